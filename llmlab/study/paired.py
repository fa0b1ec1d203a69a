"""Tests and intervals for paired differences, one difference per seed.

With d_1 .. d_n the differences, m their mean and s their standard deviation (n - 1 in the denominator):

Student's t          t = (m - shift) / (s / sqrt(n)), n - 1 degrees of freedom (Student 1908). Exact when differences
                     are Gaussian. Lies when one seed in ten diverges: then s is the diverged seed and nothing else.
t interval           m +- t_quantile s / sqrt(n): the shifts that the two-sided test does not reject.
BCa bootstrap        Resample the n differences, take percentiles of the resampled means, moved for bias and skewness
                     (Efron 1987, "Better bootstrap confidence intervals"). No Gaussian assumed, but n differences hold
                     little of a distribution: of 95% intervals for Gaussian differences, 83% cover the truth at n = 5
                     and 89% at n = 10 (measured, 4,000 studies each). Read it for its asymmetry, and t for a decision.
Sign flips           If the arms were alike, each d_i would be as likely as -d_i. Compare the mean with its value under
                     all 2^n patterns of signs (Fisher 1935). Assumes symmetry alone, but cannot be smaller than 2^-n
                     one-sided: five seeds never give less than 0.03, four never reach 0.05.
Two one-sided tests  Equivalence (Schuirmann 1987): reject "mean <= -margin" and reject "mean >= margin", each at level
                     alpha. The p-value is the larger of the two. A failed difference test is no such evidence.
Holm                 For k variants, compare the smallest p with alpha/k, the next with alpha/(k - 1), and so on (Holm
                     1979). The chance of any false rejection is at most alpha, however the tests depend on each other:
                     they do, through the baseline that they share.

Differences that are all equal have no spread to measure. That is how identical arms look (all zero: a refactoring that
changed no bit), and the answer is then exact: the mean itself, p = 0 or 1. With a coarse metric (accuracy on 100
examples) it may be chance; use a finer one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Alternative = Literal["two-sided", "less", "greater"]
Claim = Literal["no worse", "equal", "better", "worse"]

EXACT_SIGN_FLIPS = 20
"""Up to so many differences all 2^n sign patterns are visited: a million, in about 10 ms."""
RANDOM_SIGN_FLIPS = 100_000
"""Patterns drawn beyond that; the standard error of p = 0.05 is then 0.0007."""


def special() -> Any:
    """scipy.special, imported on first use: it is an extra (`study`), and takes a tenth of a second."""
    try:
        import scipy.special
    except ImportError as error:
        raise ImportError("the statistics of studies need scipy: pip install 'llmlab[study]'") from error
    return scipy.special


def differences(d: Float[np.ndarray, "N"], least: int = 1) -> Float[np.ndarray, "N"]:
    """The differences as float64, checked: at least so many, and all of them finite."""
    if d.size < least:
        raise ValueError(
            f"{d.size} paired difference{'' if d.size == 1 else 's'}: the spread between seeds needs at least {least}; "
            f"run more seeds"
        )
    if not np.isfinite(d).all():
        raise ValueError(
            f"{int((~np.isfinite(d)).sum())} of {d.size} paired differences are not finite; a diverged seed counts, so "
            f"give it a value (the worst that the study saw) instead of leaving it out"
        )
    return d.astype(np.float64)


def check_level(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must lie between 0 and 1, such as {0.95 if name == 'level' else 0.05}")


def check_margin(margin: float) -> None:
    """Raises ValueError unless the margin is a finite number that is not negative."""
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(
            f"margin={margin} must be a finite number of at least 0, in the metric's unit; to claim an improvement "
            f"beyond a margin use claim='better'"
        )


def mean_difference(d: Float[np.ndarray, "N"]) -> float:
    """The mean of the differences, in the metric's unit. An average over seeds, not over corpora or model sizes."""
    d = differences(d)
    return float(d[0]) if np.ptp(d) == 0 else float(d.mean())


def t_interval(d: Float[np.ndarray, "N"], level: float = 0.95) -> tuple[float, float]:
    """Student's two-sided interval for the mean difference, in the metric's unit.

    Raises ValueError for fewer than two differences, or any that is not finite.
    """
    check_level("level", level)
    d = differences(d, least=2)
    mean = mean_difference(d)
    half = float(special().stdtrit(d.size - 1, (1 + level) / 2)) * standard_error(d)
    return mean - half, mean + half


