"""`llmlab schedule`: the learning rate over the run, before anything runs."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment

DESCRIPTION = """\
Draw the learning rate of every step:
    llmlab schedule experiments/quickstart.py
    llmlab schedule experiments/quickstart.py --optimizer.schedule.warmup-steps 0.1 --out schedule.png
    llmlab schedule runs/quickstart-1a2b3c4d --json
Further flags are the experiment's own: llmlab train FILE.py --help lists them.
"""

# Longer runs are drawn from evenly spaced steps.
_MAX_POINTS = 100_000
_HEIGHT = 14


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab schedule`."""
    parser = argparse.ArgumentParser(
        prog="llmlab schedule",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="experiment file or run directory")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="write the picture to a file as well")
    parser.add_argument("--json", action="store_true", help="print the numbers in place of the picture")
    arguments, flags = parser.parse_known_args(argv)

    from llmlab.experiment import read_experiment
    from llmlab.flags import parse

    path = arguments.experiment
    experiment = parse(read_experiment(path), flags, prog=f"llmlab schedule {path}", file=path.name)
    steps, rates = learning_rates(experiment)
    if arguments.json:
        rows = [{"step": step, "learning_rate": rate} for step, rate in zip(steps, rates, strict=True)]
        print(json.dumps(rows))
    else:
        width = max(40, min(100, shutil.get_terminal_size().columns))
        print("\n".join([*_caption(experiment, rates), "", *draw(steps, rates, width=width, braille=_has_braille())]))
    if arguments.out is not None:
        _write_png(experiment, steps, rates, arguments.out)
        print(f"wrote {arguments.out}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def learning_rates(experiment: "Experiment") -> tuple[list[int], list[float]]:
    """Step numbers (all, or evenly spaced ones with first and last) and the learning rate at each.

    Raises:
        ValueError: the schedule does not fit into the run.
    """
    import numpy as np

    total = experiment.train.steps
    rate = experiment.optimizer.learning_rate(total)
    steps = np.unique(np.linspace(0, total - 1, min(total, _MAX_POINTS)).round().astype(np.int32))
    return steps.tolist(), np.asarray(rate(steps)).tolist()


def draw(steps: Sequence[int], rates: Sequence[float], *, width: int, braille: bool = True) -> list[str]:
    """Lines of text that show the rates as a curve above 0, `width` characters wide.

    With `braille` a character holds 2 x 4 dots, else one star.
    """
    labels = [f"{value:.3g}" for value in (max(rates), max(rates) / 2, 0.0)]
    margin = max(map(len, labels)) + 2
    across, down = (2, 4) if braille else (1, 1)
    columns, rows = (width - margin) * across, _HEIGHT * down
    lit = _raster(steps, rates, columns, rows)
    lines = []
    for row in range(_HEIGHT):
        label = {0: labels[0], _HEIGHT // 2: labels[1], _HEIGHT - 1: labels[2]}.get(row, "")
        axis = "┤" if braille else "|"
        cells = [_cell(lit, column, row, braille) for column in range(width - margin)]
        lines.append(f"{label:>{margin - 2}} {axis}{''.join(cells)}".rstrip())
    first, last = f"step {steps[0]}", f"{steps[-1]}"
    lines.append(f"{'':>{margin}}{first}{last:>{max(1, width - margin - len(first))}}")
    return lines


def _raster(steps: Sequence[int], rates: Sequence[float], columns: int, rows: int) -> set[tuple[int, int]]:
    """The dots (column, row from the top) that a line through the points touches."""
    span, top = max(steps[-1] - steps[0], 1), max(rates) or 1.0
    lit: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for step, rate in zip(steps, rates, strict=True):
        column = round((step - steps[0]) / span * (columns - 1))
        row = round((1 - rate / top) * (rows - 1))
        x, y = before or (column, row)
        for i in range(1, (n := max(abs(column - x), abs(row - y), 1)) + 1):
            lit.add((round(x + (column - x) * i / n), round(y + (row - y) * i / n)))
        before = column, row
    return lit


# The bit of each of a Braille character's dots, by (column, row).
_DOTS = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 3, (1, 1): 4, (1, 2): 5, (0, 3): 6, (1, 3): 7}


def _cell(lit: set[tuple[int, int]], column: int, row: int, braille: bool) -> str:
    if not braille:
        return "*" if (column, row) in lit else " "
    bits = sum(1 << bit for (x, y), bit in _DOTS.items() if (2 * column + x, 4 * row + y) in lit)
    return chr(0x2800 + bits) if bits else " "


def _has_braille() -> bool:
    try:
        "⣿┤".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _caption(experiment: "Experiment", rates: Sequence[float]) -> list[str]:
    """What the picture shows, in words."""
    optimizer = experiment.optimizer
    lines = [
        f"{_title(experiment)}: {rates[0]:.3g} at first, {max(rates):.3g} at most, {rates[-1]:.3g} in the last step, "
        f"{sum(rates) / len(rates):.3g} on average"
    ]
    for group in optimizer.groups:
        lines.append(f"  {group.match}: {'frozen' if group.frozen else f'{group.lr_multiplier:g} times these rates'}")
    return lines


def _title(experiment: "Experiment") -> str:
    optimizer = experiment.optimizer
    return f"{type(optimizer).__name__} with {type(optimizer.schedule).__name__} over {experiment.train.steps} steps"


def _write_png(experiment: "Experiment", steps: Sequence[int], rates: Sequence[float], path: Path) -> None:
    from matplotlib.figure import Figure

    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} for --out {path.name}")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(steps, rates)
    axes.set(title=_title(experiment), xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
