"""Figures of the page: drawings that stretch, texts that do not.

What has places on an axis is drawn in an SVG of 1000 x 1000 units that is stretched to its box, with strokes that keep
their width (`vector-effect: non-scaling-stroke`; a dot is a line without length). Texts are HTML at percentages of the
same box. So a figure has the page's own type at its own size on a phone and on paper, and follows light and dark by
the colours of the style sheet, which an image could not.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.display.figure import spread
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import count_label, fixed, general
from llmlab.study.report.scales import Scale, decimals_of

NUM_COLORS = 7  # c0 to c6 of the style sheet; c0 is the ink, the baseline's
_TALL = 320  # pixels, as in the style sheet; labels are moved apart at this height
_LABEL_GAP = 17.0

Values = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a figure."""

    name: str
    x: Sequence[float]
    y: Values
    low: Values = ()
    high: Values = ()
    color: int = 0


def color_class(index: int) -> str:
    """The style of the index-th curve; past the last, colours come again."""
    return f"c{index if index < NUM_COLORS else 1 + (index - 1) % (NUM_COLORS - 1)}"


def curves(
    series: Sequence[Series],
    *,
    x: Scale,
    y: Scale,
    x_title: str,
    y_title: str,
    summary: str,
    faint: Sequence[Series] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
    dots: bool = False,
    tall: int = _TALL,
) -> Html:
    """Curves with bands, each named at its end, with a key instead on narrow screens.

    Args:
        series: the curves that have a name and a colour.
        x: horizontal axis.
        y: vertical axis; what lies outside is cut.
        x_title: of the horizontal axis.
        y_title: of the vertical axis.
        summary: the figure in one sentence, for those who do not see it.
        faint: curves behind the others, without a name.
        x_ticks: (value, text) of the ticks, where round values would not do; the pointer then reads nothing off.
        dots: whether each point is marked.
        tall: height in pixels.
    """
    marks = [path(curve.x, curve.y, x, y, "line faint") for curve in faint]
    for curve in series:
        inner = [path(curve.x, curve.y, x, y, "line")]
        if curve.low and curve.high:
            inner.insert(0, _band(curve, x, y))
        if dots:
            inner += [dot(x.at(a), y.at(b), "dot") for a, b in zip(curve.x, curve.y, strict=True) if b is not None]
        marks.append(element("g", *inner, class_=color_class(curve.color)))
    data = {
        "x": [x.low, x.high],
        "log": x.log,
        "series": [
            {"name": curve.name, "class": color_class(curve.color), "x": list(curve.x), "y": list(curve.y)}
            for curve in series
        ],
    }
    key = element("ul", *(element("li", c.name, class_=color_class(c.color)) for c in series), class_="key")
    drawn = frame(
        marks,
        x=x,
        y=y,
        x_title=x_title,
        y_title=y_title,
        summary=summary,
        x_ticks=None if x_ticks is None else [(x.at(at), text) for at, text in x_ticks],
        ends=_ends(series, y, tall),
        data=data if x_ticks is None else None,
        tall=None if tall == _TALL else tall,
    )
    return Html(str(key) + str(drawn)) if len(series) > 1 else drawn


def frame(
    marks: Iterable[Html],
    *,
    x: Scale,
    y: Scale,
    x_title: str,
    y_title: str,
    summary: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    ends: Sequence[tuple[str, str, float]] = (),
    data: Any = None,
    tall: int | None = None,
) -> Html:
    """Axes, ticks and titles around marks that were drawn with the same scales."""
    y_values = y.ticks(5)
    y_decimals = decimals_of(y_values)
    at_x = [(x.at(tick), count_label(tick)) for tick in x.ticks(5)] if x_ticks is None else x_ticks
    grid = [element("path", d=f"M0 {place(y.at(tick), up=True)}H1000", class_="gridline") for tick in y_values]
    at_y = [(y.at(tick), general(tick) if y.log else fixed(tick, y_decimals)) for tick in y_values]
    parts = [
        element("div", y_title, class_="ytitle"),
        element("div", *tick_texts(at_y, "bottom"), class_="ys", aria_hidden="true"),
        element("div", picture([*grid, _clipped(marks)], summary), class_="area"),
        element("div", *tick_texts(at_x, "left"), class_="xs", aria_hidden="true"),
        element("div", x_title, class_="xtitle"),
    ]
    if ends:
        names = [element("span", name, class_=color, style=f"bottom: {100 * at:.2f}%") for name, color, at in ends]
        parts.append(element("div", *names, class_="ends", aria_hidden="true"))
    wide = max((len(text) for _, text in at_y), default=1)
    style = f"--wide: {0.55 * wide + 0.3:.2f}rem" + (f"; --tall: {tall}px" if tall else "")
    if ends:
        style += f"; --ends: {min(0.52 * max(len(name) for name, _, _ in ends) + 0.3, 13.0):.1f}rem"
    return element(
        "div",
        *parts,
        class_="frame named" if ends else "frame",
        style=style,
        data_series=None if data is None else json.dumps(data, ensure_ascii=False, allow_nan=False),
        data_at=None if data is None else x_title.removesuffix("s").split(" (")[0],
    )


