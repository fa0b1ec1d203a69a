"""Runs -> results.json: every number of an ablation's report, and nothing that the report would have to compute.

    arms          values by seed, mean, what each achieved, its runs, its learning curve
    comparisons   each variant against the baseline, pair by pair: difference, intervals, p-values, verdict
    factorial     effects and interactions, where the arms are a factorial
    problems      runs without a value; their seeds are left out of every arm
    provenance    code, packages and devices of the runs

The numbers are those of llmlab.study.statistics; this module only asks the right questions of the right seeds. JSON has
no NaN: what cannot be computed (an interval from one pair) is null.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from llmlab.study import matching, sources, statistics
from llmlab.study.ablation import BASELINE, Ablation, Arm, unchanged
from llmlab.study.changes import shown
from llmlab.study.measures import PREFIX
from llmlab.study.outcomes import Outcome, Table, Tuned, guessing_loss
from llmlab.study.paired import Claim
from llmlab.study.record import KIND, SCHEMA
from llmlab.study.sequential import confidence_sequence, decide_all_sequentially
from llmlab.study.trials import Status
from llmlab.study.verdict import Decision, decide_all, study_verdict

Mode = Literal["fixed", "sequential", "exploratory"]
NO_PAIR = "no seed has a result in every arm"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a report says about a study besides its numbers."""

    name: str
    mode: Mode = "fixed"
    exploratory: str | None = None
    """Why it is exploratory."""
    command: str | None = None
    """That makes it again."""
    file: str | None = None
    """The experiment file."""


def results(
    ablation: Ablation, arms: Sequence[Arm], table: Table, tuned: Mapping[str, Tuned], context: Context
) -> dict[str, Any]:
    """The content of results.json."""
    achieved = {arm.name: _achieved(arm, table) for arm in arms}
    mismatches = matching.mismatches(ablation, achieved)
    decisions = decide(ablation, arms, table)
    withheld = None if ablation.acknowledge_mismatch is not None else "; ".join(map(str, mismatches)) or None
    verdict, reason = _verdict(table, decisions, withheld)
    outcomes = list(table.outcomes.values())
    problems = [_problem(outcome) for outcome in outcomes if outcome.problem is not None]
    problems += [_tuning_problem(name, text) for name, found in tuned.items() for text in found.problems]
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "name": context.name,
        "hypothesis": ablation.hypothesis,
        "claim": ablation.claim,
        "metric": ablation.metric,
        "direction": ablation.direction,
        "margin": ablation.margin,
        "unit": unit(ablation),
        "match": ablation.match,
        "tolerance": ablation.tolerance,
        "acknowledged": ablation.acknowledge_mismatch,
        "alpha": ablation.alpha,
        "mode": context.mode,
        "exploratory": context.exploratory,
        "seeds": list(table.seeds),
        "paired_seeds": list(table.paired),
        "verdict": verdict,
        "withheld": withheld is not None,
        "reason": reason,
        "command": context.command or "",
        "file": context.file or "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arms": [_arm(arm, table, achieved[arm.name], tuned.get(arm.name), ablation) for arm in arms],
        "comparisons": [_comparison(arm, table, decisions.get(arm.name), ablation, withheld) for arm in arms[1:]],
        "mismatches": matching.as_json(mismatches),
        "factorial": _factorial(ablation, arms, table),
        "diverged_value": _imputed(table),
        "problems": problems,
        "remarks": _remarks(ablation, table, tuned, outcomes),
        "provenance": sources.provenance(outcomes),
    }
    return _strict(content)


def decide(ablation: Ablation, arms: Sequence[Arm], table: Table) -> dict[str, Decision]:
    """The decision on every variant; empty where no seed has a value in every arm."""
    if not table.paired:
        return {}
    differences = table.differences()
    claims: dict[str, Claim] = {arm.name: arm.claim for arm in arms[1:]}
    margins = {arm.name: arm.margin for arm in arms[1:]}
    if ablation.sequential:
        return decide_all_sequentially(
            differences, claims, margins, ablation.direction, ablation.alpha, min_seeds=ablation.min_seeds
        )
    return decide_all(differences, claims, margins, ablation.direction, ablation.alpha)


