"""An ablation's results in sentences: lists of texts and numbers, in which a page marks the numbers.

Nothing here decides: verdicts, p-values and reasons are the results' own. What is added is what a reader needs so as
not to misread them.
"""

from collections.abc import Iterable
from typing import Any

from llmlab.study.report.ablation_results import differences
from llmlab.study.report.forest import margin_of
from llmlab.study.report.numbers import Shown, decimals_for, fixed, general, interval

Sentence = list[str]
"""Texts, some of them `Shown` numbers, to be written one after the other."""

_OUTCOME = {
    "supported": "That supports the claim",
    "refuted": "That refutes the claim",
    "inconclusive": "That does not settle the claim",
}


def decimals(results: dict[str, Any]) -> int:
    """Decimals for the study's metric: the smallest margin or interval to two digits."""
    spreads: list[float | None] = [results["margin"]]
    for comparison in results["comparisons"]:
        spreads.append(margin_of(results, comparison))
        low, high = comparison["interval"] or (None, None)
        spreads.append(None if low is None or high is None else high - low)
    return decimals_for(spreads)


def level(results: dict[str, Any]) -> str:
    """The level of the intervals: "95%"."""
    told = next((c["level"] for c in results["comparisons"] if "level" in c), 1 - results["alpha"])
    return f"{100 * told:.4g}%"


def unit(results: dict[str, Any]) -> str:
    """ " nats per token", with its space; nothing where the metric has no unit."""
    return f" {results['unit']}" if results["unit"] else ""


def metric(results: dict[str, Any]) -> str:
    """The metric and its unit: "validation/loss, nats per token"."""
    return f"{results['metric']}, {results['unit']}" if results["unit"] else results["metric"]


def claim(results: dict[str, Any], comparison: dict[str, Any]) -> Sentence:
    """What is claimed of a variant: "at most 0.01 nats per token worse than the baseline"."""
    margin = margin_of(results, comparison)
    by: Sentence = [general(margin), unit(results)]
    if comparison["claim"] == "equal":
        return ["within ±", *by, " of the baseline"]
    if comparison["claim"] == "no worse":
        return ["at most ", *by, " worse than the baseline"] if margin else ["no worse than the baseline"]
    return [f"{comparison['claim']} than the baseline", *([" by more than ", *by] if margin else [])]


def finding(results: dict[str, Any], comparison: dict[str, Any]) -> Sentence:
    """What was measured of a variant: "rmsnorm is 0.002 nats better than the baseline on average over 5 seeds"."""
    difference = comparison["difference"]
    if difference is None:
        return [f"{comparison['arm']} could not be compared with the baseline."]
    shown = decimals(results)
    count = num_seeds(results, comparison)
    seeds = f" on average over {count} seeds" if count > 1 else " in its one seed"
    better = (difference < 0) == (results["direction"] == "lower")
    size = fixed(abs(difference), shown)
    if difference == 0:
        what: Sentence = [" equals the baseline exactly"]
    else:
        if not size.strip("0."):
            size = f"{abs(difference):.1g}"
        size = Shown(size, difference)  # shown without its sign, which "better" and "worse" tell
        what = [" is ", size, unit(results), f" {'better' if better else 'worse'} than the baseline"]
    bounds = (
        []
        if comparison["interval"] is None
        else [f" ({level(results)} interval of the difference ", *interval(comparison["interval"], shown), ")"]
    )
    return [comparison["arm"], *what, seeds, *bounds, "."]


def outcome(results: dict[str, Any], comparison: dict[str, Any]) -> Sentence:
    """What follows: "That supports the claim that it is at most 0.01 nats per token worse than the baseline."."""
    if results.get("withheld"):
        return ["The verdict is withheld: the arms do not match."]
    if comparison["difference"] is None:
        return [f"{comparison['reason'][:1].upper()}{comparison['reason'][1:]}."]
    sentence: Sentence = [_OUTCOME[comparison["verdict"]], " that it is ", *claim(results, comparison)]
    if comparison["verdict"] != "inconclusive":
        return [*sentence, "."]
    needed = comparison["seeds_to_settle"]
    if num_seeds(results, comparison) == 1:
        return [*sentence, "; one seed cannot."]
    if needed is None:
        return [*sentence, "; no affordable number of seeds would."]
    return [*sentence, "; about ", Shown(str(needed), needed), " seeds would."]


def headline(results: dict[str, Any]) -> Sentence:
    """The sentence beside the verdict."""
    if len(results["comparisons"]) == 1:
        (comparison,) = results["comparisons"]
        return [*finding(results, comparison), " ", *outcome(results, comparison)]
    parts = []
    for verdict, said in (
        ("refuted", "refuted for"),
        ("inconclusive", "not settled for"),
        ("supported", "supported for"),
    ):
        names = [c["arm"] for c in results["comparisons"] if c["verdict"] == verdict]
        if len(names) == len(results["comparisons"]) > 1:
            parts.append(f"{said} {'both' if len(names) == 2 else f'all {len(names)}'} variants")
        elif names:
            parts.append(f"{said} {listed(names)}")
    if not parts:
        return [results["reason"]]
    sentence = "; ".join(parts)
    return [f"{sentence[0].upper()}{sentence[1:]}. A study is supported if every comparison is, refuted if any is."]


def num_seeds(results: dict[str, Any], comparison: dict[str, Any]) -> int:
    """Seeds that a comparison rests on: those in which both arms have a value."""
    arms = {arm["name"]: arm for arm in results["arms"]}
    return sum(d is not None for d in differences(results["arms"][0], arms[comparison["arm"]]))


