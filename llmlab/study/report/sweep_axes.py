"""The axes of a sweep as a figure needs them: where a trial's value is on one, and what to write beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.study.report.numbers import general
from llmlab.study.report.page import plain
from llmlab.study.report.scales import Scale
from llmlab.study.report.sweep_results import ranked

MOST_CURVES = 60
"""Of the trials that a figure of curves or of parallel coordinates shows; the best ones."""
NUM_NAMED = 4
"""Curves that have a name and a colour: the best trials."""


@dataclass(frozen=True)
class Placed:
    """One axis, with a place from 0 to 1 for each of its values."""

    path: str
    scale: Scale | None
    """None for an axis of names: its values stand at equal distances."""
    names: tuple[str, ...]
    """The values of an axis of names, as JSON."""

    def at(self, value: Any) -> float:
        """The place of a trial's value."""
        if self.scale is not None:
            return self.scale.at(float(value))
        return (self.names.index(key_of(value)) + 0.5) / len(self.names)

    def ticks(self, count: int = 4) -> list[tuple[float, str]]:
        """(place, text) of what to write beside the axis."""
        if self.scale is not None:
            return [(self.scale.at(tick), str(general(tick))) for tick in self.scale.ticks(count)]
        every = zip(self.names, range(len(self.names)), strict=True)
        return [((place + 0.5) / len(self.names), plain(json.loads(name))) for name, place in every]


def key_of(value: Any) -> str:
    """What tells values of an axis apart."""
    return json.dumps(value, sort_keys=True)


def placed(results: dict[str, Any]) -> list[Placed]:
    """The axes that trials have values on; numbers on a scale, logarithmic where they were sampled so."""
    found = []
    for axis in results["axes"]:
        values = [trial["point"][axis["path"]] for trial in results["trials"] if axis["path"] in trial["point"]]
        if not values:
            continue
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numeric and axis["kind"] != "categorical":
            found.append(Placed(axis["path"], Scale.over(map(float, values), log=axis["log"]), ()))
        else:
            keys = dict.fromkeys(map(key_of, (axis["values"] or []) + values))
            found.append(Placed(axis["path"], None, tuple(keys)))
    return found


def value_scale(results: dict[str, Any]) -> Scale:
    """The axis of the metric: from the best to the worst trial, cut where a few bad ones would flatten the others."""
    values = [trial["value"] for trial in ranked(results)]
    if len(values) < 5:
        return Scale.over(values, room=0.08)
    usual, best = values[int(0.8 * (len(values) - 1))], values[0]
    reach = 3 * abs(usual - best)
    kept = [value for value in values if abs(value - best) <= reach] if reach else values
    return Scale.over(kept, room=0.08)


def unplaced(results: dict[str, Any], scale: Scale) -> int:
    """Finished trials that the metric's axis cuts off."""
    return sum(not scale.low <= trial["value"] <= scale.high for trial in ranked(results))


def curves_of(results: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the best trials with a curve, others behind them)."""

    def drawable(trial: dict[str, Any]) -> bool:
        return trial["curve"] is not None and any(value is not None for value in trial["curve"]["value"])

    best = [trial for trial in ranked(results) if drawable(trial)]
    others = [trial for trial in results["trials"] if drawable(trial) and trial not in best]
    return best[:NUM_NAMED], [*best[NUM_NAMED:], *others][: MOST_CURVES - NUM_NAMED]


def curve_scale(named: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], start: float = 0.1) -> Scale:
    """The vertical axis of curves: what the best trials show after the first steps, and room for others above."""
    last = max(max(trial["curve"]["step"]) for trial in [*named, *others])
    late = [
        value
        for trial in named or others
        for at, value in zip(trial["curve"]["step"], trial["curve"]["value"], strict=True)
        if at >= start * last
    ]
    return Scale.over(late, room=0.1)


def short(path: str) -> str:
    """The last names of a path, for a narrow place."""
    if len(path) <= 24:
        return path
    *_, before, last = ["", *path.split(".")]
    return f"\N{HORIZONTAL ELLIPSIS}{before}.{last}" if len(last) < 14 else f"\N{HORIZONTAL ELLIPSIS}{last}"
