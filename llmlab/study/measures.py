"""What is measured of a finished run besides its losses: any function of the run, computed once.

    def leak(run: Run) -> Mapping[str, float]:
        return {"leak": ...run.model(...)...}

    Ablation(..., measure=leak, metric="measure/leak")

A run directory keeps what was measured in `measures.json`, by the hash of the function's source:

    {"3f9a1c2044d0": {"function": "leak", "values": {"leak": 0.0}}}

so that studies of the same runs share the work, and a function that was changed measures again. The hash covers the
function, the functions of its own file that it calls, and the plain constants that both read; not the libraries that
it uses. A run that cannot be measured has no value, and its error is told: it never becomes a number in a mean.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmlab.runs import Run
from llmlab.study.trials import Status, Trial
from llmlab.training.directory import write_json

FILE_NAME = "measures.json"
PREFIX = "measure/"

Measure = Callable[[Run], Mapping[str, float]]
"""Numbers by name, of a finished run."""

_DIGITS = 12
_CONSTANTS = (bool, int, float, str, bytes, type(None))


class MeasureError(ValueError):
    """A run could not be measured."""


def measured(trial: Trial, measure: Measure, *, compute: bool = True) -> Trial:
    """A finished trial with what was measured of it in its summary, as "measure/<name>"; where measuring failed, with
    the reason as its problem.

    Args:
        trial: of a run. One that has not finished is returned as it is.
        measure: the function.
        compute: False to take only what was measured before.
    """
    if trial.status is not Status.FINISHED:
        return trial
    try:
        values = values_of(trial.directory, measure, compute=compute)
    except MeasureError as error:
        return dataclasses.replace(trial, problem=str(error))
    named = {f"{PREFIX}{name}": value for name, value in values.items()}
    return dataclasses.replace(trial, summary=trial.summary | named)


def values_of(directory: Path, measure: Measure, *, compute: bool = True) -> dict[str, float]:
    """What a function measures of a run: from its measures.json, or computed and kept there.

    Raises:
        MeasureError: it raised an error, or gave something else than finite numbers by name.
    """
    key, path = source_hash(measure), directory / FILE_NAME
    kept = _read(path)
    if key in kept:
        return kept[key]["values"]
    if not compute:
        return {}
    name = getattr(measure, "__name__", repr(measure))
    try:
        found = measure(Run(directory))
        values = {str(each): float(value) for each, value in found.items()}
    except Exception as error:
        raise MeasureError(f"{name} of {directory} failed: {type(error).__name__}: {error}") from error
    if wrong := [f"{each}={value}" for each, value in values.items() if not math.isfinite(value)]:
        raise MeasureError(f"{name} of {directory} gave {', '.join(wrong)}, which is no finite number")
    write_json(path, _read(path) | {key: {"function": name, "values": values}})
    return values


def source_hash(measure: Measure) -> str:
    """Digest of what the function computes, as far as its own file says it.

    Raises:
        ValueError: it is no function that was written in a file.
    """
    digest = hashlib.sha256()
    for part in _sources(measure, set()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:_DIGITS]


def _sources(function: Any, seen: set[str]) -> Iterator[str]:
    """Source of a function, constants that it reads, and the same of its file's functions that it calls."""
    if not inspect.isfunction(function) or function.__closure__:
        raise ValueError(
            f"measure={function!r} must be a function of a file's top level, without values from around it: what it "
            "computes is known by its source"
        )
    seen.add(function.__qualname__)
    try:
        yield inspect.getsource(function)
    except OSError as error:
        raise ValueError(f"measure={function.__qualname__} has no source in a file: {error}") from None
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        if inspect.isfunction(value):
            if value.__module__ == function.__module__ and value.__qualname__ not in seen and not value.__closure__:
                yield from _sources(value, seen)
        elif name in function.__globals__ and _is_constant(value):
            yield f"{name}={value!r}"


def _names(code: types.CodeType) -> set[str]:
    """Names that the code looks up, inner functions included."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def _read(path: Path) -> dict[str, Any]:
    """What was measured before. A file that is damaged is measured again: it holds nothing that cannot be computed."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {key: entry for key, entry in entries if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    values = entry.get("values") if isinstance(entry, dict) else None
    return isinstance(values, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values.values()
    )
