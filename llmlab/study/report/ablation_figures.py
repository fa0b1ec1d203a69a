"""An ablation's figures as PNG, for Markdown, slides and papers: what the page draws, drawn by matplotlib."""

import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.display.figure import COLORS, STYLE, Label, place_labels, save_figure
from llmlab.study.report import ablation_page, words
from llmlab.study.report.charts import Series
from llmlab.study.report.factorial import interaction_scale, panels
from llmlab.study.report.forest import Row, axis, beyond, rows
from llmlab.study.report.numbers import fixed, interval, signed
from llmlab.study.report.scales import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TONES = {"supported": "#00694a", "refuted": "#a83c00", "inconclusive": "#5d5a2a"}
_MARKERS = {"supported": "o", "refuted": "D", "inconclusive": "o"}
_ZONE = "#e0f3ea"
_INK, _SOFT = "#1c1e22", "#575d66"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes effects.png, curves.png and, for a factorial, interaction.png, as far as there is something to draw."""
    figures: dict[str, Callable[[], Figure]] = {}
    if results["comparisons"]:
        figures["effects.png"] = lambda: _effects(results)
    if curves := ablation_page.series(results):
        figures["curves.png"] = lambda: _curves(results, curves)
    if results["factorial"] is not None:
        figures["interaction.png"] = lambda: _interaction(results)
    return drawn_in(folder, figures)


def drawn_in(folder: Path, figures: "Mapping[str, Callable[[], Figure]]") -> list[Path]:
    """Draws each figure in llmlab's style and writes it under its name; returns the files."""
    import matplotlib.style

    with matplotlib.style.context(STYLE), warnings.catch_warnings():
        # A name may hold what the font lacks: a box stands for it in the image, and the page and Markdown have it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, make in figures.items():
            save_figure(make(), folder / name)
    return [folder / name for name in figures]


def color_of(place: int) -> str:
    """The baseline in ink, the others in the palette."""
    palette = COLORS[:-1]
    return _INK if place == 0 else palette[(place - 1) % len(palette)]


def literal(text: str, most: int = 40, *, width: int | None = None) -> str:
    """A text as matplotlib shows it unchanged: dollars would begin mathematics. Cut to `most` characters, since names
    beside a panel take its room; broken into lines of `width`."""
    plain = " ".join(text.split())
    plain = plain if len(plain) <= most else f"{plain[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
    return (plain if width is None else textwrap.fill(plain, width)).replace("$", r"\$")


