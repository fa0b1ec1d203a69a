"""The dry run of an ablation: what will run, what is there already, and how long it may take.

A run that is there is found by the hash of its config, so a run that seems to be there and is not has another config.
Which one is told: the nearest run that there is, and the fields that differ.

Time is an estimate from the speed of finished runs; the best there is of

    runs of the same model and batch      their tokens per second
    other runs                            their model FLOP/s
    none                                  a guess: a fifth of the speed of a matrix product, measured here
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.config import to_json
from llmlab.experiment import Experiment
from llmlab.study import matching, sources
from llmlab.study.ablation import Ablation, Arm
from llmlab.study.changes import Difference, json_difference
from llmlab.study.measures import measured
from llmlab.study.outcomes import Job, comparison_jobs, outcome, tuned, tuning_jobs
from llmlab.study.trials import Status, Trial, directory_of, read_trial
from llmlab.training.throughput import peak, readable_flops

GUESSED_UTILISATION = 0.2
"""Of the matrix product's speed: small models on a CPU get 10 to 40%."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the plan."""

    label: str
    arm: str
    seed: int
    hash: str | None
    """None while the learning rate that it will have is not known."""
    status: Status
    experiment: Experiment
    tokens: float | None

    @property
    def to_do(self) -> bool:
        """Whether it will be run, or go on."""
        return not self.status.settled


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Why a run is not there: the one that is most like it."""

    label: str
    hash: str
    """Of the run that is there."""
    differences: tuple[Difference, ...]
    """Path, there, here."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long what is left may take, in one worker."""

    seconds: float | None
    source: str
    """What it stands on, in words."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an ablation will do."""

    arms: tuple[Arm, ...]
    runs: tuple[PlannedRun, ...]
    most_seeds: int
    """More than are in `runs`, where seeds are added until the verdict is settled."""
    nearest: tuple[Nearest, ...]
    estimate: Estimate
    amounts: Mapping[str, matching.Achieved] = field(default_factory=dict)
    """Arm -> tokens, parameters and FLOPs of a run."""
    mismatches: tuple[matching.Mismatch, ...] = ()
    remarks: tuple[str, ...] = ()
    """What to know about the runs that are there."""

    @property
    def to_do(self) -> list[PlannedRun]:
        """The runs that are not settled."""
        return [run for run in self.runs if run.to_do]

    def tokens(self, runs: Sequence[PlannedRun]) -> float | None:
        """Of these runs together; None where some do not tell."""
        counts = [run.tokens for run in runs]
        return sum(count for count in counts if count is not None) if None not in counts else None


@dataclass(frozen=True)
class _Found:
    """A run that is there."""

    hash: str
    config: dict[str, Any]
    summary: dict[str, Any]


def plan(ablation: Ablation, root: Path, *, measure: bool = True) -> Plan:
    """The plan of an ablation whose runs live in `root`; changes nothing.

    Args:
        ablation: what to plan.
        root: of all runs.
        measure: whether to time a matrix product here where no run tells a speed.

    Raises:
        ValueError: the ablation cannot run.
    """
    arms = ablation.arms()
    amounts = {arm.name: matching.expected(arm.experiment) for arm in arms}
    runs = tuple(_planned(ablation, arms, root, amounts))
    there = _existing(root)
    return Plan(
        arms=arms,
        runs=runs,
        most_seeds=ablation.most_seeds(len(arms)),
        nearest=tuple(_nearest(runs, there)),
        estimate=_estimate([run for run in runs if run.to_do], amounts, there, measure),
        amounts=amounts,
        mismatches=tuple(matching.mismatches(ablation, amounts)),
        remarks=tuple(sources.outdated((r.label, r.experiment, root / r.hash) for r in runs if r.hash is not None)),
    )


def _planned(
    ablation: Ablation, arms: Sequence[Arm], root: Path, amounts: Mapping[str, matching.Achieved]
) -> list[PlannedRun]:
    def run(job: Job, known: bool = True) -> PlannedRun:
        directory = directory_of(root, job.experiment)
        return PlannedRun(
            label=job.label,
            arm=job.arm,
            seed=job.seed,
            hash=directory.name if known else None,
            status=read_trial(directory, job.experiment).status if known else Status.ABSENT,
            experiment=job.experiment,
            tokens=amounts[job.arm].get("tokens"),
        )

    tuning = tuning_jobs(ablation, arms)
    planned = [run(job) for job in tuning]
    rates: dict[str, float] = {}
    if tuning and not any(one.to_do for one in planned):
        found = [outcome(ablation, j, _as_measured(ablation, j, root)) for j in tuning]
        rates = {arm.name: tuned(ablation, arm.name, [f for f in found if f.job.arm == arm.name]).best for arm in arms}
    known = not tuning or bool(rates)
    return planned + [run(job, known) for job in comparison_jobs(arms, ablation.first_seeds, rates)]


def _as_measured(ablation: Ablation, job: Job, root: Path) -> Trial:
    """The trial of a job, with what was measured of it before: a plan loads no model."""
    trial = read_trial(directory_of(root, job.experiment), job.experiment)
    return trial if ablation.measure is None else measured(trial, ablation.measure, compute=False)


