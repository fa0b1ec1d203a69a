"""A trial is a run directory that is named by the hash of its resolved experiment.

    runs/trials/3f9a1c20/      config.json  provenance.json  metrics.jsonl  summary.json  checkpoints/ ...
                               failure.json where it cannot be finished: {"status", "error", "step", "traceback"}

So equal experiments meet in one directory, whatever study asks for them, and nothing is trained twice. What a directory
says about itself is believed only as far as its files agree with each other: a result that a crash, a full disk or an
editor damaged is told (`Status.CORRUPT`), and never becomes a number in a mean.
"""

import json
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab import runs
from llmlab.config import config_hash, json_hash
from llmlab.experiment import Experiment
from llmlab.training.directory import Held, RunDirectory, write_json
from llmlab.training.faults import NonFiniteError, Pruned
from llmlab.training.metrics import FILE_NAME as METRICS
from llmlab.training.metrics import read_metrics
from llmlab.training.report import Report

if TYPE_CHECKING:
    from llmlab.training.program import Programs

FAILURE = "failure.json"
"""In a run directory: why this experiment cannot be finished."""

_POLL_SECONDS = 0.5


class Status(StrEnum):
    """How a trial stands."""

    ABSENT = "absent"
    """Nobody has begun it."""
    UNFINISHED = "unfinished"
    """It was cut short and can go on at its last checkpoint."""
    RUNNING = "running"
    """A live process trains it at this moment."""
    FINISHED = "finished"
    """All its steps are done and its files agree."""
    FAILED = "failed"
    """It raised an error, which it would raise again."""
    DIVERGED = "diverged"
    """Its loss was not finite any more."""
    PRUNED = "pruned"
    """A sweep gave it up half-way because others were better. Another study may finish it."""
    CORRUPT = "corrupt"
    """Its files are damaged or contradict each other."""

    @property
    def settled(self) -> bool:
        """Whether running it again would change nothing."""
        return self in (Status.FINISHED, Status.FAILED, Status.DIVERGED, Status.CORRUPT)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the directory of a trial tells."""

    directory: Path
    hash: str
    """Of the experiment; the directory's name."""
    status: Status
    summary: dict[str, Any] = field(default_factory=dict)
    """Content of summary.json; empty unless finished."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Records of metrics.jsonl, as far as it was trained."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Content of provenance.json."""
    problem: str | None = None
    """Why it failed or what is damaged."""

    def value(self, metric: str) -> float | None:
        """A metric of the finished run; None where there is no such number."""
        value = self.summary.get(metric) if self.status is Status.FINISHED else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def seconds(self) -> float | None:
        """Time that the run took, of the session that finished it."""
        return self.summary.get("seconds", {}).get("total")


class _Damaged(ValueError):
    """A file is not what it should be."""


def directory_of(root: Path, experiment: Experiment) -> Path:
    """The directory of an experiment's trial: `<root>/<hash>`."""
    return root / config_hash(experiment)


def read_trial(directory: Path, experiment: Experiment | None = None) -> Trial:
    """What a trial's directory tells. Reads data only, runs no code, and raises nothing for damaged files.

    Args:
        directory: of the trial.
        experiment: that it should be of; the directory's name decides where it is not given.
    """
    try:
        return _read(directory, directory.name if experiment is None else config_hash(experiment))
    except (_Damaged, OSError) as error:
        return Trial(directory=directory, hash=directory.name, status=Status.CORRUPT, problem=str(error))


