"""The space of a sweep: which values which fields of an experiment take together.

    grid(axis("optimizer.peak_lr", 1e-3, 3e-4), axis("model.num_layers", 4, 8))      every pair: 4 points
    zipped(axis("model.embed_dim", 64, 128), axis("model.num_layers", 4, 8))         side by side: 2 points
    chain(grid(...), grid(...))                                                      one after the other
    sample("optimizer.peak_lr", log_uniform(1e-4, 1e-1))                             as many as there are trials
    when("model.num_layers", 8, axis("train.accumulation", 1, 2))                    only where it was chosen so
    subsample(space, 10)                                                             ten of its points

Spaces are values that combine: a grid of chains of samples is a space. A point is a dict from dotted path to value, and
values may be configs: `axis("model.pattern.0.norm", RMSNorm(), LayerNorm())`. A finite space lists its points; one that
holds a `sample` is drawn from, one trial at a time, by a sampler that has seen the results of the trials before.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from llmlab.config import compact

Point = dict[str, Any]
"""Value by dotted path."""
Kind = Literal["values", "uniform", "log_uniform", "integer", "categorical"]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Where the values of a sampled axis come from."""

    kind: Kind
    low: float | None = None
    high: float | None = None
    """Inclusive."""
    log: bool = False
    """Whether the logarithm is uniform."""
    values: tuple[Any, ...] = ()
    """Of a categorical one."""

    def __post_init__(self) -> None:
        if self.kind == "categorical":
            _check_distinct(self.values, "categorical(...)")
            return
        assert self.low is not None and self.high is not None
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"{self.kind}({self.low}, {self.high}) is no range; give low < high, both finite")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, not at {self.low}")

    @property
    def ends(self) -> tuple[Any, ...]:
        """Lowest and highest value; all of a categorical one."""
        return self.values if self.kind == "categorical" else (self.low, self.high)


def uniform(low: float, high: float) -> Distribution:
    """Real numbers between low and high."""
    return Distribution(kind="uniform", low=float(low), high=float(high))


def log_uniform(low: float, high: float) -> Distribution:
    """Real numbers whose logarithm is uniform: for learning rates, and whatever else is compared by ratio."""
    return Distribution(kind="log_uniform", low=float(low), high=float(high), log=True)


def integer(low: int, high: int, *, log: bool = False) -> Distribution:
    """Whole numbers from low to high, both included; `log` for those compared by ratio."""
    if not (isinstance(low, int) and isinstance(high, int)):
        raise ValueError(f"integer({low!r}, {high!r}) needs whole numbers")
    return Distribution(kind="integer", low=low, high=high, log=log)


def categorical(*values: Any) -> Distribution:
    """One of the values, which have no order."""
    return Distribution(kind="categorical", values=values)


@runtime_checkable  # for the checks of argument types at run time
class Chooser(Protocol):
    """Decides, where a space leaves something open."""

    def option(self, name: str, labels: Sequence[str]) -> int:
        """Index of one of several."""
        ...

    def number(self, name: str, distribution: Distribution) -> float | int:
        """A number of a range."""
        ...


class Space(ABC):
    """Points, listed or drawn."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether the points can be listed."""

    @abstractmethod
    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        """The points, in order; of a sampled axis its ends.

        Args:
            given: what parts to the left have chosen, for conditions.
        """

    @abstractmethod
    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        """One point; `scope` tells the choices under a condition from those under another."""

    @abstractmethod
    def leaves(self) -> Iterator["Axis | Sampled"]:
        """The axes, in order."""


@dataclass(frozen=True)
class Axis(Space):
    """Some values of one field."""

    path: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        _check_path(self.path)
        _check_distinct(self.values, f"axis({self.path!r}, ...)")

    @property
    def finite(self) -> bool:
        return True

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        yield from ({self.path: value} for value in self.values)

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        return {self.path: self.values[choose.option(self.path + scope, [compact(value) for value in self.values])]}

    def leaves(self) -> Iterator["Axis | Sampled"]:
        yield self


