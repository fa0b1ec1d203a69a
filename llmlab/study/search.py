"""Searching a space that cannot be listed: where the next point comes from, and which trials are given up half-way.

Samplers (Optuna's): random; qmc (quasi-random: points that leave no large hole, Sobol 1967); tpe (the tree-structured
Parzen estimator, Bergstra et al. 2011: values that were frequent among the good trials and rare among the others).
Each trial's sampler is seeded by the trial's number, so a random search has the same points with one worker and many.

Pruners: asha (asynchronous successive halving, Li et al. 2020, 1810.05934: at every third, ninth, ... of an evaluation
only the best third of the trials that came as far goes on); hyperband (several of those with different first cuts,
1603.06560); median (worse than half of the trials were at that step). They see the study's metric at each evaluation.
"""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmlab.config import config_hash
from llmlab.experiment import Experiment, read_experiment
from llmlab.study.points import PointError, apply, job, names, plain
from llmlab.study.queue import Claim, Direction, Entry, Queue, entry, replaced
from llmlab.study.space import Distribution, Space
from llmlab.study.storage import Store
from llmlab.study.trials import Status
from llmlab.study.work import Place, save_job, train
from llmlab.training.faults import Pruned
from llmlab.training.program import Programs
from llmlab.training.report import NullReport, Report

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("random", "tpe", "qmc")
PRUNERS = ("none", "asha", "hyperband", "median")

_REDUCTION = 3  # of trials at each cut; the papers' choice


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a sampled space is searched."""

    trials: int
    """How many, over all workers and all calls."""
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0


def make_sampler(search: Search, number: int) -> "optuna.samplers.BaseSampler":
    """The sampler of one trial."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # qmc, and TPE beside other workers
        match search.sampler:
            case "random":
                return optuna.samplers.RandomSampler(seed=search.seed * 1_000_003 + number)
            case "tpe":
                # constant_liar: what runs counts as bad, or several workers would all try the same place at once.
                return optuna.samplers.TPESampler(seed=search.seed * 1_000_003 + number, constant_liar=True)
            case "qmc":  # one sequence, whose next element the storage knows: the seed is the sequence's
                return optuna.samplers.QMCSampler(
                    seed=search.seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
                )
    raise ValueError(f"there is no sampler {search.sampler!r}; use {', '.join(SAMPLERS)}")


def make_pruner(name: str, every: int, steps: int) -> "optuna.pruners.BasePruner":
    """A pruner for trials of so many steps that are evaluated every so many."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match name:
            case "none":
                return optuna.pruners.NopPruner()
            case "asha":
                return optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=_REDUCTION)
            case "hyperband":
                return optuna.pruners.HyperbandPruner(
                    min_resource=every, max_resource=steps, reduction_factor=_REDUCTION
                )
            case "median":
                return optuna.pruners.MedianPruner()
    raise ValueError(f"there is no pruner {name!r}; use {', '.join(PRUNERS)}")


def check_pruner(name: str, experiment: Experiment) -> None:
    """Raises ValueError where a pruner would never see anything."""
    every, steps = experiment.train.evaluate_every, experiment.train.steps
    if name not in PRUNERS:
        raise ValueError(f"there is no pruner {name!r}; use {', '.join(PRUNERS)}")
    if name != "none" and not 0 < every < steps:
        raise ValueError(
            f"--pruner {name} looks at evaluations, and with train.evaluate_every={every} there is none before the "
            f"last of train.steps={steps}; set --train.evaluate-every {max(1, steps // 10)}"
        )


# --- pruning ---------------------------------------------------------------------------------------------------------


def pruning_report(store: Store, claim: Claim, experiment: Experiment, *, pruner: str, metric: str) -> Report:
    """A report that ends a training that does badly."""
    import optuna

    store.study.pruner = make_pruner(pruner, experiment.train.evaluate_every, experiment.train.steps)
    store.study.sampler = optuna.samplers.RandomSampler()  # asked for nothing: the point is known
    return PruningReport(optuna.trial.Trial(store.study, claim.id), metric, experiment.train.steps)


class PruningReport(NullReport):
    """Tells a trial about every evaluation, and raises `Pruned` where its pruner wants no more.

    Args:
        trial: of the study.
        metric: that is looked at.
        steps: of the whole run; at the last one there is nothing left to save.
    """

    def __init__(self, trial: "optuna.trial.Trial", metric: str, steps: int) -> None:
        import optuna

        self._trial = trial
        self._metric = metric
        self._steps = steps
        self._taken = optuna.exceptions.UpdateFinishedTrialError
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self._known = set(frozen.intermediate_values)  # by the worker that died before this one

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Reports the metric. Raises Pruned."""
        step = int(metrics["step"])
        if self._metric not in metrics or step >= self._steps:
            return
        # Where the trial was taken from this worker, its successor waits for the run to end: it goes on.
        with contextlib.suppress(self._taken):
            if step not in self._known:
                self._trial.report(float(metrics[self._metric]), step)
                self._known.add(step)
            if self._trial.should_prune():
                raise Pruned(step)


