"""The executor of sweeps, ablations and scaling studies: experiments in, their trials out, each trained exactly once.

    trials = execute({"baseline/seed=0": experiment, ...}, folder=Path("studies/norm-ablation"), workers=2)

Every worker is the same: it takes an experiment from the queue (`llmlab.study.queue`), trains it in its run directory
(`llmlab.study.trials`), and records the outcome, until nothing is left and nobody works any more. With `workers=1` that
happens in this process; otherwise in local processes of their own (`llmlab.study.crew`); and the same call in another
terminal, or on another machine that reaches the storage and sees the same directories, joins in.

A worker trains one experiment after another in one process: starting Python and importing jax is paid once, not once a
trial, and what was compiled for one trial serves all that differ from it in learning rate, weight decay or seed.
"""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmlab.config import config_hash, defining_file, from_json, load_experiment_file, to_json
from llmlab.experiment import Experiment
from llmlab.study import storage as storages
from llmlab.study.queue import Claim, Direction, Entry, Job, Queue
from llmlab.study.trials import Status, Trial, directory_of, read_trial, run_trial, run_trials_together
from llmlab.training.directory import write_text
from llmlab.training.faults import Interrupted, Interruption
from llmlab.training.metrics import FILE_NAME as METRICS
from llmlab.training.program import Programs

DEFAULT_ROOT = Path("runs/trials")
"""Where the run directories of all studies are."""
JOBS = "jobs"
"""Below a study's folder: the experiments of its queue, as <hash>.json."""

_POLL_SECONDS = 0.5
_PROGRESS_SECONDS = 1.0
_TAIL_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How one experiment stands at this moment."""

    name: str
    hash: str
    status: Status
    """ABSENT while it waits."""
    step: int = 0
    """Steps done."""
    steps: int
    """Of the whole experiment."""
    latest: Mapping[str, float] = field(default_factory=dict)
    """Newest value of the metrics."""
    value: float | None = None
    """Of the study's metric, once finished."""
    problem: str | None = None
    worker: Mapping[str, Any] | None = None
    """Process that works on it: machine and pid."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How a study stands at this moment."""

    jobs: tuple[JobProgress, ...]
    seconds: float
    """Since this call began."""

    @property
    def done(self) -> int:
        """How many will not be run any more."""
        return sum(job.status.settled or job.status is Status.PRUNED for job in self.jobs)


