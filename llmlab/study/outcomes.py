"""From trials to a table of values, one for every arm and seed, that says what it could not read.

Every seed counts:

    finished     the metric at the end
    diverged     the worst of what guessing would score (ln V, for a loss in nats per token) and every finite value
                 among the study's runs: a run that fell apart learnt nothing, and must not make its arm look better
    other        corrupt, failed or missing: no value. Its seed is left out of every arm, since pairs are compared,
                 and the result says so
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmlab.experiment import Experiment, known_size
from llmlab.study.ablation import BASELINE, Ablation, Arm
from llmlab.study.trials import Status, Trial

_LOSSES = ("validation/loss", "train/loss")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run that a study needs."""

    arm: str
    seed: int
    learning_rate: float | None = None
    """Peak rate where the study sets it."""
    experiment: Experiment
    tuning: bool = False
    """Whether it serves to choose a rate and is never compared."""

    @property
    def label(self) -> str:
        """Its name in the queue."""
        tried = f"/learning_rate={self.learning_rate:g}" if self.tuning else ""
        return f"{self.arm}{tried}/seed={self.seed}"


def comparison_jobs(arms: Sequence[Arm], seeds: Sequence[int], rates: Mapping[str, float]) -> list[Job]:
    """The runs that are compared: seed by seed, so that a study that is cut short has whole pairs."""
    return [
        Job(
            arm=arm.name,
            seed=seed,
            learning_rate=rates.get(arm.name),
            experiment=arm.run(seed, rates.get(arm.name)),
        )
        for seed in seeds
        for arm in arms
    ]


