"""`llmlab sweep`: run an experiment file's sweep, look at it, and repeat its best trial."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.passwords import without_password

if TYPE_CHECKING:
    from llmlab.study.sweep import Prepared

DESCRIPTION = """\
Run the sweep of an experiment file, whose function sweep() says what is varied:

    from llmlab.study.space import axis, grid, log_uniform, sample

    def sweep():
        return grid(axis("model.num_layers", 2, 4), axis("optimizer.peak_lr", 1e-3, 3e-3))

    llmlab sweep FILE.py --dry-run                  the points, which exist already, and what would run
    llmlab sweep FILE.py --workers 2                run them; Ctrl-C stops, the same command goes on
    llmlab sweep FILE.py --trials 30 --pruner asha  of axes with sample(...): 30 trials, bad ones given up early
    llmlab sweep FILE.py --storage postgresql+psycopg://USER@HOST/DATABASE      the same on every machine: they share it
    llmlab sweep status|report|best|retry-failed FOLDER-or-FILE.py
Other flags are values of the experiment, as for llmlab train: --train.steps 100.
"""
VERBS = ("status", "report", "best", "retry-failed")


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab sweep`."""
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    _check_installed()
    if argv[0] in VERBS:
        return _look(argv[0], argv[1:])
    if argv[0].startswith("-"):
        raise ValueError(f"give the experiment file before the flags: llmlab sweep FILE.py {shlex.join(argv)}")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.experiment.is_dir():
        raise ValueError(f"{arguments.experiment} is a directory; to look at a sweep: llmlab sweep status FOLDER")
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} does nothing; give at least 1")
    again = without_password(["llmlab", "sweep", *argv], arguments.storage)
    from llmlab.study.sweep import prepare

    prepared = prepare(
        arguments.experiment,
        flags=flags,
        folder=arguments.out,
        root=arguments.runs,
        storage=arguments.storage,
        trials=arguments.trials,
        sampler=arguments.sampler,
        pruner=arguments.pruner,
        seed=arguments.seed,
        command=again,
    )
    if arguments.dry_run:
        return _plan(prepared, as_json=arguments.json)
    return _run(prepared, arguments.workers, again, as_json=arguments.json)


def _run(prepared: "Prepared", workers: int, again: str, *, as_json: bool) -> int:
    from rich.console import Console

    from llmlab.commands.study_board import Board
    from llmlab.data.store import default_cache_dir
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.study.sweep_results import write_results
    from llmlab.training import compilation_cache
    from llmlab.training.faults import Interrupted, exit_if_busy

    leave_out_absent_tpu()
    compilation_cache.enable(default_cache_dir())
    folder = prepared.place.folder
    total = prepared.search.trials if prepared.search is not None else None
    console = Console(highlight=False, stderr=as_json)  # the table does not belong into the JSON
    try:
        with Board(str(folder), total=total, console=console) as board:
            prepared.run(workers=workers, progress=board)
    except Interrupted as error:
        print(f"{error}; what was under way is saved. To go on:\n  {again}", file=sys.stderr)
        return exit_if_busy(error.exit_code)
    except (ConnectionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = write_results(folder, prepared.storage)
    _write_report(folder)
    _show(results, as_json=as_json)
    bad = [trial for trial in results["trials"] if trial["status"] in ("failed", "corrupt", "absent")]
    if bad:
        print(
            f"{len(bad)} trials have no result; llmlab sweep retry-failed {folder} lets them run again", file=sys.stderr
        )
    return 1 if bad or results["best"] is None else 0


# --- before and after ------------------------------------------------------------------------------------------------


def _plan(prepared: "Prepared", *, as_json: bool) -> int:
    """Prints what would be run."""
    trials = prepared.existing()
    rows = [
        {"name": name, "hash": trial.hash, "status": str(trial.status), "directory": trial.directory.as_posix()}
        for name, trial in zip(prepared.names, trials, strict=True)
    ]
    to_run = sorted({row["hash"] for row in rows if row["status"] in ("absent", "unfinished", "pruned")})
    definition = prepared.definition()
    if as_json:
        plan = {"points": rows, "axes": definition["axes"], "search": definition["search"], "to_run": to_run}
        print(json.dumps(plan, indent=2, allow_nan=False))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmlab.commands.study_board import STYLES
    from llmlab.study.trials import Status

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    if prepared.search is not None:
        for column in ("axis", "kind", "values"):
            table.add_column(column)
        for axis in definition["axes"]:
            values = axis["values"] if axis["values"] is not None else [axis["low"], axis["high"]]
            table.add_row(axis["path"], axis["kind"], ", ".join(map(str, values)))
        console.print(table)
        search = prepared.search
        print(f"{search.trials} trials, drawn by {search.sampler} (seed {search.seed}), pruner {search.pruner}")
    else:
        for column in ("point", "run", "status"):
            table.add_column(column, overflow="fold")
        for row in rows:
            style = STYLES[Status(row["status"])]
            table.add_row(Text(row["name"]), row["directory"], Text(row["status"], style=style))
        console.print(table)
        distinct = {row["hash"] for row in rows}
        same = f" ({len(rows) - len(distinct)} points are the same as others)" if len(distinct) < len(rows) else ""
        print(f"{len(rows)} points{same}: {len(distinct) - len(to_run)} exist already, {len(to_run)} would run")
    print(f"folder {prepared.place.folder}, runs in {prepared.place.root}; nothing was written")
    return 0


def _look(verb: str, argv: Sequence[str]) -> int:
    """Runs the commands about a sweep that exists."""
    parser = argparse.ArgumentParser(prog=f"llmlab sweep {verb}", allow_abbrev=False)
    parser.add_argument("sweep", type=Path, metavar="FOLDER-or-FILE.py", help="the sweep's folder, or its file")
    parser.add_argument("--storage", metavar="URL", help="where its queue is, if the address has a password")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    without_password([], arguments.storage)
    path: Path = arguments.sweep
    folder = Path("studies") / f"{path.stem}-sweep" if path.suffix == ".py" else path
    from llmlab.study import sweep_results

    try:
        if verb == "retry-failed":
            return _retry(folder, arguments.storage, as_json=arguments.json)
        results = (
            sweep_results.write_results(folder, arguments.storage)
            if verb == "report"
            else sweep_results.results(folder, arguments.storage)
        )
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if verb == "best":
        return _show_best(results, as_json=arguments.json)
    if verb == "report":
        _write_report(folder)
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".html", ".md", ".png") and file.name != "study.json":
                print(file, file=sys.stderr if arguments.json else sys.stdout)
        if not arguments.json:
            return 0
    _show(results, as_json=arguments.json)
    return 0


