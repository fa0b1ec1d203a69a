"""`llmlab plot`: the curves of runs, as a PNG file."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmlab.commands.runs import is_run

if TYPE_CHECKING:
    from llmlab.display.figure import RunCurves

DESCRIPTION = """\
Draw the loss of a run, or of several, with the unigram and bigram baselines as dashed lines:
    llmlab plot runs/A
    llmlab plot runs/A runs/B --key validation/loss --out compare.png
    llmlab plot runs/A --key train/loss,learning_rate,gradient_norm --smooth 50
"""
_DEFAULT_KEYS = "train/loss,validation/loss"


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab plot`."""
    parser = argparse.ArgumentParser(
        prog="llmlab plot",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="file to write (default: loss.png in the run, or here for several runs)"
    )
    parser.add_argument(
        "--key", default=_DEFAULT_KEYS, metavar="KEYS", help=f"metrics, comma-separated (default: {_DEFAULT_KEYS})"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens", "seconds"), default="step", help="horizontal axis (default: step)"
    )
    parser.add_argument("--log-y", action="store_true", help="logarithmic vertical axis")
    parser.add_argument(
        "--smooth", type=int, metavar="STEPS", help="running mean over this many steps; the measured curve stays behind"
    )
    arguments = parser.parse_args(argv)
    keys = [key.strip() for key in arguments.key.split(",") if key.strip()]
    if arguments.smooth is not None and arguments.smooth < 1:
        raise ValueError(f"--smooth {arguments.smooth} is not a number of steps; use 1 or more")
    # The cheap checks first: a mistyped path should not wait for matplotlib.
    for run in arguments.runs:
        check_run(run)

    from llmlab.display.figure import draw_curves, save_figure

    runs = _named([read_curves(run) for run in arguments.runs], arguments.runs)
    known = list(dict.fromkeys(key for run in runs for key in run.measured()))
    unknown = [key for key in keys if key not in known]
    if arguments.key == _DEFAULT_KEYS and len(unknown) < len(keys):  # no evaluation yet
        keys = [key for key in keys if key in known]
    elif unknown or not keys:
        wanted = ", ".join(unknown) or "a metric without a name"
        raise ValueError(f"no run has {wanted}; there are {', '.join(known) or 'no metrics yet'}")
    out: Path = arguments.out or (arguments.runs[0] / "loss.png" if len(runs) == 1 else Path("loss.png"))
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} is no PNG file; give a name that ends in .png")
    figure = draw_curves(runs, keys, x=arguments.x, log_y=arguments.log_y, smooth=arguments.smooth)
    save_figure(figure, out)
    print(out)
    return 0


def check_run(directory: Path) -> None:
    """Raises FileNotFoundError, saying what was found instead, where a path is not a run with metrics."""
    listing = "llmlab runs lists the runs there are"
    if not directory.exists():
        raise FileNotFoundError(f"there is no directory {directory}; {listing}")
    if directory.is_file():
        raise FileNotFoundError(f"{directory} is a file; give the run directory that holds it ({listing})")
    if not is_run(directory):
        names = sorted(entry.name + "/" * entry.is_dir() for entry in directory.iterdir())
        found = f"holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "is empty"
        raise FileNotFoundError(f"{directory} is not a run directory: it {found}; {listing}")
    if not (directory / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{directory} has no metrics.jsonl yet: training has not begun")


def read_curves(directory: Path) -> "RunCurves":
    """A run's records and baselines."""
    from llmlab.display.figure import RunCurves
    from llmlab.training.metrics import read_metrics

    path = directory / "summary.json"
    summary = json.loads(path.read_bytes()) if path.exists() else {}
    return RunCurves(
        name=directory.resolve().name,
        records=read_metrics(directory),
        baselines=summary.get("baselines", {}),
        unit=summary.get("unit"),
    )


def _named(runs: "list[RunCurves]", directories: Sequence[Path]) -> "list[RunCurves]":
    """Runs whose names are the same get their paths instead: sweep-1/base and sweep-2/base."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [dataclasses.replace(run, name=str(path)) for run, path in zip(runs, directories, strict=True)]
