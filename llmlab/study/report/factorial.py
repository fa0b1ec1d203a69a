"""The factorial part of an ablation's page: effects, cells, and how one factor's effect depends on another.

Parallel lines mean that effects add up; lines that cross or fan mean an interaction.
"""

from typing import Any

from llmlab.study.report import charts, words
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import fixed, interval, p_value, signed
from llmlab.study.report.page import folded, section, table
from llmlab.study.report.scales import Scale


def factorial_section(results: dict[str, Any], decimals: int) -> Html | None:
    """The section; None for a study that is not a factorial."""
    factorial = results["factorial"]
    if factorial is None:
        return None
    level = words.level(results)
    heads = [("Term", False), ("Effect", True), (f"{level} interval", True), ("p", True), ("p (Holm)", True)]
    rows = [
        (
            [
                effect["term"],
                signed(effect["estimate"], decimals),
                interval(effect["interval"], decimals),
                p_value(effect["p"]),
                p_value(effect["p_holm"]),
            ],
            "",
        )
        for effect in factorial["effects"]
    ]
    lede = (
        f"Effects on {words.metric(results)}. A main effect is averaged over the other factors; an "
        "interaction is what two changes do together beyond the sum of what each does."
    )
    return section(
        "Factors and interactions",
        element("p", lede, class_="lede"),
        table(heads, rows, caption="Main effects and interactions"),
        _figure(results, decimals),
        folded("All cells", _cells(factorial, results["metric"], decimals)),
        anchor="factorial",
    )


def panels(factorial: dict[str, Any]) -> list[tuple[str, str, dict[str, list[float | None]]]]:
    """(factor on the axis, factor of the lines, {level of the lines: mean at each level of the axis}) of each pair.

    Means over the other factors' levels, all cells weighing the same; a single factor stands against nothing.
    """
    names = list(factorial["factors"])
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]] or [(names[0], "")]
    found = []
    for across, lines in pairs:
        levels = factorial["factors"][lines] if lines else [""]
        found.append(
            (
                across,
                lines,
                {
                    level: [_mean(factorial, {across: at, lines: level}) for at in factorial["factors"][across]]
                    for level in levels
                },
            )
        )
    return found


def interaction_scale(factorial: dict[str, Any]) -> Scale:
    """One vertical axis for all panels."""
    return Scale.over(
        [value for _, _, by in panels(factorial) for values in by.values() for value in values], room=0.12
    )


def _mean(factorial: dict[str, Any], wanted: dict[str, str]) -> float | None:
    means = [
        cell["mean"]
        for cell in factorial["cells"]
        if all(cell["levels"].get(factor) == level for factor, level in wanted.items() if factor)
    ]
    return sum(means) / len(means) if means and None not in means else None


def _figure(results: dict[str, Any], decimals: int) -> Html:
    factorial = results["factorial"]
    y = interaction_scale(factorial)
    drawn = []
    for across, lines, by_level in panels(factorial):
        levels = factorial["factors"][across]
        series = [
            charts.Series(
                name=f"{lines}={level}" if lines else results["metric"],
                x=list(range(len(levels))),
                y=values,
                color=place,
            )
            for place, (level, values) in enumerate(by_level.items())
        ]
        told = "; ".join(f"{one.name}: {', '.join(str(fixed(v, decimals)) for v in one.y)}" for one in series)
        drawn.append(
            charts.curves(
                series,
                x=Scale(-0.35, len(levels) - 0.65),
                y=y,
                x_title=across,
                y_title=results["metric"],
                summary=f"{results['metric']} at {across} = {', '.join(levels)}; {told}",
                x_ticks=[(place, level) for place, level in enumerate(levels)],
                dots=True,
                tall=230,
            )
        )
    caption = element("figcaption", "Parallel lines: effects add up. Lines that cross or fan: an interaction.")
    return element(
        "figure", element("div", *(element("div", one) for one in drawn), class_="small-multiples wide"), caption
    )


def _cells(factorial: dict[str, Any], metric: str, decimals: int) -> Html:
    names = list(factorial["factors"])
    heads = [(name, False) for name in names] + [(metric, True)]
    rows = [
        ([*(cell["levels"][name] for name in names), fixed(cell["mean"], decimals)], "") for cell in factorial["cells"]
    ]
    return table(heads, rows, caption="Mean of every cell")
