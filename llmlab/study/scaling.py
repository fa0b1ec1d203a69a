"""Scaling studies: what is the best model for a budget, and what will a larger one bring?

def scaling() -> Scaling:
    return Scaling(
        question="How should a budget be split between parameters and tokens?",
        family=[experiment(width) for width in (32, 48, 64, 96, 128)],
        budgets=(1e12, 2e12, 4e12, 8e12),
    )

A family is one experiment at several sizes; the study decides how long each is trained. `budgets` (FLOPs) trains every
size for as long as each budget pays for: isoFLOP profiles (`llmlab.study.isoflop`). `tokens` trains every size for each
of these token counts: a grid. Both serve the parametric law (`llmlab.study.laws`).

Conventions, which change published exponents more than any noise does (Pearce and Song 2024, 2406.12907):

    N    parameters without embeddings: every array but those with an axis of the vocabulary (tables, and the head even
         where it is not tied), of positions or of segment types; `parameters="all"` counts everything, as Hoffmann et
         al. do
    C    `model.flops` of the training steps: two per multiply-add, the head counts, attention counts in full, backward
         is twice forward; embeddings' lookups, norms and softmax do not count. Not 6 N D
    D    tokens that the model processed, padding included; not how many of them are distinct

The last point matters: repeated tokens teach less, and the law knows no epochs. Let the data be larger than the
largest D, and the schedule end with the run (it is built for each run's own length).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from llmlab.config import config_hash, load_experiment_file, own_errors
from llmlab.experiment import Experiment, known_size
from llmlab.study.laws import DELTA, NUM_PARAMETERS
from llmlab.study.transfer import Transfer

Counted = Literal["non-embedding", "all"]
Lengthen = Callable[[Experiment, int], Experiment]

# Axes of arrays that are looked up, or that turn states into scores of what is looked up.
_EMBEDDING_AXES = {"vocab", "position", "segment_type"}
# Fewer steps than this are all warm-up; and rounding to whole steps would miss the budget by more than a percent.
_LEAST_STEPS = 20


def for_steps(experiment: Experiment, steps: int) -> Experiment:
    """The experiment trained for so many steps, and evaluated at its end only."""
    train = dataclasses.replace(experiment.train, steps=steps, evaluate_every=0, keep_best=0)
    return dataclasses.replace(experiment, train=train)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A family of models and how long they are trained."""

    question: str
    """What the study wants to know."""
    family: Sequence[Experiment]
    """The same experiment at several sizes, at least three; `train.steps` is the study's to choose."""
    budgets: tuple[float, ...] = ()
    """FLOPs of training; every size is trained at each."""
    tokens: tuple[float, ...] = ()
    """Tokens; every size is trained on so many."""
    tokens_per_parameter: tuple[float, float] = (0.0, math.inf)
    """Points outside of this range of D / N are left out."""
    seeds: int = 1
    """Runs of every point."""
    hold_out: int = 1
    """The largest budgets (of a grid: the largest runs) that are predicted from the others; 0 for no such check."""
    extrapolate: tuple[float, ...] = (10.0, 100.0)
    """Budgets to extrapolate to, as multiples of the largest one that was run."""
    metric: str = "validation/loss"
    """The loss, of the runs' summaries."""
    parameters: Counted = "non-embedding"
    """What N counts."""
    for_steps: Lengthen = for_steps
    """The experiment trained for so many steps; give a function of your own where warm-up depends on the length."""
    delta: float = DELTA
    """Where Huber's loss of the fit turns linear, in log loss; about the runs' own scatter where that is known."""
    level: float = 0.9
    """Of all intervals."""
    resamples: int = 1000
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        problems = []
        if not self.budgets and not self.tokens:
            problems.append("give budgets=(...) in FLOPs, or tokens=(...)")
        if len(self.family) < 3:
            problems.append(f"family has {len(self.family)} sizes; a law in N needs at least 3")
        for name, values in (("budgets", self.budgets), ("tokens", self.tokens), ("extrapolate", self.extrapolate)):
            if any(not (value > 0 and math.isfinite(value)) for value in values):
                problems.append(f"{name}={values} must be positive numbers")
        if self.seeds < 1 or self.hold_out < 0 or self.resamples < 1:
            problems.append(
                f"seeds={self.seeds} and resamples={self.resamples} must be positive, hold_out not negative"
            )
        if not 0 < self.level < 1:
            problems.append(f"level={self.level} must lie between 0 and 1, such as 0.9")
        if not self.delta > 0:
            problems.append(f"delta={self.delta} must be positive, such as {DELTA}")
        if problems:
            raise ValueError("\n  ".join(["this scaling study cannot be:", *problems]))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study."""

    name: str
    experiment: Experiment
    parameters: int
    """N, as the study counts."""
    tokens: int
    """D."""
    flops: float
    """C, of the whole steps that are trained."""
    budget: float | None
    """The budget that the run belongs to; None in a grid."""
    seed: int


def points(scaling: Scaling) -> tuple[Point, ...]:
    """Every run of the study, smallest budget first; nothing is run.

    Raises:
        ValueError: the vocabulary of a model is not known before its tokenizer is trained, two members have the same
            size, a budget is too small for a member, or too few points are left. Everything is named at once.
    """
    problems: list[str] = []
    made: list[Point] = []
    sizes: dict[int, int] = {}
    for number, member in enumerate(scaling.family):
        try:
            size = _Size.of(member, scaling.parameters)
        except ValueError as error:
            problems.append(f"family[{number}]: {error}")
            continue
        if size.parameters in sizes:
            problems.append(
                f"family[{number}] has the {size.parameters} parameters of family[{sizes[size.parameters]}]"
            )
        sizes.setdefault(size.parameters, number)
        for budget, steps in _lengths(scaling, size):
            if not _in_range(steps * size.tokens / size.parameters, scaling.tokens_per_parameter):
                continue
            if steps < _LEAST_STEPS:
                problems.append(
                    f"family[{number}] of {size.parameters:,} parameters would be trained for {steps} steps, and less "
                    f"than {_LEAST_STEPS} measure nothing; raise the budget, shrink its batch, or leave it out with "
                    "tokens_per_parameter"
                )
                continue
            made += _seeds(scaling, member, size, budget, steps)
    if not problems and len(made) <= NUM_PARAMETERS:
        problems.append(f"{len(made)} runs cannot determine the law's {NUM_PARAMETERS} parameters")
    if problems:
        raise ValueError("\n  ".join(["this scaling study cannot run:", *problems]))
    return tuple(sorted(made, key=lambda point: (point.budget or point.flops, point.parameters, point.seed)))


def held_out(scaling: Scaling, runs: Sequence[Point]) -> set[str]:
    """Names of the runs that are predicted from the others."""
    groups: dict[float, list[str]] = {}
    for point in runs:
        groups.setdefault(point.budget or point.flops, []).append(point.name)
    largest = sorted(groups)[len(groups) - scaling.hold_out :] if scaling.hold_out else []
    return {name for group in largest for name in groups[group]}


def read_scaling(file: Path) -> "Scaling | Transfer":
    """What a file's `scaling()` returns.

    Raises:
        ValueError: it has no such function, or that returns something else.
    """
    module = load_experiment_file(file)
    if not callable(getattr(module, "scaling", None)):
        raise ValueError(
            f"{file} has no function scaling(); add one, for example:\n\n"
            "from llmlab.study.scaling import Scaling\n\n"
            "def scaling():\n"
            '    return Scaling(question="...", family=[experiment(w) for w in (64, 96, 128)], budgets=(1e12, 2e12))'
        )
    with own_errors(file.resolve()):
        found = module.scaling()
    if not isinstance(found, Scaling | Transfer):
        raise ValueError(f"{file}: scaling() returned {found!r:.100}; return a Scaling(...) or a Transfer(...)")
    return found


@dataclass(frozen=True)
class _Size:
    """What one step of a member costs."""

    parameters: int
    tokens: int
    flops: int

    @classmethod
    def of(cls, experiment: Experiment, counted: Counted) -> "_Size":
        model, train = experiment.model, experiment.train
        if model.vocab_size is None:
            size = known_size(experiment.tokenizer)
            if size is None:
                raise ValueError(
                    "the size of its vocabulary is known only once its tokenizer is opened; set model.vocab_size"
                )
            model = model.with_vocabulary(size)
        if train.sequence_length is None:
            raise ValueError("train.sequence_length is None, so its tokens cannot be counted; set it")
        shapes = model.batch_shapes(train.batch_size, train.sequence_length)
        _, params, axes = model.abstract()
        leaves = zip(
            jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True
        )
        number = sum(leaf.size for leaf, names in leaves if counted == "all" or not _EMBEDDING_AXES & set(names))
        return cls(number, model.num_tokens(shapes), model.flops(shapes, training=True))


def _lengths(scaling: Scaling, size: _Size) -> list[tuple[float | None, int]]:
    """(budget, steps) of a member's runs."""
    of_budgets: list[tuple[float | None, int]] = [(budget, round(budget / size.flops)) for budget in scaling.budgets]
    return of_budgets + [(None, round(tokens / size.tokens)) for tokens in scaling.tokens]


def _seeds(scaling: Scaling, member: Experiment, size: _Size, budget: float | None, steps: int) -> list[Point]:
    made = []
    for offset in range(scaling.seeds):
        experiment = scaling.for_steps(member, steps)
        seed = member.train.seed + offset
        experiment = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=seed))
        where = f"C={budget:.3g}" if budget is not None else f"D={steps * size.tokens:.3g}"
        made.append(
            Point(
                name=f"{where}/N={size.parameters}" + (f"/seed={seed}" if scaling.seeds > 1 else ""),
                experiment=experiment,
                parameters=size.parameters,
                tokens=steps * size.tokens,
                flops=float(steps * size.flops),
                budget=budget,
                seed=seed,
            )
        )
    return made


def _in_range(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def jobs(runs: Sequence[Point]) -> Mapping[str, Experiment]:
    """What `llmlab.study.work.execute` takes."""
    return {point.name: point.experiment for point in runs}


def hashes(runs: Sequence[Point]) -> list[str]:
    """Of the runs' experiments."""
    return [config_hash(point.experiment) for point in runs]
