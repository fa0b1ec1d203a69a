"""From the runs of a scaling study to results.json: the law, the frontier, what lies beyond, and how far to believe it.

    {"kind": "scaling", "schema": 1, "name", "question", "metric", "unit", "level", "delta", "resamples", "command",
     "file", "date", "conventions": {"parameters", "flops", "tokens"}, "cost": {"kappa", "gamma", "error"},
     "runs": [{"name", "hash", "directory", "status", "parameters", "tokens", "flops", "budget", "seed", "value",
               "fitted", "held_out", "seconds", "problem"}],
     "law": {"E", "A", "B", "alpha", "beta": each {"value", "interval"}, "spread", "runs",
             "exponents": {"parameters", "tokens": each {"value", "interval"}}} or null,
     "isoflop": {"profiles": [{"flops", "curve", "optimum", "inside", "loss"}],
                 "exponents": {"parameters", "tokens"} or null, "resamples"} or null,
     "frontier": [{"flops", "extrapolated", "parameters", "tokens", "loss": each {"value", "interval"}}],
     "held_out": {"runs", "predictions": [{"name", "parameters", "tokens", "value", "predicted", "interval", "error",
                  "covered"}], "covered", "error"} or null,
     "problems": [], "provenance": {}}

The law of the report is fitted to all runs. The held-out check fits another to the smaller runs alone, predicts the
largest, and says how far off it was and whether its interval held: the only evidence there is for extrapolating
further. An interval of a prediction is for one run: the bootstrap of the law, and a residual besides.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.study import isoflop
from llmlab.study.isoflop import Frontier, Profile
from llmlab.study.laws import Bootstrap, Cost, Fit, Fitter, Law
from llmlab.study.scaling import Point, Scaling, held_out
from llmlab.study.sweep_results import provenance_of
from llmlab.study.trials import Status, Trial, unit_of

SCHEMA = 1
TERMS = ("E", "A", "B", "alpha", "beta")
Estimate = dict[str, Any]
"""{"value", "interval": [low, high] or null}."""

_COUNTED = {
    "non-embedding": "N counts every parameter but embeddings, the head and position tables",
    "all": "N counts every parameter, embeddings and head too",
}
_FLOPS = (
    "C is 2 FLOPs per multiply-add of the forward pass times 3 for forward and backward; the head counts, attention "
    "counts in full, embedding lookups, norms and softmax do not"
)
_TOKENS = "D is every token processed, padding and repetition included"


def analyse(
    scaling: Scaling,
    runs: Sequence[Point],
    trials: Mapping[str, Trial],
    *,
    name: str,
    command: str,
    file: Path | None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        scaling: the study.
        runs: its points.
        trials: by the points' names; runs that are not finished have no part in any fit and are listed.
        name: of the study.
        command: that makes it.
        file: the experiment file.
    """
    aside = held_out(scaling, runs)
    rows = [_row(point, trials[point.name], scaling.metric, point.name in aside) for point in runs]
    usable = [point for point, row in zip(runs, rows, strict=True) if row["value"] is not None]
    values = {row["name"]: row["value"] for row in rows if row["value"] is not None}
    problems = [f"{row['name']}: {row['status']}: {row['problem']}" for row in rows if row["value"] is None]
    cost = _cost(runs)
    law, boot, fit = None, None, None
    try:
        fitter = _fitter(usable, values, scaling)
        fit = fitter.fit()
        boot = fitter.bootstrap(fit, scaling.resamples)
        law = _law(fit, boot, cost, scaling.level)
    except ValueError as error:
        problems.append(f"no law could be fitted: {error}")
    for row, point in zip(rows, runs, strict=True):
        row["fitted"] = None if fit is None else float(fit.law.loss(point.parameters, point.tokens))
    done = [trials[point.name] for point in usable]
    return {
        "kind": "scaling",
        "schema": SCHEMA,
        "name": name,
        "question": scaling.question,
        "metric": scaling.metric,
        "unit": unit_of(scaling.metric, done),
        **{key: getattr(scaling, key) for key in ("level", "delta", "resamples")},
        "command": command,
        "file": "" if file is None else file.as_posix(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "conventions": {"parameters": _COUNTED[scaling.parameters], "flops": _FLOPS, "tokens": _TOKENS},
        "cost": {"kappa": cost.kappa, "gamma": cost.gamma, "error": cost.error},
        "runs": rows,
        "law": law,
        "isoflop": _isoflop(usable, values, cost, scaling, problems),
        "frontier": [] if fit is None or boot is None else _frontier(fit.law, boot, cost, runs, scaling),
        "held_out": _held_out(usable, values, aside, scaling, problems),
        "problems": problems,
        "provenance": provenance_of(done),
    }


def _row(point: Point, trial: Trial, metric: str, aside: bool) -> dict[str, Any]:
    value = trial.value(metric)
    problem = trial.problem
    if value is None or not np.isfinite(value):
        value = None
        if trial.status is Status.FINISHED:
            problem = f"its summary has no finite {metric}"
        problem = problem or "it is not finished"
    return {
        "name": point.name,
        "hash": trial.hash,
        "directory": trial.directory.as_posix(),
        "status": str(trial.status),
        **{key: getattr(point, key) for key in ("parameters", "tokens", "flops", "budget", "seed")},
        "value": value,
        "held_out": aside,
        "seconds": trial.seconds,
        "problem": problem,
    }


def _cost(runs: Sequence[Point]) -> Cost:
    """Of the family: one number a size, however often each was run."""
    per_token = {point.parameters: point.flops / point.tokens for point in runs}
    sizes = np.array(sorted(per_token), np.float64)
    return Cost.fit(sizes, np.array([per_token[int(size)] for size in sizes], np.float64))


def _fitter(runs: Sequence[Point], values: Mapping[str, float], scaling: Scaling) -> Fitter:
    columns = [(point.parameters, point.tokens, values[point.name]) for point in runs]
    n, d, losses = np.array(columns, np.float64).reshape(-1, 3).T
    return Fitter(n, d, losses, delta=scaling.delta)


def _estimate(value: float, interval: tuple[float, float] | None) -> Estimate:
    return {"value": value, "interval": None if interval is None else list(interval)}


def _law(fit: Fit, boot: Bootstrap, cost: Cost, level: float) -> dict[str, Any]:
    a, b = fit.law.exponents(cost)
    of_a, of_b = boot.exponents(cost, level)
    return {
        **{name: _estimate(getattr(fit.law, name), boot.of(name, level)) for name in TERMS},
        "spread": fit.spread,
        "exponents": {"parameters": _estimate(a, of_a), "tokens": _estimate(b, of_b)},
        "runs": len(fit.residuals),
    }


def _frontier(law: Law, boot: Bootstrap, cost: Cost, runs: Sequence[Point], scaling: Scaling) -> list[dict[str, Any]]:
    """The best use of budgets that were run, and of larger ones."""
    spent = sorted({point.budget or point.flops for point in runs})
    seen = spent if scaling.budgets else list(np.geomspace(spent[0], spent[-1], 4))
    beyond = [factor * spent[-1] for factor in scaling.extrapolate]
    rows = []
    for flops, extrapolated in [*((c, False) for c in seen), *((c, True) for c in beyond)]:
        intervals = boot.optimum(flops, cost, scaling.level)
        named = zip(("parameters", "tokens", "loss"), law.optimum(flops, cost), intervals, strict=True)
        row: dict[str, Any] = {"flops": float(flops), "extrapolated": extrapolated}
        rows.append(row | {key: _estimate(value, interval) for key, value, interval in named})
    return rows


def _isoflop(
    runs: Sequence[Point], values: Mapping[str, float], cost: Cost, scaling: Scaling, problems: list[str]
) -> dict[str, Any] | None:
    """Parabolas and the power laws of their minima; None in a grid."""
    if not scaling.budgets:
        return None
    profiles: list[Profile] = []
    for budget in sorted(scaling.budgets):
        mine = [point for point in runs if point.budget == budget]
        n = np.array([point.parameters for point in mine], np.float64)
        try:
            profiles.append(Profile.fit(budget, n, np.array([values[point.name] for point in mine], np.float64)))
        except ValueError as error:
            problems.append(f"no isoFLOP profile: {error}")
    shown = [
        {
            "flops": profile.flops,
            "curve": list(profile.curve),
            "optimum": profile.optimum,
            "inside": profile.inside,
            "loss": None if profile.optimum is None else float(profile.at(profile.optimum)),
        }
        for profile in profiles
    ]
    problems += [
        f"the minimum at {profile.flops:.3g} FLOPs lies outside of the sizes that were trained; the budget has no part "
        "in the power laws"
        for profile in profiles
        if not profile.inside
    ]
    exponents, drawn = None, []
    try:
        frontier = Frontier.fit(profiles, cost)
    except ValueError as error:
        problems.append(f"no power laws from isoFLOP profiles: {error}")
    else:
        drawn = isoflop.bootstrap(profiles, cost, scaling.resamples)
        exponents = {key: _exponent(key, frontier, drawn, scaling.level) for key in ("parameters", "tokens")}
    return {"profiles": shown, "exponents": exponents, "resamples": len(drawn)}


def _exponent(which: str, frontier: Frontier, drawn: Sequence[Frontier], level: float) -> dict[str, Any]:
    power = getattr(frontier, which)
    interval = None
    if drawn:
        tail = 50 * (1 - level)
        low, high = np.percentile([getattr(each, which).exponent for each in drawn], [tail, 100 - tail])
        interval = (float(low), float(high))
    return _estimate(power.exponent, interval) | {"k": power.k}


def _held_out(
    runs: Sequence[Point], values: Mapping[str, float], aside: set[str], scaling: Scaling, problems: list[str]
) -> dict[str, Any] | None:
    """The largest runs predicted from the others."""
    smaller = [point for point in runs if point.name not in aside]
    larger = [point for point in runs if point.name in aside]
    if not larger:
        return None
    try:
        fitter = _fitter(smaller, values, scaling)
    except ValueError as error:
        problems.append(f"no held-out check: without the largest runs {error}")
        return None
    fit = fitter.fit()
    boot = fitter.bootstrap(fit, scaling.resamples)
    predictions = []
    for point in larger:
        low, high = boot.prediction(point.parameters, point.tokens, scaling.level)
        predicted, value = float(fit.law.loss(point.parameters, point.tokens)), values[point.name]
        predictions.append(
            {
                "name": point.name,
                "parameters": point.parameters,
                "tokens": point.tokens,
                "value": value,
                "predicted": predicted,
                "interval": [low, high],
                "error": predicted - value,
                "covered": low <= value <= high,
            }
        )
    return {
        "runs": len(smaller),
        "predictions": predictions,
        "covered": sum(each["covered"] for each in predictions),
        "error": float(np.mean([abs(each["error"]) for each in predictions])),
    }
