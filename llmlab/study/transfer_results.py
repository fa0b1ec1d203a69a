"""From the runs of a transfer study to results.json: which learning rate is best at each width, and whether it moves.

    {"kind": "transfer", "schema": 1, "name", "question", "metric", "unit", "level", "command", "file", "date",
     "widths": [], "learning_rates": [],
     "arms": [{"name", "parametrisation": "muP" or "standard",
               "widths": [{"width", "losses": [[by seed] by rate], "means": [by rate],
                           "best": {"grid_rate", "loss", "rate"}}],
               "drift": {"value", "interval"}, "regret": {"value", "interval"},
               "coordinates": {"size": {layer: [by width]}, "change": {layer: [by width]},
                               "slopes": {layer: of the change}} or null,
               "runs": [{"name", "hash", "directory", "status", "value", "seconds", "problem"}]}],
     "problems": [], "provenance": {}}

A run that diverged has no loss and counts as worse than any other. Drift and regret are computed for each seed and
averaged.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.study.coordinates import Coordinates, slopes
from llmlab.study.sweep_results import provenance_of
from llmlab.study.transfer import Transfer, TransferPoint, drift, optimum, over_seeds, regret
from llmlab.study.trials import Status, Trial, unit_of

SCHEMA = 1


def analyse_transfer(
    transfer: Transfer,
    runs: Sequence[TransferPoint],
    trials: Mapping[str, Trial],
    coordinates: Mapping[str, Sequence[Coordinates]],
    *,
    name: str,
    command: str,
    file: Path | None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        transfer: the study.
        runs: its points.
        trials: by the points' names.
        coordinates: the coordinate check of each arm, one for each width; {} where it was not made.
        name: of the study.
        command: that makes it.
        file: the experiment file.
    """
    problems: list[str] = []
    arms = [_arm(arm, transfer, runs, trials, coordinates.get(arm, ()), problems) for arm in transfer.arms]
    done = [trial for trial in trials.values() if trial.status is Status.FINISHED]
    return {
        "kind": "transfer",
        "schema": SCHEMA,
        "name": name,
        **{key: getattr(transfer, key) for key in ("question", "metric", "level")},
        "unit": unit_of(transfer.metric, done),
        "command": command,
        "file": "" if file is None else file.as_posix(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "widths": list(transfer.widths),
        "learning_rates": list(transfer.learning_rates),
        "arms": arms,
        "problems": problems,
        "provenance": provenance_of(done),
    }


def _arm(
    arm: str,
    transfer: Transfer,
    runs: Sequence[TransferPoint],
    trials: Mapping[str, Trial],
    checked: Sequence[Coordinates],
    problems: list[str],
) -> dict[str, Any]:
    mine = [point for point in runs if point.arm == arm]
    seeds = sorted({point.seed for point in mine})
    found = {(p.width, p.learning_rate, p.seed): _value(trials[p.name], transfer.metric) for p in mine}
    rows = []
    for point in mine:
        trial = trials[point.name]
        value = found[point.width, point.learning_rate, point.seed]
        problem = trial.problem or ("it is not finished, or has no finite loss" if value is None else None)
        if problem and trial.status is not Status.DIVERGED:
            problems.append(f"{point.name}: {trial.status}: {problem}")
        rows.append(
            {
                "name": point.name,
                "hash": trial.hash,
                "directory": trial.directory.as_posix(),
                "status": str(trial.status),
                "value": value,
                "seconds": trial.seconds,
                "problem": problem,
            }
        )
    widths = [_width(width, transfer, seeds, found) for width in transfer.widths]
    problems += [
        f"{arm}, width {row['width']}: the best learning rate, {row['best']['grid_rate']:g}, is at an end of the grid"
        for row in widths
        if row["best"]["grid_rate"] is not None and row["best"]["rate"] is None
    ]
    drifts, regrets = [], []
    for seed in seeds:
        curves = [[found[width, rate, seed] for rate in transfer.learning_rates] for width in transfer.widths]
        optima = [optimum(transfer.learning_rates, curve) for curve in curves]
        drifts.append(drift(transfer.widths, optima))
        regrets.append(regret(transfer.learning_rates, optima[0], curves[-1]))
    return {
        "name": arm,
        "parametrisation": "muP" if any(getattr(p.experiment.model, "mup", None) for p in mine) else "standard",
        "widths": widths,
        "drift": over_seeds(drifts, transfer.level),
        "regret": over_seeds(regrets, transfer.level),
        "coordinates": _coordinates(checked) if checked else None,
        "runs": rows,
    }


def _value(trial: Trial, metric: str) -> float | None:
    value = trial.value(metric)
    return value if value is not None and np.isfinite(value) else None


def _width(
    width: int, transfer: Transfer, seeds: Sequence[int], found: Mapping[tuple[int, float, int], float | None]
) -> dict[str, Any]:
    """Losses of one width, and the best rate of their means; a rate at which a seed diverged has no mean."""
    losses = [[found[width, rate, seed] for seed in seeds] for rate in transfer.learning_rates]
    means = [None if None in of_rate else float(np.mean([x for x in of_rate if x is not None])) for of_rate in losses]
    best = optimum(transfer.learning_rates, means)
    return {
        "width": width,
        "losses": losses,
        "means": means,
        "best": {"grid_rate": best.grid_rate, "loss": best.grid_loss, "rate": best.rate},
    }


def _coordinates(checked: Sequence[Coordinates]) -> dict[str, Any]:
    """After the last step, by layer and width."""
    layers = list(checked[0].size)
    return {
        "size": {layer: [each.size[layer][-1] for each in checked] for layer in layers},
        "change": {layer: [each.change[layer][-1] for each in checked] for layer in layers},
        "slopes": slopes(checked),
    }