def _existing(root: Path) -> list[_Found]:
    """The runs in the root, as far as their files can be read."""
    found = []
    for path in sorted(root.glob("*/config.json")):
        config, summary = _object(path), _object(path.with_name("summary.json"))
        if config is not None:
            found.append(_Found(path.parent.name, config, summary or {}))
    return found


def _object(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _nearest(runs: Sequence[PlannedRun], there: Sequence[_Found]) -> list[Nearest]:
    """For the first missing run of each arm, the nearest of the runs that are not this study's own."""
    own = {run.hash for run in runs}
    others = [found for found in there if found.hash not in own]
    missing: dict[str, PlannedRun] = {}
    for run in runs:
        if run.status is Status.ABSENT and run.hash is not None:
            missing.setdefault(run.arm, run)
    found = []
    for run in missing.values():
        config = json.loads(to_json(run.experiment))
        candidates = [(other.hash, json_difference(other.config, config)) for other in others]
        if candidates:
            # another seed is the smallest of differences: the same run was merely made with others
            near = min(candidates, key=lambda item: (sum(p != "train.seed" for p, _, _ in item[1]), len(item[1])))
            found.append(Nearest(label=run.label, hash=near[0], differences=tuple(near[1])))
    return found


# --- time ------------------------------------------------------------------------------------------------------------

_SPEED_DEPENDS_ON = ("batch_size", "sequence_length", "accumulation", "precision")


def _estimate(
    runs: Sequence[PlannedRun], amounts: Mapping[str, matching.Achieved], there: Sequence[_Found], measure: bool
) -> Estimate:
    """Seconds of training plus what finished runs took besides."""
    if not runs:
        return Estimate(seconds=0.0, source="everything is there")
    finished = [found for found in there if found.summary.get("tokens_per_second")]
    same: dict[str, list[float]] = {}
    for arm in {run.arm for run in runs}:
        config = json.loads(to_json(next(run.experiment for run in runs if run.arm == arm)))
        alike = [found for found in finished if _speed_key(found.config) == _speed_key(config)]
        same[arm] = [float(found.summary["tokens_per_second"]) for found in alike]
    sources, seconds, flops_per_second = [], 0.0, None
    if all(same.values()):
        sources.append(f"speed of {sum(map(len, same.values()))} finished runs of the same models and batches")
    else:
        flops_per_second, source = _flops_per_second(finished, measure)
        sources.append(source)
    for run in runs:
        tokens, flops = run.tokens, amounts[run.arm].get("flops")
        if same[run.arm] and tokens is not None:
            seconds += tokens / statistics.median(same[run.arm])
        elif flops is not None and flops_per_second is not None:
            seconds += flops / flops_per_second
        else:
            return Estimate(seconds=None, source="unknown: neither a finished run nor the config tells how much work")
    besides = [s["total"] - s["train"] for found in finished if {"total", "train"} <= (s := _seconds(found)).keys()]
    if besides:
        seconds += len(runs) * statistics.median(besides)
    else:
        sources.append("without compilation and evaluation")
    return Estimate(seconds=seconds, source="; ".join(sources))


def _seconds(found: _Found) -> dict[str, float]:
    seconds = found.summary.get("seconds")
    return seconds if isinstance(seconds, dict) else {}


def _speed_key(config: Mapping[str, Any]) -> str:
    """What the speed of a run depends on."""
    train = config.get("train") or {}
    parts = [config.get("model"), config.get("mesh"), *(train.get(name) for name in _SPEED_DEPENDS_ON)]
    return json.dumps(parts, sort_keys=True)


def _flops_per_second(finished: Sequence[_Found], measure: bool) -> tuple[float | None, str]:
    speeds = [float(s) for found in finished if (s := found.summary.get("model_flops_per_second"))]
    if speeds:
        return statistics.median(speeds), f"scaled by FLOPs from {len(speeds)} finished runs of other models or batches"
    if not measure:
        return None, "unknown: no run has finished"
    here = peak()
    guess = GUESSED_UTILISATION * here.flops_per_second
    return guess, f"a guess: {readable_flops(guess)}, {GUESSED_UTILISATION:.0%} of {here.source}"


def as_json(found: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    todo = found.to_do
    return {
        "arms": [
            {
                "name": arm.name,
                "changes": [path for path, _, _ in arm.changes],
                "expected": dict(found.amounts[arm.name]),
            }
            for arm in found.arms
        ],
        "runs": [{"label": r.label, "seed": r.seed, "hash": r.hash, "status": str(r.status)} for r in found.runs],
        "most_seeds": found.most_seeds,
        "to_do": len(todo),
        "tokens": found.tokens(todo),
        "seconds": found.estimate.seconds,
        "estimate": found.estimate.source,
        "nearest": [
            {
                "label": near.label,
                "hash": near.hash,
                "differences": [{"path": p, "there": a, "here": b} for p, a, b in near.differences],
            }
            for near in found.nearest
        ],
        "mismatches": matching.as_json(found.mismatches),
        "remarks": list(found.remarks),
    }
