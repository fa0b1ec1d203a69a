"""The page of an ablation: hypothesis, verdict and forest plot first; then everything that a reviewer would ask for."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from llmlab.study.report import ablation_details, charts, words
from llmlab.study.report.ablation_results import BASELINE, differences
from llmlab.study.report.factorial import factorial_section
from llmlab.study.report.forest import forest, margin_of
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import (
    NOTHING,
    Shown,
    fixed,
    general,
    interval,
    p_value,
    signed,
)
from llmlab.study.report.page import alert, code, facts, folded, moment, page, problems, section, table
from llmlab.study.report.scales import Scale

MAGNIFIED = 0.5
"""Part of training from which on curves are drawn again, larger: arms differ there by less than a line's width."""
_WARM_PART = 0.03  # of the curves, left out of the vertical axis: the first steps would flatten the rest


def render(results: dict[str, Any]) -> str:
    """The document."""
    decimals = words.decimals(results)
    return page(
        f"{results['verdict']}: {results['hypothesis']}",
        _first_screen(results, decimals),
        _comparisons(results, decimals),
        factorial_section(results, decimals),
        _seeds(results, decimals),
        _curves(results, decimals),
        ablation_details.changes(results),
        ablation_details.matched(results),
        ablation_details.learning_rates(results, decimals),
        ablation_details.speed(results),
        section("Methods", *map(_paragraph, words.methods(results)), anchor="methods"),
        problems(results["problems"]),
        ablation_details.runs(results, decimals),
        foot=[
            "Made from results.json alone.",
            [" Again, with the runs that exist already reused:", code(results["command"])]
            if results["command"]
            else None,
        ],
    )


def _paragraph(sentence: words.Sentence) -> Html:
    first, *rest = sentence
    title, _, text = first.partition(". ")
    return element("p", element("strong", f"{title}. "), text, *rest, style="max-width: 46em; margin-bottom: .8rem")


def _first_screen(results: dict[str, Any], decimals: int) -> Html:
    notice = words.mode_notice(results)
    eyebrow = element(
        "div", element("b", "Ablation"), element("span", results["name"]), moment(results["date"]), class_="eyebrow"
    )
    answer = element(
        "div",
        element("span", results["verdict"], class_=f"verdict chip {results['verdict']}"),
        element("p", words.headline(results)),
        class_="answer",
    )
    loud = []
    if results["mode"] == "sequential" and notice is not None:
        loud.append(alert(*notice, note=True))
    if results.get("withheld"):
        loud.append(alert("Verdict withheld", results["reason"].removeprefix("withheld: ")))
    elif results["mismatches"]:
        acknowledged = results["acknowledged"]
        title = "Acknowledged mismatch" if acknowledged else "Mismatch"
        loud.append(alert(title, acknowledged or "Not acknowledged.", note=bool(acknowledged)))
    if remarks := results.get("remarks"):
        items = element("ul", *(element("li", remark) for remark in remarks), class_="notes")
        loud.append(alert("Before believing the numbers", items, note=True))
    if gone := words.diverged(results):
        loud.append(alert("Diverged seeds", *(element("div", sentence) for sentence in gone), note=True))
    if count := len(results["problems"]):
        said = f"{count} run{'s' * (count > 1)} could not be used. "
        loud.append(alert("Problems", said, element("a", "What happened", href="#problems"), "."))
    return element(
        "header",
        eyebrow,
        element("h1", results["hypothesis"]),
        answer,
        alert(*notice) if results["mode"] == "exploratory" and notice is not None else None,
        forest(results, decimals, words.level(results)) if results["comparisons"] else None,
        *loud,
        facts(_facts(results)),
        class_="top",
    )


def _facts(results: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    seeds = len(results["seeds"])
    margin = [general(results["margin"]), words.unit(results)]
    yield "Metric", f"{results['metric']}, {results['direction']} is better"
    yield "Claim", [results["claim"], ", margin ", *margin]
    yield "Seeds", [Shown(str(seeds), seeds), f", {results['mode']} design"]
    yield "Matched by", results["match"]
    yield "Level", ["α = ", general(results["alpha"])]


def _comparisons(results: dict[str, Any], decimals: int) -> Html:
    several = len(results["comparisons"]) > 1
    heads = [
        ("Arm", False),
        (results["metric"], True),
        ("± std over seeds", True),
        ("Difference", True),
        (f"{words.level(results)} interval", True),
        ("p (Holm)" if several else "p", True),
        ("Verdict", False),
    ]
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]}
    rows = []
    for arm in results["arms"]:
        start = [arm["name"], fixed(arm["mean"], decimals), fixed(arm["std"], decimals)]
        comparison = by_arm.get(arm["name"])
        if comparison is None:
            rows.append(([*start, NOTHING, NOTHING, NOTHING, ""], "base"))
            continue
        rows.append(
            (
                [
                    *start,
                    signed(comparison["difference"], decimals),
                    interval(comparison["interval"], decimals),
                    p_value(words.deciding_p(comparison)),
                    element("span", comparison["verdict"], class_=f"verdict {comparison['verdict']}"),
                ],
                "",
            )
        )
    reasons = [
        element(
            "li",
            [*words.finding(results, c), " ", *words.outcome(results, c), " "] if several else None,
            element("small", c["reason"]),
        )
        for c in results["comparisons"]
    ]
    return section(
        "Comparisons",
        element("p", words.P_NOTE, class_="lede"),
        table(heads, rows, caption="Each arm against the baseline, differences paired by seed"),
        element("ul", *reasons, class_="notes", style="margin-top: 1.2rem"),
        folded("Every statistic", _statistics(results, decimals)),
        anchor="comparisons",
    )