def _read(directory: Path, expected: str) -> Trial:
    files = RunDirectory(directory)

    def trial(status: Status, **found: Any) -> Trial:
        return Trial(directory=directory, hash=directory.name, status=status, **found)

    failure = _object(directory / FAILURE) if (directory / FAILURE).exists() else None
    if failure is not None and failure.get("status") not in (Status.FAILED, Status.DIVERGED):
        raise _Damaged(f"{directory / FAILURE} has the status {failure.get('status')!r}, not failed or diverged")
    if not files.config.exists():
        if directory.exists() and not directory.is_dir():
            raise _Damaged(f"{directory} is a file, not a run directory")
        if failure is not None:  # it could not even begin
            return trial(Status(failure["status"]), problem=str(failure.get("error")))
        return trial(Status.RUNNING if files.is_held() else Status.ABSENT)
    config = _object(files.config)
    if json_hash(config) != expected:
        raise _Damaged(
            f"{files.config} has the hash {json_hash(config)}, not {expected}: it is the config of another experiment, "
            "or was edited"
        )
    provenance = _object(files.provenance) if files.provenance.exists() else {}
    metrics = _metrics(directory)
    if files.summary.exists():
        summary = _object(files.summary)
        _check_finished(files, config, summary, metrics, provenance)
        return trial(Status.FINISHED, summary=summary, metrics=metrics, provenance=provenance)
    if files.is_held():
        return trial(Status.RUNNING, metrics=metrics, provenance=provenance)
    if failure is not None:
        status = Status(failure["status"])
        return trial(status, metrics=metrics, provenance=provenance, problem=str(failure.get("error")))
    sessions = provenance.get("sessions")
    pruned = isinstance(sessions, list) and sessions and sessions[-1].get("status") == "pruned"
    return trial(Status.PRUNED if pruned else Status.UNFINISHED, metrics=metrics, provenance=provenance)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # UnicodeDecodeError too
        raise _Damaged(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _Damaged(f"{path} holds no JSON object")
    return content


def _metrics(directory: Path) -> list[dict[str, Any]]:
    if not (directory / METRICS).exists():
        return []
    try:
        return read_metrics(directory)
    except (ValueError, TypeError) as error:  # a line that is no record; a value that is no number
        raise _Damaged(f"{directory / METRICS} is damaged: {error}") from None


def _check_finished(
    files: RunDirectory,
    config: dict[str, Any],
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    provenance: dict[str, Any],
) -> None:
    """Raises where the files of a finished run do not agree: config, metrics and summary were written one by one."""
    steps = config.get("train", {}).get("steps")
    if summary.get("step") != steps:
        raise _Damaged(f"{files.summary} is of step {summary.get('step')}, and the experiment has {steps} steps")
    if not provenance:
        raise _Damaged(f"{files.path} has a summary and no provenance.json")
    latest: dict[str, Any] = {}
    for record in metrics:
        latest |= record
    for name, value in summary.items():
        if name not in ("step", "tokens", "train/loss") and not name.startswith("validation/"):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _Damaged(f"{files.summary} has {name}={value!r}, which is no number")
        computed = name in ("validation/perplexity", "validation/bits_per_byte")  # from the loss, by the summary
        if not (computed and name not in latest) and not _same(latest.get(name), value):
            raise _Damaged(f"{files.summary} has {name}={value}, and the end of {METRICS} has {latest.get(name)}")


def _same(left: Any, right: float) -> bool:
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


def run_trial(
    experiment: Experiment,
    root: Path,
    *,
    name: str,
    report: Report | None = None,
    experiment_file: Path | None = None,
    programs: "Programs | None" = None,
) -> Trial:
    """Trains an experiment in its trial's directory, or goes on at its last checkpoint, in this process.

    What is settled is not run again. Where another live process trains in the directory, its end is waited for.

    Args:
        experiment: what to do.
        root: of all trials.
        name: of the experiment, for the provenance.
        report: told about everything that happens.
        experiment_file: the Python file, for the provenance.
        programs: compiled by earlier trials of this process; this one adds its own.

    Returns:
        The trial: finished, failed, diverged, corrupt, or pruned by its report.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state is saved if training had begun.
    """
    directory = directory_of(root, experiment)
    while True:
        trial = read_trial(directory, experiment)
        if trial.status.settled:
            return trial
        if trial.status is not Status.RUNNING:
            try:
                runs.train(
                    experiment, directory, name=name, report=report, experiment_file=experiment_file, programs=programs
                )
                (directory / FAILURE).unlink(missing_ok=True)
                return read_trial(directory, experiment)
            except Held:
                pass  # somebody was faster
            except Pruned:
                return read_trial(directory, experiment)
            except Exception as error:
                _record_failure(directory, error)
                return read_trial(directory, experiment)
        time.sleep(_POLL_SECONDS)


def run_trials_together(
    experiments: Sequence[Experiment],
    root: Path,
    *,
    name: str,
    experiment_file: Path | None = None,
    programs: "Programs | None" = None,
) -> list[Trial]:
    """As `run_trial` for experiments that differ in their seed alone, as one program (`llmlab.training.seeds`). Those
    that another process trains, or the only one that is left, are run as ever."""
    from llmlab.study.vectorized import train_seeds

    directories = [directory_of(root, experiment) for experiment in experiments]
    waiting = [
        (experiment, directory)
        for experiment, directory in zip(experiments, directories, strict=True)
        if read_trial(directory, experiment).status in (Status.ABSENT, Status.UNFINISHED)
    ]
    if len(waiting) > 1:
        settings: dict[str, Any] = {"name": name, "experiment_file": experiment_file, "programs": programs}
        try:
            ended = train_seeds(*zip(*waiting, strict=True), **settings)
            for (_, directory), outcome in zip(waiting, ended, strict=True):
                if isinstance(outcome, NonFiniteError):
                    _record_failure(directory, outcome)
                else:
                    (directory / FAILURE).unlink(missing_ok=True)
        except Held:
            pass  # by somebody who will finish it: it is waited for below
        except Exception as error:
            for _, directory in waiting:
                _record_failure(directory, error)
    return [
        run_trial(experiment, root, name=name, experiment_file=experiment_file, programs=programs)
        for experiment in experiments
    ]


def _record_failure(directory: Path, error: Exception) -> None:
    """Writes failure.json. The directory may not be there yet, or not be ours to write a config in."""
    directory.mkdir(parents=True, exist_ok=True)
    diverged = isinstance(error, NonFiniteError)
    content = {
        "status": str(Status.DIVERGED if diverged else Status.FAILED),
        "error": str(error) if diverged else f"{type(error).__name__}: {error}",
        "step": error.step if isinstance(error, NonFiniteError) else None,
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_json(directory / FAILURE, content)


def forgive(trial: Trial) -> bool:
    """Makes a failed, diverged or corrupt trial runnable again; whether there was something to do.

    What is damaged is moved aside to `<root>/damaged/<hash>-<time>` and never deleted.
    """
    if trial.status is Status.CORRUPT:
        aside = trial.directory.parent / "damaged" / f"{trial.hash}-{time.time_ns()}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        trial.directory.rename(aside)
        return True
    if trial.status in (Status.FAILED, Status.DIVERGED):
        (trial.directory / FAILURE).unlink(missing_ok=True)
        return True
    return False


def unit_of(metric: str, finished: Sequence[Trial]) -> str | None:
    """What the metric is counted in: of losses the runs say it ("nats per token"), of others nobody does."""
    counted = next((trial.summary.get("unit") for trial in finished), None)
    return f"nats per {counted}" if counted is not None and metric.endswith("loss") else None
