"""The page of an ablation: hypothesis, verdict and forest plot first; then everything that a reviewer would ask for."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from llmlab.study.report import charts, words
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
    percent,
    quantity,
    signed,
    time,
)
from llmlab.study.report.page import alert, code, facts, folded, moment, page, plain, problems, section, table, tree
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
        _changes(results),
        _matched(results),
        _learning_rates(results, decimals),
        _speed(results),
        section("Methods", *map(_paragraph, words.methods(results)), anchor="methods"),
        problems(results["problems"]),
        _runs(results, decimals),
        foot=[
            "Made from results.json alone. Again, with the runs that exist already reused:",
            code(results["command"]),
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
    if results["mismatches"] and results["acknowledged"] is not None:
        loud.append(alert("Acknowledged mismatch", results["acknowledged"], note=True))
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
                    words.p_values(comparison),
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
    caption = (
        "Each arm against the baseline, differences paired by seed. p is of the test for the claim: a refutation rests "
        "on the opposite test, whose p is in the reason below."
    )
    return section(
        "Comparisons",
        table(heads, rows, caption=caption),
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
        row("Claim", (words.claim(results, c) for c in every)),
        row("Margin", (general(margin_of(results, c)) for c in every)),
        row("Difference", (signed(c["difference"], decimals) for c in every)),
        row(
            f"{level} interval", ([*interval(c["interval"], decimals), f" {c['interval_method'] or ''}"] for c in every)
        ),
        row(f"{level} t interval", (interval(c["t_interval"], decimals) for c in every)),
        row("p of the claim's test", (p_value(c["p_claim"]) for c in every)),
        row("the same after Holm", (p_value(c["p_holm"]) for c in every)),
        row("p, paired t (two-sided)", (p_value(c["p_t"]) for c in every)),
        row("p, sign flips (two-sided)", (p_value(c["p_sign_flip"]) for c in every)),
        row("p, equivalence (TOST)", (p_value(c["p_equivalence"]) for c in every)),
        row("Minimum detectable effect", (fixed(c["minimum_detectable_effect"], decimals) for c in every)),
        row("Seeds that would settle it", (general(c["seeds_to_settle"]) for c in every)),
    ]
    return table([("Statistic", False), *((name, True) for name in names)], rows, caption="Every statistic by variant")


def _seeds(results: dict[str, Any], decimals: int) -> Html:
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
    figures = []
    for start, tall, said in ((0.0, 250, ""), (MAGNIFIED, 300, "The second half, magnified. ")):
        x, y = curve_scales(drawn, start)
        part = from_step(drawn, x.low)
        if start and min(len(curve.x) for curve in part) < 3:
            continue
        summary = f"{said}{results['metric']} against training steps; at the end: {', '.join(ends)}"
        chart = charts.curves(
            part, x=x, y=y, x_title="optimizer steps", y_title=f"{said}{title}", summary=summary, tall=tall
        )
        figures.append(element("figure", chart))
    return section("Learning curves", *figures, element("figcaption", caption), anchor="curves")


def _changes(results: dict[str, Any]) -> Html:
    rows = []
    for arm in results["arms"][1:]:
        for place, change in enumerate(arm["changes"]):
            before, after = (plain(change[side]) for side in ("baseline", "variant"))
            cells = [arm["name"] if place == 0 else element("span", arm["name"], class_="sr")]
            cells += [element("code", change["path"]), element("code", before), element("code", after)]
            rows.append((cells, ""))
    heads = [("Arm", False), ("Setting", False), ("Baseline", False), ("Variant", False)]
    if not rows:
        return section(
            "What differed", element("p", "Nothing: the arms have the same configuration."), anchor="changes"
        )
    lede = element("p", "Computed from the resolved configurations of the arms; nothing else differed.", class_="lede")
    return section("What differed", lede, table(heads, rows, caption="Configuration differences"), anchor="changes")


def _matched(results: dict[str, Any]) -> Html:
    match = results["match"]
    names = ("tokens", "parameters", "flops", "seconds")
    heads = [("Arm", False)]
    for name in names:
        heads.append((f"{name}{' (matched)' if name == match else ''}", True))
    base = results["arms"][0]["achieved"]
    wrong = {(item["arm"], item["quantity"]) for item in results["mismatches"]}
    rows = []
    for arm in results["arms"]:
        cells: list[Any] = [arm["name"]]
        for name in names:
            value = arm["achieved"][name]
            shown = time(value) if name == "seconds" else quantity(value)
            cell: list[Any] = [shown]
            if arm["name"] != BASELINE and value is not None and base[name]:
                cell.append(element("small", percent(value / base[name] - 1)))
            if (arm["name"], name) in wrong:
                cell.append(element("small", element("strong", "mismatch")))
            cells.append(cell)
        rows.append((cells, "base" if arm["name"] == BASELINE else ""))
    lede: list[Any] = [
        f"Arms are matched by {match}, within ",
        percent(results["tolerance"])[1:] if results["tolerance"] else "0%",
        ".",
    ]
    if results["mismatches"] and results["acknowledged"] is None:
        lede.append(" The mismatch was not acknowledged.")
    reason = None
    if results["acknowledged"] is not None:
        reason = element("p", "Acknowledged mismatch: ", results["acknowledged"])
    return section(
        "Matched quantities",
        element("p", *lede, class_="lede"),
        table(heads, rows, caption="What each arm used, a run; small: relative to the baseline"),
        reason,
        anchor="matched",
    )


def _learning_rates(results: dict[str, Any], decimals: int) -> Html | None:
    tuned = [(place, arm) for place, arm in enumerate(results["arms"]) if arm["learning_rates"]]
    if not tuned:
        return None
    drawn, rows = [], []
    for place, arm in tuned:
        grid = sorted(arm["learning_rates"], key=lambda point: point["rate"])
        means = [_mean(point["values"]) for point in grid]
        drawn.append(charts.Series(name=arm["name"], x=[p["rate"] for p in grid], y=means, color=place))
        for point, mean in zip(grid, means, strict=True):
            chosen = point["rate"] == arm["learning_rate"]
            cells = [arm["name"], general(point["rate"]), fixed(mean, decimals), "chosen" if chosen else ""]
            rows.append((cells, "picked" if chosen else ""))
    x = Scale.over([rate for curve in drawn for rate in curve.x], log=True)
    y = Scale.over([value for curve in drawn for value in curve.y])
    title = f"{results['metric']}, mean over seeds"
    figure = element(
        "figure",
        charts.curves(
            drawn,
            x=x,
            y=y,
            x_title="learning rate",
            y_title=title,
            summary="The metric against the learning rate by arm",
        ),
    )
    heads = [("Arm", False), ("Learning rate", True), (title, True), ("", False)]
    return section(
        "Learning rates",
        figure,
        folded("As a table", table(heads, rows, caption="The grid of every arm")),
        anchor="rates",
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _speed(results: dict[str, Any]) -> Html | None:
    rows = []
    for c in results["comparisons"]:
        speed_up = c["speed_up"]
        if not speed_up or speed_up.get("ratio") is None:
            continue
        bound = speed_up.get("bound", "exact")
        bounds = speed_up.get("interval")
        shown = [] if bounds is None else ["[", fixed(bounds[0], 2), ", ", fixed(bounds[1], 2), "]"]
        target = (c["steps_to_target"] or speed_up.get("baseline") or {}).get("target")
        cells = [
            c["arm"],
            general(target),
            ["" if bound == "exact" else f"{bound} ", fixed(speed_up["ratio"], 2), "×"],
            shown,
        ]
        rows.append((cells, ""))
    if not rows:
        return None
    heads = [("Arm", False), ("Target", True), ("Speed-up in steps", True), (f"{words.level(results)} interval", True)]
    lede = "Steps of the baseline over steps of the variant until the target; above 1 the variant gets there sooner."
    return section(
        "Steps to target",
        element("p", lede, class_="lede"),
        table(heads, rows, caption="Speed-up by variant"),
        anchor="speed",
    )


def _runs(results: dict[str, Any], decimals: int) -> Html:
    heads = [
        ("Run", False),
        ("Seed", True),
        ("Status", False),
        (results["metric"], True),
        ("Learning rate", True),
        ("Time", True),
        ("Tokens/s", True),
        ("Config", False),
        ("Code", False),
        ("Directory", False),
    ]
    rows = []
    for arm in results["arms"]:
        for run in arm["runs"]:
            cells = [
                arm["name"],
                Shown(str(run["seed"]), run["seed"]),
                run["status"],
                fixed(run["value"], decimals),
                general(run["learning_rate"]),
                time(run["seconds"]),
                quantity(run["tokens_per_second"]),
                element("code", run["config_hash"][:12]),
                element("code", (run["code"] or NOTHING)[:16]),
                element("code", run["directory"]),
            ]
            rows.append((cells, "" if run["status"] == "finished" else "odd"))
    shared = {key: value for key, value in results["provenance"].items() if key != "runs"}
    every = {}
    for place, run in enumerate(results["provenance"].get("runs") or []):
        named = run.get("name") or run.get("hash") or run.get("config_hash") if isinstance(run, dict) else None
        every[str(named or place) if str(named or place) not in every else f"{named} ({place})"] = run
    return section(
        "Provenance",
        element(
            "p",
            ["Study file ", element("code", results["file"]), ", run by ", element("code", results["command"]), "."],
            class_="lede",
        ),
        folded(f"All {len(rows)} runs", table(heads, rows, caption="Every run of the study", sortable=True)),
        folded("Environment", tree(shared)) if shared else None,
        folded("Provenance by run", tree(every)) if every else None,
        anchor="provenance",
    )