def standard_error(d: Float[np.ndarray, "N"]) -> float:
    """The standard error s / sqrt(n) of the mean; exactly 0 when all differences are equal."""
    return 0.0 if np.ptp(d) == 0 else float(d.std(ddof=1)) / math.sqrt(d.size)


def bca_interval(
    d: Float[np.ndarray, "N"], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap interval for the mean difference (Efron 1987, section 3).

    The percentiles a are replaced by Phi(z0 + (z0 + z_a) / (1 - c (z0 + z_a))), where z0 = Phi^-1(share of resampled
    means below the observed one, ties counting half) and c = sum u^3 / (6 (sum u^2)^1.5), u = d - mean: the jackknife's
    acceleration, a sixth of the skewness of the mean. Deterministic: `seed` is the resampling's. Equal differences give
    the point. Raises ValueError for fewer than two differences, or any that is not finite.
    """
    check_level("level", level)
    d = differences(d, least=2)
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    rng = np.random.default_rng(seed)
    means = d[rng.integers(0, d.size, (resamples, d.size))].mean(axis=1)
    mean, centred = d.mean(), d - d.mean()
    # A resample that is a permutation of the data has its mean but for rounding: it is a tie, on neither side.
    tie = 1e-12 * np.abs(d).max()
    share = ((means < mean - tie).mean() + (means <= mean + tie).mean()) / 2
    share = np.clip(share, 0.5 / resamples, 1 - 0.5 / resamples)
    ndtr, ndtri = special().ndtr, special().ndtri
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    shifted = ndtri(share) + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(means, ndtr(ndtri(share) + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def paired_t(d: Float[np.ndarray, "N"], shift: float = 0.0, alternative: Alternative = "two-sided") -> float:
    """The p-value of Student's test that the mean difference is `shift`.

    "less": small where the mean is below the shift; "greater": above it. Raises ValueError for fewer than two
    differences, or any that is not finite.
    """
    d = differences(d, least=2)
    below, above = (float(one_sided_t(d, shift, side)) for side in ("less", "greater"))
    return {"less": below, "greater": above, "two-sided": min(1.0, 2 * min(below, above))}[alternative]


def one_sided_t(
    d: Float[np.ndarray, "*B N"], shift: float, alternative: Literal["less", "greater"]
) -> Float[np.ndarray, "*B"]:
    """One-sided p-values of many studies at once, each a row of at least two finite differences."""
    gap = d.mean(axis=-1) - shift if alternative == "less" else shift - d.mean(axis=-1)
    error = d.std(axis=-1, ddof=1) / math.sqrt(d.shape[-1])
    equal = np.ptp(d, axis=-1) == 0
    exact = d[..., 0] - shift if alternative == "less" else shift - d[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):  # rows of equal differences: taken from `exact` below
        p = special().stdtr(d.shape[-1] - 1, gap / error)
    return np.asarray(np.where(equal, np.where(exact < 0, 0.0, 1.0), p), dtype=np.float64)


def sign_flip(d: Float[np.ndarray, "N"], shift: float = 0.0, alternative: Alternative = "two-sided") -> float:
    """The p-value of the sign-flip permutation test that the differences are symmetric about `shift`.

    The share of sign patterns whose mean is at least as extreme as the observed one, which is itself among them: exact
    up to 20 differences, in O(2^n) time and memory; beyond, from 100,000 patterns drawn with a fixed seed, as
    (1 + hits) / (1 + drawn), which is still a valid p-value. `sign_flip_method(n)` says which.
    """
    d = differences(d) - shift
    if d.size <= EXACT_SIGN_FLIPS:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        extra = 0
    else:
        rng = np.random.default_rng(0)
        # In blocks, so that memory stays at 1,000 x n
        blocks = [rng.choice([-1.0, 1.0], (1000, d.size)) @ d for _ in range(RANDOM_SIGN_FLIPS // 1000)]
        sums, extra = np.concatenate(blocks), 1
    observed = d.sum()
    tie = 1e-12 * np.abs(d).sum()  # equal sums that were added in another order are equal
    extreme = {
        "less": sums <= observed + tie,
        "greater": sums >= observed - tie,
        "two-sided": np.abs(sums) >= abs(observed) - tie,
    }[alternative]
    return float((extreme.sum() + extra) / (sums.size + extra))


def sign_flip_method(n: int) -> str:
    """How `sign_flip` counts for n differences, in words for a report."""
    if n <= EXACT_SIGN_FLIPS:
        return f"exact, {2**n:,} sign patterns"
    return f"Monte Carlo, {RANDOM_SIGN_FLIPS:,} sign patterns"


def equivalence(d: Float[np.ndarray, "N"], margin: float) -> float:
    """The p-value of Schuirmann's two one-sided tests: small where the mean difference lies within +- margin.

    It is below alpha exactly where the t interval at level 1 - 2 alpha lies within the margins (90% for 0.05).
    """
    check_margin(margin)
    return max(paired_t(d, margin, "less"), paired_t(d, -margin, "greater"))


def holm(p_values: Float[np.ndarray, "K *T"]) -> Float[np.ndarray, "K *T"]:
    """Holm's adjusted p-values over the first axis: reject where the adjusted value is at most alpha.

    The j-th smallest of K becomes max over i <= j of (K - i + 1) p_(i), at most 1. Further axes are separate families.
    """
    count = p_values.shape[0]
    if count == 0:
        return p_values.astype(np.float64)
    order = np.argsort(p_values, axis=0, kind="stable")
    factors = np.arange(count, 0, -1.0).reshape(count, *(1,) * (p_values.ndim - 1))
    ordered = np.maximum.accumulate(np.take_along_axis(p_values, order, axis=0) * factors, axis=0)
    adjusted = np.empty(p_values.shape)
    np.put_along_axis(adjusted, order, np.minimum(ordered, 1.0), axis=0)
    return adjusted


def claim_p_values(
    worsening: Float[np.ndarray, "*B N"], claim: Claim, margin: float
) -> tuple[Float[np.ndarray, "*B"], Float[np.ndarray, "*B"]]:
    """(p for the claim, p against it) of many studies at once, by one-sided paired t tests.

    With w the worsening (variant - baseline where lower is better) and m the margin:

        claim       says          p for it rejects      p against it rejects
        no worse    w <= m        w >= m                w <= m
        equal       |w| <= m      |w| >= m (TOST)       |w| <= m (either side, Bonferroni)
        better      w < -m        w >= -m               w <= -m
        worse       w > m         w <= m                w >= m

    Args:
        worsening: One study a row, at least two finite values each.
        claim: What is said about the variant.
        margin: m >= 0, in the metric's unit.
    """
    check_margin(margin)
    return combine(claim, margin, lambda shift, side: one_sided_t(worsening, shift, side))


def bonferroni(first: Float[np.ndarray, "*B"], second: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """The p-value of a hypothesis that either of two tests may reject."""
    return np.asarray(np.minimum(1.0, 2 * np.minimum(first, second)))


def combine(
    claim: Claim,
    margin: float,
    test: Callable[[float, Literal["less", "greater"]], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(p for, p against) a claim, from a function that gives the p-values of the one-sided test(shift, side)."""
    if claim == "equal":
        return (
            np.asarray(np.maximum(test(margin, "less"), test(-margin, "greater"))),
            bonferroni(test(margin, "greater"), test(-margin, "less")),
        )
    if claim == "better":
        return test(-margin, "less"), test(-margin, "greater")
    below, above = test(margin, "less"), test(margin, "greater")
    return (below, above) if claim == "no worse" else (above, below)


def orient(d: Float[np.ndarray, "*B N"], direction: Literal["lower", "higher"]) -> Float[np.ndarray, "*B N"]:
    """Differences variant - baseline as a worsening: their sign is turned where a higher metric is better."""
    return d if direction == "lower" else -d


def holds_exactly(claim: Claim, worsening: float, margin: float) -> bool:
    """Whether the claim is true of a worsening that is known exactly."""
    return {
        "no worse": worsening <= margin,
        "equal": abs(worsening) <= margin,
        "better": worsening < -margin,
        "worse": worsening > margin,
    }[claim]


def check_equal_lengths(rows: Sequence[np.ndarray]) -> None:
    """Raises ValueError unless all comparisons have the same number of seeds."""
    lengths = sorted({row.shape[-1] for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"comparisons have {lengths} seeds; seeds are added to all arms together, so give equal numbers"
        )
