"""A transfer study's figures as PNG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.display.figure import COLORS, STYLE, save_figure
from llmlab.study.report import words
from llmlab.study.report.ablation_figures import literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes transfer.png and, where it was checked, coordinates.png."""
    import matplotlib.style

    figures: dict[str, Figure] = {}
    with matplotlib.style.context(STYLE):
        if any(arm["widths"] for arm in results["arms"]):
            figures["transfer.png"] = _transfer(results)
        if any(arm["coordinates"] for arm in results["arms"]):
            figures["coordinates.png"] = _coordinates(results)
        for name, figure in figures.items():
            save_figure(figure, folder / name)
    return [folder / name for name in figures]


def _panels(results: dict[str, Any]) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    arms = results["arms"]
    figure = Figure(figsize=(4.4 * len(arms) + 0.6, 3.9), layout="constrained")
    return figure, zip(figure.subplots(1, len(arms), squeeze=False, sharey=True)[0], arms, strict=True)


def _transfer(results: dict[str, Any]) -> "Figure":
    figure, panels = _panels(results)
    for place, (axes, arm) in enumerate(panels):
        for index, row in enumerate(arm["widths"]):
            color = COLORS[index % len(COLORS)]
            known = [
                (r, loss) for r, loss in zip(results["learning_rates"], row["means"], strict=True) if loss is not None
            ]
            axes.plot([r for r, _ in known], [loss for _, loss in known], "o-", color=color, markersize=4,
                      label=f"width {row['width']}")  # fmt: skip
            if row["best"]["grid_rate"] is not None:
                axes.plot([row["best"]["grid_rate"]], [row["best"]["loss"]], "*", color=color, markersize=14,
                          markeredgecolor="white")  # fmt: skip
        axes.set_xscale("log")
        # the rates of the grid, and no powers of ten between them, whose labels would overlap
        axes.set_xticks(results["learning_rates"], [f"{rate:g}" for rate in results["learning_rates"]])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("peak learning rate")
        axes.set_title(literal(arm["name"]), loc="left")
        if place == 0:
            axes.set_ylabel(literal(words.metric(results)))
            axes.legend(frameon=False)
    return figure


def _coordinates(results: dict[str, Any]) -> "Figure":
    figure, panels = _panels(results)
    for place, (axes, arm) in enumerate(panels):
        if arm["coordinates"] is None:
            axes.set_visible(False)
            continue
        for index, (layer, values) in enumerate(arm["coordinates"]["change"].items()):
            slope = arm["coordinates"]["slopes"][layer]
            color = COLORS[index % len(COLORS)]
            axes.plot(results["widths"], values, "o-", color=color, markersize=4, label=f"{layer} ({slope:+.2f})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("width")
        axes.set_title(literal(f"{arm['name']} (slope)"), loc="left")
        axes.legend(frameon=False, fontsize=8)
        if place == 0:
            axes.set_ylabel("mean |change of the output|")
    return figure
