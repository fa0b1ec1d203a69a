"""The page of a sweep: the best point and its command first, then what each axis does to the metric."""

from collections import Counter
from pathlib import PurePath
from typing import Any

from llmlab.study.report import charts, words
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import NOTHING, Shown, decimals_for, fixed, general, time
from llmlab.study.report.page import alert, code, facts, folded, moment, page, plain, problems, section, table, tree
from llmlab.study.report.scales import Scale
from llmlab.study.report.sweep_axes import Placed, curve_scale, curves_of, placed, short, unplaced, value_scale
from llmlab.study.report.sweep_results import ranked

NUM_BEST = 15
"""Trials in the first table; the others are folded."""

IN_THE_FILE = "Flags cannot say, and the study file must:"
"""Stands before what the best trial has and its command does not."""


def render(results: dict[str, Any]) -> str:
    """The document."""
    decimals = metric_decimals(results)
    axes = placed(results)
    return page(
        f"Sweep {results['name']}: {results['metric']}",
        _first_screen(results, decimals),
        _axes(results, axes, decimals),
        _best(results, axes, decimals),
        _importance(results),
        _parallel(results, axes),
        _curves(results),
        _failures(results),
        problems(results["problems"]),
        _provenance(results),
        foot=[
            "Made from results.json alone. The same command goes on where the sweep stopped:",
            code(results["command"]),
        ],
    )


def metric_decimals(results: dict[str, Any]) -> int:
    """Decimals that tell the best trials apart."""
    values = [trial["value"] for trial in ranked(results)][:NUM_BEST]
    return decimals_for([values[-1] - values[0]]) if len(values) > 1 else 4


def shown(value: Any) -> str:
    """A value of a point."""
    return general(value) if isinstance(value, int | float) and not isinstance(value, bool) else plain(value)


def _first_screen(results: dict[str, Any], decimals: int) -> Html:
    best, trials = results["best"], results["trials"]
    eyebrow = element(
        "div",
        element("b", "Sweep"),
        element("span", results["name"]),
        moment(results["date"]),
        class_="eyebrow",
    )
    if best is None:
        said: list[Html | None] = [
            element("h1", "No trial has finished"),
            alert("Nothing to compare", "See the trials below."),
        ]
    else:
        value = [fixed(best["value"], decimals), element("small", words.unit(results))]
        number = Shown(str(best["number"]), best["number"])
        point = [part for path, at in best["point"].items() for part in (f", {path} = ", shown(at))]
        said = [
            element("h1", f"{results['metric']} ", value),
            element("p", f"The best of {len(trials)} trials is number ", number, point, ".", class_="lead"),
            code(best["command"]) if best["command"] else None,
            element("p", f"{IN_THE_FILE} {'; '.join(best['told'])}.", class_="lede") if best.get("told") else None,
        ]
    counts = Counter(trial["status"] for trial in trials)
    pairs: list[tuple[str, Any]] = [("Metric", f"{results['metric']}, {results['direction']} is better")]
    pairs += [(status.capitalize(), Shown(str(count), count)) for status, count in counts.most_common()]
    spent = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    if spent:
        pairs.append(("Time of all trials", time(sum(spent))))
    return element("header", eyebrow, *said, facts(pairs), class_="top")


