"""The page of a transfer study: loss against learning rate for each width, arm beside arm."""

from typing import Any

from llmlab.study.report import charts, words
from llmlab.study.report import transfer_words as said
from llmlab.study.report.markup import Html, element
from llmlab.study.report.page import code, facts, folded, moment, page, problems, section, table, tree
from llmlab.study.report.scales import Scale


def render(results: dict[str, Any]) -> str:
    """The document."""
    return page(
        f"Transfer {results['name']}: {results['question']}",
        _first_screen(results),
        _losses(results),
        _coordinates(results),
        problems(results["problems"]),
        _provenance(results),
        foot=[
            "Made from results.json alone. The same command goes on where the study stopped:",
            code(results["command"]),
        ],
    )


def _first_screen(results: dict[str, Any]) -> Html:
    runs = [run for arm in results["arms"] for run in arm["runs"]]
    eyebrow = element(
        "p",
        element("b", "Learning-rate transfer"),
        element("span", results["name"]),
        moment(results["date"]),
        class_="eyebrow",
    )
    pairs = [
        ("Runs", f"{sum(run['value'] is not None for run in runs)} of {len(runs)} with a loss"),
        ("Widths", ", ".join(map(str, results["widths"]))),
        ("Seeds", str(len(results["arms"][0]["widths"][0]["losses"][0]))),
        ("Metric", words.metric(results)),
    ]
    sentences = [element("p", text, class_="lead") for text in said.answer(results)]
    return element("header", eyebrow, element("h1", results["question"]), *sentences, facts(pairs), class_="top")


def _losses(results: dict[str, Any]) -> Html:
    every = [loss for arm in results["arms"] for row in arm["widths"] for loss in row["means"]]
    x, y = Scale.over(results["learning_rates"], log=True), Scale.over(every)
    panels = []
    for arm in results["arms"]:
        series = [
            charts.Series(name=f"width {row['width']}", x=results["learning_rates"], y=row["means"], color=place + 1)
            for place, row in enumerate(arm["widths"])
        ]
        chart = charts.curves(
            series, x=x, y=y, x_title="peak learning rate (log)", y_title=f"{arm['name']}: {words.metric(results)}",
            summary=f"{arm['name']}: loss against learning rate for each width", dots=True,
        )  # fmt: skip
        panels.append(element("div", chart))
    caption = "A curve for each width; a rate at which a seed diverged has no point."
    return section(
        "Loss against learning rate",
        element("figure", element("div", *panels, class_="small-multiples wide"), element("figcaption", caption)),
        _table(said.best_table(results), "The best learning rate of each width"),
        folded("All losses", _table(said.loss_table(results), "Mean loss by learning rate")),
        anchor="losses",
    )


def _coordinates(results: dict[str, Any]) -> Html | None:
    checked = [arm for arm in results["arms"] if arm["coordinates"]]
    if not checked:
        return None
    every = [x for arm in checked for values in arm["coordinates"]["change"].values() for x in values]
    x, y = Scale.over(results["widths"], log=True), Scale.over(every, log=True)
    panels = []
    for arm in checked:
        series = [
            charts.Series(name=layer, x=results["widths"], y=values, color=place + 1)
            for place, (layer, values) in enumerate(arm["coordinates"]["change"].items())
        ]
        chart = charts.curves(
            series, x=x, y=y, x_title="width (log)", y_title=f"{arm['name']}: mean |change of the output| (log)",
            summary=f"{arm['name']}: change of each layer's output after a few steps, against width", dots=True,
        )  # fmt: skip
        panels.append(element("div", chart))
    lede = "How much a few steps change what each layer puts out, by width: flat where a learning rate can transfer."
    return section(
        "Coordinate check",
        element("p", lede, class_="lede"),
        element("figure", element("div", *panels, class_="small-multiples wide")),
        _table(said.slope_table(results), "Slopes of log change against log width"),
        anchor="coordinates",
    )


def _table(parts: said.Table, caption: str) -> Html:
    heads, rows = parts
    return table(heads, [(row, "") for row in rows], caption=caption)


def _provenance(results: dict[str, Any]) -> Html:
    runs = [run for arm in results["arms"] for run in arm["runs"]]
    rows = [([run["name"], run["status"], element("code", run["directory"])], "") for run in runs]
    heads = [("Run", False), ("Status", False), ("Directory", False)]
    return section(
        "Provenance",
        element("p", "Study file ", element("code", results["file"]), ".", class_="lede"),
        folded(f"{len(runs)} runs", table(heads, rows, caption="Every run")),
        folded("Environment", tree(results["provenance"])) if results["provenance"] else None,
        anchor="provenance",
    )