Tell = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study lives and what it measures: all that a worker needs to find its queue."""

    folder: Path
    root: Path
    url: str
    """Of the storage."""
    study: str
    """Its name in the storage."""
    metric: str = "validation/loss"
    direction: Direction = "lower"
    file: Path | None = None
    """The experiment file, for classes that are defined there, and for the provenance."""

    def open(self) -> storages.Store:
        """The study in its storage; made where it does not exist."""
        direction = "minimize" if self.direction == "lower" else "maximize"
        return storages.open_study(self.url, self.study, direction=direction)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Place":
        """What `to_json` gave."""
        file = None if data["file"] is None else Path(data["file"])
        return cls(**{**data, "folder": Path(data["folder"]), "root": Path(data["root"]), "file": file})


@runtime_checkable  # for the checks of argument types at run time
class Work(Protocol):
    """What a worker does again and again."""

    @property
    def queue(self) -> Queue:
        """Where its work comes from."""
        ...

    def take(self) -> Claim | None:
        """The next piece, or None where there is none at this moment."""
        ...

    def run(self, claim: Claim) -> None:
        """Does it and records its outcome. Raises Interrupted."""
        ...

    def settled(self) -> bool:
        """Whether nothing is left that anybody works on."""
        ...


class FixedWork:
    """Work on a list of experiments.

    Args:
        place: of the study.
        queue: of the list.
        load: experiment of a hash.
        pruner: name of what gives up trials that do badly ("none": nothing does).
        seeds_together: whether experiments that differ in their seed alone are taken together, as one program.
    """

    def __init__(
        self,
        place: Place,
        queue: Queue,
        load: Callable[[str], Experiment],
        *,
        pruner: str = "none",
        seeds_together: bool = False,
    ) -> None:
        self.place = place
        self.queue = queue
        self._load = functools.cache(load)
        self._pruner = pruner
        self._seeds_together = seeds_together
        self._programs = Programs()

    def take(self) -> Claim | None:
        return self.queue.take()

    def settled(self) -> bool:
        return self.queue.settled()

    def run(self, claim: Claim) -> None:
        if self._seeds_together:
            with contextlib.ExitStack() as returned:
                claims = [claim, *self._other_seeds(claim, returned)]
                self._train_together(claims)
                returned.pop_all()
            return
        train(self.place, self.queue, claim, self._load(claim.hash), pruner=self._pruner, programs=self._programs)

    def _other_seeds(self, claim: Claim, returned: contextlib.ExitStack) -> Iterator[Claim]:
        """Takes what waits and differs from a claim in its seed alone; given back where `returned` is left."""
        one = without_seed(self._load(claim.hash))
        while other := self.queue.take(lambda hash_: without_seed(self._load(hash_)) == one):
            returned.callback(self.queue.release, other)
            yield other

    def _train_together(self, claims: Sequence[Claim]) -> None:
        with contextlib.ExitStack() as alive:
            for each in claims:
                alive.enter_context(self.queue.alive(each))
            trials = run_trials_together(
                [self._load(each.hash) for each in claims],
                self.place.root,
                name=claims[0].name,
                experiment_file=self.place.file,
                programs=self._programs,
            )
            for each, trial in zip(claims, trials, strict=True):
                self.queue.finish(each, trial)


def without_seed(experiment: Experiment) -> Experiment:
    """What experiments that differ in their seed alone have in common."""
    return replace(experiment, train=replace(experiment.train, seed=0))


def train(place: Place, queue: Queue, claim: Claim, experiment: Experiment, *, pruner: str, programs: Programs) -> None:
    """Trains a claimed experiment and records the outcome. Raises Interrupted."""
    report = None
    if pruner != "none":
        from llmlab.study.search import pruning_report

        report = pruning_report(queue.store, claim, experiment, pruner=pruner, metric=place.metric)
    with queue.alive(claim):
        trial = run_trial(
            experiment, place.root, name=claim.name, report=report, experiment_file=place.file, programs=programs
        )
        queue.finish(claim, trial)


def work(on: Work) -> None:
    """Works until nothing is left and nobody else works any more: somebody who died leaves work behind.

    Raises:
        Interrupted: Ctrl-C or SIGTERM. What was under way is saved and waits for the next worker.
    """
    with Interruption() as interruption:
        while True:
            with interruption.deferred():  # never between taking something and knowing it
                claim = on.take()
                if claim is not None and interruption.requested:
                    on.queue.release(claim)
            if interruption.signal is not None:
                raise Interrupted(interruption.signal)
            if claim is None:
                if on.settled():
                    return
                time.sleep(_POLL_SECONDS)
                continue
            try:
                on.run(claim)
            except Interrupted:
                with interruption.deferred():
                    on.queue.release(claim)
                raise


def execute(
    jobs: Mapping[str, Experiment],
    *,
    folder: Path,
    root: Path = DEFAULT_ROOT,
    workers: int = 1,
    storage: str | None = None,
    progress: Tell | None = None,
    metric: str = "validation/loss",
    direction: Direction = "lower",
    file: Path | None = None,
    seeds_together: bool = False,
) -> dict[str, Trial]:
    """Trains every experiment that is not trained yet, and returns the trials of all.

    The same call again goes on where one was cut short, and works beside one that is under way.

    Args:
        jobs: experiments by label. Labels are free; equal experiments are trained once.
        folder: of the study, for the queue and its locks.
        root: of the run directories.
        workers: local processes; 1 for this one.
        storage: address of the database; None for SQLite in the folder.
        progress: told now and then, from another thread.
        metric: of the summary, recorded with the trial.
        direction: in which it is better.
        file: the experiment file, for the provenance of the runs.
        seeds_together: train experiments that differ in their seed alone as one program.

    Raises:
        ValueError: an experiment cannot run; all offenders are named and nothing was run.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
        RuntimeError: all local workers died; what is left waits for the same call.
    """
    check(jobs)
    place = Place(
        folder=folder,
        root=root,
        url=storages.storage_url(folder, storage),
        study=folder.name,
        metric=metric,
        direction=direction,
        file=file or next(filter(None, map(defining_file, jobs.values())), None),
    )
    by_hash = {config_hash(experiment): experiment for experiment in jobs.values()}
    queued: dict[str, Job] = {}
    for name, experiment in jobs.items():
        queued.setdefault(config_hash(experiment), {"name": name, "steps": experiment.train.steps})
    run_fixed(place, by_hash, queued, workers=workers, progress=progress, seeds_together=seeds_together)
    return {name: read_trial(directory_of(root, experiment), experiment) for name, experiment in jobs.items()}


def run_fixed(
    place: Place,
    experiments: Mapping[str, Experiment],
    jobs: Mapping[str, Job],
    *,
    workers: int = 1,
    progress: Tell | None = None,
    pruner: str = "none",
    seeds_together: bool = False,
) -> None:
    """Runs a list of experiments, given with what is to be kept about them by hash. Raises what `execute` raises."""
    with prepared(place, experiments, jobs) as queue, watched(queue, place, progress):
        if workers > 1:
            from llmlab.study.crew import Crew

            task = {"design": "fixed", "jobs": dict(jobs), "pruner": pruner, "seeds_together": seeds_together}
            Crew(workers, place, task).work(queue.settled)
        else:
            load = experiments.__getitem__
            work(FixedWork(place, queue, load, pruner=pruner, seeds_together=seeds_together))


def check(jobs: Mapping[str, Experiment]) -> None:
    """Raises ValueError that names every experiment that cannot run, and why."""
    problems = []
    for name, experiment in jobs.items():
        try:
            experiment.validate()
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("\n".join(["these experiments cannot run, and nothing was started:", *problems]))


@contextlib.contextmanager
def prepared(place: Place, experiments: Mapping[str, Experiment], jobs: Mapping[str, Job]) -> Iterator[Queue]:
    """The study's queue, with every experiment (by hash) enqueued that should be run."""
    for hash_, experiment in experiments.items():
        save_job(place.folder, hash_, experiment)
    store = place.open()
    try:
        queue = Queue(store, jobs, metric=place.metric, direction=place.direction)

        def again(entry: Entry) -> bool:
            """What is done has lost its directory, or another study made the same point runnable again."""
            status = read_trial(place.root / entry.hash, experiments[entry.hash]).status
            return not (status.settled or (status is Status.PRUNED and entry.status is Status.PRUNED))

        queue.enqueue(again)
        yield queue
    finally:
        store.close()


