"""The forest plot: what each variant differs by, with its interval, against what was claimed.

One row for each variant. The shaded zone is where its claim holds, so the question is seen at once: does the interval
lie inside? Small dots are the seeds' own differences, the raw data. A row that lies far beyond the others (a diverged
seed) does not flatten them: the axis ends earlier, an arrow says so, and the number stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from llmlab.study.report.ablation_results import differences
from llmlab.study.report.charts import place
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import interval, signed
from llmlab.study.report.scales import Scale, decimals_of

_FAR = 8.0  # times the median row: from here on a row is an outlier


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison as it is drawn; differences are variant less baseline, in the metric's unit."""

    name: str
    verdict: str
    difference: float | None
    interval: tuple[float | None, float | None] | None
    """None where there is none, a None inside where it has no end."""
    seeds: list[float]
    zone: tuple[float | None, float | None]
    """Differences at which the claim holds; None where it has no end."""

    @property
    def reach(self) -> float:
        """How far from the baseline the row reaches."""
        ends = [self.difference, *(self.interval or ())]
        return max((abs(end) for end in ends if end is not None), default=0.0)


def rows(results: dict[str, Any]) -> list[Row]:
    """The rows of an ablation's results."""
    arms = {arm["name"]: arm for arm in results["arms"]}
    return [
        Row(
            name=comparison["arm"],
            verdict=comparison["verdict"],
            difference=comparison["difference"],
            interval=None if comparison["interval"] is None else tuple(comparison["interval"]),
            seeds=[d for d in differences(results["arms"][0], arms[comparison["arm"]]) if d is not None],
            zone=zone(comparison["claim"], margin_of(results, comparison), results["direction"]),
        )
        for comparison in results["comparisons"]
    ]


def margin_of(results: dict[str, Any], comparison: dict[str, Any]) -> float:
    """The margin of one comparison: its own where a variant has one."""
    return comparison.get("margin", results["margin"])


def zone(claim: str, margin: float, direction: str) -> tuple[float | None, float | None]:
    """The differences at which a claim holds: ends in the metric's unit, None where there is no end."""
    low, high = {
        "no worse": (None, margin),
        "equal": (-margin, margin),
        "better": (None, -margin),
        "worse": (margin, None),
    }[claim]
    if direction == "lower":
        return low, high
    return (None if high is None else -high), (None if low is None else -low)


def axis(drawn: Sequence[Row]) -> Scale:
    """The axis of differences: the baseline, the margins and all rows that are not far beyond the others."""
    margins = [abs(end) for row in drawn for end in row.zone if end is not None]
    reaches = [row.reach for row in drawn]
    usual = max([median(reaches), *margins], default=0.0) if reaches else 0.0
    kept = [row for row in drawn if row.reach <= _FAR * usual]
    values: list[float] = [0.0, *(end for row in drawn for end in row.zone if end is not None)]
    for row in kept:
        values += [end for end in (row.difference, *(row.interval or ())) if end is not None]
        values += [seed for seed in row.seeds if abs(seed) <= 1.6 * max(row.reach, usual)]
    low, high = min(values), max(values)
    if len(kept) < len(drawn):
        low, high = min(low, -2 * usual), max(high, 2 * usual)
    if low == high:
        low, high = -1.0, 1.0
    least = 0.12 * (high - low)  # room for the zone's edges and for the words under the axis
    return Scale(min(low - 0.06 * (high - low), -least), max(high + 0.06 * (high - low), least))


