"""A sweep's figures as PNG: what the page draws, drawn by matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.display.figure import COLORS, Label, place_labels
from llmlab.study.report import words
from llmlab.study.report.ablation_figures import drawn_in, literal
from llmlab.study.report.numbers import fixed
from llmlab.study.report.sweep_axes import Placed, curve_scale, curves_of, placed, short, value_scale
from llmlab.study.report.sweep_page import metric_decimals
from llmlab.study.report.sweep_results import ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _SOFT = COLORS[0], COLORS[1], "#9aa0a8"
_COLUMNS = 3


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes axes.png, parallel.png, importance.png and curves.png, as far as there is something to draw."""
    axes, valued = placed(results), ranked(results)
    figures: dict[str, Callable[[], Figure]] = {}
    if axes and valued:
        figures["axes.png"] = lambda: _axes(results, axes)
    if len(axes) > 1 and len(valued) > 1:
        figures["parallel.png"] = lambda: _parallel(results, axes)
    if results["importance"]:
        figures["importance.png"] = lambda: _importance(results["importance"])
    if any(curves_of(results)):
        figures["curves.png"] = lambda: _curves(results)
    return drawn_in(folder, figures)


def _axes(results: dict[str, Any], axes: list[Placed]) -> "Figure":
    from matplotlib.figure import Figure

    columns = min(len(axes), _COLUMNS)
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in grid.flat[len(axes) :]:
        panel.set_visible(False)
    for place, (panel, axis) in enumerate(zip(grid.flat, axes, strict=False)):
        _scatter(panel, axis, results)
        if place % columns == 0:
            panel.set_ylabel(literal(words.metric(results)))
    return figure


def _scatter(panel: "Axes", axis: Placed, results: dict[str, Any]) -> None:
    with_axis = [trial for trial in ranked(results) if axis.path in trial["point"]]
    y = value_scale(results)
    xs = [axis.at(trial["point"][axis.path]) for trial in with_axis]
    ys = [trial["value"] for trial in with_axis]
    panel.plot(xs, ys, "o", color=_BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
    if with_axis and with_axis[0] is ranked(results)[0]:
        panel.plot(xs[:1], ys[:1], "o", color=_ORANGE, markersize=9, markeredgecolor="white")
    # Placed by hand, as on the page: one code for linear, logarithmic and named axes.
    ticks = axis.ticks()
    panel.set_xticks([at for at, _ in ticks], [literal(text) for _, text in ticks])
    panel.set_xlim(0, 1)
    panel.set_ylim(y.low, y.high)
    logarithmic = " (log)" if axis.scale is not None and axis.scale.log else ""
    panel.set_xlabel(literal(f"{axis.path}{logarithmic}"))


def _parallel(results: dict[str, Any], axes: list[Placed]) -> "Figure":
    from matplotlib.figure import Figure

    y = value_scale(results)
    trials = [trial for trial in ranked(results) if y.low <= trial["value"] <= y.high]
    tenth = max(1, len(trials) // 10)
    figure = Figure(figsize=(2.1 * (len(axes) + 1) + 1.2, 3.8), layout="constrained")
    panel = figure.subplots()
    for rank, trial in reversed(list(enumerate(trials))):
        heights = [axis.at(trial["point"][axis.path]) if axis.path in trial["point"] else float("nan") for axis in axes]
        color = _ORANGE if rank == 0 else _BLUE if rank < tenth else _SOFT
        width, alpha = (1.8, 1.0) if rank < tenth else (0.9, 0.45)
        panel.plot(
            [*heights, y.at(trial["value"])], color=color, linewidth=width, alpha=alpha, zorder=3 if rank < tenth else 2
        )
    ticks = [axis.ticks() for axis in axes] + [[(y.at(tick), str(tick)) for tick in y.ticks(4)]]
    for place, column in enumerate(ticks):
        panel.axvline(place, color="#666666", linewidth=1, zorder=1)
        for at, text in column:
            panel.annotate(
                literal(text), (place, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}, zorder=5,
            )  # fmt: skip
    names = [short(axis.path) for axis in axes] + [results["metric"]]
    panel.set_xticks(range(len(names)), [literal(name) for name in names])
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set_yticks([])
    panel.set_ylim(-0.03, 1.03)
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set_visible(False)
    return figure


def _importance(importance: dict[str, float]) -> "Figure":
    from matplotlib.figure import Figure

    order = sorted(importance.items(), key=lambda item: item[1])
    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(order)), layout="constrained")
    panel = figure.subplots()
    bars = panel.barh([literal(path) for path, _ in order], [value for _, value in order], color=_BLUE, height=0.62)
    panel.bar_label(bars, [f"{100 * value:.3g}%" for _, value in order], padding=4, fontsize=9)
    panel.grid(visible=False)
    panel.tick_params(length=0)
    panel.set_xticks([])
    panel.spines[["bottom", "left"]].set_visible(False)
    panel.set_title("Share of the metric's variation that each axis explains", loc="left")
    return figure


def _curves(results: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    named, others = curves_of(results)
    y = curve_scale(named, others)
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    panel = figure.subplots()
    labels = []
    for trial in others:
        panel.plot(*_points(trial), color=_SOFT, linewidth=0.8, alpha=0.55)
    colors = (_ORANGE, _BLUE, COLORS[2], COLORS[3])
    for trial, color in reversed(list(zip(named, colors, strict=False))):
        xs, ys = _points(trial)
        panel.plot(xs, ys, color=color, zorder=3)
        value = fixed(trial["value"], metric_decimals(results))
        labels.append(Label(literal(f"trial {trial['number']} {value}"), color, ys[-1]))
    panel.set_xlim(left=0)
    panel.set_ylim(y.low, y.high)
    panel.set_xlabel("optimizer steps")
    panel.set_ylabel(literal(words.metric(results)))
    figure.draw_without_rendering()  # settles the size of the panel
    place_labels(panel, labels)
    return figure


def _points(trial: dict[str, Any]) -> tuple[list[float], list[float]]:
    pairs = zip(trial["curve"]["step"], trial["curve"]["value"], strict=True)
    known = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in known], [value for _, value in known]
