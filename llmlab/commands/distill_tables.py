"""What `llmlab distill` shows: teacher, student and the student without a teacher, side by side."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmlab.display.numbers import count
from llmlab.study.report import markdown as md

_HEADS = (
    ("", False),
    ("validation loss", True),
    ("gap closed", True),
    ("parameters", True),
    ("FLOPs a token", True),
    ("tokens/s", True),
)
_NAMES = {"teacher": "teacher", "student": "student", "scratch": "student from scratch"}


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table, a row for each of the three."""
    closed = {"teacher": 1.0, "scratch": 0.0, "student": results["gap_closed"]}
    return [
        [
            title,
            f"{results['entrants'][name]['loss']:.4f}",
            "-" if closed[name] is None else f"{closed[name]:.0%}",
            count(results["entrants"][name]["num_parameters"]),
            count(results["entrants"][name]["flops_per_token"]),
            count(results["entrants"][name]["tokens_per_second"]),
        ]
        for name, title in _NAMES.items()
    ]


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What is to be known beside the table."""
    found = [
        f"The loss is in nats per {results['unit']} on the validation split; FLOPs and tokens/s are of a forward pass; "
        "gap closed is the student's part of the way from scratch to the teacher."
    ]
    if results["gap_closed"] is None:
        found.append("The teacher is no better than the student from scratch: there is no gap to close.")
    speeds = {name: run.get("tokens_per_second") for name, run in results["training"].items()}
    if all(speeds.values()):
        with_teacher, without = (count(speeds[name]) for name in ("student", "scratch"))
        found.append(
            f"Training went at {with_teacher} tokens/s with the teacher and at {without} without, each at its own time."
        )
    found.append("One pair of runs says nothing of luck; llmlab ablate compares pairs of seeds.")
    return found


def markdown(results: Mapping[str, Any], *, title: str) -> str:
    """The report as a file."""
    table = md.table(_HEADS, [[md.escape(cell) for cell in row] for row in rows(results)])
    return "\n\n".join([f"# {md.escape(title)}: what the teacher was worth", table, *remarks(results)]) + "\n"


def show(results: Mapping[str, Any], folder: Path) -> None:
    """Prints the table."""
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 160  # in a pipe lines are not cut to a terminal's width
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title, numeric in _HEADS:
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print()
    for remark in remarks(results):
        console.print(remark, markup=False)
    console.print(f"report {folder / 'report.md'}, data {folder / 'results.json'}", markup=False)