def path(xs: Sequence[float], ys: Values, x: Scale, y: Scale, class_: str) -> Html:
    """A line through points, broken where a value is missing."""
    commands, pen_down = [], False
    for x_value, y_value in zip(xs, ys, strict=True):
        if y_value is None:
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{place(x.at(x_value))} {place(y.at(y_value), up=True)}")
        pen_down = True
    return element("path", d="".join(commands), class_=class_)


def dot(x: float, y: float, class_: str, title: str | None = None) -> Html:
    """A dot at fractions of the box; the title shows under the pointer."""
    shown = [element("title", title)] if title else []
    return element("path", *shown, d=f"M{place(x)} {place(y, up=True)}h0.01", class_=class_)


def place(fraction: float, *, up: bool = False) -> str:
    """A fraction of the box in units of the drawing; `up` for heights, which SVG counts downwards."""
    value = 1000 * (1 - fraction if up else fraction)
    return f"{min(max(value, -9999.0), 9999.0):.1f}"


def picture(marks: Iterable[Html], summary: str) -> Html:
    """The drawing that stretches to its box."""
    return element("svg", *marks, viewBox="0 0 1000 1000", preserveAspectRatio="none", role="img", aria_label=summary)


def tick_texts(ticks: Iterable[tuple[float, str]], side: str) -> list[Html]:
    """Texts at fractions of the box, from its "left" or its "bottom"."""
    return [element("span", str(text), style=f"{side}: {100 * at:.2f}%") for at, text in ticks]


def bars(rows: Sequence[tuple[str, float, str]]) -> Html:
    """Horizontal bars: (name, length as a fraction, the number as it is shown)."""
    cells = []
    for name, length, shown in rows:
        bar = element("div", class_="bar", style=f"width: {100 * min(max(length, 0.0), 1.0):.1f}%")
        cells += [element("div", name), element("div", bar, class_="track", aria_hidden="true"), element("div", shown)]
    return element("div", *cells, class_="bars")


def _clipped(marks: Iterable[Html]) -> Html:
    """Marks in an SVG of their own, which cuts what lies outside."""
    return element(
        "svg",
        *marks,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        width="1000",
        height="1000",
        style="overflow: hidden",
    )


def _band(curve: Series, x: Scale, y: Scale) -> Html:
    """The area between low and high, in pieces where one of them is missing."""
    pieces: list[list[tuple[str, str, str]]] = [[]]
    for at, low, high in zip(curve.x, curve.low, curve.high, strict=True):
        if low is None or high is None:
            pieces.append([])
        else:
            pieces[-1].append((place(x.at(at)), place(y.at(low), up=True), place(y.at(high), up=True)))
    commands = [
        "M" + "L".join([f"{at} {high}" for at, _, high in piece] + [f"{at} {low}" for at, low, _ in piece[::-1]]) + "Z"
        for piece in pieces
        if piece
    ]
    return element("path", d="".join(commands), class_="bandfill")


def _ends(series: Sequence[Series], y: Scale, tall: int) -> list[tuple[str, str, float]]:
    """(name, style, height as a fraction) at the ends of curves, moved apart where they would touch."""
    if len(series) < 2:
        return []
    last = [next((value for value in reversed(curve.y) if value is not None), None) for curve in series]
    shown = [(curve, y.at(value)) for curve, value in zip(series, last, strict=True) if value is not None]
    places = spread([tall * at for _, at in shown], _LABEL_GAP, 0.0, float(tall))
    return [(curve.name, color_class(curve.color), at / tall) for (curve, _), at in zip(shown, places, strict=True)]