def unit(ablation: Ablation) -> str:
    """Of the metric: "nats per token"; empty for one that is not a loss."""
    name = ablation.metric.rpartition("/")[2]
    if name in ("loss", "ema_loss"):
        return f"nats per {ablation.baseline.objective.plain.unit}"
    return {"bits_per_byte": "bits per byte"}.get(name, "")


def _verdict(table: Table, decisions: Mapping[str, Decision], withheld: str | None) -> tuple[str, str]:
    """(verdict, sentence) of the whole study. Arms that do not match give numbers, and no answer."""
    if withheld is not None:
        return "inconclusive", f"withheld: {withheld}"
    if not decisions:
        return "inconclusive", NO_PAIR
    verdict, reason = study_verdict(decisions)
    if len(decisions) == 1:
        reason = next(iter(decisions.values())).reason
    if table.left_out:
        which = f"seed{'s' if len(table.left_out) > 1 else ''} {', '.join(map(str, table.left_out))}"
        reason += f"; {which} left out of every arm: runs without a result"
    return verdict, reason


# --- arms ------------------------------------------------------------------------------------------------------------


def _achieved(arm: Arm, table: Table) -> dict[str, float | None]:
    runs = [outcome.trial for outcome in table.outcomes.values() if outcome.job.arm == arm.name]
    return matching.mean_of(matching.of_run(trial.summary) for trial in runs if trial.status is Status.FINISHED)


def _arm(
    arm: Arm, table: Table, achieved: matching.Achieved, tuned: Tuned | None, ablation: Ablation
) -> dict[str, Any]:
    values = table.values(arm.name)
    outcomes = [table.outcomes[arm.name, seed] for seed in table.seeds]
    return {
        "name": arm.name,
        "changes": [{"path": p, "baseline": shown(old), "variant": shown(new)} for p, old, new in arm.changes],
        "levels": dict(arm.levels),
        "learning_rate": None if tuned is None else tuned.best,
        "learning_rates": None
        if tuned is None
        else [{"rate": rate, "values": list(row)} for rate, row in tuned.values.items()],
        "learning_rate_sensitivity": None if tuned is None else _sensitivity(ablation, tuned),
        "achieved": dict(achieved),
        "values": [table.value(arm.name, seed) if seed in table.paired else None for seed in table.seeds],
        "mean": float(values.mean()) if values.size else None,
        "std": float(values.std(ddof=1)) if values.size > 1 else None,
        "measures": _measures(outcomes),
        "diverged": [outcome.job.seed for outcome in outcomes if outcome.diverged],
        "runs": [_run(outcome) for outcome in outcomes],
        "curve": _curve(outcomes, ablation),
    }


def _measures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """What the study's function measured, by name: the values of all seeds, null where there is none."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.trial.summary if name.startswith(PREFIX))
    found = {}
    for name in names:
        each = [outcome.trial.summary.get(name) for outcome in outcomes]
        known = np.array([value for value in each if value is not None], np.float64)
        std = float(known.std(ddof=1)) if known.size > 1 else None
        found[name.removeprefix(PREFIX)] = {"values": each, "mean": float(known.mean()), "std": std}
    return found


def _run(outcome: Outcome) -> dict[str, Any]:
    trial, job = outcome.trial, outcome.job
    return {
        "seed": job.seed,
        "hash": trial.hash,
        "directory": sources.relative(trial.directory),
        "status": str(trial.status),
        "value": outcome.value,
        "learning_rate": job.experiment.optimizer.peak_lr,
        "seconds": trial.seconds,
        "tokens_per_second": trial.summary.get("tokens_per_second"),
        "code": sources.code(trial.provenance),
        "config_hash": trial.provenance.get("config_hash", trial.hash),
        "problem": outcome.problem or trial.problem,
    }


def _sensitivity(ablation: Ablation, tuned: Tuned) -> dict[str, Any] | None:
    """What a wrong rate costs (llmlab.study.statistics): of a loss, where diverged runs have one to be clipped at."""
    losses = np.array([[np.nan if v is None else v for v in tuned.values[rate]] for rate in tuned.rates], np.float64)
    initial = guessing_loss(ablation)
    if ablation.direction != "lower" or (initial is None and not np.isfinite(losses).all()):
        return None
    found = statistics.learning_rate_sensitivity(np.array(tuned.rates, np.float64), losses, initial)
    return asdict(found)


def curves(outcomes: Sequence[Outcome], ablation: Ablation) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, metric) of every run that logged it; a diverged run's ends where it fell apart."""
    found = []
    for outcome in outcomes:
        records = [record for record in outcome.trial.metrics if ablation.metric in record]
        if records and outcome.problem is None:
            found.append((_column(records, "step"), _column(records, ablation.metric)))
    return found


