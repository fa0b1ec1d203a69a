"""A sweep: an experiment file's space, run.

    def sweep():
        return grid(axis("optimizer.peak_lr", 1e-3, 3e-4), axis("model.num_layers", 4, 8))

A finite space is a list of experiments, each run once (`llmlab.study.work`). One with sampled axes is drawn from, trial
by trial (`llmlab.study.search`). Either way a trial is a run directory that other studies find again, and the sweep's
own folder holds what it was (study.json), its queue (study.db) and what came of it (results.json and the report).
"""

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.config import config_hash, json_hash, load_experiment_file, own_errors
from llmlab.experiment import Experiment, read_experiment
from llmlab.flags import parse
from llmlab.study import storage as storages
from llmlab.study.points import check, job, names, plain
from llmlab.study.queue import Direction
from llmlab.study.search import SAMPLERS, SampledWork, Search, check_pruner
from llmlab.study.space import Axis, Point, Sampled, Space, Subsample, check_conditions
from llmlab.study.trials import Trial, directory_of, read_trial
from llmlab.study.work import DEFAULT_ROOT, Place, Tell, run_fixed, save_job, watched, work
from llmlab.training.directory import write_json

DEFINITION = "study.json"
"""In a study's folder: what it is."""
SCHEMA = 1

_MAX_CORNERS = 256  # of a sampled space, that are checked before anything runs
_DEFAULT_TRIALS = 20
_DECADE = 10.0


@dataclass(frozen=True)
class Sweep:
    """What `sweep()` of an experiment file returns; a bare space stands for a sweep of the validation loss."""

    space: Space
    metric: str = "validation/loss"
    """Key of the run's summary that trials are compared by."""
    direction: Direction = "lower"
    """In which it is better."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sweep that was checked and can run."""

    place: Place
    flags: tuple[str, ...]
    command: str
    storage: str | None
    """As it was given."""
    base: Experiment
    original: Experiment
    """The file's own, without the flags."""
    sweep: Sweep
    points: tuple[Point, ...]
    """Of a finite space."""
    experiments: tuple[Experiment, ...]
    """Of the points, in the same order."""
    search: Search | None
    """How a space with sampled axes is searched; None for a list of points."""
    pruner: str

    @property
    def names(self) -> list[str]:
        """Short names of the points."""
        return names(self.points)

    def existing(self) -> list[Trial]:
        """How the points' trials stand before this sweep begins, or goes on."""
        return [read_trial(directory_of(self.place.root, each), each) for each in self.experiments]

    def run(self, *, workers: int = 1, progress: Tell | None = None) -> None:
        """Runs what is not done yet. Raises what `llmlab.study.work.execute` raises."""
        self.place.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.place.folder / DEFINITION, self.definition())
        if self.search is None:
            jobs: dict[str, dict[str, Any]] = {}
            for name, point, experiment in zip(self.names, self.points, self.experiments, strict=True):
                kept = job(self.place.file, self.original, name, point, experiment)
                jobs.setdefault(config_hash(experiment), kept)
            by_hash = {config_hash(experiment): experiment for experiment in self.experiments}
            run_fixed(self.place, by_hash, jobs, workers=workers, progress=progress, pruner=self.pruner)
        else:
            self._search(self.search, workers, progress)

    def _search(self, search: Search, workers: int, progress: Tell | None) -> None:
        store = self.place.open()
        try:
            sampled = SampledWork(self.place, store, self.base, self.sweep.space, search)
            with watched(sampled.queue, self.place, progress):
                if workers == 1:
                    work(sampled)
                    return
                from llmlab.study.crew import Crew

                base = config_hash(self.base)
                save_job(self.place.folder, base, self.base)
                task = {"design": "sampled", "base": base, "search": vars(search)}
                Crew(workers, self.place, task).work(sampled.settled)
        finally:
            store.close()

    def definition(self) -> dict[str, Any]:
        """Content of study.json: enough to look at the sweep without running the experiment file."""
        return {
            "kind": "sweep",
            "schema": SCHEMA,
            "name": self.place.folder.name,
            "file": str(self.place.file),
            "flags": list(self.flags),
            "command": self.command,
            "metric": self.sweep.metric,
            "direction": self.sweep.direction,
            "root": str(self.place.root),
            "storage": None if self.storage is None else storages.shown(self.storage),
            "study": self.place.study,
            "design": "fixed" if self.search is None else "sampled",
            "axes": describe_axes(self.sweep.space),
            "hashes": list(dict.fromkeys(map(config_hash, self.experiments))),
            "search": None if self.search is None else vars(self.search),
            "pruner": self.pruner,
        }


def read_sweep(file: Path) -> Sweep:
    """What a file's `sweep()` returns.

    Raises:
        ValueError: it has no such function, or that returns something else.
    """
    module = load_experiment_file(file)
    if not callable(getattr(module, "sweep", None)):
        raise ValueError(
            f"{file} has no function sweep(); add one, for example:\n\n"
            "from llmlab.study.space import axis, grid\n\n"
            "def sweep():\n"
            '    return grid(axis("optimizer.peak_lr", 1e-3, 3e-4), axis("train.seed", 0, 1))'
        )
    with own_errors(file.resolve()):
        found = module.sweep()
    sweep = Sweep(found) if isinstance(found, Space) else found
    if not isinstance(sweep, Sweep):
        raise ValueError(f"{file}: sweep() returned {found!r:.100}; return a space (grid, axis, ...) or a Sweep(space)")
    check_conditions(sweep.space)
    return sweep


