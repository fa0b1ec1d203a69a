"""Curves of runs as a figure: what `llmlab plot` writes.

One panel for each unit, one colour for each run (or, with a single run, for each metric). Every curve has its name at
its end instead of in a legend, so that nothing has to be matched by colour alone; the colours are those of Okabe and
Ito, which most colour-blind readers tell apart.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["step", "tokens", "seconds"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008), without yellow, which is faint on white."""
_X_LABELS: dict[XAxis, str] = {
    "step": "optimizer step",
    "tokens": "tokens seen",
    "seconds": "time spent training (s), without compilation and evaluation",
}
_Y_LABELS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "model_flops_per_second": "model FLOP/s",
    "mfu": "model FLOP utilisation",
}
# The loss before this part of a run is left out of a linear axis: it would flatten the rest.
_WARM_PART = 0.03
_INCHES_PER_CHARACTER, _INCHES_PER_LABEL = 0.075, 0.19  # of labels, at 9 points


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """What of a run is drawn."""

    name: str
    records: Sequence[Mapping[str, Any]]
    """As `read_metrics` gives them."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Loss of simple models by name, in nats per unit."""
    unit: str | None = None
    """What losses are per, "token"; None where that is not known."""

    def measured(self) -> list[str]:
        """Everything that was measured."""
        found = dict.fromkeys(key for record in self.records for key in record)
        return [key for key in found if key not in ("step", "tokens", "eta_seconds")]

    def curve(self, key: str, x: XAxis) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """x and y of one metric; values that are not finite are gaps."""
        where = {"step": "step", "tokens": "tokens"}.get(x)
        times = self._seconds() if where is None else {}
        points = [
            (times[record["step"]] if where is None else record[where], record[key])
            for record in self.records
            if key in record and (where is None or where in record)
        ]
        xs, ys = np.array(points, np.float64).reshape(-1, 2).T
        return xs, np.where(np.isfinite(ys), ys, np.nan)

    def _seconds(self) -> dict[int, float]:
        """Step to seconds of training, from the speed that the records tell."""
        seconds, tokens, times = 0.0, 0.0, {}
        for record in self.records:
            if record.get("tokens_per_second"):
                seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
                tokens = record["tokens"]
            times[record["step"]] = seconds
        return times


