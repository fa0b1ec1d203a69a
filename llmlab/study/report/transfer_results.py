"""The results of a learning-rate transfer study, schema 1: its shape, and what must agree within it."""

from pathlib import Path
from typing import Any

from llmlab.study.report.schema import (
    Faults,
    anything,
    load,
    mapping,
    nullable,
    number,
    one_of,
    pair,
    text,
    whole,
)

SCHEMA = 1

_estimate = {"value": nullable(number), "interval": nullable(pair(number))}
_arm = {
    "name": text,
    "parametrisation": one_of("standard", "muP"),
    "widths": [
        {
            "width": whole,
            "losses": [[nullable(number)]],
            "means": [nullable(number)],
            "best": dict.fromkeys(("grid_rate", "loss", "rate"), nullable(number)),
        }
    ],
    "drift": _estimate,
    "regret": _estimate,
    "coordinates": nullable({"size": mapping([number]), "change": mapping([number]), "slopes": mapping(number)}),
    "runs": [
        {
            **dict.fromkeys(("name", "hash", "directory", "status"), text),
            **dict.fromkeys(("value", "seconds"), nullable(number)),
            "problem": nullable(text),
        }
    ],
}
SHAPE = {
    **dict.fromkeys(("name", "question", "metric", "command", "file", "date"), text),
    "unit": nullable(text),
    "level": number,
    "widths": [whole],
    "learning_rates": [number],
    "arms": [_arm],
    "problems": [anything],
    "provenance": mapping(anything),
}


def read(folder: Path) -> dict[str, Any]:
    """The results of the transfer study in this folder, checked. Errors as of `schema.load`."""
    return load(folder, "transfer", SCHEMA, SHAPE, disagreements)


def disagreements(results: dict[str, Any]) -> Faults:
    """What the parts of well-shaped results say against each other."""
    rates, widths = results["learning_rates"], results["widths"]
    for arm in results["arms"]:
        if [row["width"] for row in arm["widths"]] != widths:
            yield f"arm {arm['name']} has other widths than the study"
        for row in arm["widths"]:
            where = f"arm {arm['name']}, width {row['width']}"
            if len(row["means"]) != len(rates) or len(row["losses"]) != len(rates):
                yield f"{where}: not one loss for each learning rate"
                continue
            known = [loss for loss in row["means"] if loss is not None]
            if row["best"]["loss"] != min(known, default=None):
                yield f"{where}: best.loss is {row['best']['loss']}, which is not the least of its means"
        for name in ("size", "change") if arm["coordinates"] else ():
            if any(len(values) != len(widths) for values in arm["coordinates"][name].values()):
                yield f"arm {arm['name']}: coordinates.{name} has not one value for each width"
