"""Looking after every seed without being fooled: anytime-valid tests and confidence sequences.

A test at level 0.05 is right in 95% of studies if it is looked at once. Looked at after each of 3 to 20 seeds, and
stopped at the first p <= 0.05, it calls out a difference between identical arms in almost one study of four (measured:
23% of A/A studies, two-sided). A confidence sequence holds at all numbers of seeds at once:

    P(for every n: low_n <= truth <= high_n) >= level

so one may add seeds until the verdict is settled, for whatever reason, and stop. The price is width: at 5 seeds the 95%
confidence sequence is 1.9 times as wide as the t interval, at 20 seeds 1.7 times.

How. Let x_i = d_i - shift and suppose the mean of x is 0. Bet on a standardised mean theta = mean / sd drawn from a
Gaussian of mean 0 and variance 1 / c^2, and let the unknown sd be integrated out with the scale-invariant weight 1/sd
on both sides. With S = sum x, V = sum x^2 and A = V - S^2 / (n + c^2), the ratio of the marginal likelihoods is

    E_n = c / sqrt(n + c^2)  (V / A)^(n/2)

a nonnegative martingale that starts at E_1 = 1, whatever the sd (Lai 1976; Wang and Ramdas 2023, 2310.03722, section
4). By Ville's inequality it ever reaches 1/alpha with chance at most alpha, and 1 / max E is a p-value at all times.
Bets on theta > 0 alone serve the one-sided tests; their integral has a closed form too, with F_n the distribution
function of Student's t with n degrees of freedom:

    E+_n = 2 E_n F_n( S sqrt(n) / sqrt((n + c^2) A) )

It grows with S at every n, so a mean below 0 only makes it smaller: it tests "mean <= 0" as a whole (the same holds for
any bet on theta > 0: Gruenwald and Koolen 2025, 2502.04208). The confidence sequence inverts E; verdicts use E+.

c = 1/2: bets on differences of about 2 sd, where a study of few seeds can succeed. Measured at alpha = 0.05, a verdict
from the third seed on: effects of 1, 2, 3 and 5 sd beyond the margin are settled after a median of 10, 5, 4 and 4
seeds; of 0.7 sd, within 20 seeds in 58% of studies.

When it lies. Differences must be independent and Gaussian; everything else (their sd, the number of looks, the reason
to stop) is free. Share of 20,000 A/A studies of 3 to 20 seeds, alpha = 0.05, margin 0, looked at after each seed, that
ever reach a false verdict of one given kind, with one variant:

    Gaussian 2.5%    Student's t, 5 degrees of freedom 2.1%, 3 degrees 1.8%    one value in ten spread 10 times 1.5%
    exponential (skewness 2): 17% towards its mode, 0.3% towards its tail      lognormal (skewness 6): 27% and 0.1%

Heavy tails make it cautious. Skewed differences break it, as they break the t test at such n; but the difference of two
arms that are skewed alike is symmetric (three variants with exponential arms: 2.0% for both kinds together).
"""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float

from llmlab.study.paired import (
    Claim,
    check_equal_lengths,
    check_level,
    check_margin,
    combine,
    differences,
    holds_exactly,
    holm,
    mean_difference,
    orient,
    special,
)
from llmlab.study.verdict import (
    Decision,
    Direction,
    Verdict,
    check_alpha,
    in_words,
    per_variant,
    worsening,
)

C_SQUARED = 0.25
"""c^2 of the module's formulae: bets on standardised means of about 1 / c = 2."""
MOST_SEEDS = 200
"""Beyond so many seeds `seeds_to_settle_sequentially` gives up."""


def log_e_values(x: Float[np.ndarray, "*B N"], sided: Literal[1, 2] = 1) -> Float[np.ndarray, "*B N"]:
    """log E_n after each of the first n values: evidence against "mean = 0" (sided 2) or "mean <= 0" (sided 1).

    Args:
        x: One study a row, in the order in which its seeds were run.
        sided: 1 for the bet on positive means, 2 for the bet on either sign.

    Returns:
        Natural logarithms. 0 after the first value of the two-sided bet, and while all values are zero.
    """
    n = np.arange(1, x.shape[-1] + 1)
    sums, squares = np.cumsum(x, axis=-1), np.cumsum(x * x, axis=-1)
    silent = squares == 0
    squares = np.where(silent, 1.0, squares)
    rest = squares - sums * sums / (n + C_SQUARED)
    log_e = 0.5 * np.log(C_SQUARED / (n + C_SQUARED)) + n / 2 * np.log(squares / rest)
    if sided == 1:
        with np.errstate(divide="ignore"):  # a mean far below 0 has evidence 0: its logarithm is -inf
            log_e = log_e + np.log(2 * special().stdtr(n, sums * np.sqrt(n / ((n + C_SQUARED) * rest))))
    return np.where(silent, 0.0, log_e)