def tuning_jobs(ablation: Ablation, arms: Sequence[Arm]) -> list[Job]:
    """The runs that choose each arm's learning rate."""
    return [
        Job(arm=arm.name, seed=seed, learning_rate=rate, experiment=arm.run(seed, rate), tuning=True)
        for seed in ablation.seeds_for_tuning
        for arm in arms
        for rate in ablation.learning_rates
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job."""

    job: Job
    trial: Trial
    value: float | None
    """The metric at the end; None for a run that diverged or cannot be read."""
    diverged: bool = False
    problem: str | None = None
    """Why it is neither a value nor diverged."""


def outcome(ablation: Ablation, job: Job, trial: Trial) -> Outcome:
    """Reads the metric of a trial."""
    if trial.status is Status.DIVERGED:
        return Outcome(job=job, trial=trial, value=None, diverged=True)
    if trial.status is not Status.FINISHED:
        problem = trial.problem or f"the run is {trial.status}"
        return Outcome(job=job, trial=trial, value=None, problem=problem)
    value = trial.value(ablation.metric)
    if value is None:
        logged = [record[ablation.metric] for record in trial.metrics if ablation.metric in record]
        value = float(logged[-1]) if logged else None
    if value is None:
        known = sorted({*trial.summary, *(key for record in trial.metrics for key in record)})
        names = ", ".join(name for name in known if "/" in name)
        problem = trial.problem or f"the run has no {ablation.metric}; it has {names}"
        return Outcome(job=job, trial=trial, value=None, problem=problem)
    if not math.isfinite(value):
        return Outcome(job=job, trial=trial, value=None, diverged=True)
    return Outcome(job=job, trial=trial, value=value)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The outcomes of the runs that are compared."""

    ablation: Ablation
    arms: tuple[str, ...]
    """The baseline first."""
    seeds: tuple[int, ...]
    outcomes: Mapping[tuple[str, int], Outcome]

    @functools.cached_property
    def imputed(self) -> tuple[float, str] | None:
        """(the value of a diverged run, where it is from); None where nothing finite is known."""
        lower, guessing = self.ablation.direction == "lower", guessing_loss(self.ablation)
        values = [found.value for found in self.outcomes.values() if found.value is not None]
        worst = (max if lower else min)(values, default=None)
        if lower and guessing is not None and (worst is None or guessing > worst):
            return guessing, "the loss of a uniform guess, ln V"
        return None if worst is None else (worst, "the worst value of the study")

    def value(self, arm: str, seed: int) -> float | None:
        """The value that counts; None where there is none."""
        found = self.outcomes[arm, seed]
        if not found.diverged:
            return found.value
        return None if self.imputed is None else self.imputed[0]

    @functools.cached_property
    def paired(self) -> tuple[int, ...]:
        """The seeds with a value in every arm."""
        return tuple(seed for seed in self.seeds if all(self.value(arm, seed) is not None for arm in self.arms))

    @property
    def left_out(self) -> tuple[int, ...]:
        """The other seeds."""
        return tuple(seed for seed in self.seeds if seed not in self.paired)

    def values(self, arm: str) -> Float[np.ndarray, " seeds"]:
        """Of the paired seeds, in their order."""
        return np.array([self.value(arm, seed) for seed in self.paired], np.float64)

    def differences(self) -> dict[str, Float[np.ndarray, " seeds"]]:
        """Variant - baseline of every paired seed, by variant."""
        baseline = self.values(BASELINE)
        return {arm: self.values(arm) - baseline for arm in self.arms if arm != BASELINE}

    @property
    def any_diverged(self) -> bool:
        """Whether some value is not what a run measured at its end."""
        return any(outcome.diverged for outcome in self.outcomes.values())


def table(ablation: Ablation, arms: Sequence[Arm], jobs: Sequence[Job], trials: Mapping[str, Trial]) -> Table:
    """The table of these jobs; `trials` are theirs by label. A job without a trial has no value."""
    found = {}
    for job in jobs:
        trial = trials.get(job.label)
        if trial is None:
            raise ValueError(f"the run {job.label} was asked for, and nothing is said of it")
        found[job.arm, job.seed] = outcome(ablation, job, trial)
    seeds = tuple(dict.fromkeys(job.seed for job in jobs))
    return Table(ablation=ablation, arms=tuple(arm.name for arm in arms), seeds=seeds, outcomes=found)


def guessing_loss(ablation: Ablation) -> float | None:
    """ln V, the loss of a uniform guess, where the metric is a loss in nats per token and V is known."""
    experiment = ablation.baseline
    if ablation.metric not in _LOSSES or "token" not in experiment.objective.plain.unit:
        return None
    size = known_size(experiment.tokenizer) or experiment.model.vocab_size
    return None if size is None else math.log(size)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How one arm's learning rate was chosen."""

    rates: tuple[float, ...]
    """The grid, ascending."""
    values: Mapping[float, tuple[float | None, ...]]
    """Rate -> the metric at each tuning seed; None for a run that diverged or cannot be read."""
    best: float
    problems: tuple[str, ...] = ()
    """Of runs that cannot be read."""

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond the grid."""
        return self.best in (self.rates[0], self.rates[-1])


def tuned(ablation: Ablation, arm: str, outcomes: Sequence[Outcome]) -> Tuned:
    """The rate with the best mean over the tuning seeds; one that diverged at any of them is out.

    Raises:
        ValueError: no rate is left.
    """
    values: dict[float, list[float | None]] = {rate: [] for rate in sorted(ablation.learning_rates)}
    problems = []
    for found in outcomes:
        assert found.job.learning_rate is not None
        values[found.job.learning_rate].append(found.value)
        if found.problem is not None:
            problems.append(f"{found.job.label}: {found.problem}")
    means = {rate: float(np.mean([v for v in row if v is not None])) for rate, row in values.items() if None not in row}
    if not means:
        told = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{arm} has no learning rate that trains: all of {ablation.learning_rates} diverged{told}")
    best = min(means, key=lambda rate: means[rate] if ablation.direction == "lower" else -means[rate])
    kept = {rate: tuple(row) for rate, row in values.items()}
    return Tuned(rates=tuple(values), values=kept, best=best, problems=tuple(problems))