def _retry(folder: Path, storage: str | None, *, as_json: bool) -> int:
    from llmlab.study import sweep_results

    retried = sweep_results.retry_failed(folder, storage)
    if as_json:
        print(json.dumps([{"number": entry.number, "name": entry.name, "hash": entry.hash} for entry in retried]))
        return 0
    for entry in retried:
        print(f"{entry.name or f'trial {entry.number}'} waits again")
    again = sweep_results.read_definition(folder)["command"]
    print(f"to run them:\n  {again}" if retried else "there is nothing to retry")
    return 0


def _write_report(folder: Path) -> None:
    """The pages that are made of results.json."""
    from llmlab.study.report import sweep as pages

    pages.write(folder)


def _show(results: dict[str, Any], *, as_json: bool) -> None:
    """Prints the trials, the best ones first, and what is wrong."""
    if as_json:
        print(json.dumps(results, indent=2, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmlab.commands.study_board import STYLES
    from llmlab.display.numbers import duration, nats
    from llmlab.study.trials import Status

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("trial", overflow="fold")
    for column in ("status", results["metric"], "time", "run"):
        table.add_column(column, justify="right" if column in (results["metric"], "time") else "left", overflow="fold")
    sign = 1 if results["direction"] == "lower" else -1

    def order(trial: dict[str, Any]) -> tuple[bool, float]:
        return trial["value"] is None, sign * (trial["value"] or 0.0)

    for trial in sorted(results["trials"], key=order):
        table.add_row(
            Text(trial["name"]),
            Text(trial["status"], style=STYLES[Status(trial["status"])]),
            "-" if trial["value"] is None else nats(trial["value"]),
            "-" if trial["seconds"] is None else duration(trial["seconds"]),
            Text(trial["directory"] or "-", style="dim"),
        )
    console.print(table)
    for trial in results["trials"]:
        if trial["problem"]:
            console.print(Text(f"{trial['name']}: {trial['problem'].splitlines()[0]}", style="red"))
    if results["best"] is not None:
        _print_best(results)


def _show_best(results: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(results["best"], indent=2, allow_nan=False))
    elif results["best"] is None:
        print("no trial is finished yet", file=sys.stderr)
    else:
        _print_best(results)
    return 0 if results["best"] is not None else 1


def _print_best(results: dict[str, Any]) -> None:
    best = results["best"]
    print(f"best: {best['name']}, {results['metric']} {best['value']:.4f}, in {best['directory']}")
    print(f"  {best['command']}")
    for line in best["told"]:
        print(f"  with, in the file: {line}")


def _check_installed() -> None:
    import importlib.util

    if importlib.util.find_spec("optuna") is None:
        raise ValueError("sweeps need Optuna, which is not installed; pip install 'llmlab[study]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab sweep",
        usage="llmlab sweep FILE.py [--trials N] [--workers N] [--dry-run] ... [--dotted.field VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="an experiment file with a function sweep()")
    parser.add_argument("--trials", type=int, metavar="N", help="how many (a list: all of it; sampled axes: 20)")
    parser.add_argument("--sampler", metavar="NAME", help="grid, random, tpe or qmc (a list: grid; sampled axes: tpe)")
    parser.add_argument("--pruner", default="none", metavar="NAME", help="none, asha, hyperband or median (none)")
    parser.add_argument("--seed", type=int, default=0, help="of samplers and subsamples (0)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (1)")
    parser.add_argument("--storage", metavar="URL", help="database of the queue (study.db in the folder)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trials"), metavar="DIR", help="run directories of trials"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the sweep's folder (studies/<file>-sweep)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