def running_p_values(
    worsening: Float[np.ndarray, "*B N"], claim: Claim, margin: float, min_seeds: int = 3
) -> tuple[Float[np.ndarray, "*B N"], Float[np.ndarray, "*B N"]]:
    """(p for the claim, p against it) after each seed of many studies at once; valid at every one of them together.

    Never increasing along a row, and 1 before `min_seeds`. Arms that have agreed exactly in every seed so far are
    decided exactly, as in `verdict.decide`.

    Args:
        worsening: One study a row, in the order in which its seeds were run.
        claim: What is said about the variant.
        margin: m >= 0, in the metric's unit.
        min_seeds: The first number of seeds at which a verdict is sought.
    """
    check_margin(margin)
    seen = np.arange(1, worsening.shape[-1] + 1) >= min_seeds

    def test(shift: float, side: Literal["less", "greater"]) -> np.ndarray:
        x = shift - worsening if side == "less" else worsening - shift
        best = np.maximum.accumulate(np.where(seen, log_e_values(x), -np.inf), axis=-1)
        return np.exp(-np.maximum(best, 0.0))

    p_for, p_against = combine(claim, margin, test)
    identical = seen & (np.maximum.accumulate(np.abs(worsening), axis=-1) == 0)
    exact = (0.0, 1.0) if holds_exactly(claim, 0.0, margin) else (1.0, 0.0)
    return (
        np.minimum.accumulate(np.where(identical, exact[0], p_for), axis=-1),
        np.minimum.accumulate(np.where(identical, exact[1], p_against), axis=-1),
    )


def confidence_bounds(
    d: Float[np.ndarray, "*B N"], level: float = 0.95
) -> tuple[Float[np.ndarray, "*B N"], Float[np.ndarray, "*B N"]]:
    """(low, high) of the confidence sequence for the mean after each seed; infinite while nothing can be said.

    All shifts whose two-sided E_n is below 1 / (1 - level). With Q the sum of squared deviations from the mean and
    r = (sqrt(n + c^2) / (c (1 - level)))^(2/n), E_n < 1 / (1 - level) reads V / A < r, whose solution is

        |mean - shift| < sqrt( Q (1 - 1/r) / (n (n / (n + c^2) - 1 + 1/r)) )
    """
    check_level("level", level)
    n = np.arange(1, d.shape[-1] + 1)
    mean = np.cumsum(d, axis=-1) / n
    centred = d - d[..., :1]  # the spread does not change, and equal differences give exactly 0
    sums, squares = np.cumsum(centred, axis=-1), np.cumsum(centred * centred, axis=-1)
    spread = np.maximum(squares - sums * sums / n, 0.0)
    kept = np.exp(-2 / n * (0.5 * np.log((n + C_SQUARED) / C_SQUARED) - math.log(1 - level)))  # 1/r
    room = n / (n + C_SQUARED) - 1 + kept
    with np.errstate(divide="ignore", invalid="ignore"):  # no room: the evidence cannot reach the level yet
        half = np.where(room > 0, np.sqrt(spread * (1 - kept) / (n * room)), np.inf)
    return mean - half, mean + half


def confidence_sequence(d: Float[np.ndarray, "N"], level: float = 0.95) -> tuple[float, float]:
    """The anytime-valid interval (low, high) for the mean difference after all of d, in the metric's unit.

    Infinite for fewer than four seeds at level 0.95. Raises ValueError for no difference, or any that is not finite.
    """
    low, high = confidence_bounds(differences(d), level)
    return float(low[-1]), float(high[-1])


def decide_sequentially(
    d: Float[np.ndarray, "N"],
    claim: Claim,
    margin: float,
    direction: Direction = "lower",
    alpha: float = 0.05,
    power: float = 0.8,
    min_seeds: int = 3,
) -> Decision:
    """The verdict on one claim from a study that is looked at after every seed.

    As `verdict.decide`, and valid however the number of seeds came about. Once settled it stays so: further seeds do
    not change the verdict, and the p-values are those of the seed that settled it.

    Args:
        d: Differences variant - baseline, in the order in which the seeds were run.
        claim: What is said about the variant.
        margin: m >= 0, in the metric's unit.
        direction: Whether a lower or a higher metric is better.
        alpha: Bound on the chance that a false verdict is ever reached.
        power: The chance that `seeds_to_settle` plans for.
        min_seeds: The first number of seeds at which a verdict is sought.
    """
    return decide_all_sequentially({"": d}, claim, margin, direction, alpha, power, min_seeds)[""]


