"""The lines of a scaling study's figures, as numbers: the page and the PNG files draw the same."""

import math
from typing import Any

import numpy as np

from llmlab.study.laws import Cost, Law
from llmlab.study.report.scaling_results import finished

Line = tuple[list[float], list[float]]
"""x and y."""

_POINTS = 80
_CONTOURS = 7


def law_of(results: dict[str, Any]) -> Law | None:
    """The law that was fitted to all runs."""
    if results["law"] is None:
        return None
    return Law(**{name: results["law"][name]["value"] for name in ("E", "A", "B", "alpha", "beta")})


def cost_of(results: dict[str, Any]) -> Cost:
    """What a model of the family costs."""
    return Cost(**results["cost"])


def parabola(profile: dict[str, Any], low: float, high: float) -> Line:
    """Of one budget, between two sizes."""
    n = np.geomspace(low, high, _POINTS)
    c2, c1, c0 = profile["curve"]
    x = np.log(n)
    return n.tolist(), (c2 * x**2 + c1 * x + c0).tolist()


def frontier(results: dict[str, Any], which: str) -> Line:
    """N* or D* against C, over all budgets of the results, beyond those that were run too."""
    law, cost = law_of(results), cost_of(results)
    rows = results["frontier"]
    if law is None or not rows:
        return [], []
    flops = np.geomspace(rows[0]["flops"], rows[-1]["flops"], _POINTS).tolist()
    place = {"parameters": 0, "tokens": 1, "loss": 2}[which]
    return flops, [law.optimum(c, cost)[place] for c in flops]


def contours(results: dict[str, Any]) -> list[tuple[float, Line]]:
    """Lines of equal loss in the plane of N and D: (loss, (N, D)), least loss first.

    From the law: D = (B / (L - E - A / N^alpha))^(1 / beta), where that is within the plane.
    """
    law, runs = law_of(results), finished(results)
    if law is None or not runs:
        return []
    (n_low, n_high), (d_low, d_high) = plane(results)
    losses = [float(law.loss(n, d)) for n in (n_low, n_high) for d in (d_low, d_high)]
    above = np.geomspace(min(losses) - law.E, max(losses) - law.E, _CONTOURS + 2)[1:-1]
    lines = []
    for level in (law.E + above).tolist():
        n = np.geomspace(n_low, n_high, 4 * _POINTS)
        left = level - law.E - law.A * n**-law.alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            d = np.where(left > 0, (law.B / left) ** (1 / law.beta), math.inf)
        seen = (d >= d_low) & (d <= d_high)
        if np.any(seen):
            lines.append((level, (n[seen].tolist(), d[seen].tolist())))
    return lines


def plane(results: dict[str, Any], room: float = 1.4) -> tuple[tuple[float, float], tuple[float, float]]:
    """What part of the plane of N and D is drawn."""
    runs = results["runs"]
    ends = []
    for key in ("parameters", "tokens"):
        values = [run[key] for run in runs]
        ends.append((min(values) / room, max(values) * room))
    return ends[0], ends[1]