def _column(records: Sequence[Mapping[str, Any]], name: str) -> Float[np.ndarray, " records"]:
    return np.array([record[name] for record in records], np.float64)


def _curve(outcomes: Sequence[Outcome], ablation: Ablation) -> dict[str, Any]:
    """The mean over seeds at every evaluation, with the interval for it."""
    found = [curve for curve in curves(outcomes, ablation) if np.isfinite(curve[1][0])]
    if not found:
        return {"step": [], "tokens": [], "mean": [], "low": [], "high": [], "count": []}
    band = statistics.band(found, 1 - ablation.alpha)
    logged = {r["step"]: r.get("tokens") for outcome in outcomes for r in outcome.trial.metrics}
    return {
        "step": [int(step) for step in band.steps],
        "tokens": [logged.get(int(step)) for step in band.steps],
        "mean": band.mean.tolist(),
        "low": band.low.tolist(),
        "high": band.high.tolist(),
        "count": band.count.tolist(),
    }


# --- comparisons -----------------------------------------------------------------------------------------------------


def _comparison(
    arm: Arm, table: Table, decision: Decision | None, ablation: Ablation, withheld: str | None
) -> dict[str, Any]:
    d = table.differences()[arm.name]
    level, several = 1 - ablation.alpha, d.size > 1
    interval, method = _interval(d, level, ablation)
    return {
        "arm": arm.name,
        "claim": arm.claim,
        "margin": arm.margin,
        "difference": statistics.mean_difference(d) if d.size else None,
        "differences": d.tolist(),
        "level": level,
        "interval": interval,
        "interval_method": method,
        "t_interval": list(statistics.t_interval(d, level)) if several else None,
        "p_t": statistics.paired_t(d) if several else None,
        "p_sign_flip": statistics.sign_flip(d) if several else None,
        "sign_flip_method": statistics.sign_flip_method(d.size) if several else None,
        "p_claim": None if decision is None else decision.p_for,
        "p_holm": None if decision is None else decision.p_for_holm,
        "p_against": None if decision is None else decision.p_against,
        "p_against_holm": None if decision is None else decision.p_against_holm,
        "p_equivalence": statistics.equivalence(d, arm.margin) if several and arm.margin > 0 else None,
        "minimum_detectable_effect": statistics.minimum_detectable_effect(d, ablation.alpha) if several else None,
        "verdict": "inconclusive" if decision is None or withheld else decision.verdict,
        "reason": f"withheld: {withheld}" if withheld else decision.reason if decision else NO_PAIR,
        "seeds_to_settle": None if decision is None or withheld else decision.seeds_to_settle,
        **_speed(arm, table, ablation),
    }


def _interval(d: np.ndarray, level: float, ablation: Ablation) -> tuple[list[float] | None, str]:
    """The interval that belongs to the way seeds were added, and its name."""
    if ablation.sequential:
        bounds = confidence_sequence(d, level) if d.size else (-math.inf, math.inf)
        return (list(bounds) if all(map(math.isfinite, bounds)) else None), "confidence sequence"
    return (list(statistics.bca_interval(d, level)) if d.size > 1 else None), "BCa"