def decide_all_sequentially(
    comparisons: Mapping[str, Float[np.ndarray, "_"]],
    claims: Claim | Mapping[str, Claim],
    margins: float | Mapping[str, float],
    direction: Direction = "lower",
    alpha: float = 0.05,
    power: float = 0.8,
    min_seeds: int = 3,
) -> dict[str, Decision]:
    """The verdicts on all variants of a study that is looked at after every seed, with Holm's correction over them.

    Holm's method applies to p-values that are valid at all times as to others: a false rejection at any time needs one
    of the k' true hypotheses to have reached alpha / k' at some time. Seeds are added to all arms together, so the
    comparisons have equal numbers of differences, in the order of the seeds.
    """
    check_alpha(alpha)
    if min_seeds < 2:
        raise ValueError(f"min_seeds={min_seeds} must be at least 2: one seed shows no spread between seeds")
    rows = {name: worsening(name, d, direction) for name, d in comparisons.items()}
    check_equal_lengths(list(rows.values()))
    if not rows:
        return {}
    claim_of: dict[str, Claim] = per_variant(rows, claims)
    margin_of: dict[str, float] = per_variant(rows, margins)
    pairs = [running_p_values(w, claim_of[name], margin_of[name], min_seeds) for name, w in rows.items()]
    p_for, p_against = np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])
    holm_for, holm_against = holm(p_for), holm(p_against)
    settled = np.minimum(holm_for, holm_against) <= alpha
    decisions = {}
    for row, (name, w) in enumerate(rows.items()):
        at = int(settled[row].argmax()) if settled[row].any() else w.size - 1
        adjusted = float(holm_for[row, at]), float(holm_against[row, at])
        verdict: Verdict = "inconclusive"
        if settled[row, at]:
            verdict = "supported" if adjusted[0] <= adjusted[1] else "refuted"
        claim, margin, needed = claim_of[name], margin_of[name], None
        if verdict == "inconclusive" and w.size > 1:
            needed = seeds_to_settle_sequentially(
                w, claim, margin, alpha / len(rows), power, "lower", max(min_seeds, w.size + 1)
            )
        decisions[name] = Decision(
            verdict=verdict,
            p_for=float(p_for[row, at]),
            p_against=float(p_against[row, at]),
            reason=_reason(w[: at + 1], claim, margin, verdict, adjusted, alpha, len(rows), needed),
            seeds_to_settle=needed,
            p_for_holm=adjusted[0],
            p_against_holm=adjusted[1],
            seeds=at + 1,
        )
    return decisions


def seeds_to_settle_sequentially(
    d: Float[np.ndarray, "N"],
    claim: Claim,
    margin: float,
    alpha: float = 0.05,
    power: float = 0.8,
    direction: Direction = "lower",
    min_seeds: int = 3,
) -> int | None:
    """How many seeds in all, these included, settle the claim with chance `power`, if these show the truth.

    The quantile of the settling time over 1,000 continuations of the study, drawn with a fixed seed from the Gaussian
    of the observed mean and standard deviation. None where that is beyond 200 seeds. Raises ValueError for fewer than
    two differences, or any that is not finite.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    w = orient(differences(d, least=2), direction)
    rng = np.random.default_rng(0)
    more = rng.normal(w.mean(), w.std(ddof=1), (1000, max(MOST_SEEDS - w.size, 0)))
    paths = np.concatenate([np.broadcast_to(w, (1000, w.size)), more], axis=1)
    for most in (2 * w.size, 6 * w.size, MOST_SEEDS):  # the answer is rarely far away
        p_for, p_against = running_p_values(paths[:, :most], claim, margin, min_seeds)
        share = (np.minimum(p_for, p_against) <= alpha).mean(axis=0)  # never decreasing
        if share[-1] >= power:
            return int((share >= power).argmax()) + 1
    return None


def _reason(
    w: np.ndarray,
    claim: Claim,
    margin: float,
    verdict: Verdict,
    adjusted: tuple[float, float],
    alpha: float,
    variants: int,
    needed: int | None,
) -> str:
    """The sentence that stands beside the verdict."""
    said = f"claim {in_words(claim, margin)}"
    over = f" after Holm over {variants} variants" if variants > 1 else ""
    mean = f"mean worsening {mean_difference(w):+.4g} after {w.size} seed{'' if w.size == 1 else 's'}"
    if verdict != "inconclusive":
        if not w.any():
            return f"the arms agree exactly in all {w.size} seeds: {said} is {verdict} without a test"
        opposite = "its opposite" if verdict == "supported" else "it"
        p = adjusted[0] if verdict == "supported" else adjusted[1]
        return f"{mean}; {said}: {opposite} is rejected at all times together (anytime-valid p = {p:.2g}{over})"
    text = f"{mean}; {said}: not settled (anytime-valid p = {adjusted[0]:.2g} for and {adjusted[1]:.2g} against{over}, "
    text += f"alpha = {alpha:g})"
    if needed is not None:
        return f"{text}; about {needed} seeds in all would settle it if this mean and spread are the truth"
    if w.size == 1:
        return f"{text}; one seed shows no spread between seeds, so run more"
    if claim == "equal" and margin == 0:
        return f"{text}; only identical arms are equal within 0, so claim a margin above 0"
    return f"{text}; at this mean not even {MOST_SEEDS} seeds would settle it"