@dataclass(frozen=True)
class Sampled(Space):
    """Values of one field from a distribution."""

    path: str
    distribution: Distribution

    def __post_init__(self) -> None:
        _check_path(self.path)

    @property
    def finite(self) -> bool:
        return False

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        yield from ({self.path: value} for value in self.distribution.ends)

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        if self.distribution.kind == "categorical":
            return Axis(self.path, self.distribution.values).draw(choose, given, scope)
        return {self.path: choose.number(self.path + scope, self.distribution)}

    def leaves(self) -> Iterator["Axis | Sampled"]:
        yield self


@dataclass(frozen=True)
class Grid(Space):
    """Every combination of the points of its parts; the last part changes fastest."""

    parts: tuple[Space, ...]

    @property
    def finite(self) -> bool:
        return all(part.finite for part in self.parts)

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        yield from self._from(0, dict(given or {}), {})

    def _from(self, index: int, given: Point, so_far: Point) -> Iterator[Point]:
        if index == len(self.parts):
            yield so_far
            return
        for point in self.parts[index].points(given):
            yield from self._from(index + 1, given | point, _joined(so_far, point))

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        drawn: Point = {}
        for part in self.parts:
            drawn = _joined(drawn, part.draw(choose, {**(given or {}), **drawn}, scope))
        return drawn

    def leaves(self) -> Iterator["Axis | Sampled"]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Zipped(Space):
    """The first points of all parts together, then the second ones, and so on."""

    parts: tuple[Space, ...]

    def __post_init__(self) -> None:
        if not self.finite:
            raise ValueError("zipped(...) goes through lists side by side; a sample has none: put it in a grid beside")
        lengths = [len(list(part.points())) for part in self.parts]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"zipped(...) needs parts of equal length; these have {', '.join(map(str, lengths))} points"
            )

    @property
    def finite(self) -> bool:
        return all(part.finite for part in self.parts)

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        for row in zip(*(part.points(given) for part in self.parts), strict=True):
            point: Point = {}
            for part in row:
                point = _joined(point, part)
            yield point

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        return _draw_row(list(self.points(given)), choose, scope)

    def leaves(self) -> Iterator["Axis | Sampled"]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Chain(Space):
    """The points of one part after those of another."""

    parts: tuple[Space, ...]

    @property
    def finite(self) -> bool:
        return all(part.finite for part in self.parts)

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        for part in self.parts:
            yield from part.points(given)

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        paths = [" & ".join(dict.fromkeys(leaf.path for leaf in part.leaves())) for part in self.parts]
        labels = [f"{number}: {path}" for number, path in enumerate(paths)]
        part = choose.option(f"chain({', '.join(paths)}){scope}", labels)
        return self.parts[part].draw(choose, given, f"{scope} in part {part}")

    def leaves(self) -> Iterator["Axis | Sampled"]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class When(Space):
    """A space where a condition on what was chosen to its left holds; one point without anything elsewhere."""

    path: str
    condition: Any
    space: Space

    @property
    def finite(self) -> bool:
        return self.space.finite

    def holds(self, given: Mapping[str, Any]) -> bool:
        """Whether the condition holds; a path that was not chosen (it hangs on a condition as well) has no value."""
        if self.path not in given:
            return False
        value = given[self.path]
        return bool(self.condition(value)) if _is_predicate(self.condition) else value == self.condition

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        if self.holds(given or {}):
            yield from self.space.points(given)
        else:
            yield {}

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        if not self.holds(given or {}):
            return {}
        what = self.condition.__name__ if _is_predicate(self.condition) else compact(self.condition)
        if what == "<lambda>":
            what = f"lambda of line {self.condition.__code__.co_firstlineno}"
        return self.space.draw(choose, given, f"{scope} when {self.path} is {what}")

    def leaves(self) -> Iterator["Axis | Sampled"]:
        yield from self.space.leaves()


