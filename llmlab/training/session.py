"""One process's work on a run: from an experiment to a trained model in its directory, or a part of the way.

tokenizer -> tokens -> compile -> initialise or restore -> train -> summary

Of several processes all do the same, but only the first writes: the others find its tokenizer in the run's directory,
and tokens in the cache, where they share a disk, or make the same ones on their own.
"""

import contextlib
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llmlab.config import to_json
from llmlab.data.dataset import Dataset, ValidationSplit
from llmlab.data.prefetch import prefetch
from llmlab.data.store import default_cache_dir
from llmlab.nn.module import Params
from llmlab.sharding import Placement, cluster
from llmlab.sharding.cluster import Cluster
from llmlab.sharding.pipeline import AXIS, Schedule
from llmlab.tokenizers import Tokenizer, load_tokenizer
from llmlab.training.checkpoint import Checkpoints
from llmlab.training.directory import RunDirectory
from llmlab.training.evaluation import evaluate
from llmlab.training.faults import Interruption, in_background, wait
from llmlab.training.loop import UNEVALUATED, Parts, train
from llmlab.training.metrics import Log, MetricsLog, NoLog, read_metrics
from llmlab.training.phases import Phases
from llmlab.training.program import Program, Programs, Weights
from llmlab.training.recorder import Recorder
from llmlab.training.report import Report
from llmlab.training.state import TrainState
from llmlab.training.throughput import FLOP_CONVENTION, Throughput, peak

if TYPE_CHECKING:
    from llmlab.experiment import Experiment


