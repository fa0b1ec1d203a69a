"""What a study can see: power, the minimum detectable effect, and the seeds that would settle a claim.

The power of a test is the chance that it rejects when the truth is as supposed. With n differences of mean mu and
standard deviation sigma, the t statistic is noncentral: a Gaussian of mean sqrt(n) mu / sigma and variance 1, over an
independent u = sqrt(chi2 / (n - 1)). Given u, every rejection region here is an interval of that Gaussian, so

    power = integral over u of [Phi(upper(u)) - Phi(lower(u))] density(u) du

which Gauss-Legendre quadrature computes to about 1e-9 for one- and two-sided tests and for the pair of one-sided tests
of equivalence alike (Owen 1965, "A special case of a bivariate noncentral t-distribution").

All of it stands on sigma, estimated from the same few seeds: with n = 5 the estimate is 0.35 to 1.67 times sigma in 95%
of studies, and the seeds needed go with its square. Take such a number as an order of magnitude. And power computed at
the observed mean says nothing that the p-value does not (Hoenig and Heisey 2001, "The abuse of power"): it plans the
next study, it does not excuse this one.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float

from llmlab.study.paired import Alternative, Claim, check_level, check_margin, differences, orient, special

MOST_SEEDS = 10_000
"""Beyond so many seeds the answer is that no study would settle it."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)


def _over_spread(freedom: int, probability: Callable[[np.ndarray], np.ndarray], most: float = math.inf) -> float:
    """The mean of probability(u) over u = sqrt(chi2_freedom / freedom), u at most `most`."""
    low, high = (math.sqrt(float(special().chdtri(freedom, tail)) / freedom) for tail in (1 - 1e-14, 1e-14))
    high = min(high, most)
    if high <= low:
        return 0.0
    u = low + (high - low) * (_NODES + 1) / 2
    half = freedom / 2
    density = np.exp(math.log(2) + half * math.log(half) - math.lgamma(half) + (freedom - 1) * np.log(u) - half * u * u)
    return float((high - low) / 2 * (_WEIGHTS * density * probability(u)).sum())


def t_power(effect: float, n: int, alpha: float, sided: Literal[1, 2] = 1) -> float:
    """The power of Student's one-sample test of "mean <= 0" (or "mean = 0") for n values.

    Args:
        effect: The true mean in standard deviations; towards the alternative is positive.
        n: Number of values, at least 2.
        alpha: Level of the test.
        sided: 1 for the one-sided test, 2 for the two-sided.
    """
    ndtr = special().ndtr
    critical = float(special().stdtrit(n - 1, 1 - alpha / sided))
    shift = math.sqrt(n) * effect
    tails = (
        (lambda u: ndtr(shift - critical * u))
        if sided == 1
        else (lambda u: ndtr(shift - critical * u) + ndtr(-shift - critical * u))
    )
    return _over_spread(n - 1, tails)


def equivalence_power(effect: float, margin: float, n: int, alpha: float) -> float:
    """The power of the two one-sided tests, for a true mean and a margin in standard deviations."""
    ndtr = special().ndtr
    critical = float(special().stdtrit(n - 1, 1 - alpha))
    upper, lower = math.sqrt(n) * (margin - effect), -math.sqrt(n) * (margin + effect)
    # Both tests reject while critical u is below sqrt(n) margin
    return _over_spread(
        n - 1, lambda u: ndtr(upper - critical * u) - ndtr(lower + critical * u), math.sqrt(n) * margin / critical
    )


def claim_power(mean: float, sd: float, n: int, claim: Claim, margin: float, alpha: float) -> tuple[float, float]:
    """(chance of *supported*, chance of *refuted*) for a study of n seeds.

    Args:
        mean: The true worsening, in the metric's unit.
        sd: The true standard deviation of the paired differences, above 0.
        n: Seeds, at least 2.
        claim: What is said about the variant.
        margin: The claim's margin, in the metric's unit.
        alpha: Level of each one-sided test.
    """
    if claim == "equal":
        outside = t_power((mean - margin) / sd, n, alpha / 2) + t_power((-mean - margin) / sd, n, alpha / 2)
        return equivalence_power(mean / sd, margin / sd, n, alpha), outside
    gap = (margin - mean) / sd if claim != "better" else (-margin - mean) / sd
    below, above = t_power(gap, n, alpha), t_power(-gap, n, alpha)
    return (above, below) if claim == "worse" else (below, above)


def minimum_detectable_effect(
    d: Float[np.ndarray, "N"], alpha: float = 0.05, power: float = 0.8, alternative: Alternative = "two-sided"
) -> float:
    """The smallest true difference that a study with these seeds and this spread would find with chance `power`.

    In the metric's unit; the alternative hypothesis is two-sided, or one-sided where "less" or "greater" (the sign of
    the effect is then understood). Effects below it may exist unseen. 0 where all differences are equal. Raises
    ValueError for fewer than two differences, or any that is not finite, or a power that is not above alpha.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    if power <= alpha:
        raise ValueError(f"power={power} must be above alpha={alpha}: no effect at all is found that often")
    d = differences(d, least=2)
    if np.ptp(d) == 0:
        return 0.0
    sided: Literal[1, 2] = 2 if alternative == "two-sided" else 1
    low, high = 0.0, 1.0
    while t_power(high, d.size, alpha, sided) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_power(middle, d.size, alpha, sided) < power else (low, middle)
    return high * float(d.std(ddof=1))


def seeds_to_settle(
    d: Float[np.ndarray, "N"],
    claim: Claim,
    margin: float,
    alpha: float = 0.05,
    power: float = 0.8,
    direction: Literal["lower", "higher"] = "lower",
) -> int | None:
    """How many seeds a new study needs to settle the claim with chance `power`, if the truth is what these seeds show.

    The smallest n whose chance of *supported*, or of *refuted*, is at least `power` when the differences are Gaussian
    with the observed mean and standard deviation. None where no number up to 10,000 would do: the observed mean lies on
    the claim's boundary. Equal differences are already settled: their own number. Raises ValueError for fewer than two
    differences, or any that is not finite.

    Args:
        d: Differences variant - baseline, one per seed.
        claim: What is said about the variant.
        margin: The claim's margin, in the metric's unit.
        alpha: Level of the study; divide by the number of variants for Holm's first step.
        power: The chance asked for.
        direction: Whether a lower or a higher metric is better.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    check_margin(margin)
    worsening = orient(differences(d, least=2), direction)
    if np.ptp(worsening) == 0:
        return int(d.size)
    mean, sd = float(worsening.mean()), float(worsening.std(ddof=1))

    def settles(n: int) -> bool:
        return max(claim_power(mean, sd, n, claim, margin, alpha)) >= power

    most = 2
    while not settles(most):  # power grows with n
        if most >= MOST_SEEDS:
            return None
        most = min(2 * most, MOST_SEEDS)
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if settles(middle) else (middle, most)
    return most
