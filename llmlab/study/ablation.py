"""Ablations: one thing changed, everything else held, enough seeds to tell a difference from luck.

    def ablation():
        return Ablation(
            hypothesis="LayerNorm is no worse than RMSNorm",
            baseline=config(),
            variants={"layernorm": swap(RMSNorm, LayerNorm())},
            margin=0.01,
        )

Every arm is trained once per seed, and seed s of one arm is compared with seed s of the other: the same batches in the
same order, the same initial value of every parameter that both have. What the seeds share cancels in the difference,
so that five pairs can show what five and five independent runs cannot.

Three shapes:

    variants         one change at a time, each against the baseline
    leave_one_out    the baseline is the full recipe; one part is taken away at a time
    factors          every combination of every level: main effects and whether they add up (a full factorial)

What is held equal is `match`: tokens by default. A variant that also has more parameters, or takes longer, may win by
that: what each arm achieved is in the report, whatever is matched.

**How many seeds.** `seeds=5` is fixed before anything runs. Adding seeds after a look at the results, until they
please, finds a difference between equal arms far more often than alpha says; so that is refused, or the report says
"exploratory". `seeds="until settled"` may look after every seed: its intervals (llmlab.study.sequential) hold for all
looks together, and are wider for that.

**Learning rates.** A change may need another learning rate, and lose by the baseline's. With `learning_rates=(...)`
every arm first runs the whole grid on seeds of its own, and is compared at the rate with the best mean there. Tuning
seeds are never among those compared: the best of several noisy numbers looks better than it is, the more so the longer
the grid, and its runs at fresh seeds do not.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

from llmlab.config import load_experiment_file, own_errors
from llmlab.experiment import Experiment
from llmlab.study.changes import (
    Change,
    Difference,
    change_problems,
    changes_of,
    covers,
    listed,
    swap,
    unchanged,
    with_values,
)
from llmlab.study.measures import PREFIX, Measure, source_hash
from llmlab.study.paired import Claim
from llmlab.study.verdict import Direction

__all__ = ["Ablation", "Arm", "Variant", "read_ablation", "swap", "unchanged", "with_values"]

Quantity = Literal["tokens", "parameters", "flops", "seconds"]

BASELINE = "baseline"
UNTIL_SETTLED = "until settled"
TUNING_SEEDS = 1_000_000
"""First of the seeds that learning rates are tuned on; those that are compared are far below."""


@dataclass(frozen=True)
class Variant:
    """A change with what is particular to it."""

    change: Change
    """Makes it of the baseline."""
    _: KW_ONLY
    claim: Claim | None = None
    """About it against the baseline; None for the study's."""
    margin: float | None = None
    """Of the claim; None for the study's."""
    changes: tuple[str, ...] = ()
    """Patterns of the paths that it changes, where that is more than one thing: ("model.*.ffn", "train.steps")."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the experiments that are compared."""

    name: str
    """"baseline", or the variant's."""
    experiment: Experiment
    """What every seed of it runs, but for the seed."""
    changes: tuple[Difference, ...] = ()
    """What differs from the baseline."""
    claim: Claim
    """About it against the baseline."""
    margin: float
    """Of the claim."""
    levels: tuple[tuple[str, str], ...] = ()
    """(factor, level) of its cell in a factorial."""

    def run(self, seed: int, learning_rate: float | None = None) -> Experiment:
        """The experiment of one run: the same seed means the same batches in every arm."""
        experiment = replace(self.experiment, train=replace(self.experiment.train, seed=seed))
        if learning_rate is None:
            return experiment
        return replace(experiment, optimizer=replace(experiment.optimizer, peak_lr=learning_rate))


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A hypothesis, the arms that test it, and what will count as an answer, settled before anything runs."""

    hypothesis: str
    """One sentence that the result can support or refute."""
    baseline: Experiment
    """What the others are compared with."""
    variants: Mapping[str, Change | Variant] = dataclasses.field(default_factory=dict)
    """Name -> change, one at a time."""
    factors: Mapping[str, Mapping[str, Change | Variant]] = dataclasses.field(default_factory=dict)
    """Factor -> level -> change; every combination is an arm. One level of each is the baseline's: `unchanged`."""
    leave_one_out: Mapping[str, Change | Variant] = dataclasses.field(default_factory=dict)
    """Part -> change that takes it away from the full recipe, which the baseline is."""
    metric: str = "validation/loss"
    """Key of summary.json, or of the last record of metrics.jsonl that has it; or "measure/<name>"."""
    direction: Direction = "lower"
    """Which way the metric is better."""
    measure: Measure | None = None
    """What else to measure of every finished run (llmlab.study.measures): its values are metrics "measure/<name>"."""
    claim: Claim = "no worse"
    """About each variant against the baseline."""
    margin: float = 0.0
    """The difference that does not matter, in the metric's unit."""
    match: Quantity = "tokens"
    """What the arms have equal."""
    tolerance: float = 0.01
    """Relative difference of that up to which it is equal."""
    acknowledge_mismatch: str | None = None
    """Why arms that do not match are compared all the same; the report shows it."""
    seeds: int | Literal["until settled"] = 5
    """How many, or "until settled"."""
    min_seeds: int = 3
    """Before the first look, with seeds="until settled"."""
    max_seeds: int = 20
    """At most, with seeds="until settled"."""
    budget: int | None = None
    """Most training runs of the study, with seeds="until settled", those for tuning included. Runs and not hours, so
    that the study ends with the same seeds on every machine, and after every interruption."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates to tune every arm over; () for what each arm's experiment says."""
    tuning_seeds: int = 1
    """Seeds, apart from those that are compared, on which the rates are tried."""
    alpha: float = 0.05
    """Error rate of the verdict, over all variants together."""

    def __post_init__(self) -> None:
        shapes = [name for name in ("variants", "factors", "leave_one_out") if getattr(self, name)]
        problems = [*self._number_problems(), *self._seed_problems()]
        if len(shapes) != 1:
            given = " and ".join(shapes) or "none"
            problems.append(f"exactly one of variants, factors and leave_one_out makes the arms; {given} was given")
        if self.measure is None and self.metric.startswith(PREFIX):
            problems.append(f"metric={self.metric!r} is measured of a run: give the function, measure=...")
        if self.measure is not None:
            try:
                source_hash(self.measure)
            except ValueError as error:
                problems.append(str(error))
        if self.claim == "equal" and self.margin == 0:
            problems.append('claim="equal" needs a margin: no number of seeds shows a difference of exactly 0')
        if problems:
            raise ValueError("; ".join(problems))

    def _number_problems(self) -> Iterator[str]:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            yield f"margin={self.margin} must be a number of at least 0; direction says which way is better"
        if not 0 < self.alpha < 0.5:
            yield f"alpha={self.alpha} must be between 0 and 0.5; 0.05 is usual"
        if not self.tolerance >= 0:
            yield f"tolerance={self.tolerance} must be at least 0; 0.01 is one percent"
        if not self.hypothesis.strip():
            yield "hypothesis is empty: say in a sentence what the result can support or refute"
        if any(not (math.isfinite(rate) and rate > 0) for rate in self.learning_rates):
            yield f"learning_rates={self.learning_rates} must be positive"
        if len(set(self.learning_rates)) < len(self.learning_rates):
            yield f"learning_rates={self.learning_rates} has one twice"
        if len(self.learning_rates) == 1:
            yield f"learning_rates={self.learning_rates} leaves nothing to tune; put it into the baseline's optimizer"

    def _seed_problems(self) -> Iterator[str]:
        if isinstance(self.seeds, int) and not 2 <= self.seeds < TUNING_SEEDS:
            yield f"seeds={self.seeds} must be at least 2: one pair says nothing of how much pairs vary"
        if not 2 <= self.min_seeds <= self.max_seeds < TUNING_SEEDS:
            yield f"min_seeds={self.min_seeds} and max_seeds={self.max_seeds} must be 2 <= min_seeds <= max_seeds"
        if self.budget is not None and self.budget < 1:
            yield f"budget={self.budget} runs must be at least 1; None for no limit but max_seeds"
        if self.budget is not None and not self.sequential:
            yield f'budget={self.budget} is for seeds="until settled"; seeds={self.seeds} says how many there are'
        if self.tuning_seeds < 1:
            yield f"tuning_seeds={self.tuning_seeds} must be at least 1"

    @property
    def sequential(self) -> bool:
        """Whether seeds are added until the verdict is settled."""
        return self.seeds == UNTIL_SETTLED

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """The seeds that run before anything is looked at."""
        return tuple(range(self.seeds if isinstance(self.seeds, int) else self.min_seeds))

    @property
    def seeds_for_tuning(self) -> tuple[int, ...]:
        """The seeds on which learning rates are tried."""
        return tuple(range(TUNING_SEEDS, TUNING_SEEDS + self.tuning_seeds)) if self.learning_rates else ()

    def most_seeds(self, num_arms: int) -> int:
        """How many seeds the study may come to, by its maximum and its budget."""
        if isinstance(self.seeds, int):
            return self.seeds
        if self.budget is None:
            return self.max_seeds
        tuning = num_arms * len(self.learning_rates) * len(self.seeds_for_tuning)
        return min(self.max_seeds, (self.budget - tuning) // num_arms)

    def arms(self) -> tuple[Arm, ...]:
        """The baseline and the others, each checked.

        Raises:
            ValueError: a variant changes nothing, or more than one thing that it does not declare; it cannot run; two
                are the same. The message lists all that is wrong with all of them.
        """
        base = Arm(name=BASELINE, experiment=self.baseline, claim=self.claim, margin=self.margin)
        problems: dict[str, list[str]] = {BASELINE: _validation_problems(self.baseline)}
        arms = list(self._factorial(base, problems) if self.factors else self._one_at_a_time(base, problems))
        for i, arm in enumerate(arms):
            twin = next((other.name for other in arms[:i] if other.experiment == arm.experiment), None)
            if twin is not None and not problems.get(arm.name):
                problems.setdefault(arm.name, []).append(f"it is the same experiment as {twin}")
        if not problems.get(BASELINE) and (most := self.most_seeds(len(arms))) < len(self.first_seeds):
            problems[BASELINE] = [
                f"budget={self.budget} runs is too few for {len(arms)} arms: it leaves {max(most, 0)} of the "
                f"min_seeds={self.min_seeds}"
            ]
        if any(problems.values()):
            found = [(name, problem.replace("\n", "\n    ")) for name, each in problems.items() for problem in each]
            lines = [f"\n  {name}: {problem}" for name, problem in found]
            raise ValueError("this ablation cannot run:" + "".join(lines))
        return tuple(arms)

    def _one_at_a_time(self, base: Arm, problems: dict[str, list[str]]) -> Iterator[Arm]:
        yield base
        named = dict(self.variants) | {f"full minus {name}": change for name, change in self.leave_one_out.items()}
        for name, given in named.items():
            variant = given if isinstance(given, Variant) else Variant(given)
            arm = _varied(base, name, variant, problems)
            if arm is not None:
                yield arm

    def _factorial(self, base: Arm, problems: dict[str, list[str]]) -> Iterator[Arm]:
        """All cells, the baseline's first; each level was checked alone, and a cell changes what its levels change."""
        alone: dict[tuple[str, str], Arm] = {}
        for factor, levels in self.factors.items():
            at_baseline = [level for level, change in levels.items() if change is unchanged]
            if len(levels) < 2 or len(at_baseline) != 1:
                problems[factor] = [
                    f"it has {len(levels)} levels, and {len(at_baseline)} of them is `unchanged`; it needs at least 2, "
                    "of which exactly one is the baseline's"
                ]
                continue
            for level, given in levels.items():
                variant = given if isinstance(given, Variant) else Variant(given)
                changed = level not in at_baseline
                arm = _varied(base, f"{factor}={level}", variant, problems) if changed else base
                if arm is not None:
                    alone[factor, level] = arm
        if any(problems.values()):
            yield base
            return
        cells = [tuple(zip(self.factors, cell, strict=True)) for cell in itertools.product(*self.factors.values())]
        made = [self._cell(base, cell, alone, problems) for cell in cells]
        yield from sorted((arm for arm in made if arm is not None), key=lambda arm: arm.name != BASELINE)

    def _cell(
        self,
        base: Arm,
        cell: tuple[tuple[str, str], ...],
        alone: Mapping[tuple[str, str], Arm],
        problems: dict[str, list[str]],
    ) -> Arm | None:
        changed = [place for place in cell if alone[place] is not base]
        if not changed:
            return replace(base, levels=cell)
        name = ",".join(f"{factor}={level}" for factor, level in cell)
        if len(changed) == 1:
            return replace(alone[changed[0]], name=name, levels=cell)
        try:
            forwards, backwards = (self._applied(places) for places in (changed, changed[::-1]))
        except ValueError as error:
            problems[name] = [str(error)]
            return None
        found = _validation_problems(forwards)
        if forwards != backwards:
            found.append(
                "it depends on the order in which its factors are applied, so they are not separate factors:"
                f"{listed(changes_of(forwards, backwards))}"
            )
        differences = changes_of(base.experiment, forwards)
        own = [path for place in changed for path, _, _ in alone[place].changes]
        strays = [entry for entry in differences if not any(covers(p, entry[0]) or covers(entry[0], p) for p in own)]
        if strays:
            found.append(f"together its factors change what none of them changes alone:{listed(strays)}")
        problems[name] = found
        arm = Arm(name=name, experiment=forwards, changes=tuple(differences), claim=base.claim, margin=base.margin)
        return replace(arm, levels=cell)

    def _applied(self, places: list[tuple[str, str]]) -> Experiment:
        experiment = self.baseline
        for factor, level in places:
            given = self.factors[factor][level]
            experiment = (given.change if isinstance(given, Variant) else given)(experiment)
        return experiment


def _varied(base: Arm, name: str, variant: Variant, problems: dict[str, list[str]]) -> Arm | None:
    """The arm of one variant; appends to problems what is wrong with it."""
    found = problems.setdefault(name, [])
    if name == BASELINE or "/" in name or not name.strip():
        found.append(f"{name!r} cannot name a variant; use a short name of its own, without /")
    try:
        experiment = variant.change(base.experiment)
    except ValueError as error:
        found.append(str(error))
        return None
    if not isinstance(experiment, Experiment):
        found.append(f"its change returned {experiment!r:.100}, which is no Experiment")
        return None
    if experiment.train.seed != base.experiment.train.seed:
        found.append("it changes train.seed, which the study sets: every arm runs the same seeds")
        return None
    differences = changes_of(base.experiment, experiment)
    found += change_problems(differences, variant.changes)
    found += _validation_problems(experiment)
    claim, margin = variant.claim or base.claim, base.margin if variant.margin is None else variant.margin
    if not (math.isfinite(margin) and margin >= 0):
        found.append(f"margin={margin} must be a number of at least 0")
    if claim == "equal" and margin == 0:
        found.append('claim="equal" needs a margin: no number of seeds shows a difference of exactly 0')
    return Arm(name=name, experiment=experiment, changes=tuple(differences), claim=claim, margin=margin)


def _validation_problems(experiment: Experiment) -> list[str]:
    try:
        experiment.validate()
    except ValueError as error:
        return [str(error)]
    return []


def read_ablation(path: Path) -> Ablation:
    """The ablation that a Python file's `ablation()` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be used, or has no ablation(); the message says what to write.
    """
    module = load_experiment_file(path)
    make = getattr(module, "ablation", None)
    if not callable(make):
        raise ValueError(
            f"{path} has no function ablation(); write one that returns llmlab.study.ablation.Ablation(hypothesis=..., "
            'baseline=config(), variants={"name": swap(Old, New())})'
        )
    with own_errors(path.resolve()):
        found = make()
    if not isinstance(found, Ablation):
        raise ValueError(f"{path}: ablation() returned {found!r:.100}, which is no Ablation")
    return found
