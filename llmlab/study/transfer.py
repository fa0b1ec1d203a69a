"""Learning-rate transfer: does the best rate of a narrow model serve a wide one?

def scaling() -> Transfer:
    return Transfer(
        question="Does the best learning rate of width 32 serve width 256?",
        arms={"standard": standard, "muP": mup},          # functions of the width that return an Experiment
        widths=(32, 64, 128, 256),
        learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 16e-3),
        seeds=2,
    )

For each arm, every width is trained at every rate. Loss against log rate is a valley; near its floor a parabola through
the best rate of the grid and its neighbours gives the optimum. What is reported, with intervals over the seeds:

    drift      slope of log best rate against log width: 0 where the rate transfers, about -1 for Adam in the standard
               parametrisation of wide models
    regret     loss of the widest model at the narrowest one's best rate, minus its loss at its own best rate: what
               tuning small costs

and, without training, the coordinate check of each arm (`llmlab.study.coordinates`). A best rate at an end of the grid
is told and gives no drift: widen the grid. What happens at widths that were not trained is not shown by this.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmlab.experiment import Experiment

Arm = Callable[[int], Experiment]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Arms at several widths and learning rates."""

    question: str
    """What the study wants to know."""
    arms: Mapping[str, Arm]
    """Parametrisations by name: from a width to the experiment."""
    widths: tuple[int, ...]
    """Narrowest first; the first is the one that is tuned."""
    learning_rates: tuple[float, ...]
    """Values of optimizer.peak_lr, ascending."""
    seeds: int = 1
    """Runs of every point; two or more for intervals."""
    metric: str = "validation/loss"
    """The loss, of the runs' summaries."""
    coordinate_steps: int = 4
    """Steps of the coordinate check; 0 for none."""
    level: float = 0.9
    """Of all intervals."""

    def __post_init__(self) -> None:
        problems = []
        if not self.arms:
            problems.append("arms is empty")
        if len(self.widths) < 2 or list(self.widths) != sorted(set(self.widths)):
            problems.append(f"widths={self.widths} must be two or more, ascending")
        rates = self.learning_rates
        if len(rates) < 3 or list(rates) != sorted(set(rates)) or not rates[0] > 0:
            problems.append(f"learning_rates={rates} must be three or more positive numbers, ascending")
        if self.seeds < 1 or self.coordinate_steps < 0:
            problems.append(
                f"seeds={self.seeds} must be positive and coordinate_steps={self.coordinate_steps} not negative"
            )
        if not 0 < self.level < 1:
            problems.append(f"level={self.level} must lie between 0 and 1, such as 0.9")
        if problems:
            raise ValueError("\n  ".join(["this transfer study cannot be:", *problems]))


@dataclass(frozen=True, kw_only=True)
class TransferPoint:
    """One run of a transfer study."""

    name: str
    experiment: Experiment
    arm: str
    width: int
    learning_rate: float
    seed: int


def transfer_points(transfer: Transfer) -> tuple[TransferPoint, ...]:
    """Every run of the study."""
    made = []
    for arm, build in transfer.arms.items():
        for width in transfer.widths:
            base = build(width)
            for rate in transfer.learning_rates:
                for offset in range(transfer.seeds):
                    seed = base.train.seed + offset
                    experiment = dataclasses.replace(
                        base,
                        optimizer=dataclasses.replace(base.optimizer, peak_lr=rate),
                        train=dataclasses.replace(base.train, seed=seed),
                    )
                    name = f"{arm}/width={width}/lr={rate:g}" + (f"/seed={seed}" if transfer.seeds > 1 else "")
                    made.append(
                        TransferPoint(
                            name=name, experiment=experiment, arm=arm, width=width, learning_rate=rate, seed=seed
                        )
                    )
    return tuple(made)


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of one width."""

    grid_rate: float | None
    """Of the rates that were tried; None where no run was finished."""
    grid_loss: float | None
    rate: float | None
    """Of the parabola; None where the best is at an end of the grid."""


def optimum(rates: Sequence[float], losses: Sequence[float | None]) -> Optimum:
    """The best rate by a parabola in log rate through the best of the grid and its neighbours.

    Args:
        rates: ascending.
        losses: None for runs that diverged or were not finished: worse than any other.
    """
    known = [(loss, place) for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    if not known:
        return Optimum(grid_rate=None, grid_loss=None, rate=None)
    best, place = min(known)
    rate = None
    if 0 < place < len(rates) - 1:
        left, right = losses[place - 1], losses[place + 1]
        if left is not None and right is not None and max(left, right) > best:
            x = np.log(rates[place - 1 : place + 2])
            c2, c1, _ = np.polyfit(x - x[1], [left, best, right], 2)
            rate = math.exp(x[1] - c1 / (2 * c2))
        else:  # a neighbour diverged: there is a floor, but no parabola
            rate = rates[place]
    return Optimum(grid_rate=rates[place], grid_loss=best, rate=rate)


def drift(widths: Sequence[int], optima: Sequence[Optimum]) -> float | None:
    """Slope of log best rate against log width; None where fewer than two widths have one."""
    known = [(math.log(width), math.log(best.rate)) for width, best in zip(widths, optima, strict=True) if best.rate]
    if len(known) < 2:
        return None
    xs, ys = zip(*known, strict=True)
    return float(np.polyfit(xs, ys, 1)[0])


def regret(rates: Sequence[float], narrow: Optimum, wide: Sequence[float | None]) -> float | None:
    """What the widest model loses by the narrowest one's best rate; None where that run has no loss."""
    best = optimum(rates, wide).grid_loss
    if narrow.grid_rate is None or best is None:
        return None
    there = wide[list(rates).index(narrow.grid_rate)]
    return None if there is None else there - best


def over_seeds(values: Sequence[float | None], level: float) -> dict[str, float | list[float | None] | None]:
    """Mean over the seeds, and Student's interval where there are two or more."""
    known = [value for value in values if value is not None]
    if not known:
        return {"value": None, "interval": None}
    mean = float(np.mean(known))
    if len(known) < 2:
        return {"value": mean, "interval": None}
    from scipy import stats

    half = float(stats.t.ppf(0.5 + level / 2, len(known) - 1)) * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return {"value": mean, "interval": [mean - half, mean + half]}