def _speed(arm: Arm, table: Table, ablation: Ablation) -> dict[str, Any]:
    """Steps to the worst value that a finished baseline run ended at: every one of them gets there."""
    nothing = {"steps_to_target": None, "speed_up": None}
    pairs = [[table.outcomes[name, seed] for name in (BASELINE, arm.name)] for seed in table.paired]
    sides = [curves(side, ablation) for side in zip(*pairs, strict=True)]
    ends = [pair[0].value for pair in pairs if pair[0].value is not None]
    if not ends or any(len(side) != len(pairs) or any(len(steps) < 2 for steps, _ in side) for side in sides):
        return nothing
    target = (max if ablation.direction == "lower" else min)(ends)
    found = statistics.speed_up(sides[0], sides[1], target, ablation.direction, 1 - ablation.alpha)
    return {
        "steps_to_target": {
            "target": target,
            "baseline": {"steps": list(found.baseline.steps), "mean": found.baseline.mean},
            "variant": {"steps": list(found.variant.steps), "mean": found.variant.mean},
        },
        "speed_up": {"ratio": found.ratio, "interval": found.interval, "bound": found.bound},
    }


def _factorial(ablation: Ablation, arms: Sequence[Arm], table: Table) -> dict[str, Any] | None:
    if not ablation.factors:
        return None
    # The statistics take the first level of a factor for the baseline's.
    factors = {
        factor: sorted(levels, key=lambda level, levels=levels: levels[level] is not unchanged)
        for factor, levels in ablation.factors.items()
    }
    cells = np.full((*map(len, factors.values()), len(table.paired)), np.nan)
    for arm in arms:
        place = tuple(factors[factor].index(level) for factor, level in arm.levels)
        cells[place] = table.values(arm.name)
    effects = statistics.interactions(cells, factors, 1 - ablation.alpha) if table.paired else []
    rows = [(dict(arm.levels), table.values(arm.name)) for arm in arms]
    return {
        "factors": factors,
        "cells": [
            {"levels": levels, "mean": float(v.mean()) if v.size else None, "values": v.tolist()} for levels, v in rows
        ],
        "effects": [
            {"term": e.term, "estimate": e.estimate, "interval": e.interval, "p": e.p, "p_holm": e.p_holm}
            for e in effects
        ],
    }


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _problem(outcome: Outcome) -> dict[str, Any]:
    return {
        "arm": outcome.job.arm,
        "seed": outcome.job.seed,
        "hash": outcome.trial.hash,
        "directory": sources.relative(outcome.trial.directory),
        "status": str(outcome.trial.status),
        "problem": outcome.problem,
    }


def _tuning_problem(arm: str, text: str) -> dict[str, Any]:
    return {"arm": arm, "seed": None, "hash": None, "directory": None, "status": "tuning", "problem": text}


def _imputed(table: Table) -> dict[str, Any] | None:
    if not table.any_diverged or table.imputed is None:
        return None
    value, source = table.imputed
    return {"value": value, "source": source}


def _remarks(ablation: Ablation, table: Table, tuned: Mapping[str, Tuned], outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    if table.any_diverged and table.imputed is not None:
        labels = ", ".join(outcome.job.label for outcome in outcomes if outcome.diverged)
        value, source = table.imputed
        found.append(f"{labels} diverged and count as {value:.4f}, {source}")
    found += [
        f"the best learning rate of {arm} is {t.best:g}, at the edge of the grid: a better one may lie beyond"
        for arm, t in tuned.items()
        if t.at_edge
    ]
    if ablation.measure is not None and not ablation.metric.startswith(PREFIX):
        # Where the metric is measured these are problems, and their seeds are left out.
        failed = [o for o in outcomes if o.trial.status is Status.FINISHED and o.trial.problem is not None]
        found += [f"{outcome.job.label}: {outcome.trial.problem}" for outcome in failed]
    there = [(outcome.job.label, outcome.job.experiment, outcome.trial.directory) for outcome in outcomes]
    return [*found, *sources.disagreements(outcomes), *sources.outdated(there)]


def _strict(value: Any) -> Any:
    """Plain JSON values; null for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Path):
        return value.as_posix()
    return None if isinstance(value, float) and not math.isfinite(value) else value
