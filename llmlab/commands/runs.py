"""`llmlab runs`: what was trained here, how it ended, and how good it is."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DESCRIPTION = """\
List the runs in a directory:
    llmlab runs
    llmlab runs runs/sweep --sort validation/loss
    llmlab runs --json | jq '.[] | select(.status == "finished") | .name'
"""

# Deepest place of a run below the directory that is listed: runs/sweep/trial.
_MAX_DEPTH = 3
# Enough for the last hundred lines of a metrics.jsonl, whatever its length.
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, as far as its files tell."""

    name: str
    """Directory, relative to the one that is listed."""
    status: str
    """running, finished, interrupted, preempted, pruned, failed, or damaged."""
    step: int | None = None
    steps: int | None = None
    """Of the whole experiment."""
    num_parameters: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    updated: float | None = None
    """Unix time of the last sign of life."""
    experiment: str | None = None
    """The experiment file, or the experiment's name."""
    problem: str | None = None
    """What is damaged."""


# Name of --sort -> key; what is missing comes last.
_SORT: dict[str, Callable[[Row], Any]] = {
    "age": lambda row: None if row.updated is None else -row.updated,
    "name": lambda row: row.name,
    "status": lambda row: row.status,
    "step": lambda row: row.step,
    "num_parameters": lambda row: row.num_parameters,
    "train/loss": lambda row: row.train_loss,
    "validation/loss": lambda row: row.validation_loss,
    "tokens_per_second": lambda row: None if row.tokens_per_second is None else -row.tokens_per_second,
}
_STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "preempted": "yellow",
    "pruned": "magenta",
    "failed": "red",
    "damaged": "bold red",
}


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab runs`."""
    parser = argparse.ArgumentParser(
        prog="llmlab runs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)")
    parser.add_argument("--sort", choices=sorted(_SORT), default="age", help="order (default: age, newest first)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = parser.parse_args(argv)
    root: Path = arguments.directory
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no directory {root}; give the directory that holds the runs, or make one with llmlab train FILE"
        )
    rows = sorted((read_row(path, root) for path in run_directories(root)), key=_order(_SORT[arguments.sort]))
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2, allow_nan=False))
    elif rows:
        _print_table(rows)
    else:
        print(f"there are no runs in {root}; llmlab train FILE makes one")
    return 0


def is_run(directory: Path) -> bool:
    """Whether a directory is a run: it has a config and a sign that training was begun."""
    signs = ("metrics.jsonl", "provenance.json", "summary.json", "run.lock")
    return (directory / "config.json").is_file() and any((directory / sign).exists() for sign in signs)


def run_directories(root: Path, depth: int = _MAX_DEPTH) -> Iterator[Path]:
    """The runs at and below a directory; nothing inside a run is looked at."""
    if is_run(root):
        yield root
    elif depth > 0:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from run_directories(entry, depth - 1)


def read_row(directory: Path, root: Path) -> Row:
    """What the files of a run tell. Files may be missing or damaged: the listing of the others goes on."""
    name = str(directory.relative_to(root)) if directory != root else directory.name
    try:
        config = _json(directory / "config.json")
        summary = _json(directory / "summary.json")
        provenance = _json(directory / "provenance.json")
        latest = _latest(directory / "metrics.jsonl") | summary
        return Row(
            name=name,
            status=status(directory, summary, provenance),
            step=latest.get("step"),
            steps=config.get("train", {}).get("steps"),
            num_parameters=summary.get("num_parameters"),
            train_loss=latest.get("train/loss"),
            validation_loss=latest.get("validation/loss"),
            tokens_per_second=latest.get("tokens_per_second"),
            updated=_updated(directory),
            experiment=(provenance.get("experiment_file") or {}).get("path") or provenance.get("name"),
        )
    except (ValueError, OSError, AttributeError, TypeError) as error:  # a file that is not what it should be
        return Row(name=name, status="damaged", updated=_updated(directory), problem=str(error))


def status(directory: Path, summary: dict[str, Any], provenance: dict[str, Any]) -> str:
    """How a run stands: by the lock where a process holds it, else by what its last session wrote at its end."""
    from llmlab.training.directory import RunDirectory

    sessions = provenance.get("sessions") or []
    last = sessions[-1]["status"] if sessions else "finished" if summary else "running"
    if last != "running":
        return last
    # It says that it runs; a killed process could not say that it does not.
    return "running" if RunDirectory(directory).is_held() else "interrupted"


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    if not path.exists():
        return {}
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _latest(path: Path) -> dict[str, Any]:
    """The last value of every metric, from the end of the file."""
    latest: dict[str, Any] = {}
    if not path.exists():
        return latest
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    whole = lines[:-1] if path.stat().st_size <= _TAIL_BYTES else lines[1:-1]
    for line in whole:
        latest |= json.loads(line)
    return {key: float(value) if isinstance(value, str) else value for key, value in latest.items()}


def _updated(directory: Path) -> float | None:
    files = [directory / name for name in ("metrics.jsonl", "summary.json", "provenance.json", "config.json")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def _order(key: Callable[[Row], Any]) -> Callable[[Row], tuple[bool, Any, str]]:
    def order(row: Row) -> tuple[bool, Any, str]:
        value = key(row)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return missing, 0 if missing else value, row.name

    return order


def _as_json(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    updated = fields.pop("updated")
    renamed = {"train_loss": "train/loss", "validation_loss": "validation/loss"}
    return {renamed.get(key, key): _finite(value) for key, value in fields.items()} | {
        "updated": None if updated is None else datetime.fromtimestamp(updated, UTC).isoformat(timespec="seconds")
    }


def _finite(value: Any) -> Any:
    """Numbers that JSON lacks, as in metrics.jsonl: strings."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmlab.display.numbers import count, duration, nats

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold", style="bold")
    table.add_column("status")
    for column in ("step", "params", "loss", "validation", "tokens/s", "age"):
        table.add_column(column, justify="right", no_wrap=True)
    wide = console.width >= 110
    if wide:
        table.add_column("experiment", overflow="fold", style="dim")

    def cell(value: float | None, form: Callable[[float], str]) -> Text:
        if value is None:
            return Text("-", style="dim")
        return Text(form(value), style="" if math.isfinite(value) else "bold red")

    now = time.time()
    for row in rows:
        step = cell(row.step, "{:,}".format)
        if row.steps is not None and row.step != row.steps:
            step.append(f"/{row.steps:,}", style="dim")
        cells = [
            Text(row.name),
            Text(row.status, style=_STYLES.get(row.status, "")),
            step,
            cell(row.num_parameters, count),
            cell(row.train_loss, nats),
            cell(row.validation_loss, nats),
            cell(row.tokens_per_second, "{:,.0f}".format),
            cell(None if row.updated is None else max(0.0, now - row.updated), duration),
        ]
        table.add_row(*cells, *([Text(row.experiment or "-")] if wide else []))
    console.print(table)
    for row in rows:
        if row.problem is not None:
            console.print(Text(f"{row.name}: {row.problem}", style="red"))