def _effects(results: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    drawn, decimals = rows(results), words.decimals(results)
    scale = axis(drawn)
    figure = Figure(figsize=(8.4, 1.35 + 0.72 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(drawn):
        _effect(axes, row, -place, scale, decimals)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_xlim(scale.low, scale.high)
    axes.set_ylim(-len(drawn) + 0.4, 0.6)
    axes.set_yticks([-place for place in range(len(drawn))], [literal(row.name, width=22) for row in drawn])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    left, right = ("better", "worse") if results["direction"] == "lower" else ("worse", "better")
    unit = f" ({results['unit']})" if results["unit"] else ""
    what = literal(f"difference of {results['metric']}{unit}")
    axes.set_xlabel(f"\N{LEFTWARDS ARROW} {left}      {what}      {right} \N{RIGHTWARDS ARROW}")
    title = f"{results['verdict'].capitalize()}: {results['hypothesis']}"
    axes.set_title(literal(title, 240, width=80), loc="left")
    return figure


def _effect(axes: "Axes", row: Row, y: float, scale: Scale, decimals: int) -> None:
    tone = _TONES[row.verdict]
    left, right = (
        end if end is not None else edge for end, edge in zip(row.zone, (scale.low, scale.high), strict=True)
    )
    axes.fill_betweenx([y - 0.5, y + 0.5], left, right, color=_ZONE, linewidth=0, zorder=0)
    for end in row.zone:
        if end is not None:
            axes.plot(
                [end, end],
                [y - 0.5, y + 0.5],
                color=_TONES["supported"],
                linewidth=0.9,
                linestyle=(0, (3, 3)),
                zorder=1,
            )
    if row.interval is not None:
        low, high = (
            end if end is not None else edge for end, edge in zip(row.interval, (scale.low, scale.high), strict=True)
        )
        axes.plot(
            [max(low, scale.low), min(high, scale.high)],
            [y, y],
            color=tone,
            linewidth=2.4,
            solid_capstyle="butt",
            zorder=3,
        )
    seeds = [seed for seed in row.seeds if scale.low <= seed <= scale.high]
    axes.plot(seeds, [y - 0.3] * len(seeds), "o", color=_INK, alpha=0.35, markersize=3.5, markeredgewidth=0, zorder=2)
    if row.difference is not None and scale.low <= row.difference <= scale.high:
        hollow = row.verdict == "inconclusive"
        axes.plot(
            [row.difference],
            [y],
            _MARKERS[row.verdict],
            color="white" if hollow else tone,
            markersize=8,
            markeredgecolor=tone if hollow else "white",
            markeredgewidth=1.8 if hollow else 1.2,
            zorder=4,
        )
    for edge, marker, on_left in ((scale.low, "<", True), (scale.high, ">", False)):
        if beyond(row, scale, left=on_left):
            axes.plot([edge], [y], marker, color=tone, markersize=8, clip_on=False, zorder=5)
    text = f"{signed(row.difference, decimals)}  {''.join(interval(row.interval, decimals))}\n{row.verdict}"
    axes.annotate(
        text,
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=tone,
        annotation_clip=False,
        linespacing=1.35,
    )


def _curves(results: dict[str, Any], curves: list[Series]) -> "Figure":
    """All of training, and its second half magnified."""
    from matplotlib.figure import Figure

    decimals = words.decimals(results)
    halves = [0.0, ablation_page.MAGNIFIED]
    figure = Figure(figsize=(8.4, 3.1 * len(halves)), layout="constrained")
    panels = figure.subplots(len(halves), 1)
    unit = f" ({results['unit']})" if results["unit"] else ""
    beside = []
    for axes, start in zip(panels, halves, strict=True):
        x, y = ablation_page.curve_scales(curves, start)
        beside.append([_curve(axes, curve, decimals) for curve in curves])
        axes.set_xlim(x.low, x.high)
        axes.set_ylim(y.low, y.high)
        axes.set_ylabel(literal(f"{results['metric']}{unit}"))
    panels[0].set_title(f"Mean over {len(results['seeds'])} seeds, {words.level(results)} intervals", loc="left")
    panels[1].set_title("The second half, magnified", loc="left")
    panels[-1].set_xlabel("optimizer steps")
    figure.draw_without_rendering()  # settles the size of the panels
    for axes, labels in zip(panels, beside, strict=True):
        place_labels(axes, labels)
    return figure


def _curve(axes: "Axes", curve: Series, decimals: int) -> Label:
    color = color_of(curve.color)
    known = [(a, b) for a, b in zip(curve.x, curve.y, strict=True) if b is not None]
    axes.plot(*zip(*known, strict=True), color=color, zorder=3)
    columns = zip(curve.x, curve.low, curve.high, strict=True)
    banded = [(a, low, high) for a, low, high in columns if low is not None and high is not None]
    if banded:
        steps, lows, highs = zip(*banded, strict=True)
        axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    return Label(f"{literal(curve.name, 30)} {fixed(known[-1][1], decimals)}", color, known[-1][1])


def _interaction(results: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    factorial = results["factorial"]
    found, y = panels(factorial), interaction_scale(factorial)
    figure = Figure(figsize=(3.9 * min(len(found), 3) + 0.8, 3.2 * -(-len(found) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(found) // 3), min(len(found), 3), squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (across, lines, by_level) in zip(grid.flat, found, strict=False):
        levels = factorial["factors"][across]
        for place, (level, values) in enumerate(by_level.items()):
            known = [(at, value) for at, value in enumerate(values) if value is not None]
            if known:
                name = literal(f"{lines}={level}" if lines else results["metric"])
                axes.plot(*zip(*known, strict=True), "o-", color=color_of(place), label=name, markeredgecolor="white")
        axes.set_xticks(range(len(levels)), [literal(level) for level in levels])
        axes.set_xlim(-0.35, len(levels) - 0.65)
        axes.set_ylim(y.low, y.high)
        axes.set_xlabel(literal(across))
        axes.set_ylabel(literal(results["metric"]))
        axes.legend(frameon=False, fontsize=9)
    return figure