# Beyond it a perplexity is no finite number: a learning rate that is too high ends with any loss.
_MAX_EXPONENT = 700.0


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a session works with.

    `started` is called when everything is ready, with the number of steps done and the fingerprints of data and
    tokenizer; `weights` gives the parameters to start a new run from, None for fresh ones; `processes` train together;
    `programs` are those that earlier sessions of this process compiled.
    """

    experiment: "Experiment"
    directory: RunDirectory
    report: Report
    phases: Phases
    interruption: Interruption
    started: Callable[[int, dict[str, str]], None]
    weights: Weights | None = None
    processes: Cluster = cluster.ALONE
    programs: Programs = field(default_factory=Programs)

    def run(self) -> tuple[Any, Tokenizer, dict[str, Any]]:
        """Trains to the end; returns the model, the tokenizer and the summary, which the first process alone has.
        Raises what `loop.train` raises."""
        writes = self.processes.is_first
        tokenizer = self.tokenizer()
        dataset = self.dataset(tokenizer)
        self.processes.check_same(tokenizer=tokenizer.fingerprint, data=dataset.fingerprint)
        # Counting takes a second per 10 million tokens: beside everything else.
        counted = in_background(lambda: dataset.baselines(self.experiment.train.accumulation) if writes else {})
        program = self.program(tokenizer, dataset)
        checkpoints = self.checkpoints()
        log: Log = MetricsLog(self.directory.path) if writes else NoLog()
        with contextlib.closing(checkpoints), contextlib.closing(log):
            devices = _devices(program.placement, self.experiment.train.accumulation)
            self.phases.begin("compile", f"{program.num_parameters:,} parameters, {devices}")
            compiling = in_background(program.compiled)
            state, start, unevaluated = self.state(program, checkpoints)
            program = wait(compiling)
            self.programs.add(program, self.experiment.objective, self.experiment.optimizer, self.experiment.train)
            # Collectives give up on a process that is half a minute late, and compiling takes longer than that.
            self.processes.meet("compiled")
            log.cut_back(start)
            brought = {} if program.companion is None else program.companion.fingerprints
            self.started(start, {"data": dataset.fingerprint, "tokenizer": tokenizer.fingerprint, **brought})
            speed = throughput(program, self.experiment.train.steps)
            parts = self._parts(program, dataset, checkpoints, log, speed)
            self.phases.begin("train")
            self.report.progress(start, self.experiment.train.steps, "steps")
            state = train(state, start, parts, unevaluated=unevaluated)
        self.phases.begin("summary")
        summary = self.summary(program, dataset, speed, wait(counted)) if writes else {}
        return program.finished(state.params), tokenizer, summary

    def program(self, tokenizer: Tokenizer, dataset: Dataset) -> Program:
        """What the devices will do, compiled if an equal one was compiled before. Raises ValueError where model and
        data do not fit."""
        model = self.experiment.model.with_vocabulary(tokenizer.vocab_size)
        self.experiment.objective.check_tokenizer(tokenizer)
        _check_labels(model.num_labels, dataset.num_labels)
        model.check_batch(dataset.validation.batch(0))
        return self.programs.build(
            model,
            self.experiment.objective,
            self.experiment.optimizer,
            self.experiment.mesh.build(jax.devices()),
            self.experiment.train,
            dataset.validation.batch(0),
        )

    def checkpoints(self) -> Checkpoints:
        """Of the run, to be closed."""
        return Checkpoints(
            self.directory.checkpoints,
            self.directory.quarantine,
            keep_last=self.experiment.train.keep_last,
            keep_best=self.experiment.train.keep_best,
            tell=lambda text: self.report.message(text, "warning"),
            processes=self.processes,
        )

    def tokenizer(self) -> Tokenizer:
        """The run's own tokenizer, made by the first process where there is none yet."""

        def make() -> None:
            if not (self.directory.tokenizer / "llmlab_tokenizer.json").exists():
                self._new_tokenizer().save(self.directory.tokenizer)

        self.processes.lead("tokenizer", make)
        return load_tokenizer(self.directory.tokenizer)

    def _new_tokenizer(self) -> Tokenizer:
        """One that was trained before on the same data, or else a new one."""
        self.phases.begin("tokenizer", type(self.experiment.tokenizer).__name__)
        return tokenizer_for(self.experiment, self.report.progress)

    def dataset(self, tokenizer: Tokenizer) -> Dataset:
        """What it reads, in tokens."""
        config = self.experiment.train
        self.phases.begin("tokens", f"vocabulary of {tokenizer.vocab_size:,}")

        def build() -> Dataset:
            return self.experiment.data.build(
                tokenizer,
                sequence_length=config.sequence_length,
                batch_size=config.batch_size,
                seed=config.seed,
                report=self.report.progress,
            )

        # First one, then the others, which then find its tokens: where they share a disk they would all make them.
        built: list[Dataset] = []
        self.processes.lead("tokens", lambda: built.append(build()))
        dataset = built[0] if built else build()
        dataset = self.experiment.objective.dataset(
            dataset,
            steps=config.steps,
            seed=config.seed,
            sequence_length=config.sequence_length,
            tokenizer=tokenizer,
        )
        for remark in dataset.remarks:
            self.report.message(remark, "warning")
        return dataset

    def state(self, program: Program, checkpoints: Checkpoints) -> tuple[TrainState, int, bool]:
        """The state to go on from, the steps it has done, and whether an evaluation at that step is missing."""
        had_some = bool(checkpoints.steps())
        restored = checkpoints.restore(program.state)
        if restored is None:
            if had_some:
                self.report.message("no checkpoint is whole: the run begins again", "warning")
            return wait(in_background(lambda: program.initialise(self.weights))), 0, False
        state, meta = restored
        start = int(state.step)
        if start > self.experiment.train.steps:
            raise ValueError(
                f"{self.directory.path} has done {start} steps already, more than train.steps="
                f"{self.experiment.train.steps}; raise it, or start another run with --out"
            )
        self.report.message(f"resumed at step {start}")
        return state, start, UNEVALUATED in meta

    def _parts(
        self, program: Program, dataset: Dataset, checkpoints: Checkpoints, log: Log, speed: Throughput
    ) -> Parts:
        config, report = self.experiment.train, self.report

        def batch(step: int) -> dict[str, np.ndarray]:
            return dataset.train.part(step, program.places)

        def validate(params: Params) -> dict[str, float] | None:
            return evaluate(
                program.evaluate_step,
                params,
                _Share(dataset.validation, program.places),
                program.place,
                max_batches=config.evaluate_batches,
                stop=self.interruption.look,
                progress=lambda done, total: report.progress(done, total, "evaluate"),
            )

        return Parts(
            config=config,
            step=program.train_step,
            evaluate=lambda state: validation(state, validate),
            batches=lambda start: prefetch(batch, start, program.place, stop=config.steps),
            checkpoints=checkpoints,
            recorder=Recorder(log, report, speed, config, checkpoints.newest),
            speed=speed,
            phases=self.phases,
            report=report,
            interruption=self.interruption,
        )

    def summary(
        self, program: Program, dataset: Dataset, speed: Throughput, counted: dict[str, float]
    ) -> dict[str, Any]:
        """What is known at the end: the last value of every metric, the baselines, the time by phase."""
        latest: dict[str, Any] = {}
        speeds = []
        for record in read_metrics(self.directory.path):
            latest |= record
            speeds += [record["tokens_per_second"]] if "tokens_per_second" in record else []
        loss, unit = latest["validation/loss"], self.experiment.objective.plain.unit
        names = [name for name in latest if name in ("step", "tokens", "train/loss") or name.startswith("validation/")]
        summary = {name: latest[name] for name in names} | {
            "unit": unit,
            "baselines": counted,
            "num_parameters": program.num_parameters,
            "flops_per_token": speed.flops_per_token,
        }
        if self.experiment.objective.plain.perplexity and loss < _MAX_EXPONENT:
            summary["validation/perplexity"] = math.exp(loss)
        if dataset.bytes_per_token is not None:
            summary["validation/bits_per_byte"] = loss / (dataset.bytes_per_token * math.log(2))
        if speeds and speed.peak is not None:
            summary["tokens_per_second"] = statistics.median(speeds)
            summary["model_flops_per_second"] = summary["tokens_per_second"] * speed.flops_per_token
            summary["mfu"] = summary["model_flops_per_second"] / speed.peak.flops_per_second
            summary["mfu_convention"] = f"MFU of {speed.peak.source}; {FLOP_CONVENTION}"
        return summary


