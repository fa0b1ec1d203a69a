"""The page of a scaling study: the exponents and how well the largest runs were predicted, then what they rest on."""

from typing import Any

from llmlab.display.figure import spread
from llmlab.study.report import charts, scaling_curves, words
from llmlab.study.report import scaling_words as said
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import quantity
from llmlab.study.report.page import code, facts, folded, moment, page, problems, section, table, tree
from llmlab.study.report.scales import Scale
from llmlab.study.report.scaling_results import finished

_TALL, _GAP = 320.0, 17.0  # pixels: of a figure in the style sheet, and between the names at its side


def render(results: dict[str, Any]) -> str:
    """The document."""
    return page(
        f"Scaling {results['name']}: {results['question']}",
        _first_screen(results),
        _isoflop(results),
        _law(results),
        _frontier(results),
        _held_out(results),
        _runs(results),
        problems(results["problems"]),
        _provenance(results),
        foot=[
            "Made from results.json alone. The same command goes on where the study stopped:",
            code(results["command"]),
        ],
    )


def _first_screen(results: dict[str, Any]) -> Html:
    eyebrow = element(
        "p", element("b", "Scaling study"), element("span", results["name"]), moment(results["date"]), class_="eyebrow"
    )
    runs, done = results["runs"], finished(results)
    pairs = [
        ("Runs", f"{len(done)} of {len(runs)} with a loss"),
        ("Sizes", str(len({run["parameters"] for run in runs}))),
        ("Compute", f"{quantity(min(r['flops'] for r in runs))} to {quantity(max(r['flops'] for r in runs))} FLOPs"),
        ("Metric", words.metric(results)),
    ]
    return element(
        "header",
        eyebrow,
        element("h1", results["question"]),
        element("p", *said.answer(results), class_="lead"),
        facts(pairs),
        class_="top",
    )


def _table(parts: said.Table, caption: str, *, sortable: bool = False) -> Html:
    heads, rows = parts
    return table(heads, [(row, "") for row in rows], caption=caption, sortable=sortable)


def _isoflop(results: dict[str, Any]) -> Html | None:
    if not results["isoflop"] or not results["isoflop"]["profiles"]:
        return None
    x = Scale.over([run["parameters"] for run in finished(results)], log=True)
    y = Scale.over([run["value"] for run in finished(results) if run["budget"] is not None])
    marks, ends = [], []
    for place, profile in enumerate(results["isoflop"]["profiles"]):
        color = charts.color_class(place + 1)
        runs = [run for run in finished(results) if run["budget"] == profile["flops"]]
        sizes = [run["parameters"] for run in runs]
        line = scaling_curves.parabola(profile, min(sizes), max(sizes))
        inner = [charts.path(*line, x, y, "line")]
        inner += [
            charts.dot(x.at(run["parameters"]), y.at(run["value"]), "dot", f"{run['name']}: {run['value']:.4f}")
            for run in runs
        ]
        if profile["inside"]:
            minimum = f"minimum at {quantity(profile['optimum'])} parameters"
            inner.append(charts.dot(x.at(profile["optimum"]), y.at(profile["loss"]), "dot big", minimum))
        marks.append(element("g", *inner, class_=color))
        ends.append((str(quantity(profile["flops"])), color, _TALL * y.at(line[1][-1])))
    heights = spread([height for _, _, height in ends], _GAP, 0.0, _TALL)
    ends = [(name, color, height / _TALL) for (name, color, _), height in zip(ends, heights, strict=True)]
    chart = charts.frame(
        marks, x=x, y=y, x_title="parameters N (log)", y_title=words.metric(results), ends=ends,
        summary=f"Loss against size for {len(marks)} budgets",
    )  # fmt: skip
    caption = "A curve for each budget in FLOPs: runs, the parabola through them, and its minimum as a larger dot."
    return section("IsoFLOP profiles", element("figure", chart, element("figcaption", caption)), anchor="isoflop")