def _axes(results: dict[str, Any], axes: list[Placed], decimals: int) -> Html | None:
    """The metric against each axis."""
    valued = ranked(results)
    if not axes or not valued:
        return None
    y = value_scale(results)
    panels = []
    for axis in axes:
        marks = []
        for trial in reversed(valued):  # the best on top
            if axis.path not in trial["point"] or not y.low <= trial["value"] <= y.high:
                continue
            best = trial is valued[0]
            setting = trial["point"][axis.path]
            told = (
                f"trial {trial['number']}: {fixed(trial['value'], decimals)} at {short(axis.path)} = {shown(setting)}"
            )
            drawn = charts.dot(axis.at(setting), y.at(trial["value"]), "dot big" if best else "dot soft", told)
            marks.append(element("g", drawn, class_="c2" if best else "c1"))
        scale = axis.scale or Scale(0.0, 1.0)
        summary = f"{results['metric']} of the finished trials against {axis.path}"
        logarithmic = " (log)" if axis.scale is not None and axis.scale.log else ""
        chart = charts.frame(
            marks, x=scale, y=y, x_title=f"{axis.path}{logarithmic}", y_title=results["metric"], summary=summary,
            x_ticks=axis.ticks(), tall=230,
        )  # fmt: skip
        panels.append(element("div", chart))
    caption = [f"Every finished trial; {words.metric(results)}. The orange dot is the best."]
    if cut := unplaced(results, y):
        caption.append(f" {cut} trial{'s' * (cut > 1)} beyond the vertical axis.")
    figure = element("figure", element("div", *panels, class_="small-multiples"), element("figcaption", *caption))
    return section("Axis by axis", figure, anchor="axes")


def _best(results: dict[str, Any], axes: list[Placed], decimals: int) -> Html:
    valued = ranked(results)
    best = results["best"]["number"] if results["best"] else None
    points = [(axis.path, axis.scale is not None) for axis in axes]
    heads = [("Trial", False), (results["metric"], True), *points, ("Status", False), ("Time", True), ("Run", False)]
    # Run directories mostly share a parent, which is then said once.
    parents = {str(PurePath(trial["directory"]).parent) for trial in results["trials"] if trial["directory"]}
    where = f", runs in {parents.pop()}" if len(parents) == 1 else None

    def row(trial: dict[str, Any]) -> tuple[list[Any], str]:
        number, run = trial["number"], trial["directory"]
        return [
            Shown(str(number), number),
            fixed(trial["value"], decimals),
            *(shown(trial["point"][axis.path]) if axis.path in trial["point"] else NOTHING for axis in axes),
            trial["status"],
            time(trial["seconds"]),
            element("code", (PurePath(run).name if where else run) or NOTHING),
        ], "picked" if number == best else ""

    listed = {trial["number"] for trial in valued[:NUM_BEST]}
    rest = [trial for trial in [*valued[NUM_BEST:], *results["trials"]] if trial["number"] not in listed]
    rest = list({trial["number"]: trial for trial in rest}.values())
    content = []
    if valued:
        caption = f"Finished trials, the best first{where or ''}"
        content.append(table(heads, map(row, valued[:NUM_BEST]), caption=caption, sortable=True))
    if rest:
        others = table(heads, map(row, rest), caption=f"The other trials{where or ''}", sortable=True)
        content.append(folded(f"The other {len(rest)} trials", others))
    return section("Best trials", *content, anchor="best")


def _importance(results: dict[str, Any]) -> Html | None:
    importance = results["importance"]
    if not importance:
        return None
    order = sorted(importance.items(), key=lambda item: -item[1])
    most = max(value for _, value in order) or 1.0
    rows = [(path, value / most, Shown(f"{100 * value:.3g}%", value)) for path, value in order]
    lede = (
        "How much of the metric's variation each axis explains, estimated from the trials: a guide to what to look at, "
        "not a test. An axis that was sampled in a narrow range looks unimportant."
    )
    return section("Importance", element("p", lede, class_="lede"), charts.bars(rows), anchor="importance")