def tokenizer_for(
    experiment: "Experiment", progress: Callable[[int, int | None, str], None] | None = None
) -> Tokenizer:
    """The tokenizer of an experiment: one that was trained before on the same data, or else a new one."""
    trained_from = (to_json(experiment.tokenizer) + experiment.data.fingerprint()).encode()
    cached = default_cache_dir() / "tokenizers" / hashlib.sha256(trained_from).hexdigest()[:32]
    if (cached / "llmlab_tokenizer.json").exists():
        return load_tokenizer(cached)
    asked = False

    def texts() -> Iterator[str]:
        nonlocal asked
        asked = True
        return experiment.data.training_texts()

    tokenizer = experiment.tokenizer.build(texts, progress=progress)
    if asked:  # one that is opened from a path belongs to its path
        tokenizer.save(cached)
    return tokenizer


def validation(state: TrainState, evaluate: Callable[[Params], Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The metrics of a state and of its averaged weights, named as in metrics.jsonl; None where a signal came."""
    metrics = evaluate(state.params)
    averaged = None if state.ema is None else evaluate(state.ema)
    if metrics is None or (state.ema is not None and averaged is None):
        return None
    of_average = {f"validation/ema_{name}": value for name, value in (averaged or {}).items()}
    return {f"validation/{name}": value for name, value in metrics.items()} | of_average


def throughput(program: Program, steps: int) -> Throughput:
    """Measures the speed of a program."""
    tokens = program.model.num_tokens(program.shapes)
    return Throughput(
        flops_per_token=program.model.flops(program.shapes) / tokens,
        tokens_per_step=tokens,
        total_steps=steps,
        peak=peak(list(program.placement.mesh.devices.flat)),
    )


@dataclass(frozen=True)
class _Share:
    """The rows of a validation split that the devices of one process need."""

    split: ValidationSplit
    places: np.ndarray

    @property
    def num_batches(self) -> int:
        return self.split.num_batches

    def batch(self, step: int) -> dict[str, np.ndarray]:
        return self.split.part(step, self.places)


def _check_labels(of_model: int | None, of_data: int | None) -> None:
    if of_model is not None and of_data is not None and of_model < of_data:
        raise ValueError(
            f"model.head.num_labels={of_model} is less than the data's {of_data} labels; use at least {of_data}"
        )


def _devices(placement: Placement, parts: int) -> str:
    """Number and kind, the shape of the mesh, and what a pipeline stands idle."""
    mesh = placement.mesh
    text = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    if shape := " x ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1):
        text += f" ({shape})"
    if (stages := mesh.shape[AXIS]) > 1:
        schedule = Schedule(stages=stages, parts=parts, interleave=placement.interleave)
        text += f", {placement.schedule} pipeline of {parts} parts: {schedule.bubble:.0%} bubble"
    return text
