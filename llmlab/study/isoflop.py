"""IsoFLOP profiles (Hoffmann et al. 2022, 2203.15556, approach 2): the best size for a budget, without a law.

For a budget C, models of several sizes are trained for as many tokens as C pays for. Too small a model cannot use so
many tokens, too large a one sees too few: the loss against log N is a valley, near its floor a parabola, whose minimum
is N*(C). Minima over several budgets give the power law N* = k C^a by a straight line in logs, and D* likewise.

Against the parametric fit this assumes nothing about the loss far from the optimum, and it needs more runs: three sizes
a budget at least, on both sides of the minimum. A minimum that lies outside of the sizes that were trained is an
extrapolation of a parabola; it is told as such and left out of the power law.

Intervals come from a residual bootstrap: the runs' deviations from their parabolas, inflated for the three parameters
of each, are drawn anew and everything is fitted again. With exactly three sizes everywhere there are no deviations to
draw, and no intervals.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from llmlab.study.laws import Cost, Vector

_LEAST_SIZES = 3


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One budget: losses of models of several sizes, and the valley's floor."""

    flops: float
    parameters: Vector
    losses: Vector
    curve: tuple[float, float, float]
    """loss = c2 x^2 + c1 x + c0 with x = log N."""

    @classmethod
    def fit(cls, flops: float, parameters: Vector, losses: Vector) -> "Profile":
        """The parabola by least squares.

        Raises:
            ValueError: fewer than three different sizes.
        """
        if (found := len(np.unique(parameters))) < _LEAST_SIZES:
            raise ValueError(f"a parabola needs {_LEAST_SIZES} sizes, and the budget of {flops:.3g} FLOPs has {found}")
        x = np.log(parameters)
        centre = float(np.mean(x))
        c2, c1, c0 = map(float, np.polyfit(x - centre, losses, 2))
        return cls(
            flops=flops,
            parameters=parameters,
            losses=losses,
            curve=(c2, c1 - 2 * c2 * centre, c0 - c1 * centre + c2 * centre**2),
        )

    def at(self, parameters: Vector | float) -> Vector | float:
        """The parabola's loss."""
        x = np.log(parameters)
        c2, c1, c0 = self.curve
        return c2 * x**2 + c1 * x + c0

    @property
    def optimum(self) -> float | None:
        """N*: where the parabola is least; None where it has no floor."""
        c2, c1, _ = self.curve
        if c2 <= 0 or abs(c1 / (2 * c2)) > 200:
            return None
        return math.exp(-c1 / (2 * c2))

    @property
    def inside(self) -> bool:
        """Whether the minimum lies between the smallest and the largest size."""
        best = self.optimum
        return best is not None and float(np.min(self.parameters)) <= best <= float(np.max(self.parameters))


@dataclass(frozen=True, kw_only=True)
class Power:
    """y = k C^exponent."""

    k: float
    exponent: float

    @classmethod
    def fit(cls, flops: list[float], values: list[float]) -> "Power":
        """Least squares in logs. Raises ValueError for fewer than two budgets."""
        if len(set(flops)) < 2:
            raise ValueError(
                f"a power law needs two budgets with a minimum among their sizes, and has {len(set(flops))}"
            )
        exponent, intercept = np.polyfit(np.log(flops), np.log(values), 1)
        return cls(k=float(np.exp(intercept)), exponent=float(exponent))

    def at(self, flops: float) -> float:
        """The value for a budget."""
        return self.k * flops**self.exponent


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """N*(C) and D*(C) from the profiles' minima."""

    parameters: Power
    tokens: Power

    @classmethod
    def fit(cls, profiles: list[Profile], cost: Cost) -> "Frontier":
        """Over the profiles whose minimum lies inside. Raises ValueError for fewer than two."""
        used = [profile for profile in profiles if profile.inside]
        flops = [profile.flops for profile in used]
        best = [float(profile.optimum or 0.0) for profile in used]
        tokens = [cost.tokens(c, n) for c, n in zip(flops, best, strict=True)]
        return cls(parameters=Power.fit(flops, best), tokens=Power.fit(flops, tokens))


def bootstrap(profiles: list[Profile], cost: Cost, resamples: int, *, seed: int = 0) -> list[Frontier]:
    """Frontiers of runs whose residuals were drawn anew; [] where the parabolas leave none.

    A resample whose minima lie outside the sizes for all but one budget has no frontier and is left out.
    """
    random = np.random.default_rng(seed)
    pools = [_residuals(profile) for profile in profiles]
    pool = np.concatenate(pools) if pools else np.zeros(0)
    if not np.any(pool):
        return []
    frontiers = []
    for _ in range(resamples):
        again = []
        for profile in profiles:
            noise = random.choice(pool, len(profile.losses))
            again.append(
                Profile.fit(profile.flops, profile.parameters, np.asarray(profile.at(profile.parameters)) + noise)
            )
        try:
            frontiers.append(Frontier.fit(again, cost))
        except ValueError:
            continue
    return frontiers


def _residuals(profile: Profile) -> Float64[np.ndarray, " n"]:
    """Deviations from the parabola, as large as those of runs that it was not fitted to; none of exact fits."""
    number = len(profile.losses)
    if number <= _LEAST_SIZES:
        return np.zeros(0)
    residuals = profile.losses - np.asarray(profile.at(profile.parameters))
    return residuals * math.sqrt(number / (number - _LEAST_SIZES))