@dataclass(frozen=True)
class Subsample(Space):
    """Some points of a finite space, in its order."""

    space: Space
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.space.finite:
            raise ValueError("subsample(...) takes points of a list; of a sampled space --trials says how many")
        if self.count < 1:
            raise ValueError(f"subsample of {self.count} points has none; give at least 1")

    @property
    def finite(self) -> bool:
        return True

    def points(self, given: Mapping[str, Any] | None = None) -> Iterator[Point]:
        points = list(self.space.points(given))
        kept = random.Random(self.seed).sample(range(len(points)), min(self.count, len(points)))
        yield from (points[index] for index in sorted(kept))

    def draw(self, choose: Chooser, given: Mapping[str, Any] | None = None, scope: str = "") -> Point:
        return _draw_row(list(self.points(given)), choose, scope)

    def leaves(self) -> Iterator["Axis | Sampled"]:
        yield from self.space.leaves()


# --- what experiment files call --------------------------------------------------------------------------------------


def axis(path: str, *values: Any) -> Axis:
    """The field at a dotted path takes each of the values: `axis("optimizer.peak_lr", 1e-3, 3e-4)`."""
    return Axis(path, values)


def sample(path: str, distribution: Distribution) -> Sampled:
    """The field takes values of a distribution: `sample("optimizer.peak_lr", log_uniform(1e-4, 1e-1))`."""
    return Sampled(path, distribution)


def grid(*parts: Space) -> Grid:
    """Every combination."""
    return Grid(_parts(parts, "grid"))


def zipped(*parts: Space) -> Zipped:
    """Side by side: the first of each, the second of each, ..."""
    return Zipped(_parts(parts, "zipped"))


def chain(*parts: Space) -> Chain:
    """One after the other."""
    return Chain(_parts(parts, "chain"))


def when(path: str, condition: Any | Callable[[Any], bool], space: Space) -> When:
    """The space, only in points where the axis `path`, further left in the same grid, has a value.

    Args:
        path: of that axis.
        condition: the value, or a function of it that says whether.
        space: what is varied there.
    """
    return When(path, condition, _parts((space,), "when")[0])


def subsample(space: Space, n: int, seed: int = 0) -> Subsample:
    """`n` points of a finite space, drawn without repetition, the same ones for the same seed."""
    return Subsample(_parts((space,), "subsample")[0], n, seed)


def check_conditions(space: Space) -> None:
    """Raises ValueError where a `when` asks for a path that no axis of the space sets."""
    known = {leaf.path for leaf in space.leaves()}
    unknown = sorted({path for path in _conditions(space) if path not in known})
    if unknown:
        raise ValueError(
            f"when({unknown[0]!r}, ...) looks at what an axis chose, and none sets {unknown[0]}; there are "
            f"{', '.join(sorted(known))}"
        )


def _conditions(space: Space) -> Iterator[str]:
    if isinstance(space, When):
        yield space.path
    if isinstance(space, When | Subsample):
        yield from _conditions(space.space)
    if isinstance(space, Grid | Zipped | Chain):
        for part in space.parts:
            yield from _conditions(part)


def _parts(parts: Sequence[Any], name: str) -> tuple[Space, ...]:
    if not parts:
        raise ValueError(f"{name}() has nothing to combine; give it axes")
    for part in parts:
        if not isinstance(part, Space):
            raise ValueError(f"{name}(...) combines axes and spaces, not {part!r:.60}; use axis(path, *values)")
    return tuple(parts)


def _joined(left: Point, right: Point) -> Point:
    if twice := left.keys() & right.keys():
        raise ValueError(f"{', '.join(sorted(twice))} is set twice in one point; chain(...) puts alternatives in a row")
    return left | right


def _draw_row(rows: list[Point], choose: Chooser, scope: str) -> Point:
    """One of the points of a list, as one choice: its paths do not vary on their own."""
    name = " & ".join(dict.fromkeys(itertools.chain.from_iterable(rows)))
    labels = [", ".join(compact(value) for value in row.values()) for row in rows]
    return rows[choose.option(name + scope, labels)]


def _check_path(path: str) -> None:
    if not path or not all(path.split(".")):
        raise ValueError(f"{path!r} is no dotted path to a field, as optimizer.peak_lr is")


def _check_distinct(values: tuple[Any, ...], what: str) -> None:
    if not values:
        raise ValueError(f"{what} has no values; give it some")
    labels = [compact(value) for value in values]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{what} has {', '.join(twice)} more than once; the same point is never run twice")


def _is_predicate(condition: Any) -> bool:
    return callable(condition) and not isinstance(condition, type)
