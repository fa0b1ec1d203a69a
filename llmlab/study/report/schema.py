"""What a results.json must look like before a number of it is shown: shapes, checked whole, every fault named.

A report is believed because it looks finished. So a file that lost half of itself, was edited by hand, or comes from
another version is refused with the names of what is wrong, and never drawn. A shape is written as plain Python:

    {"name": text, "values": [nullable(number)], "curve": curve}       keys that must be there; others may be
    [shape]                                                            a list of any length
    text, number, whole, flag, anything                                leaves
    nullable(shape), one_of("lower", "higher"), mapping(shape), pair(shape)
    optional(shape)                                                    of a key that may be missing
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "results.json"
_SHOWN = 12  # faults in a message

Faults = Iterator[str]
Shape = Any
"""A dict of shapes, a list of one shape, or a function from (value, where) to faults."""


def text(value: Any, where: str) -> Faults:
    """A string."""
    if not isinstance(value, str):
        yield f"{where} is {_short(value)}, not a text"


def number(value: Any, where: str) -> Faults:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{where} is {_short(value)}, not a number"


def whole(value: Any, where: str) -> Faults:
    """An integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        yield f"{where} is {_short(value)}, not a whole number"


def flag(value: Any, where: str) -> Faults:
    """True or false."""
    if not isinstance(value, bool):
        yield f"{where} is {_short(value)}, neither true nor false"


def anything(value: Any, where: str) -> Faults:
    """Whatever JSON can say; numbers in it are finite all the same."""
    yield from ()


@dataclass(frozen=True)
class optional:
    """The shape of a key that may be missing."""

    shape: Shape


def nullable(shape: Shape) -> Shape:
    """The shape, or null."""
    return lambda value, where: iter(()) if value is None else faults(value, shape, where)


def one_of(*allowed: str) -> Shape:
    """One of these texts."""

    def check(value: Any, where: str) -> Faults:
        if value not in allowed:
            yield f"{where} is {_short(value)}, not one of {', '.join(allowed)}"

    return check


def mapping(shape: Shape) -> Shape:
    """An object with any keys, whose values have this shape."""

    def check(value: Any, where: str) -> Faults:
        if not isinstance(value, dict):
            yield f"{where} is {_short(value)}, not an object"
            return
        for key, item in value.items():
            yield from faults(item, shape, f"{where}.{key}")

    return check


def pair(shape: Shape) -> Shape:
    """A list of two."""

    def check(value: Any, where: str) -> Faults:
        if not isinstance(value, list) or len(value) != 2:
            yield f"{where} is {_short(value)}, not a pair"
        else:
            yield from faults(value, [shape], where)

    return check


def faults(value: Any, shape: Shape, where: str = "") -> Faults:
    """Everything about the value that is not of this shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where or 'the content'} is {_short(value)}, not an object"
            return
        for key, inner in shape.items():
            place = f"{where}.{key}" if where else key
            if key in value:
                yield from faults(value[key], inner.shape if isinstance(inner, optional) else inner, place)
            elif not isinstance(inner, optional):
                yield f"{place} is missing"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is {_short(value)}, not a list"
            return
        for position, item in enumerate(value):
            yield from faults(item, shape[0], f"{where}.{position}")
    else:
        yield from shape(value, where)


def kind_of(folder: Path, known: Collection[str]) -> str:
    """The kind of the study in this folder. Errors as of `load`."""
    return _kind(folder / FILE_NAME, _content(folder / FILE_NAME), known)


def load(folder: Path, kind: str, version: int, shape: Shape, further: Callable[[Any], Faults]) -> dict[str, Any]:
    """The content of a study's results.json.

    Args:
        folder: of the study.
        kind: of study that it must be.
        version: of its schema.
        shape: of the content.
        further: faults of content that has the shape.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another kind or version, lacks a key, or holds a number that is not finite; the
            message names the file and every key.
    """
    path = folder / FILE_NAME
    content = _content(path)
    _kind(path, content, [kind])
    found_version = content.get("schema")
    if found_version != version or isinstance(found_version, bool):
        raise ValueError(
            f"{path}: schema is {_short(found_version)}; this version reads {version}: compute the results again"
        )
    found = [*_not_finite(content, ""), *faults(content, shape)]
    found = found or list(further(content))  # what ties values together makes sense of whole ones only
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{path} cannot be reported:\n  " + "\n  ".join(found[:_SHOWN]) + more)
    return content


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; compute the results again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_short(content)}, not the results of a study; compute them again")
    return content


def _kind(path: Path, content: dict[str, Any], known: Collection[str]) -> str:
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{path}: kind is {_short(kind)}, not one of {', '.join(known)}")
    return kind


def _not_finite(value: Any, where: str) -> Faults:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}; what is not known is null"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _not_finite(item, f"{where}.{position}")


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
