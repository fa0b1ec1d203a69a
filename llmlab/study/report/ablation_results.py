"""The results of an ablation, schema 1: its shape, and what must agree within it.

Means and differences are computed again from the values of the seeds: a number that was edited, or a seed that was
lost, would otherwise stand in a table that everyone trusts.
"""

import math
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
    pair,
    text,
    whole,
)

SCHEMA = 1
VERDICTS = ("supported", "refuted", "inconclusive")
CLAIMS = ("no worse", "equal", "better", "worse")
BASELINE = "baseline"
# Relative: sums over a few seeds in another order differ by far less, and rounding to six digits by about this.
_SAME = 2e-5

_quantities = {name: nullable(number) for name in ("tokens", "parameters", "flops", "seconds")}
_arm = {
    "name": text,
    "changes": [{"path": text, "baseline": anything, "variant": anything}],
    "learning_rate": nullable(number),
    "learning_rates": nullable([{"rate": number, "values": [nullable(number)]}]),
    "learning_rate_sensitivity": optional(nullable({"value": number})),
    "achieved": _quantities,
    "values": [nullable(number)],
    "mean": nullable(number),
    "std": nullable(number),
    "diverged": [whole],
    "runs": [
        {
            "seed": whole,
            "hash": text,
            "directory": text,
            "status": text,
            "value": nullable(number),
            "learning_rate": nullable(number),
            "seconds": nullable(number),
            "tokens_per_second": nullable(number),
            "code": nullable(text),
            "config_hash": text,
        }
    ],
    "curve": nullable(
        {
            "step": [number],
            "tokens": [nullable(number)],
            "mean": [nullable(number)],
            "low": [nullable(number)],
            "high": [nullable(number)],
        }
    ),
}
_comparison = {
    "arm": text,
    "claim": one_of(*CLAIMS),
    "difference": nullable(number),
    "interval": nullable(pair(nullable(number))),
    "interval_method": nullable(text),
    "t_interval": nullable(pair(nullable(number))),
    **{name: nullable(number) for name in ("p_t", "p_sign_flip", "p_claim", "p_holm", "p_equivalence")},
    "minimum_detectable_effect": nullable(number),
    "verdict": one_of(*VERDICTS),
    "reason": text,
    "seeds_to_settle": nullable(whole),
    "margin": optional(number),
    "level": optional(number),
    "p_against": optional(nullable(number)),
    "p_against_holm": optional(nullable(number)),
    "steps_to_target": nullable({"target": optional(nullable(number))}),
    "speed_up": nullable(
        {
            "ratio": nullable(number),
            "interval": optional(nullable(pair(number))),
            "bound": optional(one_of("exact", "at least", "at most", "unknown")),
        }
    ),
}
_effect = {
    "term": text,
    "estimate": number,
    "interval": nullable(pair(nullable(number))),
    "p": nullable(number),
    "p_holm": nullable(number),
}
SHAPE = {
    **dict.fromkeys(("name", "hypothesis", "metric", "command", "file", "date", "reason"), text),
    "claim": one_of(*CLAIMS),
    "direction": one_of("lower", "higher"),
    "margin": number,
    "unit": nullable(text),
    "match": one_of("tokens", "parameters", "flops", "seconds"),
    "tolerance": number,
    "acknowledged": nullable(text),
    "alpha": number,
    "mode": one_of("fixed", "sequential", "exploratory"),
    "seeds": [whole],
    "verdict": one_of(*VERDICTS),
    "arms": [_arm],
    "comparisons": [_comparison],
    "mismatches": [{"arm": text, "quantity": text, "baseline": number, "variant": number, "relative": number}],
    "factorial": nullable(
        {
            "factors": mapping([text]),
            "cells": [{"levels": mapping(text), "mean": nullable(number), "values": [nullable(number)]}],
            "effects": [_effect],
        }
    ),
    "problems": [anything],
    "provenance": {"runs": optional([anything])},
    "exploratory": optional(nullable(text)),
    "withheld": optional(flag),
    "remarks": optional([text]),
    "diverged_value": optional(nullable({"value": number, "source": text})),
}