def forest(results: dict[str, Any], decimals: int, level: str) -> Html:
    """The forest plot of the page."""
    drawn = rows(results)
    scale = axis(drawn)
    left, right = ("better", "worse") if results["direction"] == "lower" else ("worse", "better")
    unit = f", {results['unit']}" if results["unit"] else ""
    title = f"Difference of {results['metric']} from the baseline{unit}"
    ticks = scale.ticks(5)
    tick_decimals = decimals_of(ticks)
    labels = [
        element("span", str(signed(tick, tick_decimals)), class_="tick", style=f"left: {100 * scale.at(tick):.2f}%")
        for tick in ticks
    ]
    zero = 100 * scale.at(0)
    words = [
        element(
            "span", f"\N{LEFTWARDS ARROW} {left}", class_="side", style=f"right: {100 - zero:.2f}%; padding-right: .6em"
        ),
        element("span", f"{right} \N{RIGHTWARDS ARROW}", class_="side", style=f"left: {zero:.2f}%; padding-left: .6em"),
    ]
    axis_row = element(
        "div",
        element("div", class_="who"),
        element("div", *labels, *words, class_="plot"),
        element("div", class_="num"),
        class_="row axis",
        aria_hidden="true",
    )
    caption = element(
        "figcaption",
        title,
        f". Thick line: {level} interval; large mark: mean; small dots: single seeds; vertical line: baseline. ",
        element("span", class_="swatch", aria_hidden="true"),
        "where the claim holds.",
    )
    return element("figure", *(_row(row, scale, decimals) for row in drawn), axis_row, caption, class_="forest")


def _row(row: Row, scale: Scale, decimals: int) -> Html:
    who = element("div", row.name, element("span", row.verdict, class_=f"verdict {row.verdict}"), class_="who")
    numbers = element(
        "div",
        element("b", signed(row.difference, decimals)),
        element("span", interval(row.interval, decimals)),
        class_="num",
    )
    picture = element(
        "svg", *_marks(row, scale), viewBox="0 0 1000 1000", preserveAspectRatio="none", aria_hidden="true"
    )
    return element(
        "div", who, element("div", picture, *_mean(row, scale), class_="plot"), numbers, class_=f"row {row.verdict}"
    )


def _marks(row: Row, scale: Scale) -> list[Html]:
    left, right = (_within(end, scale, default) for end, default in zip(row.zone, (0.0, 1.0), strict=True))
    marks = [element("path", d=f"M{place(left)} 0H{place(right)}V1000H{place(left)}Z", class_="zone")]
    for end in row.zone:
        if end is not None:
            marks.append(element("path", d=f"M{place(scale.at(end))} 0V1000", class_="edge"))
    marks.append(element("path", d=f"M{place(scale.at(0))} 0V1000", class_="zero"))
    if row.interval is not None:
        low, high = (_within(end, scale, default) for end, default in zip(row.interval, (0.0, 1.0), strict=True))
        marks.append(element("path", d=f"M{place(low)} 440H{place(high)}", class_="ci"))
    for seed in row.seeds:
        at = scale.at(seed)
        if 0 <= at <= 1:
            marks.append(element("path", d=f"M{place(at)} 800h0.01", class_="seed"))
    return marks


def _mean(row: Row, scale: Scale) -> list[Html]:
    """The mark of the mean, and an arrow at each end of the axis that the row goes beyond."""
    marks = []
    if row.difference is not None and 0 <= (at := scale.at(row.difference)) <= 1:
        marks.append(element("span", class_="mark", style=f"left: {100 * at:.2f}%"))
    if beyond(row, scale, left=True):
        marks.append(element("span", "\N{BLACK LEFT-POINTING TRIANGLE}", class_="beyond", style="left: 0"))
    if beyond(row, scale, left=False):
        marks.append(element("span", "\N{BLACK RIGHT-POINTING TRIANGLE}", class_="beyond", style="right: 0"))
    return marks


def beyond(row: Row, scale: Scale, *, left: bool) -> bool:
    """Whether the row goes on past this end of the axis."""
    if row.difference is None:
        return False
    edge = (row.interval or (row.difference, row.difference))[0 if left else 1]
    if edge is None:
        return True
    return edge < scale.low if left else edge > scale.high


def _within(value: float | None, scale: Scale, default: float) -> float:
    return default if value is None else min(max(scale.at(value), 0.0), 1.0)
