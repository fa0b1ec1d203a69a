"""Runs: an experiment becomes a directory, and a directory becomes a model again.

    run = llmlab.train(experiment, out="runs/mine")      # or: llmlab train FILE.py
    run.metrics[-1]["train/loss"], run.model

The same call on a run that was cut short takes it up at its last checkpoint; on a finished one it says so.
"""

import contextlib
import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab import buckets
from llmlab.cli import is_users_error
from llmlab.config import config_hash, difference, save, to_json
from llmlab.config import load as load_saved
from llmlab.experiment import Experiment, read_experiment
from llmlab.models.config import Transformer
from llmlab.objectives import NextToken, PrefixLM
from llmlab.sharding import cluster
from llmlab.sharding.cluster import Cluster, Departed
from llmlab.training.directory import RunDirectory, write_json
from llmlab.training.faults import Interrupted, Interruption
from llmlab.training.metrics import read_metrics
from llmlab.training.phases import Phases
from llmlab.training.provenance import Account, Provenance
from llmlab.training.report import NullReport, Report

if TYPE_CHECKING:
    from llmlab.models.config import ModelConfig
    from llmlab.models.decoder import DecoderModel
    from llmlab.nn.module import Params
    from llmlab.sharding.rules import Placement
    from llmlab.tokenizers import Tokenizer
    from llmlab.training.program import Programs, Weights

_SAMPLE_TOKENS = 192


class Run:
    """A run directory, opened for reading.

    Args:
        directory: of the run.

    Raises:
        FileNotFoundError: it has no config.json.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = buckets.local(directory)
        self.experiment = read_experiment(self.directory)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in order."""
        return read_metrics(self.directory)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json; empty while the run is not finished."""
        path = RunDirectory(self.directory).summary
        return json.loads(path.read_bytes()) if path.exists() else {}

    @functools.cached_property
    def model(self) -> "DecoderModel":
        """The model after the last checkpoint."""
        return load(self.directory)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that the run was trained with."""
        from llmlab.tokenizers import load_tokenizer

        return load_tokenizer(self.directory)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"


def load(
    path: str | Path, *, ema: bool = False, placement: "Placement | None" = None, host: bool = False
) -> "DecoderModel":
    """The model of a run, of one checkpoint of a run (runs/mine/checkpoints/500), of a Hugging Face directory, or of
    what `llmlab convert` made of one.

    Args:
        path: the directory, or its address in a bucket (gs://...), of which what is needed is copied here.
        ema: the average of the weights, for a run that kept one.
        placement: a mesh that the weights are read to, every device getting its part alone; None for the first device.
        host: leave the weights in the host's memory instead, as NumPy arrays: for `llmlab.infer.offload`, which puts
            them where they belong.

    Raises:
        FileNotFoundError: there is nothing, or no checkpoint yet.
        ValueError: what is there is damaged or is no model.
    """
    if host and placement is not None:
        raise ValueError("host=True leaves the weights in the host's memory and placement spreads them over devices")
    directory, step = locate(path)
    if is_hugging_face(directory):
        from llmlab.models.huggingface import load_hf

        return load_hf(directory, placement=placement, host=host)
    return _load_run(directory, step=step, ema=ema, placement=placement, host=host)


