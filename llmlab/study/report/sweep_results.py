"""The results of a sweep, schema 1: its shape, and what must agree within it."""

from pathlib import Path
from typing import Any

from llmlab.study.report.schema import (
    Faults,
    anything,
    flag,
    load,
    mapping,
    nullable,
    number,
    one_of,
    optional,
    text,
    whole,
)

SCHEMA = 1

_axis = {
    "path": text,
    "kind": one_of("values", "uniform", "log_uniform", "integer", "categorical"),
    "log": flag,
    "values": nullable([anything]),
    "low": nullable(number),
    "high": nullable(number),
}
_trial = {
    "number": whole,
    "name": text,
    "hash": text,
    "directory": text,
    "status": text,
    "point": mapping(anything),
    "value": nullable(number),
    "seconds": nullable(number),
    "problem": nullable(text),
    "curve": nullable({"step": [number], "value": [nullable(number)]}),
}
SHAPE = {
    **dict.fromkeys(("name", "metric", "command", "file", "date"), text),
    "direction": one_of("lower", "higher"),
    "unit": nullable(text),
    "axes": [_axis],
    "trials": [_trial],
    "importance": nullable(mapping(number)),
    "best": nullable(
        {
            "number": whole,
            "value": number,
            "point": mapping(anything),
            "command": nullable(text),
            "told": optional([text]),
        }
    ),
    "problems": [anything],
    "provenance": mapping(anything),
}


def read(folder: Path) -> dict[str, Any]:
    """The results of the sweep in this folder, checked. Errors as of `schema.load`."""
    return load(folder, "sweep", SCHEMA, SHAPE, disagreements)


def ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished trials with a value, best first."""
    sign = 1 if results["direction"] == "lower" else -1
    valued = [trial for trial in results["trials"] if trial["value"] is not None and trial["status"] == "finished"]
    return sorted(valued, key=lambda trial: (sign * trial["value"], trial["number"]))


def disagreements(results: dict[str, Any]) -> Faults:
    """What the parts of well-shaped results say against each other."""
    numbers = [trial["number"] for trial in results["trials"]]
    if len(set(numbers)) != len(numbers):
        yield "trials: two have one number"
    paths = {axis["path"] for axis in results["axes"]}
    for place, trial in enumerate(results["trials"]):
        if strangers := sorted(trial["point"].keys() - paths):
            yield f"trials.{place}.point names {', '.join(strangers)}, which is no axis"
        if (curve := trial["curve"]) is not None and len(curve["step"]) != len(curve["value"]):
            yield f"trials.{place}.curve has columns of several lengths"
    best, order = results["best"], ranked(results)
    if best is None:
        if order:
            yield f"best is null, but trial {order[0]['number']} finished with a value"
        return
    named = [trial for trial in order if trial["number"] == best["number"]]
    if not named:
        yield f"best.number is {best['number']}, which no finished trial has"
    elif best["value"] != named[0]["value"] or best["value"] != order[0]["value"]:
        yield f"best.value is {best['value']}, but trial {order[0]['number']} has {order[0]['value']}"
