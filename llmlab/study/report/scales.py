"""Axes: from values to places, and the round values to write beside them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], *, log: bool = False, room: float = 0.05) -> "Scale":
        """The axis that shows all the values, with a little room; logarithmic only where all are positive."""
        known = [value for value in values if value is not None]
        if not known:
            return cls(0.0, 1.0)
        low, high = min(known), max(known)
        if log and low > 0:
            margin = (high / low) ** room if high > low else 2.0
            return cls(low / margin, high * margin, log=True)
        margin = room * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - margin, high + margin)

    def at(self, value: float) -> float:
        """The place of a value: 0 at `low`, 1 at `high`, beyond them outside."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """About so many round values within the axis."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        step = _nice((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def decimals_of(ticks: list[float]) -> int:
    """Decimals that write the ticks exactly: 2.25 is not 2.2."""

    def exact(decimals: int) -> bool:
        return all(math.isclose(round(tick, decimals), tick, abs_tol=1e-12) for tick in ticks)

    return next(filter(exact, range(12)), 12)


def _nice(step: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is at least the step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        within = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(within) >= min(count, 3):
            every = max(1, math.ceil(len(within) / (count + 2)))
            return within[::every]
    return Scale(low, high).ticks(count)
