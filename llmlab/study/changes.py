"""What an ablation changes: functions from one experiment to another, and what the two disagree on.

    swap(RMSNorm, LayerNorm())                        every RMSNorm of the tree becomes this, and nothing else
    swap(Attention, lambda a: replace(a, ...))        every one becomes what the function makes of it
    with_values({"optimizer.peak_lr": 1e-3})          values by their dotted paths, as on the command line
    lambda e: replace(e, objective=...)               any function will do

A comparison says something about a change only if nothing else changed with it. So what differs is never taken from
what the author says: it is computed from the two configs, and gathered into changes. One change may show in several
places (the norm of every block), and then has the same values in all of them:

    a component of another class     is one change, wherever it is: its fields do not compare
    a value                          is one change wherever a field of the same name went from and to the same value
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmlab.config import ABSENT, compact, difference
from llmlab.experiment import Experiment
from llmlab.study.points import apply

Change = Callable[[Experiment], Experiment]
"""Makes a variant of the baseline."""

Difference = tuple[str, Any, Any]
"""Path, the baseline's value, the variant's; `llmlab.config.ABSENT` where one of them has no such element."""


def unchanged(experiment: Experiment) -> Experiment:
    """The baseline itself: the level of a factor that it is at."""
    return experiment


# --- ways to change --------------------------------------------------------------------------------------------------


def swap(old: type, new: Any) -> Change:
    """Every instance of a class in the tree replaced, and nothing else.

    Args:
        old: class of what goes; its subclasses go too.
        new: a config to put there, or a function from the one that goes to the one that comes.

    Returns:
        the change. It raises ValueError where the experiment has no such part, or the new one does not fit.
    """
    if isinstance(new, type):
        raise ValueError(f"swap({old.__name__}, {new.__name__}) needs an instance: {new.__name__}(...)")
    make = new if callable(new) else lambda _: new

    def change(experiment: Experiment) -> Experiment:
        found = 0

        def replaced(part: Any) -> Any:
            nonlocal found
            if not isinstance(part, old):
                return part
            found += 1
            return make(part)

        changed = _rebuilt(experiment, replaced)
        if not found:
            classes = sorted({type(part).__name__ for part in _parts(experiment)} - {type(experiment).__name__})
            raise ValueError(f"there is no {old.__name__} to swap; the experiment has {', '.join(classes)}")
        return changed

    return change


def with_values(values: Mapping[str, Any]) -> Change:
    """Values set by their dotted paths: `with_values({"train.steps": 600, "model.pattern.0.ffn": MLP(...)})`.

    Returns:
        the change. It raises ValueError that lists every path that is not there and every value that does not fit.
    """
    return lambda experiment: apply(experiment, dict(values))


def _rebuilt(value: Any, replaced: Callable[[Any], Any]) -> Any:
    """The tree with every part that the function changes in its new form; a new part is not looked into."""
    new = replaced(value)
    if new is not value:
        return new
    if isinstance(value, tuple):
        items = tuple(_rebuilt(item, replaced) for item in value)
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    rebuilt = {name: _rebuilt(part, replaced) for name, part in fields.items()}
    changed = {name: part for name, part in rebuilt.items() if part is not fields[name]}
    return dataclasses.replace(value, **changed) if changed else value


def _parts(value: Any) -> list[Any]:
    """All configs of a tree."""
    if isinstance(value, tuple):
        return [part for item in value for part in _parts(item)]
    if not dataclasses.is_dataclass(value):
        return []
    return [value, *(part for field in dataclasses.fields(value) for part in _parts(getattr(value, field.name)))]


# --- what changed ----------------------------------------------------------------------------------------------------


def grouped(differences: Sequence[Difference]) -> list[list[Difference]]:
    """The differences gathered into changes, by the rule in the module's docstring."""
    groups: list[tuple[tuple[Any, ...], list[Difference]]] = []
    for entry in differences:
        path, old, new = entry
        # Not hashes: a config may hold a dict.
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            key: tuple[Any, ...] = (type(old), new)
        else:
            key = (_field(path), old, new)
        members = next((members for other, members in groups if other == key), None)
        if members is None:
            groups.append((key, [entry]))
        else:
            members.append(entry)
    return [members for _, members in groups]


def change_problems(differences: Sequence[Difference], declared: Sequence[str]) -> list[str]:
    """Why these differences are not the one change that was meant; empty where they are.

    Args:
        differences: of a variant from its baseline.
        declared: patterns of paths that may differ ("model.*.ffn": it and what is below it); () for one change.
    """
    if not differences:
        return ["it does not differ from the baseline: what it changes has that value already"]
    if declared:
        undeclared = [entry for entry in differences if not any(covers(pattern, entry[0]) for pattern in declared)]
        idle = [pattern for pattern in declared if not any(covers(pattern, path) for path, _, _ in differences)]
        problems = [f"changes={pattern!r} is declared, and nothing differs there" for pattern in idle]
        if undeclared:
            problems.append(f"it changes what changes=(...) does not declare:{listed(undeclared)}")
        return problems
    groups = grouped(differences)
    if len(groups) == 1:
        return []
    shown = "".join(f"\n  {number}. {_described(group)}" for number, group in enumerate(groups, 1))
    patterns = ", ".join(repr(group[0][0]) for group in groups)
    return [
        f"it changes {len(groups)} things at once, so that a difference could be due to any of them:{shown}\n  "
        f"change one, or declare that they belong together: Variant(change, changes=({patterns}))"
    ]


def covers(pattern: str, path: str) -> bool:
    """Whether a path is one that the pattern ("model.*.ffn") names, or is below one."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def listed(differences: Sequence[Difference]) -> str:
    """The differences as indented lines."""
    return "".join(f"\n  {path}: {shown(old)} -> {shown(new)}" for path, old, new in differences)


def shown(value: Any) -> str:
    """A value in short Python form."""
    return "absent" if value is ABSENT else compact(value)


def changes_of(baseline: Experiment, variant: Experiment) -> list[Difference]:
    """What two experiments disagree on, path by path."""
    return difference(baseline, variant)


def json_difference(before: Any, after: Any, path: str = "") -> list[Difference]:
    """What two values of JSON disagree on, None standing for what is absent; components of two classes are one entry.

    For configs of which only the JSON is at hand: their classes may be a file's that is no more.
    """
    if isinstance(before, list) and isinstance(after, list) and any(isinstance(item, dict) for item in before + after):
        before, after = ({str(i): item for i, item in enumerate(side)} for side in (before, after))
    if not (isinstance(before, dict) and isinstance(after, dict)) or before.get("class") != after.get("class"):
        return [] if before == after else [(path, before, after)]
    keys = [*before, *(key for key in after if key not in before)]
    where = {key: f"{path}.{key}" if path else key for key in keys}
    return [entry for key in keys for entry in json_difference(before.get(key), after.get(key), where[key])]


def _field(path: str) -> str:
    """Name of the field that a path leads to: "pattern" of "model.pattern.0"."""
    return next((name for name in reversed(path.split(".")) if not name.isdigit()), path)


def _described(group: Sequence[Difference]) -> str:
    path, old, new = group[0]
    more = f" (and {len(group) - 1} more places: {', '.join(p for p, _, _ in group[1:4])})" if len(group) > 1 else ""
    return f"{path}: {shown(old)} -> {shown(new)}{more}"