def _parallel(results: dict[str, Any], axes: list[Placed]) -> Html | None:
    """Each trial as a line through its values on all axes, ending at the metric."""
    y = value_scale(results)
    trials = [trial for trial in ranked(results) if y.low <= trial["value"] <= y.high]
    if len(axes) < 2 or len(trials) < 2:
        return None
    places = [index / len(axes) for index in range(len(axes) + 1)]
    marks = [element("path", d=f"M{charts.place(at)} 0V1000", class_="zero soft") for at in places]
    tenth = max(1, len(trials) // 10)
    unit = Scale(0.0, 1.0)
    for rank, trial in reversed(list(enumerate(trials))):
        heights: list[float | None] = [
            axis.at(trial["point"][axis.path]) if axis.path in trial["point"] else None for axis in axes
        ]
        class_ = "line" if rank < tenth else "line faint"
        line = charts.path(places, [*heights, y.at(trial["value"])], unit, unit, class_)
        marks.append(element("g", line, class_="c2" if rank == 0 else "c1") if rank < tenth else line)
    paths = ", ".join(axis.path for axis in axes)
    summary = f"Parallel coordinates of {len(trials)} finished trials over {paths} and {results['metric']}"
    picture = charts.picture(marks, summary)
    ticks = [*(axis.ticks() for axis in axes), [(y.at(tick), str(general(tick))) for tick in y.ticks(4)]]
    rails = [
        element("div", *charts.tick_texts(column, "bottom"), class_="rail", style=f"left: {100 * at:.2f}%")
        for at, column in zip(places, ticks, strict=True)
    ]
    names = [*(short(axis.path) for axis in axes), results["metric"]]
    heads = element(
        "div", *charts.tick_texts(list(zip(places, names, strict=True)), "left"), class_="heads", aria_hidden="true"
    )
    area = element("div", picture, element("div", *rails, aria_hidden="true"), class_="area")
    chart = element("div", element("div", heads, area, class_="parallel"), class_="scroll", tabindex="0", role="region",
                    aria_label="Parallel coordinates")  # fmt: skip
    caption = element("figcaption", "Each line is a trial. Coloured: the best tenth; orange: the best.")
    return section("Parallel coordinates", element("figure", chart, caption), anchor="parallel")


def _curves(results: dict[str, Any]) -> Html | None:
    named, others = curves_of(results)
    if not named and not others:
        return None

    def series(trial: dict[str, Any], color: int) -> charts.Series:
        return charts.Series(
            name=f"trial {trial['number']}", x=trial["curve"]["step"], y=trial["curve"]["value"], color=color
        )

    last = max(max(trial["curve"]["step"]) for trial in [*named, *others])
    colors = (2, 1, 3, 4)
    names = [f"trial {trial['number']}" for trial in named]
    chart = charts.curves(
        [series(trial, color) for trial, color in zip(named, colors, strict=False)],
        x=Scale(0.0, float(last) or 1.0),
        y=curve_scale(named, others),
        x_title="optimizer steps",
        y_title=words.metric(results),
        summary=f"Learning curves; the best: {', '.join(names) or 'none finished'}",
        faint=[series(trial, 0) for trial in others],
    )
    caption = element(
        "figcaption", "Named: the best trials. Behind them, the others, pruned and diverged ones included."
    )
    return section("Learning curves", element("figure", chart, caption), anchor="curves")


def _failures(results: dict[str, Any]) -> Html | None:
    rows = [
        (
            [
                Shown(str(trial["number"]), trial["number"]),
                trial["status"],
                trial["problem"],
                element("code", trial["directory"]),
            ],
            "",
        )
        for trial in results["trials"]
        if trial["problem"]
    ]
    if not rows:
        return None
    heads = [("Trial", False), ("Status", False), ("What happened", False), ("Directory", False)]
    return section("Failed trials", table(heads, rows, caption="Trials without a result, and why"), anchor="failures")


def _provenance(results: dict[str, Any]) -> Html:
    rows = []
    for axis in results["axes"]:
        values = ", ".join(map(plain, axis["values"])) if axis["values"] is not None else ""
        ends = [general(axis["low"]), " to ", general(axis["high"])] if axis["low"] is not None else values
        rows.append(([element("code", axis["path"]), axis["kind"].replace("_", "-"), ends], ""))
    space = table([("Axis", False), ("Kind", False), ("Values", False)], rows, caption="The space of the sweep")
    return section(
        "Provenance",
        element("p", "Study file ", element("code", results["file"]), ".", class_="lede"),
        space,
        folded("Environment", tree(results["provenance"])) if results["provenance"] else None,
        anchor="provenance",
    )
