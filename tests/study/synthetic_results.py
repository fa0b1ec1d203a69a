"""Results of studies that nobody ran, with the noise and accidents of real ones; numbers by NumPy and SciPy alone."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Results = dict[str, Any]

ENVIRONMENT = {
    "git": {
        "experiment": {"commit": "9fddf6b2c1", "branch": "main", "dirty": True, "diff": "--- a/x\n+++ b/x\n-1\n+2\n"}
    },
    "packages": {"llmlab": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"},
    "python": "3.11.9",
    "platform": {"system": "Linux-6.1-x86_64", "machine": "x86_64", "num_cpus": 2},
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
}


def ablation(
    variants: Mapping[str, float] | None = None,
    *,
    hypothesis: str = "RMSNorm is no worse than LayerNorm at equal tokens",
    seeds: int = 5,
    noise: float = 0.004,
    margin: float = 0.01,
    claim: str = "no worse",
    direction: str = "lower",
    mode: str = "fixed",
    diverged: Mapping[str, Sequence[int]] | None = None,
    rates: Sequence[float] = (),
    random_seed: int = 0,
) -> Results:
    """An ablation whose variants differ from the baseline by these true amounts."""
    rng = np.random.default_rng(random_seed)
    variants = {"rmsnorm": -0.002} if variants is None else variants
    common = rng.normal(0, 0.02, seeds)
    values = {"baseline": 2.31 + common}
    for name, effect in variants.items():
        values[name] = 2.31 + effect + common + rng.normal(0, noise, seeds)
    for name, which in (diverged or {}).items():
        values[name][list(which)] = math.log(1024)
    sign = 1 if direction == "lower" else -1
    comparisons = [
        _comparison(name, values[name] - values["baseline"], claim, margin, sign, len(variants)) for name in variants
    ]
    verdicts = {comparison["verdict"] for comparison in comparisons}
    verdict = next((v for v in ("refuted", "inconclusive") if v in verdicts), "supported")
    arms = [
        _arm(name, place, values[name], list((diverged or {}).get(name, ())), rng, rates)
        for place, name in enumerate(values)
    ]
    return {
        "kind": "ablation",
        "schema": 1,
        "name": "norm",
        "hypothesis": hypothesis,
        "claim": claim,
        "metric": "validation/loss",
        "direction": direction,
        "margin": margin,
        "unit": "nats per token",
        "match": "tokens",
        "tolerance": 0.01,
        "acknowledged": None,
        "alpha": 0.05,
        "mode": mode,
        "seeds": list(range(seeds)),
        "verdict": verdict,
        "reason": f"{verdict} for {', '.join(variants)}",
        "command": "llmlab ablate experiments/ablations/norm.py",
        "file": "experiments/ablations/norm.py",
        "date": "2026-11-26T01:40:00+00:00",
        "arms": arms,
        "comparisons": comparisons,
        "mismatches": [],
        "exploratory": None,
        "withheld": False,
        "remarks": [],
        "diverged_value": {"value": math.log(1024), "source": "the uniform guess"} if diverged else None,
        "factorial": None,
        "problems": [],
        "provenance": copy.deepcopy(ENVIRONMENT)
        | {"runs": [run | {"arm": arm["name"]} for arm in arms for run in arm["runs"]]},
    }


def factorial(random_seed: int = 1) -> Results:
    """A study of 2 x 3 cells whose factors interact."""
    factors = {"norm": ["layernorm", "rmsnorm"], "ffn": ["gelu", "swiglu", "relu"]}
    truth = {("rmsnorm", "gelu"): -0.004, ("layernorm", "swiglu"): -0.03, ("layernorm", "relu"): 0.02}
    truth |= {("rmsnorm", "swiglu"): -0.06, ("rmsnorm", "relu"): 0.018}
    names = {f"{norm}, {ffn}": effect for (norm, ffn), effect in truth.items()}
    results = ablation(names, claim="better", margin=0.0, random_seed=random_seed, hypothesis="Modern parts add up")
    by_name = {arm["name"]: arm for arm in results["arms"]}
    cells = []
    for norm in factors["norm"]:
        for ffn in factors["ffn"]:
            arm = by_name.get(f"{norm}, {ffn}", by_name["baseline"])
            cells.append({"levels": {"norm": norm, "ffn": ffn}, "mean": arm["mean"], "values": arm["values"]})
    effects = [
        {"term": "norm=rmsnorm", "estimate": -0.0121, "interval": [-0.019, -0.005], "p": 0.0052, "p_holm": 0.0104},
        {"term": "ffn=swiglu", "estimate": -0.0433, "interval": [-0.051, -0.036], "p": 2e-5, "p_holm": 1e-4},
        {"term": "ffn=relu", "estimate": 0.0212, "interval": [0.013, 0.028], "p": 0.0013, "p_holm": 0.0039},
        {
            "term": "norm=rmsnorm x ffn=swiglu",
            "estimate": -0.0266,
            "interval": [-0.04, -0.012],
            "p": 0.006,
            "p_holm": 0.0104,
        },
        {"term": "norm=rmsnorm x ffn=relu", "estimate": 0.0021, "interval": [-0.008, 0.012], "p": 0.61, "p_holm": 0.61},
    ]
    return results | {"name": "modern", "factorial": {"factors": factors, "cells": cells, "effects": effects}}


def sweep(trials: int = 40, random_seed: int = 2, axes: int = 3) -> Results:
    """A random search with failures, over a learning rate, a depth and a kind of norm."""
    rng = np.random.default_rng(random_seed)
    every = [
        {"path": "optimizer.peak_lr", "kind": "log_uniform", "log": True, "values": None, "low": 1e-4, "high": 3e-2},
        {"path": "model.num_layers", "kind": "integer", "log": False, "values": None, "low": 2, "high": 8},
        {
            "path": "model.pattern.0.norm",
            "kind": "categorical",
            "log": False,
            "values": ["RMSNorm", "LayerNorm"],
            "low": None,
            "high": None,
        },
    ][:axes]
    done = []
    for number in range(trials):
        rate, layers = float(10 ** rng.uniform(-4, math.log10(3e-2))), int(rng.integers(2, 9))
        norm = ["RMSNorm", "LayerNorm"][int(rng.integers(2))]
        point = dict(zip([axis["path"] for axis in every], (rate, layers, norm), strict=False))
        value = 2.2 + 0.08 * math.log10(rate / 2e-3) ** 2 - 0.02 * layers + 0.01 * (norm == "LayerNorm")
        value += float(rng.normal(0, 0.01))
        status, problem = "finished", None
        if rate > 2e-2:
            status, problem, value = "diverged", f"train/loss is not finite at step {int(rng.integers(50, 500))}", None
        elif number == 7:
            status, problem, value = "failed", "RuntimeError: RESOURCE_EXHAUSTED: out of memory", None
        elif number % 11 == 10:
            status = "pruned"
        last = 600 if status == "finished" else 200
        steps = list(range(50, last + 1, 50))
        end = 3.4 if value is None else value
        curve = [end + 2.2 * math.exp(-step / 110) + float(rng.normal(0, 0.005)) for step in steps]
        digest = f"{number:04x}{int(rng.integers(16**8)):08x}"
        done.append(
            {
                "number": number, "name": f"trial {number}", "hash": digest, "directory": f"runs/trials/{digest}",
                "status": status, "point": point, "value": value if status == "finished" else None,
                "seconds": float(rng.uniform(30, 60)), "problem": problem, "curve": {"step": steps, "value": curve},
            }
        )  # fmt: skip
    best = min((trial for trial in done if trial["value"] is not None), key=lambda trial: trial["value"])
    flags = " ".join(f"--{path.replace('_', '-')} {value}" for path, value in best["point"].items())
    importance = dict(zip([axis["path"] for axis in every], (0.81, 0.15, 0.04), strict=False))
    return {
        "kind": "sweep", "schema": 1, "name": "rates", "metric": "validation/loss", "direction": "lower",
        "unit": "nats per token", "command": "llmlab sweep experiments/rates.py --trials 40 --sampler random",
        "file": "experiments/rates.py", "date": "2026-11-26T02:10:00+00:00", "axes": every, "trials": done,
        "importance": importance,
        "best": {"number": best["number"], "value": best["value"], "point": dict(best["point"]),
                 "command": f"llmlab train experiments/rates.py {flags}"},
        "problems": [], "provenance": copy.deepcopy(ENVIRONMENT),
    }  # fmt: skip


def _comparison(name: str, d: np.ndarray, claim: str, margin: float, sign: int, variants: int) -> Results:
    n = len(d)
    w = sign * d
    mean, error = float(d.mean()), float(d.std(ddof=1) / math.sqrt(n))
    half = float(stats.t.ppf(0.975, n - 1)) * error

    def above(shift: float) -> float:  # p of "w > shift"
        return float(stats.t.sf((w.mean() - shift) / error, n - 1))

    p_for, p_against = {
        "no worse": (1 - above(margin), above(margin)),
        "worse": (above(margin), 1 - above(margin)),
        "better": (1 - above(-margin), above(-margin)),
        "equal": (max(1 - above(margin), above(-margin)), min(1.0, 2 * min(above(margin), 1 - above(-margin)))),
    }[claim]
    holm = [min(1.0, variants * p) for p in (p_for, p_against)]
    verdict = "supported" if holm[0] <= 0.05 else "refuted" if holm[1] <= 0.05 else "inconclusive"
    return {
        "arm": name,
        "claim": claim,
        "margin": margin,
        "level": 0.95,
        "difference": mean,
        "interval": [mean - 0.9 * half, mean + 0.92 * half],
        "interval_method": "BCa",
        "t_interval": [mean - half, mean + half],
        "p_t": 2 * min(above(0.0), 1 - above(0.0)),
        "p_sign_flip": 0.0625,
        "p_claim": p_for,
        "p_holm": holm[0],
        "p_against": p_against,
        "p_against_holm": holm[1],
        "p_equivalence": max(1 - above(margin), above(-margin)),
        "minimum_detectable_effect": 3.2 * error,
        "verdict": verdict,
        "reason": f"mean worsening {w.mean():+.4g} over {n} seeds; p = {holm[0]:.2g}",
        "seeds_to_settle": 23 if verdict == "inconclusive" else None,
        "steps_to_target": {"target": 2.4, "steps": [400.0 + i for i in range(n)], "last": [600.0] * n, "reached": n},
        "speed_up": {"ratio": 1.08, "interval": [1.02, 1.13], "bound": "exact"},
    }


def _arm(name: str, place: int, values: np.ndarray, diverged: list[int], rng: Any, rates: Sequence[float]) -> Results:
    steps = list(range(0, 601, 25))
    end = float(np.delete(values, diverged).mean()) if len(diverged) < len(values) else 6.0
    mean = [end + 4.4 * math.exp(-step / 70) + 0.35 * math.exp(-step / 300) - 0.05 for step in steps]
    band = [0.06 * math.exp(-step / 200) + 0.012 for step in steps]
    runs = []
    for seed, value in enumerate(values.tolist()):
        digest = f"{place:04x}{int(rng.integers(16**8)):08x}"
        runs.append(
            {
                "seed": seed, "hash": digest, "directory": f"runs/trials/{digest}",
                "status": "diverged" if seed in diverged else "finished", "value": None if seed in diverged else value,
                "learning_rate": 3e-3, "seconds": float(rng.uniform(38, 44)),
                "tokens_per_second": float(rng.uniform(28000, 31000)), "code": "9fddf6b2c1", "config_hash": digest,
            }
        )  # fmt: skip
    grid = [{"rate": rate, "values": (values + 0.05 * math.log10(rate / 3e-3) ** 2).tolist()} for rate in rates]
    changes = [
        {
            "path": f"model.pattern.0.{part}",
            "baseline": {"type": "llmlab.nn.norms.LayerNorm", "bias": False},
            "variant": {"type": "llmlab.nn.norms.RMSNorm", "epsilon": 1e-6},
        }
        for part in ("norm", "ffn.norm")
    ]
    return {
        "name": name,
        "changes": [] if name == "baseline" else changes,
        "learning_rate": 3e-3 if rates else None,
        "learning_rates": grid or None,
        "learning_rate_sensitivity": {"value": 0.0123, "best_rate": 3e-3, "at_edge": False} if grid else None,
        "achieved": {
            "tokens": 1228800.0,
            "parameters": 1054720 - 640 * place,
            "flops": 7.7e12 * (1 - 0.002 * place),
            "seconds": 41.2 + place,
        },
        "values": values.tolist(),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)),
        "diverged": diverged,
        "runs": runs,
        "curve": {
            "step": steps,
            "tokens": [2048 * step for step in steps],
            "mean": mean,
            "low": [m - b for m, b in zip(mean, band, strict=True)],
            "high": [m + b for m, b in zip(mean, band, strict=True)],
        },
    }
