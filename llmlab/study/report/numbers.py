"""Numbers as a careful table shows them: as many decimals as they are known to, a real minus, signs on differences."""

import math
from collections.abc import Iterable, Sequence

from llmlab.display.numbers import count, duration

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EM DASH}"
"""Stands for what is not known."""


class Shown(str):
    """A number as it is shown, which remembers what it is: a page can offer it exactly, `<data value="...">`."""

    value: float

    def __new__(cls, text: str, value: float) -> "Shown":
        shown = super().__new__(cls, text)
        shown.value = value
        return shown


def decimals_for(spreads: Iterable[float | None], most: int = 6) -> int:
    """Decimals that show the smallest of these spreads (standard deviations, interval widths, margins) to two digits.

    Further digits would be noise, fewer would hide the difference that the study is about.
    """
    known = [abs(spread) for spread in spreads if spread]
    return min(most, max(1, 1 - math.floor(math.log10(min(known))))) if known else 4


def fixed(value: float | None, decimals: int) -> str:
    """A value with so many decimals."""
    return NOTHING if value is None else Shown(_minus(f"{value:.{decimals}f}"), value)


def signed(value: float | None, decimals: int) -> str:
    """A difference: always with its sign, except a zero."""
    if value is None:
        return NOTHING
    shown = f"{value:+.{decimals}f}"
    return Shown(shown[1:] if float(shown) == 0 else _minus(shown), value)


def interval(bounds: Sequence[float | None] | None, decimals: int, joint: str = ", ") -> list[str]:
    """The parts of "[-0.006, +0.003]"; a bound that is not known is infinite."""
    if bounds is None:
        return [NOTHING]
    low, high = bounds
    left = f"{MINUS}∞" if low is None else signed(low, decimals)
    return ["[", left, joint, "∞" if high is None else signed(high, decimals), "]"]


def p_value(p: float | None) -> str:
    """Two digits, as far as they matter: "0.34", "0.012", "< 0.001"."""
    if p is None:
        return NOTHING
    if p < 0.001:
        return Shown("< 0.001", p)
    return Shown(f"{p:.3f}" if p < 0.0995 else f"{p:.2f}", p)


def percent(fraction: float | None) -> str:
    """A relative difference: "+1.3%"."""
    if fraction is None:
        return NOTHING
    shown = f"{100 * fraction:+.2g}" if abs(fraction) < 0.1 else f"{100 * fraction:+.0f}"
    return Shown("0%" if float(shown) == 0 else f"{_minus(shown)}%", fraction)


def general(value: float | None) -> str:
    """Any other number, up to four significant digits: a learning rate, a count of layers, a tick."""
    if value is None:
        return NOTHING
    if value == int(value) and abs(value) < 1e5:
        return Shown(_minus(str(int(value))), value)
    shown = f"{value:.4g}"
    if "e" in shown:
        mantissa, exponent = shown.split("e")
        shown = f"{mantissa}e{int(exponent)}"
    return Shown(_minus(shown), value)


def quantity(value: float | None) -> str:
    """A count of tokens, parameters or operations: "10.2k", "1.54M"; beyond trillions "3.2e17"."""
    if value is None:
        return NOTHING
    return Shown(count(value) if value < 1e15 else f"{value:.3g}".replace("e+", "e"), value)


def time(seconds: float | None) -> str:
    """A length of time: "12 s", "3:05"."""
    return NOTHING if seconds is None else Shown(duration(seconds), seconds)


def _minus(shown: str) -> str:
    if not shown.strip("-0."):
        return shown.removeprefix("-")  # what rounds to zero has no sign
    return shown.replace("-", MINUS)


def count_label(value: float) -> str:
    """A tick of an axis that counts: "500", "10k", "1.5M"; any other number as `general` shows it."""
    return str(count(value)) if value == int(value) and value >= 1e4 else str(general(value))
