import math

import pytest

from llmlab.display.curve import Drawing, Series, draw, limits


def text(drawing: Drawing | None) -> list[str]:
    assert drawing is not None
    return ["".join(cell.character for cell in row) for row in drawing.rows]


def line(*values: float) -> Series:
    return Series(list(map(float, range(len(values)))), list(values))


def dots(drawing: Drawing | None) -> set[tuple[int, int]]:
    """(column, row) of every braille dot, by the order of bits in Unicode, chapter 21.1: 1 2 3 7 down, 4 5 6 8 down."""
    order = {0: (0, 0), 1: (0, 1), 2: (0, 2), 6: (0, 3), 3: (1, 0), 4: (1, 1), 5: (1, 2), 7: (1, 3)}
    found = set()
    for y, row in enumerate(text(drawing)):
        for x, character in enumerate(row):
            bits = 0 if character == " " else ord(character) - 0x2800
            found |= {(2 * x + dx, 4 * y + dy) for bit, (dx, dy) in order.items() if bits >> bit & 1}
    return found


def test_a_straight_fall_is_the_diagonal() -> None:
    drawing = draw([line(3.0, 2.0, 1.0, 0.0)], width=2, height=1)
    assert dots(drawing) == {(0, 0), (1, 1), (2, 2), (3, 3)}
    assert drawing is not None
    assert (drawing.top, drawing.bottom) == (3.0, 0.0)


def test_in_ascii_every_character_is_ascii() -> None:
    curves = [line(3.0, 2.0, 1.0, 0.0), Series([2.0], [2.0])]
    drawing = draw(curves, width=4, height=4, ascii_only=True)
    assert text(drawing) == [".   ", " .o ", "  . ", "   ."]


def test_marks_lie_where_their_values_are() -> None:
    drawing = draw([line(*(float(10 - i) for i in range(11))), Series([5.0], [5.0])], width=11, height=3)
    assert drawing is not None
    marks = [(x, y) for y, row in enumerate(drawing.rows) for x, cell in enumerate(row) if cell.series == 1]
    assert marks == [(5, 1)]


def test_a_curve_of_many_points_reaches_both_edges() -> None:
    drawing = draw([line(*(math.sin(i / 900) for i in range(10_000)))], width=40, height=5)
    columns = {column for column, _ in dots(drawing)}
    assert columns == set(range(80))


def test_the_axis_covers_what_follows_the_first_tenth() -> None:
    series = line(*([100.0] * 10), *([2.0] * 89), 1.0)
    assert limits([series]) == (1.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, 1.0, math.inf]])
def test_fewer_than_two_finite_points_are_no_curve(values: list[float]) -> None:
    series = Series()
    for i, value in enumerate(values):
        series.add(i, value)
    assert draw([series, Series()], width=10, height=3) is None


def test_a_constant_curve_is_a_horizontal_line() -> None:
    assert {row for _, row in dots(draw([line(2.0, 2.0, 2.0)], width=6, height=2))} == {0}
