"""Claims and verdicts: *supported*, *refuted* or *inconclusive*.

Before the runs, a study says what it claims about each variant and by which margin m; after them, with w the worsening
(variant - baseline where lower is better, baseline - variant where higher is):

    claim       says         supported when we reject     refuted when we reject
    no worse    w <= m       w >= m                       w <= m
    equal       |w| <= m     |w| >= m                     |w| <= m
    better      w < -m       w >= -m                      w <= -m
    worse       w > m        w <= m                       w >= m

each by one-sided paired t tests at level alpha. Both outcomes need evidence; without it the verdict is *inconclusive*,
never "no difference". The truth is on one side of the boundary, so only one of the two errors is possible in a
comparison, and it happens in at most alpha of studies, at the boundary itself. A one-sided test at 0.05 agrees with the
90% interval, not with the 95% interval: an interval that includes the margin may stand beside *supported*.

With k variants, the p-values for the claims are adjusted by Holm's method, and so are those against them: the chance
that any false claim is called supported is at most alpha, and the chance that any true one is called refuted too. In a
study where some claims are true and others false, all at their boundary, the two chances could add up to more: 5.0% to
5.2% in 200,000 simulated studies of 3 variants that share a baseline, at alpha = 0.05 with 3 and 6 seeds.

When it lies: differences far from Gaussian (a run that diverges in one seed of ten), seeds that share more than they
should (one data order for all), a margin or claim chosen after looking, seeds added until the verdict came (use
sequential.py), and arms whose learning rates were tuned with unequal care.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float

from llmlab.study.paired import (
    Claim,
    check_margin,
    claim_p_values,
    differences,
    holds_exactly,
    holm,
    mean_difference,
    orient,
)
from llmlab.study.power import MOST_SEEDS, seeds_to_settle

Verdict = Literal["supported", "refuted", "inconclusive"]
Direction = Literal["lower", "higher"]
T = TypeVar("T")


@dataclass(frozen=True)
class Decision:
    """What a study says about one claim."""

    verdict: Verdict
    """Supported, refuted or inconclusive."""
    p_for: float
    """The claim's own p-value: small is evidence for it."""
    p_against: float
    """The opposite test's p-value: small is evidence against the claim."""
    reason: str
    """One sentence that says which test decided, or what stood in the way."""
    seeds_to_settle: int | None
    """Seeds that would settle it; None where it is settled, or where no affordable number would do."""
    p_for_holm: float
    """`p_for` after Holm's correction over the study's variants; what alpha is compared with."""
    p_against_holm: float
    """`p_against` after Holm's correction."""
    seeds: int
    """Seeds that the decision rests on."""


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless 0 < alpha < 0.5."""
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha} must lie between 0 and 0.5, such as 0.05: it bounds the false verdicts")


def in_words(claim: Claim, margin: float) -> str:
    """The claim as an inequality: "worsening <= 0.01"."""
    return {
        "no worse": f"worsening <= {margin:g}",
        "equal": f"|worsening| <= {margin:g}",
        "better": f"worsening < {-margin:g}" if margin else "worsening < 0",
        "worse": f"worsening > {margin:g}",
    }[claim]


def decide(
    d: Float[np.ndarray, "N"],
    claim: Claim,
    margin: float,
    direction: Direction = "lower",
    alpha: float = 0.05,
    power: float = 0.8,
) -> Decision:
    """The verdict on one claim from a study whose number of seeds was fixed beforehand.

    Args:
        d: Differences variant - baseline in the metric's unit, one per seed. A single one is always inconclusive.
        claim: What is said about the variant.
        margin: m >= 0, in the metric's unit. "equal" with a margin of 0 is only ever supported by identical arms.
        direction: Whether a lower or a higher metric is better.
        alpha: Bound on the chance of a false verdict.
        power: The chance of settling that `seeds_to_settle` plans for.

    Raises:
        ValueError: No difference, one that is not finite, a margin below 0, an alpha outside (0, 0.5).
    """
    return decide_all({"": d}, claim, margin, direction, alpha, power)[""]


def decide_all(
    comparisons: Mapping[str, Float[np.ndarray, "_"]],
    claims: Claim | Mapping[str, Claim],
    margins: float | Mapping[str, float],
    direction: Direction = "lower",
    alpha: float = 0.05,
    power: float = 0.8,
) -> dict[str, Decision]:
    """The verdicts on all variants of a study, with Holm's correction over them.

    Args:
        comparisons: Differences variant - baseline of each variant, one per seed; their numbers may differ.
        claims: One claim for all variants, or one for each.
        margins: One margin for all variants, or one for each.
        direction: Whether a lower or a higher metric is better.
        alpha: Bound on the chance that any claim of the study gets a false verdict of either kind.
        power: The chance of settling that `seeds_to_settle` plans for.

    Raises:
        ValueError: As `decide`, with the variant's name.
    """
    check_alpha(alpha)
    rows = {name: worsening(name, d, direction) for name, d in comparisons.items()}
    claim_of: dict[str, Claim] = per_variant(rows, claims)
    margin_of: dict[str, float] = per_variant(rows, margins)
    p_values = {name: _p_values(w, claim_of[name], margin_of[name]) for name, w in rows.items()}
    adjusted = holm(np.array(list(p_values.values()), dtype=np.float64).reshape(len(rows), 2))
    decisions = {}
    for (name, w), (p_for_holm, p_against_holm) in zip(rows.items(), adjusted.tolist(), strict=True):
        claim, margin = claim_of[name], margin_of[name]
        verdict: Verdict = (
            "supported" if p_for_holm <= alpha else "refuted" if p_against_holm <= alpha else "inconclusive"
        )
        needed = None
        if verdict == "inconclusive" and w.size > 1:
            needed = seeds_to_settle(w, claim, margin, alpha / len(rows), power)
        decisions[name] = Decision(
            verdict=verdict,
            p_for=p_values[name][0],
            p_against=p_values[name][1],
            reason=_reason(w, claim, margin, verdict, (p_for_holm, p_against_holm), alpha, len(rows), needed),
            seeds_to_settle=needed,
            p_for_holm=p_for_holm,
            p_against_holm=p_against_holm,
            seeds=int(w.size),
        )
    return decisions


def worsening(name: str, d: Float[np.ndarray, "N"], direction: Direction) -> Float[np.ndarray, "N"]:
    """A comparison's differences as a worsening, checked; errors name the variant."""
    try:
        return orient(differences(d), direction)
    except ValueError as error:
        raise ValueError(f"variant {name!r}: {error}" if name else str(error)) from error