def save_job(folder: Path, hash_: str, experiment: Experiment) -> None:
    """Keeps an experiment where other workers find it."""
    path = folder / JOBS / f"{hash_}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_text(path, to_json(experiment))


def load_job(folder: Path, hash_: str, file: Path | None) -> Experiment:
    """An experiment of a study's queue.

    Raises:
        ValueError: its file is damaged, or the experiment file that defines its classes has changed since.
    """
    path = folder / JOBS / f"{hash_}.json"
    text = path.read_text(encoding="utf-8")
    module = None if file is None else load_experiment_file(file)
    try:
        experiment = from_json(text, Experiment, experiment=module)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config_hash(experiment) != hash_:
        raise ValueError(f"{path} is another experiment than its name says; it was edited: remove it")
    return experiment


# --- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(queue: Queue, place: Place, tell: Tell | None) -> Iterator[None]:
    """Inside, `tell` hears every second how the study stands, and once more at the end."""
    if tell is None:
        yield
        return
    began, stop = time.monotonic(), threading.Event()

    def look() -> None:
        tell(snapshot(queue, place.root, time.monotonic() - began))

    def watch() -> None:
        while not stop.wait(_PROGRESS_SECONDS):
            # A display is not worth a study: what it cannot read now it reads a second later.
            with contextlib.suppress(Exception):
                look()
        queue.store.rdb.remove_session()

    look()
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        look()


def snapshot(queue: Queue, root: Path, seconds: float = 0.0) -> Progress:
    """How a study stands: the storage knows who works on what, and the run directories how far they are."""
    return Progress(jobs=tuple(job_progress(root, entry) for entry in queue.entries()), seconds=seconds)


def job_progress(root: Path, entry: Entry) -> JobProgress:
    """How one experiment stands."""
    latest = _latest(root / entry.hash / METRICS) if entry.hash else {}
    if entry.state == "waiting":
        status = Status.UNFINISHED if latest else Status.ABSENT
    else:
        status = Status.RUNNING if entry.state == "running" else entry.status or Status.FINISHED
    return JobProgress(
        name=entry.name,
        hash=entry.hash,
        status=status,
        step=int(latest.get("step", 0)),
        steps=int(entry.attributes.get("steps", 0)),
        latest=latest,
        value=entry.value,
        problem=entry.problem,
        worker=entry.worker,
    )


def _latest(path: Path) -> dict[str, float]:
    """The newest values in a metrics.jsonl, from its end; whatever is torn there is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    latest: dict[str, float] = {}
    for line in lines[:-1] if size <= _TAIL_BYTES else lines[1:-1]:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                latest |= {key: float(value) for key, value in record.items()}
    return latest