# --- sampling --------------------------------------------------------------------------------------------------------


class Suggestions:
    """Lets a trial of Optuna choose."""

    def __init__(self, trial: "optuna.trial.Trial") -> None:
        self._trial = trial

    def option(self, name: str, labels: Sequence[str]) -> int:
        """Index of one of several."""
        # With its place, as labels of rows may be equal; and a single option is no parameter.
        choices = [f"{index}: {label}" for index, label in enumerate(labels)]
        return 0 if len(choices) == 1 else choices.index(str(self._trial.suggest_categorical(name, choices)))

    def number(self, name: str, distribution: Distribution) -> float | int:
        """A number of a range."""
        low, high = distribution.low, distribution.high
        assert low is not None and high is not None  # of a range
        if distribution.kind == "integer":
            return self._trial.suggest_int(name, int(low), int(high), log=distribution.log)
        return self._trial.suggest_float(name, low, high, log=distribution.log)


class SampledQueue(Queue):
    """A queue that grows by one trial whenever a worker asks, up to a number of trials."""

    def __init__(self, store: Store, trials: int, *, metric: str, direction: Direction) -> None:
        super().__init__(store, {}, metric=metric, direction=direction)
        self._trials = trials

    def entries(self) -> list[Entry]:
        return [entry(trial) for trial in self._live()]

    def settled(self) -> bool:
        entries = self.entries()
        return len(entries) >= self._trials and all(entry.state == "done" for entry in entries)

    def _live(self) -> list["optuna.trial.FrozenTrial"]:
        trials = self.store.study.get_trials(deepcopy=False)
        gone = replaced(trials)
        return [trial for trial in trials if trial.number not in gone and OURS in trial.user_attrs]

    def _invent(self) -> Claim | None:
        if len(self._live()) >= self._trials:
            return None
        self._add({OURS: True})
        return self.begin(self.store.study.get_trials(deepcopy=False)[-1])


OURS = "sampled"
"""Attribute of the trials that this program enqueued."""


class SampledWork:
    """Work on a space that is drawn from.

    Args:
        place: of the study.
        store: its storage.
        base: the experiment that points change.
        space: to draw from.
        search: how.
    """

    def __init__(self, place: Place, store: Store, base: Experiment, space: Space, search: Search) -> None:
        self.place = place
        self.queue = SampledQueue(store, search.trials, metric=place.metric, direction=place.direction)
        self._base = base
        self._space = space
        self._search = search
        self._original = base if place.file is None else read_experiment(place.file)
        self._programs = Programs()

    def take(self) -> Claim | None:
        return self.queue.take()

    def settled(self) -> bool:
        return self.queue.settled()

    def run(self, claim: Claim) -> None:
        try:
            claim, experiment = self._drawn(claim)
        except PointError as error:
            self.queue.tell(claim, Status.FAILED, problem=str(error))
            return
        save_job(self.place.folder, claim.hash, experiment)
        train(
            self.place,
            self.queue,
            claim,
            experiment,
            pruner=self._search.pruner,
            programs=self._programs,
        )

    def _drawn(self, claim: Claim) -> tuple[Claim, Experiment]:
        """The claim's experiment: a new point, or the one that it had before it was given back or its worker died."""
        import optuna

        study, rdb = self.queue.store.study, self.queue.store.rdb
        with self.queue.store.exclusive():  # one after the other, so that each sees what the others try
            # Before the draw: hyperband's brackets each learn from their own trials.
            every, steps = self._base.train.evaluate_every, self._base.train.steps
            study.pruner = make_pruner(self._search.pruner, every, steps)
            study.sampler = make_sampler(self._search, _first(study, claim.number))
            point = self._space.draw(Suggestions(optuna.trial.Trial(study, claim.id)))
            name = names([point], digits=4)[0]
            for key, value in {"point": plain(point), "name": name}.items():
                rdb.set_trial_user_attr(claim.id, key, value)  # also of a point that cannot be
            experiment = apply(self._base, point)
            hash_ = config_hash(experiment)
            for key, value in job(self.place.file, self._original, name, point, experiment).items():
                rdb.set_trial_user_attr(claim.id, key, value)
            rdb.set_trial_user_attr(claim.id, "hash", hash_)
        return Claim(number=claim.number, id=claim.id, name=name, hash=hash_), experiment


def _first(study: "optuna.Study", number: int) -> int:
    """The number of the trial that this one retries, if it does: a draw that was cut short is made again, the same."""
    trial = study.get_trials(deepcopy=False)[number]
    return min([number, *trial.system_attrs.get("retry_history", [])])
