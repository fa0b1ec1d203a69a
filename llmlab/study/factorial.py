"""Effects and interactions of a full factorial: do the changes help each other, or the same way twice?

A factorial runs every combination of the factors' levels: with k factors of two levels, 2^k arms. Each arm then serves
every factor, so a main effect is as precise as if all runs had been spent on that factor alone, and interactions, which
one-at-a-time ablations cannot see, come free (Fisher 1935; Box, Hunter and Hunter 2005, chapter 5).

The first level of a factor is the baseline's. With y the mean of the metric in a cell and bars over the factors that a
term does not name:

    main effect of A = a                 y(a) - y(a0)                                     averaged over the others
    interaction of A = a and B = b       [y(a, b) - y(a0, b)] - [y(a, b0) - y(a0, b0)]    averaged over the others

and so on: an interaction of order j is the difference that one more factor makes to an interaction of order j - 1. It
is 0 where effects add up, and in the metric's unit. (Textbooks that code levels as -1 and +1 report half of this for
two factors; the p-values are the same.) These are the coefficients of the saturated linear model in the contrasts
"level - baseline".

Seeds are blocks: each contrast is computed within every seed, and its n values are tested by Student's t with n - 1
degrees of freedom. That asks nothing of the arms' variances, where a pooled error would ask that they be equal.

When it lies: with an interaction present a main effect is an average over levels that nobody may want to use; read the
cells. And there are 2^k - 1 terms: the p-values carry Holm's correction over all of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from llmlab.study.paired import holm, mean_difference, paired_t, t_interval


@dataclass(frozen=True)
class Effect:
    """One term of a factorial."""

    term: str
    """The levels that it compares with the baseline's: "norm=layernorm", "norm=layernorm x ffn=swiglu"."""
    levels: dict[str, str]
    """The same as {factor: level}; one entry is a main effect, more are an interaction."""
    estimate: float
    """The effect on the metric, in its unit: the mean over seeds."""
    interval: tuple[float, float] | None
    """Student's interval over seeds; None for a single seed."""
    p: float | None
    """Two-sided paired t test of no effect; None for a single seed."""
    p_holm: float | None
    """After Holm's correction over all terms of the table."""


def interactions(
    cells: Float[np.ndarray, "*L N"], factors: Mapping[str, Sequence[str]], level: float = 0.95
) -> list[Effect]:
    """All main effects and interactions, main effects first.

    Args:
        cells: The metric by level of the first factor, of the second, ..., and by seed on the last axis.
        factors: The levels of each factor, in the order of the axes; the first level is the baseline's.
        level: Of the intervals.

    Raises:
        ValueError: Cells and factors that do not fit together, a factor of one level, a cell that is not finite.
    """
    shape = tuple(len(levels) for levels in factors.values())
    if cells.shape[:-1] != shape or not shape or min(shape) < 2 or cells.shape[-1] == 0:
        raise ValueError(
            f"cells of shape {cells.shape} for factors { ({name: list(levels) for name, levels in factors.items()}) }; "
            f"give one axis of at least two levels for each factor, then one of seeds"
        )
    missing = np.argwhere(~np.isfinite(cells))
    if missing.size:
        places = [
            ", ".join(f"{name}={levels[index]}" for (name, levels), index in zip(factors.items(), place, strict=False))
            + f", seed number {place[-1]}"
            for place in missing.tolist()
        ]
        raise ValueError(f"a factorial needs every cell; not finite: {'; '.join(places[:10])} ({len(places)} in all)")
    values = cells.astype(np.float64)
    effects = []
    for order in range(1, len(shape) + 1):
        for chosen in itertools.combinations(range(len(shape)), order):
            effects += _effects(values, chosen, factors, level)
    if values.shape[-1] == 1:
        return effects
    adjusted = holm(np.array([effect.p for effect in effects], dtype=np.float64)).tolist()
    return [Effect(e.term, e.levels, e.estimate, e.interval, e.p, p) for e, p in zip(effects, adjusted, strict=True)]


def _effects(
    values: np.ndarray, chosen: tuple[int, ...], factors: Mapping[str, Sequence[str]], level: float
) -> list[Effect]:
    """The effects of one set of factors: one for every choice of levels that are not the baseline's."""
    names = list(factors)
    contrasts = values
    for axis in range(values.ndim - 1):
        if axis in chosen:
            baseline = np.take(contrasts, [0], axis)
            contrasts = np.take(contrasts, range(1, contrasts.shape[axis]), axis) - baseline
        else:
            contrasts = contrasts.mean(axis=axis, keepdims=True)
    effects = []
    for place in np.ndindex(*contrasts.shape[:-1]):
        levels = {names[axis]: str(factors[names[axis]][place[axis] + 1]) for axis in chosen}
        by_seed = contrasts[place]
        several = by_seed.size > 1
        effects.append(
            Effect(
                term=" x ".join(f"{name}={chosen_level}" for name, chosen_level in levels.items()),
                levels=levels,
                estimate=mean_difference(by_seed),
                interval=t_interval(by_seed, level) if several else None,
                p=paired_t(by_seed) if several else None,
                p_holm=None,
            )
        )
    return effects
