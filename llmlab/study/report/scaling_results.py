"""The results of a scaling study, schema 1: its shape, and what must agree within it."""

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
    pair,
    text,
    whole,
)

SCHEMA = 1

estimate = {"value": number, "interval": nullable(pair(number))}
_both = {"parameters": estimate, "tokens": estimate}
_run = {
    **dict.fromkeys(("name", "hash", "directory", "status"), text),
    **dict.fromkeys(("parameters", "tokens", "seed"), whole),
    "flops": number,
    **dict.fromkeys(("budget", "value", "fitted", "seconds"), nullable(number)),
    "held_out": flag,
    "problem": nullable(text),
}
_profile = {
    "flops": number,
    "curve": [number],
    "optimum": nullable(number),
    "inside": flag,
    "loss": nullable(number),
}
_prediction = {
    "name": text,
    **dict.fromkeys(("parameters", "tokens"), whole),
    **dict.fromkeys(("value", "predicted", "error"), number),
    "interval": pair(number),
    "covered": flag,
}
SHAPE = {
    **dict.fromkeys(("name", "question", "metric", "command", "file", "date"), text),
    "unit": nullable(text),
    **dict.fromkeys(("level", "delta"), number),
    "resamples": whole,
    "conventions": dict.fromkeys(("parameters", "flops", "tokens"), text),
    "cost": dict.fromkeys(("kappa", "gamma", "error"), number),
    "runs": [_run],
    "law": nullable(
        {
            **dict.fromkeys(("E", "A", "B", "alpha", "beta"), estimate),
            "spread": number,
            "runs": whole,
            "exponents": _both,
        }
    ),
    "isoflop": nullable({"profiles": [_profile], "exponents": nullable(_both), "resamples": whole}),
    "frontier": [{"flops": number, "extrapolated": flag, **_both, "loss": estimate}],
    "held_out": nullable({"runs": whole, "predictions": [_prediction], "covered": whole, "error": number}),
    "problems": [anything],
    "provenance": mapping(anything),
}


def read(folder: Path) -> dict[str, Any]:
    """The results of the scaling study in this folder, checked. Errors as of `schema.load`."""
    return load(folder, "scaling", SCHEMA, SHAPE, disagreements)


def finished(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with a loss."""
    return [run for run in results["runs"] if run["value"] is not None]


def disagreements(results: dict[str, Any]) -> Faults:
    """What the parts of well-shaped results say against each other."""
    names = [run["name"] for run in results["runs"]]
    if len(set(names)) != len(names):
        yield "runs: two have one name"
    by_name = {run["name"]: run for run in results["runs"]}
    for place, run in enumerate(results["runs"]):
        if run["parameters"] < 1 or run["tokens"] < 1 or run["flops"] <= 0:
            yield f"runs.{place} has no size: parameters, tokens and flops must be positive"
    for place, profile in enumerate(results["isoflop"]["profiles"] if results["isoflop"] else ()):
        if len(profile["curve"]) != 3:
            yield f"isoflop.profiles.{place}.curve has {len(profile['curve'])} coefficients, not 3"
    checked = results["held_out"]
    for place, prediction in enumerate(checked["predictions"] if checked else ()):
        run = by_name.get(prediction["name"])
        if run is None or run["value"] != prediction["value"]:
            yield f"held_out.predictions.{place} is of a loss that no run has"
        low, high = prediction["interval"][0], prediction["interval"][1]
        if prediction["covered"] != (low <= prediction["value"] <= high):
            yield f"held_out.predictions.{place}.covered does not follow from its interval"