def per_variant(names: Iterable[str], given: T | Mapping[str, T]) -> dict[str, T]:
    """One value for every variant, from a single value or a mapping with just these names."""
    names = list(names)
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    if given.keys() != set(names):
        raise ValueError(f"{sorted(given)} are not the variants {sorted(names)}; give each variant one value")
    return {name: given[name] for name in names}


def study_verdict(decisions: Mapping[str, Decision]) -> tuple[Verdict, str]:
    """(the study's verdict, a sentence on it): supported if every claim is, refuted if any is, else inconclusive.

    Raises ValueError where there is nothing to judge.
    """
    if not decisions:
        raise ValueError("a study without comparisons has no verdict; give it a variant")
    by_verdict: dict[Verdict, list[str]] = {"supported": [], "refuted": [], "inconclusive": []}
    for name, decision in decisions.items():
        by_verdict[decision.verdict].append(name)
    if by_verdict["refuted"]:
        return "refuted", f"refuted for {', '.join(by_verdict['refuted'])} (of {len(decisions)} variants)"
    if by_verdict["inconclusive"]:
        return "inconclusive", f"not settled for {', '.join(by_verdict['inconclusive'])} (of {len(decisions)} variants)"
    return "supported", f"supported for {'all' if len(decisions) > 1 else 'the'} {len(decisions)} variant" + (
        "s" if len(decisions) > 1 else ""
    )


def _p_values(w: np.ndarray, claim: Claim, margin: float) -> tuple[float, float]:
    """(p for, p against): 1 and 1 for a single seed, exactly 0 and 1 where the differences are all equal."""
    check_margin(margin)
    if w.size < 2:
        return 1.0, 1.0
    if np.ptp(w) == 0:
        return (0.0, 1.0) if holds_exactly(claim, float(w[0]), margin) else (1.0, 0.0)
    p_for, p_against = claim_p_values(w, claim, margin)
    return float(p_for), float(p_against)


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
    said = in_words(claim, margin)
    if w.size == 1:
        return "one seed shows no spread between seeds, so nothing can be told from luck; run at least 2, better 5"
    if np.ptp(w) == 0:
        same = "the arms agree exactly in every seed" if w[0] == 0 else f"the worsening is {w[0]:g} in every seed"
        return f"{same}: {said} is {'true' if verdict == 'supported' else 'false'} without a test"
    over = f" after Holm over {variants} variants" if variants > 1 else ""
    mean = f"mean worsening {mean_difference(w):+.4g} over {w.size} seeds"
    if verdict != "inconclusive":
        opposite = "its opposite" if verdict == "supported" else "it"
        p = adjusted[0] if verdict == "supported" else adjusted[1]
        return f"{mean}; claim {said}: {opposite} is rejected (paired t, one-sided, p = {p:.2g}{over})"
    neither = f"{mean}; claim {said}: neither it nor its opposite is rejected (p = {adjusted[0]:.2g} and "
    neither += f"{adjusted[1]:.2g}{over}, alpha = {alpha:g})"
    if needed is not None:
        return f"{neither}; about {needed} seeds would settle it if this mean and spread are the truth"
    if claim == "equal" and margin == 0:
        return f"{neither}; only identical arms are equal within 0, so claim a margin above 0"
    return f"{neither}; at this mean not even {MOST_SEEDS:,} seeds would settle it"