def listed(names: Iterable[str]) -> str:
    """ "a, b and c"; names with a comma of their own are quoted."""
    *most, last = (f"“{name}”" if "," in name else name for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def mode_notice(results: dict[str, Any]) -> tuple[str, str] | None:
    """(title, text) of what must be said loudly about how the seeds came about; None for a fixed design."""
    if results["mode"] == "exploratory":
        why = results.get("exploratory")
        return (
            "Exploratory: the error rates below do not hold",
            (f"{why.rstrip('.')}. " if why else "")
            + "Results of this study were known before its design was changed or seeds were added. P-values and "
            "intervals are those of a design that was fixed beforehand, which this was not: read them as a "
            "description, and confirm with fresh seeds.",
        )
    if results["mode"] == "sequential":
        return (
            "Sequential design",
            "Seeds were added until the verdict was settled. Intervals and verdicts are anytime-valid: they hold at "
            "every number of seeds together, at the price of wider intervals than a fixed design has.",
        )
    return None


def diverged(results: dict[str, Any]) -> list[Sentence]:
    """One sentence for each arm with diverged seeds."""
    counts: Sentence = ["; each counts, with the worst value known"]
    if imputed := results.get("diverged_value"):
        counts = ["; each counts as ", fixed(imputed["value"], decimals(results)), f", {imputed['source']}"]
    return [
        [
            f"{arm['name']} diverged in seed{'s' * (len(arm['diverged']) > 1)} ",
            listed(map(str, arm["diverged"])),
            *counts,
            ".",
        ]
        for arm in results["arms"]
        if arm["diverged"]
    ]


def methods(results: dict[str, Any]) -> list[Sentence]:
    """How to read the numbers: one sentence group a paragraph."""
    alpha: Sentence = [general(results["alpha"])]
    several = len(results["comparisons"]) > 1
    over = [f", with Holm's correction over the {len(results['comparisons'])} variants"] if several else []
    paragraphs: list[Sentence] = [
        [
            "Pairing. The same seed gives both arms the same data order and the same initialisation of the parameters "
            "that they share. What a seed adds to a run is therefore common to both and cancels in the difference "
            "variant − baseline; every statistic here is about these differences, one per seed."
        ],
        _interval_method(results),
    ]
    if results["mode"] == "sequential":
        paragraphs.append(
            [
                "Verdict. A claim is supported when an anytime-valid test rejects its opposite at level ",
                *alpha,
                *over,
                ", refuted when the opposite test rejects the claim, and inconclusive otherwise. The bound on false "
                "verdicts holds however many seeds were looked at. The t and sign-flip p-values assume a number of "
                "seeds that was fixed beforehand and are for description only.",
            ]
        )
    else:
        paragraphs.append(
            [
                "Verdict. A claim is supported when a one-sided paired t test rejects its opposite at level ",
                *alpha,
                *over,
                ", refuted when the opposite test rejects the claim, and inconclusive otherwise: no evidence is "
                "not evidence of no difference. A one-sided test is less strict than the two-sided interval in the "
                "figure, so an interval may touch the edge of the claim beside a verdict that is settled.",
            ]
        )
    paragraphs.append(
        [
            "Other numbers. The sign-flip p-value asks the same of all sign patterns of the differences and assumes "
            "symmetry only; equivalence is two one-sided tests (TOST) within the margin; the minimum detectable effect "
            "is the true difference that a study of this spread and number of seeds would have found with 80% power."
        ]
    )
    if any(arm["diverged"] for arm in results["arms"]):
        paragraphs.append(
            [
                "Diverged seeds. A seed whose loss stopped being finite counts, with the worst of what is known: the "
                "loss of a uniform guess, or the worst finite value of the study. Leaving it out would reward an arm "
                "for its failures."
            ]
        )
    if any(arm["learning_rates"] for arm in results["arms"]):
        paragraphs.append(
            [
                "Learning rates. Each arm was tuned on the same grid and is compared at its own best rate, so that no "
                "arm loses by the rate of another. Rates chosen on the seeds that are compared flatter both arms alike."
            ]
        )
    return paragraphs


def _interval_method(results: dict[str, Any]) -> Sentence:
    explained = {
        "BCa": "bias-corrected and accelerated bootstrap over seeds",
        "t": "Student's t over seeds",
    }
    used: dict[str, None] = dict.fromkeys(filter(None, (c["interval_method"] for c in results["comparisons"])))
    named = listed(explained.get(method) or method for method in used) if used else "method not recorded"
    if results["mode"] == "sequential":
        meaning = "in that share of studies the true difference is inside at every number of seeds at once"
    else:
        meaning = "in that share of repeated studies such an interval holds the true mean difference"
    return [f"Interval. {level(results)}, {named}: {meaning}. It is about the mean over seeds, not about one run."]


def deciding_p(comparison: dict[str, Any]) -> float | None:
    """The p-value that the verdict rests on: against the claim where it is refuted, after Holm's correction."""
    side = ("p_against_holm", "p_against") if comparison["verdict"] == "refuted" else ("p_holm", "p_claim")
    found = [comparison[name] for name in (*side, "p_holm", "p_claim") if comparison.get(name) is not None]
    return found[0] if found else None


P_NOTE = "p is of the test that the verdict rests on: against the claim where it is refuted."
"""Stands beside every table that shows `deciding_p`."""
