"""A scaling study's figures as PNG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.display.figure import COLORS, STYLE, save_figure
from llmlab.study.report import scaling_curves, words
from llmlab.study.report.ablation_figures import literal
from llmlab.study.report.numbers import quantity
from llmlab.study.report.scaling_results import finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _SOFT = COLORS[0], COLORS[1], "#9aa0a8"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes isoflop.png, frontier.png, contours.png and held_out.png, as far as there is something to draw."""
    import matplotlib.style

    figures: dict[str, Figure] = {}
    with matplotlib.style.context(STYLE):
        if results["isoflop"] and results["isoflop"]["profiles"]:
            figures["isoflop.png"] = _isoflop(results)
        if results["frontier"]:
            figures["frontier.png"] = _frontier(results)
            figures["contours.png"] = _contours(results)
        if results["held_out"]:
            figures["held_out.png"] = _held_out(results)
        for name, figure in figures.items():
            save_figure(figure, folder / name)
    return [folder / name for name in figures]


def _new(width: float = 6.4, height: float = 4.2) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _isoflop(results: dict[str, Any]) -> "Figure":
    figure, axes = _new()
    for place, profile in enumerate(results["isoflop"]["profiles"]):
        color = COLORS[place % len(COLORS)]
        runs = [run for run in finished(results) if run["budget"] == profile["flops"]]
        sizes = [run["parameters"] for run in runs]
        axes.plot(sizes, [run["value"] for run in runs], "o", color=color, markersize=5)
        along, losses = scaling_curves.parabola(profile, min(sizes), max(sizes))
        axes.plot(along, losses, color=color)
        if profile["inside"]:
            axes.plot(profile["optimum"], profile["loss"], "*", color=color, markersize=13, markeredgecolor="white")
        axes.annotate(
            f"{quantity(profile['flops'])} FLOPs",
            (along[-1], losses[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
    axes.set_xscale("log")
    axes.set_xlabel("parameters N")
    axes.set_ylabel(literal(words.metric(results)))
    axes.set_title("IsoFLOP profiles: stars are the minima", loc="left")
    return figure


def _frontier(results: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    for axes, which, name in zip(figure.subplots(1, 2), ("parameters", "tokens"), ("N*", "D*"), strict=True):
        axes.plot(*scaling_curves.frontier(results, which), color=_BLUE, label="parametric fit")
        for row in results["frontier"]:
            low, high = row[which]["interval"]
            style = "--" if row["extrapolated"] else "-"
            axes.plot([row["flops"]] * 2, [low, high], style, color=_BLUE, linewidth=2.4, alpha=0.5)
        if results["isoflop"]:
            found = [p for p in results["isoflop"]["profiles"] if p["inside"]]
            cost = scaling_curves.cost_of(results)
            best = [p["optimum"] if which == "parameters" else cost.tokens(p["flops"], p["optimum"]) for p in found]
            axes.plot([p["flops"] for p in found], best, "*", color=_ORANGE, markersize=11, label="isoFLOP minima")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("training FLOPs C")
        axes.set_title(f"{name}: compute-optimal {which}", loc="left")
        axes.legend(frameon=False)
    return figure


def _contours(results: dict[str, Any]) -> "Figure":
    figure, axes = _new()
    for level, (n, d) in scaling_curves.contours(results):
        axes.plot(n, d, color=_SOFT, linewidth=1)
        axes.annotate(f"{level:.2f}", (n[-1], d[-1]), color="#666666", fontsize=8, ha="right")
    _, optimal_n = scaling_curves.frontier(results, "parameters")
    _, optimal_d = scaling_curves.frontier(results, "tokens")
    axes.plot(optimal_n, optimal_d, color=_ORANGE, label="compute-optimal")
    runs = finished(results)
    for held, marker, label in ((False, "o", "runs"), (True, "s", "runs, held out in the check")):
        mine = [run for run in runs if run["held_out"] is held]
        axes.plot([r["parameters"] for r in mine], [r["tokens"] for r in mine], marker, color=_BLUE, label=label,
                  fillstyle="none" if held else "full")  # fmt: skip
    (n_low, n_high), (d_low, d_high) = scaling_curves.plane(results)
    axes.set(xscale="log", yscale="log", xlim=(n_low, n_high), ylim=(d_low, d_high))
    axes.set_xlabel("parameters N")
    axes.set_ylabel("tokens D")
    axes.set_title("Lines of equal loss of the fitted law", loc="left")
    axes.legend(frameon=False, loc="lower left")
    return figure


def _held_out(results: dict[str, Any]) -> "Figure":
    figure, axes = _new()
    rows = results["held_out"]["predictions"]
    for row in rows:
        bounds = [bound - row["value"] for bound in row["interval"]]
        axes.plot([row["value"]] * 2, bounds, color=_BLUE, linewidth=3, alpha=0.4)
    measured, errors = ([row[key] for row in rows] for key in ("value", "error"))
    axes.plot(measured, errors, "o", color=_BLUE, label="largest runs, predicted from the smaller")
    axes.axhline(0.0, color="#666666", linewidth=1, zorder=1)
    axes.set_xlabel(literal(f"measured {words.metric(results)}"))
    axes.set_ylabel("predicted minus measured")
    axes.set_title(f"Held-out check, {100 * results['level']:.4g}% prediction intervals", loc="left")
    axes.legend(frameon=False)
    return figure
