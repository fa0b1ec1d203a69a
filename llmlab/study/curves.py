"""Numbers of whole curves: steps to a target, the speed-up, bands over seeds, and sensitivity to the learning rate.

Steps to target   The step at which a curve first reaches a target, between two evaluations by linear interpolation.
                  Lies when curves are noisy (the first crossing is then a lucky one, earlier than the level it stands
                  for) and when the learning rate decays: a run planned for fewer steps would have been lower there.
Speed-up          Steps of the baseline over steps of the variant, per seed; over seeds the geometric mean, so that
                  twice as fast and half as fast cancel. A seed that never reaches the target gives a bound, not a
                  number. Equal steps are not equal time: multiply by the seconds per step before claiming any.
Band              Mean over seeds at each step, and an interval for it. Pointwise: at some of many steps it misses the
                  truth. Two bands that overlap can belong to arms that differ in every seed, since the band keeps what
                  the pairing cancels. Where a curve has ended (a diverged run), the mean goes on over the survivors
                  and looks better than it is: `count` tells.
Sensitivity       How much is lost, on average over a range of learning rates, by not using the best one (Wortsman et
                  al. 2023, 2309.14322, section 2.2): mean over rates of min(loss, initial loss) - best loss, in the
                  loss's unit. Clipping at the loss before training counts a diverged run as having learnt nothing. It
                  depends on the range, so compare arms on the same grid, evenly spaced in log rate, that brackets the
                  best rate of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from llmlab.study.paired import bca_interval, check_level, special

Curve = tuple[np.ndarray, np.ndarray]
"""(steps, increasing; the metric's values at them), two arrays of one length."""


@dataclass(frozen=True)
class StepsToTarget:
    """When each seed's curve first reached the target."""

    target: float
    """The value to reach, in the metric's unit."""
    steps: tuple[float | None, ...]
    """The interpolated step of each curve; None where it never got there."""
    last: tuple[float, ...]
    """Each curve's last step, which a curve that never got there has exceeded."""
    reached: int
    """How many curves got there."""
    mean: float | None
    """The mean step, where all curves got there; the mean of a lucky part would flatter."""


@dataclass(frozen=True)
class SpeedUp:
    """How many times fewer steps the variant needs for the same target."""

    ratio: float | None
    """Geometric mean over seeds of baseline steps / variant steps; above 1 the variant is faster. See `bound`."""
    interval: tuple[float, float] | None
    """BCa bootstrap interval over seeds (pairs resampled); None for a bound, or a single seed."""
    bound: Literal["exact", "at least", "at most", "unknown"]
    """Whether the ratio is a number; "at least" where some baseline runs never got there, "at most" where variants."""
    baseline: StepsToTarget
    """The baseline's steps."""
    variant: StepsToTarget
    """The variant's steps."""


@dataclass(frozen=True)
class Band:
    """A mean curve over seeds with an interval at each step."""

    steps: Float[np.ndarray, "T"]
    """Every step at which any curve has a value."""
    mean: Float[np.ndarray, "T"]
    """The mean over the curves that reach the step (the median for the quantile band)."""
    low: Float[np.ndarray, "T"]
    """Lower end; NaN where a single curve is left, whose spread nobody knows."""
    high: Float[np.ndarray, "T"]
    """Upper end, likewise."""
    count: Int[np.ndarray, "T"]
    """How many curves the step rests on."""


@dataclass(frozen=True)
class LearningRateSensitivity:
    """What a wrong learning rate costs."""

    value: float
    """Mean over the rates of the clipped loss, less the best; in the loss's unit, at least 0."""
    best_rate: float
    """The rate with the lowest loss."""
    best_loss: float
    """Its loss: over seeds, the mean."""
    at_edge: bool
    """Whether the best rate is the grid's first or last: then the range does not bracket it, and should be widened."""


def checked(curve: Curve) -> Curve:
    """The curve up to its first value that is not finite, as float64; raises ValueError if it is malformed."""
    steps, values = (np.asarray(part, dtype=np.float64) for part in curve)
    if steps.ndim != 1 or steps.shape != values.shape or steps.size == 0:
        raise ValueError(
            f"a curve of {steps.shape} steps and {values.shape} values; give two 1-D arrays of one length, not empty"
        )
    if not (np.diff(steps) > 0).all():
        raise ValueError("the steps of a curve must increase; cut a resumed run back to its checkpoint")
    wrong = ~np.isfinite(values)
    end = int(wrong.argmax()) if wrong.any() else values.size
    return steps[:end], values[:end]


def steps_to_target(
    curves: Sequence[Curve], target: float, direction: Literal["lower", "higher"] = "lower"
) -> StepsToTarget:
    """When each curve first reaches the target.

    Args:
        curves: (steps, values) of each seed; lengths may differ. A curve ends at its first value that is not finite.
        target: The value to reach, in the metric's unit; usually the baseline's final mean.
        direction: "lower" where a curve reaches the target from above.

    Raises:
        ValueError: No curve, a malformed one, or a target that is not finite.
    """
    if not curves:
        raise ValueError("no curve to look for the target in; give one for each seed")
    if not math.isfinite(target):
        raise ValueError(f"target={target} must be finite")
    steps = tuple(_first(*checked(curve), target, direction) for curve in curves)
    reached = [step for step in steps if step is not None]
    return StepsToTarget(
        target=float(target),
        steps=steps,
        last=tuple(float(np.asarray(curve[0])[-1]) for curve in curves),
        reached=len(reached),
        mean=float(np.mean(reached)) if len(reached) == len(steps) else None,
    )


def _first(steps: np.ndarray, values: np.ndarray, target: float, direction: str) -> float | None:
    """The step at which the values, joined by straight lines, first are at the target."""
    there = values <= target if direction == "lower" else values >= target
    if not there.any():
        return None
    index = int(there.argmax())
    if index == 0:
        return float(steps[0])
    before, after = values[index - 1], values[index]
    return float(steps[index - 1] + (steps[index] - steps[index - 1]) * (target - before) / (after - before))


def speed_up(
    baseline: Sequence[Curve],
    variant: Sequence[Curve],
    target: float,
    direction: Literal["lower", "higher"] = "lower",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> SpeedUp:
    """How many times fewer steps the variant needs, with a paired bootstrap interval on the log ratio.

    Where one arm's curve never reaches the target, its last step stands in and the ratio becomes a bound; where both of
    a seed's curves fall short, or some seeds bound it from below and others from above, nothing is known.

    Args:
        baseline: (steps, values) of the baseline, one for each seed.
        variant: The variant's, in the same order of seeds.
        target: The value to reach, in the metric's unit.
        direction: "lower" where a curve reaches the target from above.
        level: Of the interval.
        resamples: Bootstrap resamples.
        seed: The resampling's.

    Raises:
        ValueError: Unequal numbers of curves, malformed curves, a target already reached at step 0.
    """
    check_level("level", level)
    if len(baseline) != len(variant):
        raise ValueError(f"{len(baseline)} baseline and {len(variant)} variant curves; give one of each for every seed")
    first, second = steps_to_target(baseline, target, direction), steps_to_target(variant, target, direction)
    pairs = list(zip(first.steps, second.steps, strict=True))
    slow_baseline = any(b is None for b, _ in pairs)
    slow_variant = any(v is None for _, v in pairs)
    if slow_baseline and slow_variant:
        return SpeedUp(None, None, "unknown", first, second)
    ratios = [
        ((last_b if b is None else b), (last_v if v is None else v))
        for (b, v), last_b, last_v in zip(pairs, first.last, second.last, strict=True)
    ]
    if any(b <= 0 or v <= 0 for b, v in ratios):
        raise ValueError(f"target={target:g} is reached at step 0 already; choose one that takes training")
    logs = np.log([b / v for b, v in ratios])
    ratio = float(np.exp(logs.mean()))
    if slow_baseline or slow_variant:
        return SpeedUp(ratio, None, "at least" if slow_baseline else "at most", first, second)
    interval = None
    if len(logs) > 1:
        low, high = bca_interval(logs, level, resamples, seed)
        interval = (math.exp(low), math.exp(high))
    return SpeedUp(ratio, interval, "exact", first, second)


def band(curves: Sequence[Curve], level: float = 0.95, method: Literal["t", "quantile"] = "t") -> Band:
    """The mean of the curves at every step with an interval over seeds.

    Args:
        curves: (steps, values) of each seed; lengths and steps may differ. Between its own steps a curve is joined by
            straight lines; outside them, and from its first value that is not finite, it does not count.
        level: Of the interval.
        method: "t": Student's interval for the mean. "quantile": the median, and the central `level` of the curves
            themselves: where a further seed would fall, which does not shrink as seeds are added.

    Raises:
        ValueError: No curve, a malformed one, or none that starts with a finite value.
    """
    check_level("level", level)
    kept = [curve for curve in map(checked, curves) if curve[0].size]
    if not kept:
        raise ValueError(f"none of {len(curves)} curves has a finite value to begin with; there is nothing to draw")
    steps = np.unique(np.concatenate([curve[0] for curve in kept]))
    rows = np.stack([np.interp(steps, *curve, left=np.nan, right=np.nan) for curve in kept])
    count = np.isfinite(rows).sum(axis=0)
    covered = count > 0  # between a curve that ended and one that starts later there is nothing
    steps, rows, count = steps[covered], rows[:, covered], count[covered]
    if method == "quantile":
        low, mean, high = np.nanquantile(rows, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
    else:
        mean = np.nanmean(rows, axis=0)
        freedom = np.maximum(count - 1, 1)
        sd = np.sqrt(np.nansum((rows - mean) ** 2, axis=0) / freedom)
        half = special().stdtrit(freedom, (1 + level) / 2) * sd / np.sqrt(count)
        low, high = mean - half, mean + half
    alone = count == 1
    return Band(steps, mean, np.where(alone, np.nan, low), np.where(alone, np.nan, high), count)


def learning_rate_sensitivity(
    rates: Float[np.ndarray, "R"],
    losses: Float[np.ndarray, "R"] | Float[np.ndarray, "R S"],
    initial_loss: float | None = None,
) -> LearningRateSensitivity:
    """The mean over learning rates of min(loss, initial loss) less the best: Wortsman et al. 2023, section 2.2.

    Args:
        rates: The grid, at least two increasing positive rates. Every rate counts the same, so space them evenly in
            log rate.
        losses: Final loss at each rate, or at each rate and seed (averaged over seeds after clipping). Lower is better.
        initial_loss: The loss before training, at which losses are clipped and which stands for those that are not
            finite. None: no clipping, and all losses must be finite.

    Raises:
        ValueError: A grid or losses that do not fit together, or a loss that is not finite without an initial loss.
    """
    if rates.size < 2 or not (rates[0] > 0 and (np.diff(rates) > 0).all()):
        raise ValueError(f"rates={rates.tolist()} must be at least two positive rates in increasing order")
    table = losses.astype(np.float64).reshape(rates.size, -1)
    wrong = ~np.isfinite(table)
    if wrong.any() and initial_loss is None:
        raise ValueError(
            f"{int(wrong.sum())} of {table.size} losses are not finite; give initial_loss, at which diverged runs count"
        )
    if initial_loss is not None:
        table = np.minimum(np.where(wrong, np.inf, table), initial_loss)
    means = table.mean(axis=1)
    best = int(means.argmin())
    return LearningRateSensitivity(
        value=float(means.mean() - means[best]),
        best_rate=float(rates[best]),
        best_loss=float(means[best]),
        at_edge=best in (0, rates.size - 1),
    )
