"""`llmlab scaling`: scaling laws of a family of models, and learning-rate transfer across widths."""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.study.coordinates import Coordinates
    from llmlab.study.scaling import Scaling
    from llmlab.study.transfer import Transfer
    from llmlab.study.trials import Trial

DESCRIPTION = """\
Run the scaling study of an experiment file, whose function scaling() returns one of

    Scaling(question=..., family=[experiment(width) for width in ...], budgets=(1e12, 2e12))
        isoFLOP profiles, the law L(N, D), the best model for each budget, and a check: the largest runs predicted from
        the smaller ones
    Transfer(question=..., arms={"standard": ..., "muP": ...}, widths=(...), learning_rates=(...))
        loss against learning rate for each width, and the coordinate check

    llmlab scaling FILE.py --dry-run          the runs, which exist already, and what would run
    llmlab scaling FILE.py --workers 2        run them; Ctrl-C stops, the same command goes on
The study's folder gets results.json, report.html, report.md and figures.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab scaling`."""
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    _check_installed()
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} does nothing; give at least 1")
    if arguments.experiment.is_dir():
        raise ValueError(f"{arguments.experiment} is a directory; give the experiment file of the study")
    from llmlab.study.scaling import read_scaling

    study = read_scaling(arguments.experiment)
    arguments.out = arguments.out or Path("studies") / f"{arguments.experiment.stem}-scaling"
    arguments.again = shlex.join(["llmlab", "scaling", *argv])
    runs = _runs(study)
    if arguments.dry_run:
        return _plan(study, runs, arguments)
    return _run(study, runs, arguments)


def _runs(study: "Scaling | Transfer") -> "Mapping[str, Experiment]":
    """Experiments by name."""
    from llmlab.study.scaling import Scaling, points
    from llmlab.study.transfer import transfer_points

    found = points(study) if isinstance(study, Scaling) else transfer_points(study)
    return {point.name: point.experiment for point in found}


def _run(study: "Scaling | Transfer", runs: "Mapping[str, Experiment]", arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from llmlab.commands.study_board import Board
    from llmlab.data.store import default_cache_dir
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.study.work import execute
    from llmlab.training import compilation_cache
    from llmlab.training.directory import write_json
    from llmlab.training.faults import Interrupted, exit_if_busy

    leave_out_absent_tpu()
    compilation_cache.enable(default_cache_dir())
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, stderr=arguments.json)  # the table does not belong into the JSON
    try:
        with Board(str(folder), console=console) as board:
            trials = execute(
                runs,
                folder=folder,
                root=arguments.runs,
                workers=arguments.workers,
                progress=board,
                metric=study.metric,
                file=arguments.experiment,
            )
    except Interrupted as error:
        print(f"{error}; what was under way is saved. To go on:\n  {arguments.again}", file=sys.stderr)
        return exit_if_busy(error.exit_code)
    except (ConnectionError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = _analyse(study, trials, arguments)
    write_json(folder / "results.json", results)
    written = _write_report(results["kind"], folder)
    if arguments.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        _show(results, written)
    bad = sum(trial.value(study.metric) is None and trial.status != "diverged" for trial in trials.values())
    if bad:
        print(f"{bad} of {len(trials)} runs have no result", file=sys.stderr)
    return 1 if bad or (results["kind"] == "scaling" and results["law"] is None) else 0


def _analyse(
    study: "Scaling | Transfer", trials: "Mapping[str, Trial]", arguments: argparse.Namespace
) -> dict[str, Any]:
    """The content of results.json."""
    from llmlab.study.scaling import Scaling, points
    from llmlab.study.scaling_results import analyse
    from llmlab.study.transfer import transfer_points
    from llmlab.study.transfer_results import analyse_transfer

    named: dict[str, Any] = {
        "name": arguments.out.name,
        "command": arguments.again,
        "file": arguments.experiment,
    }
    if isinstance(study, Scaling):
        return analyse(study, points(study), trials, **named)
    return analyse_transfer(study, transfer_points(study), trials, _coordinates(study, trials), **named)


def _coordinates(study: "Transfer", trials: "Mapping[str, Trial]") -> "Mapping[str, Sequence[Coordinates]]":
    """The coordinate check of each arm on the study's own data, where it asks for one and a run was finished."""
    from llmlab.study.coordinates import coordinates
    from llmlab.study.trials import Status

    done = next((trial.directory for trial in trials.values() if trial.status is Status.FINISHED), None)
    if study.coordinate_steps == 0 or done is None:
        return {}
    found: dict[str, list[Coordinates]] = {}
    for arm, build in study.arms.items():
        for width in study.widths:
            experiment, batch = _first_batch(build(width), done)
            found.setdefault(arm, []).append(coordinates(experiment, batch, steps=study.coordinate_steps))
    return found


def _first_batch(experiment: "Experiment", run: Path) -> "tuple[Experiment, dict[str, Any]]":
    """The experiment with its vocabulary settled, and what its model is called with at the first step."""
    import dataclasses

    from llmlab.tokenizers import load_tokenizer

    tokenizer, train = load_tokenizer(run), experiment.train
    dataset = experiment.data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    model = experiment.model.with_vocabulary(tokenizer.vocab_size)
    batch = dataset.train.batch(0)
    inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "segment_ids") if name in batch}
    return dataclasses.replace(experiment, model=model), inputs