def prepare(
    file: Path,
    *,
    flags: Sequence[str] = (),
    folder: Path | None = None,
    root: Path = DEFAULT_ROOT,
    storage: str | None = None,
    trials: int | None = None,
    sampler: str | None = None,
    pruner: str = "none",
    seed: int = 0,
    command: str | None = None,
) -> Prepared:
    """Reads and checks a sweep; nothing is written.

    Args:
        file: the experiment file.
        flags: values of the experiment that are the same in all trials, as for `llmlab train`.
        folder: of the sweep; None for `studies/<file>-sweep`.
        root: of the run directories.
        storage: address of the database; None for SQLite in the folder.
        trials: how many; of a finite space a subsample.
        sampler: "grid" for a list of points, or one of SAMPLERS; None for what the space needs.
        pruner: one of PRUNERS.
        seed: of samplers and subsamples.
        command: that is being run, for the results.

    Raises:
        ValueError: it cannot run; everything that is wrong is named.
    """
    original = read_experiment(file)
    base = parse(original, flags, prog=f"llmlab sweep {file}", file=file.name) if flags else original
    sweep = read_sweep(file)
    if trials is not None and trials < 1:
        raise ValueError(f"--trials {trials} runs nothing; give at least 1")
    fixed = _is_fixed(sweep.space, sampler)
    if fixed:
        space = sweep.space if trials is None else Subsample(sweep.space, trials, seed)
        points = tuple(space.points())
        experiments, search = tuple(check(base, points)), None
    else:
        check(base, itertools.islice(sweep.space.points(), _MAX_CORNERS))
        points, experiments = (), ()
        search = Search(trials=trials or _DEFAULT_TRIALS, sampler=sampler or "tpe", pruner=pruner, seed=seed)
    for experiment in experiments or (base,):
        check_pruner(pruner, experiment)
    folder = folder or Path("studies") / f"{file.stem}-sweep"
    return Prepared(
        place=Place(
            folder=folder,
            root=root,
            url=storages.storage_url(folder, storage),
            study=folder.name if fixed else f"{folder.name}-{_identity(base, sweep)}",
            metric=sweep.metric,
            direction=sweep.direction,
            file=file,
        ),
        flags=tuple(flags),
        command=command or shlex.join(["llmlab", "sweep", str(file), *flags]),
        storage=storage,
        base=base,
        original=original,
        sweep=sweep,
        points=points,
        experiments=experiments,
        search=search,
        pruner=pruner,
    )


def _is_fixed(space: Space, sampler: str | None) -> bool:
    """Whether a sweep is a list of points."""
    if sampler == "grid" and not space.finite:
        sampled = ", ".join(leaf.path for leaf in space.leaves() if isinstance(leaf, Sampled))
        raise ValueError(
            f"--sampler grid lists points, and {sampled} is sampled; use {', '.join(SAMPLERS)}, or an axis"
        )
    if sampler not in (None, "grid", *SAMPLERS):
        raise ValueError(f"there is no sampler {sampler!r}; use grid, {', '.join(SAMPLERS)}")
    return space.finite and sampler in (None, "grid")


def _identity(base: Experiment, sweep: Sweep) -> str:
    """Tells searches of different spaces apart that share a folder or a server: they learn nothing from each other."""
    return json_hash([config_hash(base), sweep.metric, sweep.direction, describe_axes(sweep.space)])


def describe_axes(space: Space) -> list[dict[str, Any]]:
    """The axes as results.json has them; alternatives for one path are one axis."""
    described: dict[str, dict[str, Any]] = {}
    for leaf in space.leaves():
        new = _describe(leaf)
        old = described.setdefault(leaf.path, new)
        if old is new:
            continue
        if old["values"] is not None and new["values"] is not None:
            old["values"] += [value for value in new["values"] if value not in old["values"]]
        old["log"] = old["log"] or new["log"]
        for end, better in (("low", min), ("high", max)):
            ends = [axis[end] for axis in (old, new) if axis[end] is not None]
            old[end] = better(ends) if ends else None
    return list(described.values())


def _describe(leaf: Axis | Sampled) -> dict[str, Any]:
    if isinstance(leaf, Sampled) and leaf.distribution.kind != "categorical":
        of = leaf.distribution
        return {"path": leaf.path, "kind": of.kind, "log": of.log, "values": None, "low": of.low, "high": of.high}
    values = leaf.distribution.values if isinstance(leaf, Sampled) else leaf.values
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    ordered = len(numbers) == len(values)
    return {
        "path": leaf.path,
        "kind": "categorical" if isinstance(leaf, Sampled) else "values",
        # Values that span a decade were chosen by their ratios.
        "log": ordered and min(numbers) > 0 and max(numbers) / min(numbers) >= _DECADE,
        "values": [plain({"": value})[""] for value in values],
        "low": min(numbers) if ordered else None,
        "high": max(numbers) if ordered else None,
    }
