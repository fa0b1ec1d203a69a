"""Curves drawn with characters: braille patterns give every character cell 2 x 4 dots.

    rows = draw([Series(steps, losses)], Box(width=60, height=5))

A curve of losses falls steeply and then goes on slowly for a long time. So that the long part can be read, the axis
covers what happened after the first tenth; what lies above it is left out.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# The bit of each dot of a braille cell (Unicode, chapter 21.1), by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


@dataclass
class Series:
    """Points of one curve, by rising x."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Appends a point; one that is not finite is not drawn."""
        if math.isfinite(y):
            self.x.append(x)
            self.y.append(y)


@dataclass(frozen=True)
class Cell:
    """One character of a drawing."""

    character: str
    series: int | None
    """Which curve it belongs to; None for background."""


@dataclass(frozen=True)
class Drawing:
    """Rows of characters, top first, and the values at the top and the bottom edge."""

    rows: tuple[tuple[Cell, ...], ...]
    top: float
    bottom: float


def draw(curves: Sequence[Series], width: int, height: int, *, ascii_only: bool = False) -> Drawing | None:
    """The curves over one x axis from the first point to the last; None where there are fewer than two points.

    The first curve is joined by lines, the others are marks on top of it. With `ascii_only`, one dot per cell.
    """
    main = curves[0]
    if len(main.x) < 2 or width < 2 or height < 1:
        return None
    low, high = limits(curves)
    across, down = (1, 1) if ascii_only else (2, 4)
    num_columns, num_rows = width * across, height * down
    start, span = main.x[0], (main.x[-1] - main.x[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - start) / span * (num_columns - 1), (high - y) / ((high - low) or 1.0) * (num_rows - 1)

    def inside(column: int, row: int) -> bool:
        return 0 <= column < num_columns and 0 <= row < num_rows

    dots = [[0] * width for _ in range(height)]
    for column, row in _joined([place(x, y) for x, y in _thinned(main, num_columns)]):
        if inside(column, row):
            dots[row // down][column // across] |= 1 if ascii_only else _DOTS[row % down][column % across]
    rows = [[_line(bits, ascii_only) for bits in row] for row in dots]
    for number, series in enumerate(curves[1:], 1):
        for x, y in zip(series.x, series.y, strict=True):
            column, row = (round(dot) for dot in place(x, y))
            if inside(column, row):
                rows[row // down][column // across] = Cell("o" if ascii_only else "•", number)
    return Drawing(tuple(tuple(row) for row in rows), high, low)


def limits(curves: Sequence[Series]) -> tuple[float, float]:
    """Lowest and highest value that the axis covers: all that happened after the first tenth of the points."""
    values = [y for curve in curves for y in curve.y[len(curve.y) // 10 :]]
    return min(values), max(values)


def _line(bits: int, ascii_only: bool) -> Cell:
    return Cell("." if ascii_only else chr(_BLANK + bits), 0) if bits else Cell(" ", None)


def _thinned(series: Series, num_columns: int) -> list[tuple[float, float]]:
    """At most one point a column: the mean of those that fall into it."""
    size = max(1, math.ceil(len(series.x) / num_columns))
    parts = [slice(i, i + size) for i in range(0, len(series.x), size)]
    points = [(_mean(series.x[part]), _mean(series.y[part])) for part in parts]
    return [(series.x[0], points[0][1]), *points[1:-1], (series.x[-1], points[-1][1])] if len(points) > 1 else points


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _joined(points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """The dots on the straight lines between neighbouring points."""
    dots = [(round(x), round(y)) for x, y in points[:1]]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        num_dots = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        steps = [i / num_dots for i in range(1, num_dots + 1)]
        dots += [(round(x0 + (x1 - x0) * t), round(y0 + (y1 - y0) * t)) for t in steps]
    return dots
