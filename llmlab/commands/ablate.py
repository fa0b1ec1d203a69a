"""`llmlab ablate`: carry out the ablation of an experiment file, and say what it shows."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.passwords import without_password

if TYPE_CHECKING:
    from llmlab.study.ablation import Ablation

DESCRIPTION = """\
Train every arm of an ablation at every seed, compare them in pairs, and write a report with a verdict:
    llmlab ablate FILE.py --dry-run        what will run, what is there already, how long it takes
    llmlab ablate FILE.py                  run; the same command goes on after Ctrl-C, a crash or a kill
    llmlab ablate FILE.py --workers 2      two runs at a time
The file has a function ablation() that returns an Ablation (llmlab/study/ablation.py explains its fields). Runs go to
runs/trials, by the hash of their config, and are shared by all studies; report.html, report.md, table.tex, figures and
results.json go to studies/<file>-ablation.
Exit codes: 0 done, whatever the verdict; 1 no verdict, because the arms do not match, or a run has no result.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab ablate`."""
    parser = _parser()
    if not argv:
        parser.print_help()
        return 2
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers} must be at least 1")
    if missing := [name for name in ("optuna", "scipy") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ablations need {' and '.join(missing)}, not installed here: pip install 'llmlab[study]'")

    from llmlab.study.ablation import read_ablation
    from llmlab.study.matching import MismatchError

    ablation = read_ablation(arguments.file)
    if arguments.seeds is not None:
        ablation = replace(ablation, seeds=arguments.seeds, budget=None)
    try:
        return _dry_run(ablation, arguments) if arguments.dry_run else _run(ablation, arguments, argv)
    except MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _dry_run(ablation: "Ablation", arguments: argparse.Namespace) -> int:
    """Prints the plan; where the run would be refused, that as well, with the exit code that it would have."""
    from llmlab.commands import ablate_tables
    from llmlab.study import matching, planning
    from llmlab.study.record import open_record

    plan = planning.plan(ablation, arguments.runs)
    if arguments.json:
        print(json.dumps(planning.as_json(plan), indent=2, allow_nan=False))
    else:
        ablate_tables.print_plan(plan, ablation, arguments.runs)
    if plan.mismatches and ablation.acknowledge_mismatch is None:
        print(f"error: {matching.refusal(ablation, plan.mismatches)}", file=sys.stderr)
        return 1
    sys.stdout.flush()  # the plan comes before what is wrong with it
    how = {"exploratory": arguments.exploratory, "allow_change": arguments.allow_config_change}
    open_record(_folder(arguments), ablation, plan.arms, **how, write=False)
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    """Of the study."""
    return arguments.out or Path("studies") / f"{arguments.file.stem}-ablation"


def _run(ablation: "Ablation", arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    from llmlab.commands.ablate_board import Board
    from llmlab.data.store import default_cache_dir
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.study.conduct import Conduct
    from llmlab.study.report import ablation as report
    from llmlab.training import compilation_cache
    from llmlab.training.faults import Interrupted, exit_if_busy

    leave_out_absent_tpu()
    compilation_cache.enable(default_cache_dir())
    path: Path = arguments.file
    folder = _folder(arguments)
    command = without_password(["llmlab", "ablate", *argv], arguments.storage)
    board = Board(quiet=arguments.json)
    try:
        with board:
            results = Conduct(
                name=path.stem,
                folder=folder,
                root=arguments.runs,
                workers=arguments.workers,
                vectorize_seeds=arguments.vectorize_seeds,
                storage=arguments.storage,
                exploratory=arguments.exploratory,
                allow_change=arguments.allow_config_change,
                retry_failed=arguments.retry_failed,
                file=path,
                command=_reproducing(argv),
                progress=board.update,
                tell=board.tell,
            ).run(ablation)
    except Interrupted as error:
        print(f"{error}; {board.standing}. To go on:\n  {command}", file=sys.stderr)
        return exit_if_busy(error.exit_code)
    except (ConnectionError, RuntimeError) as error:  # the storage does not answer; all workers died
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.write(folder)
    _show(results, folder, as_json=arguments.json)
    return 1 if results["withheld"] or results["problems"] else 0


def _show(results: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    from llmlab.commands import ablate_tables

    if as_json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        ablate_tables.print_results(results, folder)


def _reproducing(argv: Sequence[str]) -> str:
    """The command for the report: without the address of a storage, which is one user's own."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument.partition("=")[0] == "--storage":
            skip = argument == "--storage"
            continue
        kept.append(argument)
    return shlex.join(["llmlab", "ablate", *kept])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab ablate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE.py", help="an experiment file with an ablation()")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    parser.add_argument("--seeds", type=int, metavar="N", help="pairs of runs, instead of the file's")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--vectorize-seeds",
        action="store_true",
        help="train the seeds of an arm as one program: for small models that do not fill the device",
    )
    parser.add_argument(
        "--storage", metavar="URL", help="database of the queue, to work on several machines (SQLite in the folder)"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trials"), metavar="DIR", help="where runs are (default: runs/trials)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the study's folder (studies/<file>-ablation)")
    parser.add_argument("--resume", action="store_true", help="go on; which is what happens without it, too")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed or is damaged")
    parser.add_argument(
        "--allow-config-change", action="store_true", help="go on in a folder that another definition began"
    )
    parser.add_argument(
        "--exploratory",
        action="store_true",
        help="add seeds, or change the definition, although results are known; the report will say so",
    )
    parser.add_argument("--json", action="store_true", help="print the results (or the plan) as JSON")
    return parser