def draw_curves(
    runs: Sequence[RunCurves], keys: Sequence[str], *, x: XAxis = "step", log_y: bool = False, smooth: int | None = None
) -> "Figure":
    """The figure.

    Args:
        runs: at least one.
        keys: metrics; those with the same unit share a panel.
        x: what the horizontal axis shows.
        log_y: whether vertical axes are logarithmic.
        smooth: width in steps of a running mean over what training measured at every step; the measured curve stays
            behind it. None for no smoothing.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in itertools.groupby(sorted(keys, key=_unit_order(keys)), key=_unit)]
    with matplotlib.style.context(STYLE):
        longest = max(len(run.name) for run in runs) * (len(runs) > 1) + 18  # characters beside the panels
        most = len(runs) * max(map(len, panels)) + 2  # labels beside one panel
        height = max(3.4 if len(panels) == 1 else 2.6, _INCHES_PER_LABEL * most)
        size = (6.0 + _INCHES_PER_CHARACTER * longest, 1.0 + height * len(panels))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        labels = [
            _draw_panel(panel, runs, panel_keys, x=x, log_y=log_y, smooth=smooth)
            for panel, panel_keys in zip(axes, panels, strict=True)
        ]
        _label_x(axes[-1], x)
        if len(runs) == 1:
            axes[0].set_title(runs[0].name, loc="left")
        figure.draw_without_rendering()  # settles the size of the panels
        for panel, beside in zip(axes, labels, strict=True):
            place_labels(panel, beside)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the figure as PNG, 200 dots per inch. Raises FileNotFoundError where the directory does not exist."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} to")
    # Labels stand outside the axes; the tight box makes room for them.
    figure.savefig(path, format="png", dpi=200, bbox_inches="tight", pad_inches=0.1)


@dataclass
class Label:
    """A text beside the right edge of a panel, at the height `y` of the data."""

    text: str
    color: str
    y: float


STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
}
"""matplotlib settings of every figure."""


def _draw_panel(
    axes: "Axes", runs: Sequence[RunCurves], keys: Sequence[str], *, x: XAxis, log_y: bool, smooth: int | None
) -> list[Label]:
    labels: list[Label] = []
    colors = itertools.cycle(COLORS)
    drawn: list[tuple[Any, Any]] = []
    right = 0.0
    for run in runs:
        run_color = next(colors)
        for number, key in enumerate(keys):
            xs, ys = run.curve(key, x)
            if not len(xs):
                continue
            color = run_color if len(runs) > 1 or number == 0 else next(colors)
            window = None if smooth is None else _window(run, key, smooth)
            shown = _plot(axes, xs, ys, key, color, smooth=window, faint=len(runs) > 1 and len(keys) > 1)
            drawn.append((xs, ys))
            right = max(right, float(xs[-1]))
            if len(last := shown[np.isfinite(shown)]):
                labels.append(Label(_label(run, key, keys, len(runs), float(last[-1])), color, float(last[-1])))
    if _unit(keys[0]) == "loss":
        labels += _draw_baselines(axes, runs)
    axes.set_ylabel(_y_label(runs, keys[0]))
    axes.set_xlim(0, 1.015 * right or 1.0)  # room for half a marker
    if log_y:
        _log_scale(axes)
    elif _unit(keys[0]) == "loss":
        _limit(axes, drawn, labels)
    return labels


def _y_label(runs: Sequence[RunCurves], key: str) -> str:
    if _unit(key) != "loss":
        return _Y_LABELS.get(_unit(key), key)
    units = {run.unit for run in runs if run.unit}
    return f"loss (nats per {' or '.join(sorted(units))})" if units else "loss (nats)"


def _plot(
    axes: "Axes",
    xs: Float64[np.ndarray, " n"],
    ys: Float64[np.ndarray, " n"],
    key: str,
    color: str,
    *,
    smooth: int | None,
    faint: bool,
) -> Float64[np.ndarray, " n"]:
    """Draws one curve and returns the values of its main line; what is faint stands behind a validation curve."""
    if key.startswith("validation/"):  # few points, each the mean over a whole split
        marker = "o" if len(xs) <= 40 else ""
        axes.plot(xs, ys, color=color, marker=marker, markersize=5, markeredgecolor="white", zorder=4)
        return ys
    if smooth is None or smooth < 2 or key == "learning_rate":  # which is exact: its corners are real
        axes.plot(xs, ys, color=color, linewidth=1.0, alpha=0.5 if faint else 0.9)
        return ys
    axes.plot(xs, ys, color=color, linewidth=0.8, alpha=0.25)
    smoothed = running_mean(ys, smooth)
    axes.plot(xs, smoothed, color=color, linewidth=1.0 if faint else 1.6, alpha=0.7 if faint else 1.0)
    return smoothed


def running_mean(ys: Float64[np.ndarray, " n"], window: int) -> Float64[np.ndarray, " n"]:
    """Mean of the `window` values around each; gaps stay gaps.

    At the left end, where losses are steep, the window shrinks on both sides, so that it stays centred; at the right
    end, where they are flat, only on the right.
    """
    half = window // 2
    result = np.full_like(ys, np.nan)
    for i in range(len(ys)):
        reach = min(half, i)
        part = ys[i - reach : i + reach + 1]
        if np.isfinite(ys[i]):
            result[i] = part[np.isfinite(part)].mean()
    return result


def _window(run: RunCurves, key: str, steps: int) -> int:
    """Points of this curve in so many steps."""
    with_key = [record["step"] for record in run.records if key in record]
    if len(with_key) < 2:
        return 1
    return round(steps * (len(with_key) - 1) / max(1, with_key[-1] - with_key[0]))


def _draw_baselines(axes: "Axes", runs: Sequence[RunCurves]) -> list[Label]:
    """Dashed lines: grey where all runs share them, else in the run's colour."""
    labels = []
    known = [(run, color) for run, color in zip(runs, itertools.cycle(COLORS)) if run.baselines]
    shared = all(_same(run.baselines, known[0][0].baselines) for run, _ in known)
    for run, color in known[:1] if shared else known:
        for name, value in run.baselines.items():
            shade = "#777777" if shared else color
            axes.axhline(value, color=shade, linestyle=(0, (5, 3)), linewidth=1.0, zorder=1.5)
            whose = name if shared else f"{run.name}, {name}"
            labels.append(Label(f"{whose} {value:.2f}", shade, value))
    return labels


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether baselines are the same as far as a figure can show."""
    return one.keys() == other.keys() and all(abs(one[name] - other[name]) < 5e-3 for name in one)


def _label(run: RunCurves, key: str, keys: Sequence[str], num_runs: int, value: float) -> str:
    metric = key.removesuffix("/loss") if key.endswith("/loss") else _Y_LABELS.get(key, key)
    number = f"{value:.2f}" if key.endswith("/loss") else f"{value:.3g}"
    if num_runs == 1:
        return f"{metric} {number}" if len(keys) > 1 else number
    return f"{run.name}, {metric} {number}" if len(keys) > 1 else f"{run.name} {number}"


def _limit(axes: "Axes", drawn: Sequence[tuple[Any, Any]], labels: Sequence[Label]) -> None:
    """A linear axis from the lowest loss to the highest after the first steps, baselines included."""
    late = [ys[xs >= _WARM_PART * xs[-1]] for xs, ys in drawn]
    values = np.concatenate([*late, [label.y for label in labels]])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 30:  # decades alone would be one tick or none
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def place_labels(axes: "Axes", labels: Sequence[Label], gap: float = 13.0) -> None:
    """Writes labels beside the right edge at their heights, moved apart where they would overlap.

    `gap` is the least distance of two baselines in points.
    """
    box = axes.get_window_extent()
    points_per_pixel = 72.0 / axes.figure.dpi
    low, height = float(box.y0) * points_per_pixel, float(box.height) * points_per_pixel
    visible = [label for label in labels if math.isfinite(label.y)]
    wanted = [float(axes.transData.transform((0, label.y))[1]) * points_per_pixel - low for label in visible]
    for label, place in zip(visible, spread(wanted, gap, 0.0, height), strict=True):
        axes.annotate(
            label.text,
            xy=(1.0, place / height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            color=label.color,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in the same order, at least `gap` apart, and within low..high where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Clusters of touching labels, each centred on the mean of what its members want.
    clusters: list[list[int]] = []
    centers: list[float] = []
    for i in order:
        clusters.append([i])
        centers.append(min(max(wanted[i], low), high))
        while len(clusters) > 1 and _touch(clusters, centers, gap):
            merged = clusters[-2] + clusters[-1]
            clusters[-2:], centers[-2:] = [merged], [math.fsum(wanted[j] for j in merged) / len(merged)]
            half = (len(merged) - 1) * gap / 2
            centers[-1] = max(min(centers[-1], high - half), low + half)
    places = [0.0] * len(wanted)
    for cluster, center in zip(clusters, centers, strict=True):
        for position, i in enumerate(cluster):
            places[i] = center + (position - (len(cluster) - 1) / 2) * gap
    return places


def _touch(clusters: Sequence[Sequence[int]], centers: Sequence[float], gap: float) -> bool:
    top_of_lower = centers[-2] + (len(clusters[-2]) - 1) * gap / 2
    bottom_of_upper = centers[-1] - (len(clusters[-1]) - 1) * gap / 2
    return bottom_of_upper - top_of_lower < gap


def _label_x(axes: "Axes", x: XAxis) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(_X_LABELS[x])
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _unit(key: str) -> str:
    """What shares an axis: all losses do."""
    return "loss" if key.endswith("loss") else key


def _unit_order(keys: Sequence[str]) -> Any:
    units = list(dict.fromkeys(map(_unit, keys)))
    return lambda key: units.index(_unit(key))