def locate(path: str | Path) -> tuple[Path, int | None]:
    """The directory with the config.json, and the step where the path names one checkpoint of a run.

    Raises:
        FileNotFoundError: there is nothing, or nothing that holds a model.
    """
    path = buckets.local(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}; give a run, a checkpoint or a Hugging Face directory")
    if path.name.isdigit() and path.absolute().parent.name == "checkpoints":
        return path.absolute().parent.parent, int(path.name)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} has no config.json, so it is neither a run nor a Hugging Face directory "
            f"(it holds {', '.join(sorted(entry.name for entry in path.iterdir())[:8]) or 'nothing'})"
        )
    return path, None


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory's config.json is Hugging Face's."""
    return "model_type" in _json_object(directory / "config.json")


def load_config(path: str | Path) -> "ModelConfig":
    """Config of the model that `load` would open, its vocabulary settled; reads no weights. Errors as for `load`."""
    directory, _ = locate(path)
    if is_hugging_face(directory):
        from llmlab.models.huggingface import load_hf_config

        return load_hf_config(directory)
    return _run_config(directory)


def _run_config(directory: Path) -> "ModelConfig":
    """The model of a run's experiment, or of a converted model, whose config.json is the model's alone."""
    from llmlab.models.config import ModelConfig
    from llmlab.tokenizers import load_tokenizer

    alone = str(_json_object(directory / "config.json").get("class", "")).startswith("llmlab.models.")
    model = load_saved(directory, ModelConfig) if alone else read_experiment(directory).model
    if model.vocab_size is None:
        model = model.with_vocabulary(load_tokenizer(directory).vocab_size)
    return model


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; it is the config of neither a run nor a Hugging Face model")
    return value


def _load_run(
    directory: Path, *, step: int | None, ema: bool, placement: "Placement | None", host: bool
) -> "DecoderModel":
    import jax
    import numpy as np

    from llmlab.nn.module import merge
    from llmlab.training.checkpoint import restore_params

    graphdef, shapes, axes = _run_config(directory).abstract()
    checkpoints = RunDirectory(directory).checkpoints
    if host:  # arrays of one number each, of these shapes: what kind is wanted, not room for it
        wanted = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
        return merge(graphdef, restore_params(checkpoints, wanted, step=step, ema=ema))
    if placement is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    else:
        shardings = placement.shardings(axes, shapes)
    shapes = jax.tree.map(lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), shapes, shardings)
    return merge(graphdef, restore_params(checkpoints, shapes, step=step, ema=ema))


def default_directory(experiment: Experiment, name: str) -> Path:
    """Where a run goes when nobody says: runs/<name>-<hash>. Equal experiments meet there, different ones do not."""
    return Path("runs") / f"{name}-{config_hash(experiment)}"


def train(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    name: str = "experiment",
    report: Report | None = None,
    allow_config_change: bool = False,
    experiment_file: Path | None = None,
    seconds: Mapping[str, float] | None = None,
    programs: "Programs | None" = None,
) -> Run:
    """Trains, or goes on training, in a run directory.

    Where several processes joined a cluster (`llmlab.sharding.cluster.join`) all call this with the same experiment and
    the same directory, which all of them must see; the first one writes.

    Args:
        experiment: what to do.
        out: the run directory; None for `default_directory`.
        name: of the experiment.
        report: told about everything that happens; nothing is shown by default.
        allow_config_change: go on even where the directory's config differs.
        experiment_file: the Python file, for the provenance.
        seconds: spent before by phase ("imports"), for the summary.
        programs: compiled by earlier calls, which this one may use and adds to.

    Raises:
        ValueError: the experiment cannot run, or the directory is another's; nothing was changed.
        NonFiniteError: the loss is not finite any more.
        Interrupted: Ctrl-C or SIGTERM; the state is saved if training had begun.
        Departed: another process failed.
    """
    import jax

    processes = cluster.here()
    report = (report if processes.is_first else None) or NullReport()
    summary: dict[str, Any] | None = None
    if out is not None:
        buckets.check_local(out, "out")
    directory = RunDirectory(default_directory(experiment, name) if out is None else Path(out))

    def prepare() -> bool:
        held.enter_context(directory.held())
        settle_config(directory, experiment, report, allow=allow_config_change)
        return Run(directory.path).summary.get("step") == experiment.train.steps

    try:
        with together(), contextlib.ExitStack() as held, Interruption(processes.votes()) as interruption:
            # Before the devices are asked for: a process that has none yet waits there for all, and cannot be told.
            processes.check_same(config=config_hash(experiment))
            experiment.validate(num_devices=jax.device_count())
            if processes.lead("directory", prepare):
                report.message(
                    f"{directory.path} is finished: all {experiment.train.steps} steps are done. To train it longer, "
                    f"raise train.steps: --train.steps N --out {directory.path} --allow-config-change"
                )
            else:
                begin = functools.partial(
                    Provenance.begin,
                    directory.path,
                    name=name,
                    config=json.loads(to_json(experiment)),
                    config_hash=config_hash(experiment),
                    experiment_file=experiment_file,
                )
                phases = Phases(report, seconds or {})
                summary = _train(experiment, directory, report, phases, interruption, begin, processes, programs)
            processes.meet("done")  # nobody takes the coordinator away, or the lock, while others are at work
    finally:
        report.close(summary)
    return Run(directory.path)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What stops one process of a cluster stops all: it lets them know, and hears of them.

    Raises:
        Interrupted: this process, or another that it waited for, was stopped.
        Departed: another failed that this one waited for.
    """
    processes = cluster.here()
    try:
        with processes.watched():
            yield
    except Departed as error:
        processes.depart(str(error), exit_code=error.exit_code, signal=error.signal)
        if error.signal:
            raise Interrupted(error.signal) from error
        raise
    except Interrupted as error:
        processes.depart(str(error), exit_code=error.exit_code, signal=error.signal)
        raise
    except BaseException as error:
        users = isinstance(error, Exception) and is_users_error(error)
        processes.depart(f"{type(error).__name__}: {error}", exit_code=2 if users else 1)
        raise


