"""A point of a space, applied to an experiment: checked before anything runs.

A path is followed through the dataclass tree as the flags of `llmlab train` are: `optimizer.peak_lr`,
`model.pattern.0.mixer.num_heads`. Fields of one object are changed together, since a class may accept both changes and
neither alone; and a component is put in before its own fields are changed.
"""

import dataclasses
import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmlab.config import compact, difference, field_types, mismatches, to_json
from llmlab.experiment import Experiment
from llmlab.flags import entries
from llmlab.study.space import Point

_UNSET = object()
_MAX_LISTED = 3


class PointError(ValueError):
    """A point that cannot be applied; `problems` are lines that each name a field."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


@dataclasses.dataclass
class _Node:
    """What is to happen to one field and to the fields below it."""

    value: Any = _UNSET
    children: dict[str, "_Node"] = dataclasses.field(default_factory=dict)


def apply(experiment: Experiment, point: Point) -> Experiment:
    """The experiment with the values of a point.

    Raises:
        PointError: an unknown field, a value that does not fit its field's type, or values that a class or the
            experiment as a whole refuses; every offender is named.
    """
    root = _Node()
    for path, value in point.items():
        node = root
        for name in path.split("."):
            node = node.children.setdefault(name, _Node())
        node.value = value
    problems: list[str] = []
    changed = _changed(experiment, root, "", problems, experiment)
    if not problems:
        try:
            to_json(changed)  # what has no hint on the way (an element of a tuple) is checked as a whole
            changed.validate()
        except ValueError as error:
            problems += [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    if problems:
        raise PointError(problems)
    return changed


def check(experiment: Experiment, points: Iterable[Point]) -> list[Experiment]:
    """The experiments of all points.

    Raises:
        ValueError: some cannot be; each problem is told once, with the points that have it.
    """
    experiments: list[Experiment] = []
    offenders: dict[str, list[str]] = {}
    for number, point in enumerate(points, 1):
        try:
            experiments.append(apply(experiment, point))
        except PointError as error:
            for problem in error.problems:
                offenders.setdefault(problem, []).append(f"point {number} ({text(point)})")
    if offenders:
        lines = [f"{problem}\n    in {_listed(where)}" for problem, where in offenders.items()]
        raise ValueError("\n  ".join(["this sweep cannot run, and nothing was started:", *lines]))
    return experiments


def text(point: Point) -> str:
    """A point for people: "optimizer.peak_lr=0.001, model.num_layers=4"."""
    return ", ".join(f"{path}={compact(value)}" for path, value in point.items()) or "the experiment as it is"


def names(points: Sequence[Point], *, digits: int | None = None) -> list[str]:
    """Short names of points, with as much of each path as tells it from the others: "peak_lr=0.001 num_layers=4".

    `digits` rounds drawn numbers, of which the others mean nothing.
    """
    paths = list(dict.fromkeys(path for point in points for path in point))
    short = {path: _shortest(path, paths) for path in paths}
    return [
        " ".join(f"{short[path]}={_shown(value, digits)}" for path, value in point.items()) or "baseline"
        for point in points
    ]


def plain(point: Point) -> dict[str, Any]:
    """A point as JSON can hold it: numbers, texts and None as they are, everything else as compact text."""
    return {
        path: value if value is None or type(value) in (bool, int, float, str) else compact(value)
        for path, value in point.items()
    }


def command(file: Path | str, original: Experiment, experiment: Experiment) -> tuple[str, list[str]]:
    """The command that trains an experiment, and what it cannot say: classes are chosen in the file.

    Args:
        file: of the experiment.
        original: what its `config()` gives.
        experiment: to be trained.
    """
    words, told = ["llmlab", "train", str(file)], []
    for path, before, after in difference(original, experiment):
        values = after if isinstance(after, tuple) else (after,)
        if after != () and all(value is None or isinstance(value, bool | int | float | str) for value in values):
            words += [f"--{path.replace('_', '-')}", *map(str, values)]
        else:
            told.append(f"{path}={compact(after)} (instead of {compact(before)})")
    return shlex.join(words), told


def job(file: Path | None, original: Experiment, name: str, point: Point, experiment: Experiment) -> dict[str, Any]:
    """What a study keeps with the trial of a point: how to name it, how long it is, and how to repeat it."""
    line, told = command(file or "FILE.py", original, experiment)
    return {"name": name, "steps": experiment.train.steps, "point": plain(point), "command": line, "told": told}


# --- following paths -------------------------------------------------------------------------------------------------


def _changed(value: Any, node: _Node, path: str, problems: list[str], root: Experiment) -> Any:
    """The value with a node's changes; problems are appended, and the value then does not matter."""
    if node.value is not _UNSET:
        value = node.value
    if not node.children:
        return value
    if isinstance(value, tuple):
        return _changed_tuple(value, node, path, problems, root)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        for name in node.children:
            problems.append(
                f"{_at(path, name)}: {path} is {compact(value)} here, which has no fields; choose a component for it, "
                "in the file or by an axis of its own"
            )
        return value
    types, changes = field_types(type(value)), {}
    before = len(problems)
    for name, child in node.children.items():
        here = _at(path, name)
        if name not in types:
            problems.append(f"{here}: {type(value).__name__} has no field {name}{_near(here, value, path, root)}")
            continue
        found = len(problems)
        changes[name] = _changed(getattr(value, name), child, here, problems, root)
        if len(problems) == found:
            problems += mismatches(changes[name], types[name], here)
    if len(problems) > before:
        return value
    try:
        return dataclasses.replace(value, **changes)
    except (ValueError, TypeError) as error:  # the class's own validation
        problems.append(f"{', '.join(_at(path, name) for name in changes)}: {error}")
        return value


def _changed_tuple(value: tuple[Any, ...], node: _Node, path: str, problems: list[str], root: Experiment) -> Any:
    items = list(value)
    for name, child in node.children.items():
        if not name.isdecimal() or int(name) >= len(items):
            which = f"0 to {len(items) - 1}" if items else "none: it is empty"
            problems.append(f"{_at(path, name)}: {path} is a row of {len(items)}; its elements are {which}")
        else:
            items[int(name)] = _changed(items[int(name)], child, _at(path, name), problems, root)
    return tuple(items)


def _near(wanted: str, owner: Any, path: str, root: Experiment) -> str:
    """The nearest paths: of the same object, or else of the whole experiment."""
    own = [_at(path, name) for name in field_types(type(owner))]
    last = wanted.rsplit(".", 1)[-1]
    by_end: dict[str, list[str]] = {}
    for entry in entries(root):
        by_end.setdefault(entry.path.rsplit(".", 1)[-1], []).append(entry.path)
    near = difflib.get_close_matches(wanted, own, n=2, cutoff=0.8)
    near = near or [found for end in difflib.get_close_matches(last, by_end, n=2, cutoff=0.75) for found in by_end[end]]
    if near:
        return f"; did you mean {' or '.join(near[:_MAX_LISTED])}?"
    return f"; it has {', '.join(name.rsplit('.', 1)[-1] for name in own) or 'none'}"


def _shortest(path: str, paths: Sequence[str]) -> str:
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        end = ".".join(parts[-count:])
        if sum(other == end or other.endswith(f".{end}") for other in paths) == 1:
            return end
    return path


def _shown(value: Any, digits: int | None) -> str:
    return f"{value:.{digits}g}" if digits is not None and isinstance(value, float) else compact(value)


def _listed(where: Sequence[str]) -> str:
    more = len(where) - _MAX_LISTED
    return "; ".join(where[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