def read(folder: Path) -> dict[str, Any]:
    """The results of the ablation in this folder, checked. Errors as of `schema.load`."""
    return load(folder, "ablation", SCHEMA, SHAPE, disagreements)


def disagreements(results: dict[str, Any]) -> Faults:
    """What the parts of well-shaped results say against each other."""
    if not 0 < results["alpha"] < 1:
        yield f"alpha is {results['alpha']}, not between 0 and 1"
    names = [arm["name"] for arm in results["arms"]]
    if names[:1] != [BASELINE]:
        yield f"arms.0.name is {names[0]!r}, not {BASELINE!r}" if names else "arms is empty"
        return
    if len(set(names)) != len(names):
        yield "arms: two have one name"
    for place, arm in enumerate(results["arms"]):
        yield from _of_arm(arm, len(results["seeds"]), f"arms.{place}")
    for place, comparison in enumerate(results["comparisons"]):
        where = f"comparisons.{place}"
        if comparison["arm"] not in names[1:]:
            yield f"{where}.arm is {comparison['arm']!r}, which no variant is called"
            continue
        variant = results["arms"][names.index(comparison["arm"])]
        yield from _of_comparison(comparison, results["arms"][0], variant, where)
    yield from _of_factorial(results["factorial"])


def differences(baseline: dict[str, Any], variant: dict[str, Any]) -> list[float | None]:
    """Variant less baseline, seed by seed; None where one of them has no value."""
    pairs = zip(variant["values"], baseline["values"], strict=True)
    return [None if v is None or b is None else v - b for v, b in pairs]


def _of_arm(arm: dict[str, Any], num_seeds: int, where: str) -> Faults:
    if len(arm["values"]) != num_seeds:
        yield f"{where}.values has {len(arm['values'])} values for {num_seeds} seeds"
    elif arm["mean"] is not None and not _is_mean(arm["mean"], arm["values"]):
        yield f"{where}.mean is {arm['mean']}, which is not the mean of {where}.values"
    curve = arm["curve"]
    if curve is not None and len({len(column) for column in curve.values() if isinstance(column, list)}) != 1:
        yield f"{where}.curve has columns of several lengths"


def _of_comparison(comparison: dict[str, Any], baseline: dict[str, Any], variant: dict[str, Any], where: str) -> Faults:
    difference = comparison["difference"]
    if difference is not None and len(baseline["values"]) == len(variant["values"]):
        scale = max((abs(x) for x in (*baseline["values"], *variant["values"]) if x is not None), default=1.0)
        if not _is_mean(difference, differences(baseline, variant), scale):
            yield f"{where}.difference is {difference}, which is not the mean of the values' differences"
    for name in ("interval", "t_interval"):
        low, high = comparison[name] or (None, None)
        if low is not None and high is not None and low > high:
            yield f"{where}.{name} is [{low}, {high}], which ends before it begins"
    for name in ("p_t", "p_sign_flip", "p_claim", "p_holm", "p_against", "p_against_holm", "p_equivalence"):
        if comparison.get(name) is not None and not 0 <= comparison[name] <= 1:
            yield f"{where}.{name} is {comparison[name]}, which is no probability"


def _of_factorial(factorial: dict[str, Any] | None) -> Faults:
    if factorial is None:
        return
    for place, cell in enumerate(factorial["cells"]):
        for factor, level in cell["levels"].items():
            if level not in factorial["factors"].get(factor, []):
                yield f"factorial.cells.{place}.levels.{factor} is {level!r}, which the factors do not have"
        if cell["levels"].keys() != factorial["factors"].keys():
            yield f"factorial.cells.{place}.levels does not name every factor"


def _is_mean(mean: float, values: list[float | None], scale: float = 0.0) -> bool:
    known = [value for value in values if value is not None]
    if not known:
        return False
    scale = max(scale, *map(abs, known))
    return abs(mean - math.fsum(known) / len(known)) <= _SAME * scale
