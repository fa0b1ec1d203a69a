import pytest

from llmlab.display.numbers import count, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (185.2, "3:05"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (2 * 86400 + 3 * 3600 + 59, "2d 03:00"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_short_and_never_show_sixty_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9999, "9,999"), (10_240, "10.2k"), (1_540_000, "1.54M"), (999_999_999, "1000M"), (2.1e9, "2.1B")],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert count(value) == text