def _write_report(kind: str, folder: Path) -> list[Path]:
    from llmlab.study.report import scaling, transfer

    return (scaling if kind == "scaling" else transfer).write(folder)


# --- what is printed -------------------------------------------------------------------------------------------------


def _plan(study: "Scaling | Transfer", runs: "Mapping[str, Experiment]", arguments: argparse.Namespace) -> int:
    """Prints what would be run."""
    from llmlab.study.scaling import Scaling, points
    from llmlab.study.trials import directory_of, read_trial
    from llmlab.study.work import check

    check(runs)
    trials = {name: read_trial(directory_of(arguments.runs, each), each) for name, each in runs.items()}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "steps": runs[name].train.steps,
            "hash": trial.hash,
            "status": str(trial.status),
            "directory": trial.directory.as_posix(),
        }
        for name, trial in trials.items()
    ]
    if isinstance(study, Scaling):
        for row, point in zip(rows, points(study), strict=True):
            row |= {"parameters": point.parameters, "tokens": point.tokens, "flops": point.flops}
    if arguments.json:
        print(json.dumps({"runs": rows}, indent=2, allow_nan=False))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmlab.commands.study_board import STYLES
    from llmlab.display.numbers import count
    from llmlab.study.trials import Status

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    columns = [name for name in ("parameters", "tokens", "flops", "steps") if name in rows[0]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("status")
    for row in rows:
        status = Text(row["status"], style=STYLES[Status(row["status"])])
        table.add_row(Text(row["name"]), *(count(row[column]) for column in columns), status)
    console.print(table)
    by_hash = {row["hash"]: row["status"] for row in rows}
    missing = sum(status in ("absent", "unfinished", "pruned") for status in by_hash.values())
    same = f" ({len(rows) - len(by_hash)} are the same as others)" if len(by_hash) < len(rows) else ""
    flops = f", {count(sum(row['flops'] for row in rows))} FLOPs in all" if "flops" in columns else ""
    print(f"{len(rows)} runs{same}{flops}: {len(by_hash) - missing} exist already, {missing} would run")
    print(f"folder {arguments.out}, runs in {arguments.runs}; nothing was written")
    return 0


def _show(results: dict[str, Any], written: Sequence[Path]) -> None:
    """Prints the answer, what is wrong, and where the rest is."""
    from llmlab.study.report import scaling_words, transfer_words

    if results["kind"] == "scaling":
        print("".join(scaling_words.answer(results)))
    else:
        for sentence in transfer_words.answer(results):
            print(sentence.strip())
    for problem in results["problems"]:
        print(problem, file=sys.stderr)
    for path in written:
        print(path)


def _check_installed() -> None:
    import importlib.util

    for library in ("optuna", "scipy"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f"scaling studies need {library}, which is not installed; pip install 'llmlab[study]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab scaling",
        usage="llmlab scaling FILE.py [--workers N] [--runs DIR] [--out DIR] [--dry-run] [--json]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="an experiment file with a function scaling()")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (1)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trials"), metavar="DIR", help="run directories of trials"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (studies/<file>-scaling)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