def _law(results: dict[str, Any]) -> Html | None:
    if results["law"] is None:
        return None
    formula = element("p", "L(N, D) = E + A / N^alpha + B / D^beta, fitted to log loss.", class_="lede")
    (n_low, n_high), (d_low, d_high) = scaling_curves.plane(results)
    x, y = Scale(n_low, n_high, log=True), Scale(d_low, d_high, log=True)
    marks = [charts.path(*line, x, y, "line faint") for _, line in scaling_curves.contours(results)]
    best_n, best_d = (scaling_curves.frontier(results, which)[1] for which in ("parameters", "tokens"))
    marks.append(element("g", charts.path(best_n, best_d, x, y, "line"), class_="c2"))
    for run in finished(results):
        told = f"{run['name']}: {run['value']:.4f}, the law {run['fitted']:.4f}"
        marks.append(element("g", charts.dot(x.at(run["parameters"]), y.at(run["tokens"]), "dot", told), class_="c1"))
    chart = charts.frame(
        marks, x=x, y=y, x_title="parameters N (log)", y_title="tokens D (log)",
        summary="Runs in the plane of parameters and tokens, with lines of equal loss of the fitted law",
    )  # fmt: skip
    levels = ", ".join(f"{level:.2f}" for level, _ in scaling_curves.contours(results))
    caption = f"Dots are runs; grey, lines of equal loss ({levels}, from top right); orange, the best use of a budget."
    return section(
        "The law",
        formula,
        _table(said.law_table(results), "Parameters of the law and exponents of the frontier"),
        element("figure", chart, element("figcaption", caption)),
        anchor="law",
    )


def _frontier(results: dict[str, Any]) -> Html | None:
    if not results["frontier"]:
        return None
    panels = []
    for which, name in (("parameters", "parameters N*"), ("tokens", "tokens D*"), ("loss", words.metric(results))):
        flops, values = scaling_curves.frontier(results, which)
        ends = [end for row in results["frontier"] for end in row[which]["interval"] or ()]
        x = Scale.over(flops, log=True)
        y = Scale.over([*values, *ends], log=which != "loss")
        bars = [
            charts.path([row["flops"]] * 2, row[which]["interval"], x, y, "line")
            for row in results["frontier"]
            if row[which]["interval"] is not None
        ]
        marks = [element("g", charts.path(flops, values, x, y, "line"), *bars, class_="c1")]
        chart = charts.frame(
            marks, x=x, y=y, x_title="FLOPs C (log)", y_title=name, summary=f"Best {name} against FLOPs", tall=230
        )
        panels.append(element("div", chart))
    caption = f"Bars are {said.level(results)} bootstrap intervals."
    return section(
        "Compute-optimal frontier",
        _table(said.frontier_table(results), "The best use of each budget"),
        element("figure", element("div", *panels, class_="small-multiples"), element("figcaption", caption)),
        anchor="frontier",
    )


def _held_out(results: dict[str, Any]) -> Html | None:
    if results["held_out"] is None:
        return None
    lede = (
        f"A law fitted to the {results['held_out']['runs']} smaller runs alone, and what it says of the largest. "
        "The interval is for one run: the law's uncertainty and the runs' own scatter."
    )
    return section(
        "Held-out check",
        element("p", lede, class_="lede"),
        _table(said.held_out_table(results), "The largest runs, predicted from the smaller ones"),
        anchor="held-out",
    )


def _runs(results: dict[str, Any]) -> Html:
    content = _table(said.runs_table(results), "Every run", sortable=True)
    return section("Runs", folded(f"{len(results['runs'])} runs", content), anchor="runs")


def _provenance(results: dict[str, Any]) -> Html:
    return section(
        "Conventions and provenance",
        element("ul", *(element("li", text, ".") for text in said.conventions(results)), class_="notes"),
        element("p", "Study file ", element("code", results["file"]), ".", class_="lede"),
        folded("Environment", tree(results["provenance"])) if results["provenance"] else None,
        anchor="provenance",
    )