def settle_config(directory: RunDirectory, experiment: Experiment, report: Report, *, allow: bool) -> None:
    """Writes the config into a new run; in one that exists it must be the same, or the change allowed."""
    if directory.config.exists():
        before = read_experiment(directory.path)
        changes = difference(before, experiment)
        if not changes:
            return
        listed = "".join(f"\n  {path}: {old!r} -> {new!r}" for path, old, new in changes)
        if not allow:
            raise ValueError(
                f"{directory.path} was begun with another config:{listed}\nrun it with the old values, choose another "
                "directory with --out, or go on with the new values with --allow-config-change"
            )
        if before.tokenizer != experiment.tokenizer:
            raise ValueError(f"the tokenizer of {directory.path} cannot change: its weights know the old one:{listed}")
        report.message(f"the config changes:{listed}", "warning")
    with tempfile.TemporaryDirectory(prefix=".config-", dir=directory.path) as staging:
        save(experiment, Path(staging))
        # config.json last: it makes a directory a run
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.name == directory.config.name):
            file.replace(directory.path / file.name)


def _train(
    experiment: Experiment,
    directory: RunDirectory,
    report: Report,
    phases: Phases,
    interruption: Interruption,
    begin: Callable[..., Provenance],
    processes: Cluster,
    programs: "Programs | None",
) -> dict[str, Any]:
    """Trains to the end; the first process writes the summary, and how it went to the provenance."""
    from llmlab.training.program import Programs
    from llmlab.training.session import Session

    account = Account(begin, writes=processes.is_first)
    session = Session(
        experiment=experiment,
        directory=directory,
        report=report,
        phases=phases,
        interruption=interruption,
        started=account.started,
        weights=initial_weights(experiment),
        processes=processes,
        programs=programs or Programs(),
    )
    with account.failures():
        model, tokenizer, summary = session.run()
        # Several processes have a part of the model each, and no loop of tokens that they could turn together.
        if processes.count == 1:
            summary |= closing_sample(experiment, model, tokenizer)
    phases.stop()
    if processes.is_first:
        conclude(directory, summary, phases)
        account.finish("finished", summary["step"])
    return summary


def conclude(directory: RunDirectory, summary: dict[str, Any], phases: Phases) -> None:
    """Writes the summary, which makes a run finished, with the seconds of its phases."""
    seconds = {name: round(value, 3) for name, value in phases.seconds.items()}
    summary["seconds"] = seconds | {"total": round(math.fsum(seconds.values()), 3)}
    write_json(directory.summary, summary)


def initial_weights(experiment: Experiment) -> "Weights | None":
    """What the model starts from; None for fresh ones."""
    path = experiment.initialize_from
    return experiment.objective.weights(experiment.model) if path is None else pretrained(path, experiment.model)


def closing_sample(experiment: Experiment, model: Any, tokenizer: "Tokenizer") -> dict[str, Any]:
    """What a decoder writes at the end of its run, for the summary."""
    writes = isinstance(experiment.model, Transformer) and isinstance(experiment.objective.plain, NextToken | PrefixLM)
    return {"sample": _sample(model, tokenizer)} if writes else {}


def pretrained(path: str, model: "ModelConfig") -> "Weights":
    """The parameters of another run or a Hugging Face directory, for a model that starts from them.

    Where one of the model's replaceable parts (an encoder's head) is not the one there, it is left out as a whole.
    """

    def weights(shapes: "Params") -> "Params":
        import jax

        from llmlab.nn.module import split

        params = split(load(path))[1]
        sizes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, shapes)]
        own = [part for part in model.replaceable if sizes[0].get(part) != sizes[1].get(part)]
        params, shapes = ({part: tree[part] for part in tree if part not in own} for tree in (params, shapes))
        found, wanted = (
            {jax.tree_util.keystr(where, simple=True, separator="."): leaf.shape for where, leaf in leaves}
            for leaves in map(jax.tree_util.tree_leaves_with_path, (params, shapes))
        )
        problems = [
            f"{name}: {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if problems:
            listed = "\n  ".join(problems)
            raise ValueError(f"initialize_from={path} holds another model; parameters differ:\n  {listed}")
        return params

    return weights


def _sample(model: "DecoderModel", tokenizer: "Tokenizer") -> dict[str, str]:
    """A text that the model writes from nothing; from a line break where the tokenizer has no token to begin with."""
    from llmlab.infer.generate import generate
    from llmlab.infer.sampling import Sampling

    prompt = "" if (tokenizer.bos_id, tokenizer.eos_id) != (None, None) else "\n"
    limit = model.config.max_length
    new = _SAMPLE_TOKENS if limit is None else min(_SAMPLE_TOKENS, limit - 8)
    completion = generate(model, tokenizer, prompt, max_new_tokens=new, sampling=Sampling(temperature=0.8))[0]
    return {"prompt": prompt, "text": completion.text}