def _statistics(results: dict[str, Any], decimals: int) -> Html:
    names = [c["arm"] for c in results["comparisons"]]

    def row(title: str, cells: Iterable[Any]) -> tuple[list[Any], str]:
        return [title, *cells], ""

    every = results["comparisons"]
    level = words.level(results)
    rows = [
        row("Claim", (c["claim"] for c in every)),
        row("Margin", (general(margin_of(results, c)) for c in every)),
        row("Difference", (signed(c["difference"], decimals) for c in every)),
        row(
            f"{level} interval", ([*interval(c["interval"], decimals), f" {c['interval_method'] or ''}"] for c in every)
        ),
        row(f"{level} t interval", (interval(c["t_interval"], decimals) for c in every)),
        row("p of the claim's test", (p_value(c["p_claim"]) for c in every)),
        row("the same after Holm", (p_value(c["p_holm"]) for c in every)),
        row("p of the opposite test", (p_value(c.get("p_against")) for c in every)),
        row("the opposite after Holm", (p_value(c.get("p_against_holm")) for c in every)),
        row("p, paired t (two-sided)", (p_value(c["p_t"]) for c in every)),
        row("p, sign flips (two-sided)", (p_value(c["p_sign_flip"]) for c in every)),
        row("p, equivalence (TOST)", (p_value(c["p_equivalence"]) for c in every)),
        row("Minimum detectable effect", (fixed(c["minimum_detectable_effect"], decimals) for c in every)),
        row("Seeds that would settle it", (general(c["seeds_to_settle"]) for c in every)),
    ]
    return table([("Statistic", False), *((name, True) for name in names)], rows, caption="Every statistic by variant")


def _seeds(results: dict[str, Any], decimals: int) -> Html:
    decimals = max(decimals, 3)  # a wide interval says little of how precise a run is
    arms = results["arms"]
    heads = [("Seed", False)]
    for arm in arms:
        heads.append((arm["name"], True))
        if arm["name"] != BASELINE:
            heads.append((f"{arm['name']}, difference", True))
    by_arm = {arm["name"]: differences(arms[0], arm) for arm in arms}
    rows = []
    for place, seed in enumerate(results["seeds"]):
        cells: list[Any] = [Shown(str(seed), seed)]
        for arm in arms:
            value = fixed(arm["values"][place], decimals)
            cells.append([value, element("small", "diverged")] if seed in arm["diverged"] else value)
            if arm["name"] != BASELINE:
                cells.append(signed(by_arm[arm["name"]][place], decimals))
        rows.append((cells, ""))
    return section(
        "Seeds",
        table(heads, rows, caption=f"Every seed: {words.metric(results)}"),
        anchor="seeds",
    )


def series(results: dict[str, Any]) -> list[charts.Series]:
    """The arms' learning curves."""
    return [
        charts.Series(
            name=arm["name"],
            x=arm["curve"]["step"],
            y=arm["curve"]["mean"],
            low=arm["curve"]["low"],
            high=arm["curve"]["high"],
            color=place,
        )
        for place, arm in enumerate(results["arms"])
        if arm["curve"] is not None and any(value is not None for value in arm["curve"]["mean"])
    ]


def curve_scales(drawn: list[charts.Series], start: float = 0.0) -> tuple[Scale, Scale]:
    """(horizontal, vertical) axes from a part of training on; the steep first steps are cut vertically."""
    last = max(max(curve.x) for curve in drawn)
    late: list[float | None] = []
    for curve in drawn:
        for values in (curve.y, curve.low, curve.high):
            late += [value for at, value in zip(curve.x, values, strict=False) if at >= max(start, _WARM_PART) * last]
    return Scale(start * last, float(last) or 1.0), Scale.over(late)


def from_step(drawn: list[charts.Series], start: float) -> list[charts.Series]:
    """The points of curves from a step on."""
    cut = []
    for curve in drawn:
        first = next((place for place, at in enumerate(curve.x) if at >= start), len(curve.x))
        if any(value is not None for value in curve.y[first:]):
            cut.append(
                replace(curve, x=curve.x[first:], y=curve.y[first:], low=curve.low[first:], high=curve.high[first:])
            )
    return cut


def _curves(results: dict[str, Any], decimals: int) -> Html | None:
    drawn = series(results)
    if not drawn:
        return None
    ends = []
    for curve in drawn:
        final = next(value for value in reversed(curve.y) if value is not None)
        ends.append(f"{curve.name} {fixed(final, decimals)}")
    caption = (
        f"Mean over seeds; bands are pointwise {words.level(results)} intervals of each arm's own mean. Two bands may "
        "overlap although the arms differ in every seed: the pairing, which the comparison uses, is not in them."
    )
    title = words.metric(results)
    parts = []
    for start, tall, said in ((0.0, 250, ""), (MAGNIFIED, 300, "The second half, magnified. ")):
        x, y = curve_scales(drawn, start)
        part = from_step(drawn, x.low)
        if start and min(len(curve.x) for curve in part) < 3:
            continue
        summary = f"{said}{results['metric']} against training steps; at the end: {', '.join(ends)}"
        chart = charts.curves(
            part, x=x, y=y, x_title="optimizer steps", y_title=f"{said}{title}", summary=summary, tall=tall
        )
        parts.append(element("div", chart, class_="part"))
    figure = element("figure", *parts, element("figcaption", caption))
    return section("Learning curves", figure, anchor="curves")
