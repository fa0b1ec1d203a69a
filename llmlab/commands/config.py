"""`llmlab config`: the experiment as the run would see it, or what two experiments disagree on."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
With one experiment, print its resolved config as JSON, after the flags:
    llmlab config experiments/quickstart.py --train.steps 100
With two, print every value on which they differ:
    llmlab config experiments/quickstart.py runs/quickstart-1a2b3c4d
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab config`."""
    parser = argparse.ArgumentParser(
        prog="llmlab config",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", nargs="*", type=Path, help="one or two of: FILE.py, a run directory")
    parser.add_argument("--json", action="store_true", help="print the difference as JSON as well")
    # Paths come first: what follows the first flag belongs to the experiment.
    first_flag = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    flags = [argument for argument in argv[first_flag:] if argument != "--json"]
    if not first_flag:
        parser.print_help()
        if flags and flags[0] not in ("-h", "--help"):
            raise ValueError("give an experiment file or a run directory before the flags")
        return 0 if flags else 2
    arguments = parser.parse_args([*argv[:first_flag], *(["--json"] if "--json" in argv else [])])
    if len(arguments.experiment) == 1:
        return _show(arguments.experiment[0], flags)
    if len(arguments.experiment) > 2 or flags:
        raise ValueError("llmlab config takes one experiment with flags, or two experiments without")
    return _compare(*arguments.experiment, as_json=arguments.json)


def _show(path: Path, flags: Sequence[str]) -> int:
    from llmlab.config import to_json
    from llmlab.experiment import read_experiment
    from llmlab.flags import parse

    experiment = parse(read_experiment(path), flags, prog=f"llmlab config {path}", file=path.name)
    experiment.validate()
    text = to_json(experiment)
    if sys.stdout.isatty():
        from rich.console import Console

        Console(soft_wrap=True).print_json(text)
    else:
        print(text, end="")
    return 0


def _compare(left: Path, right: Path, *, as_json: bool) -> int:
    from llmlab.config import compact, difference
    from llmlab.experiment import read_experiment

    differences = difference(read_experiment(left), read_experiment(right))
    if as_json:
        rows = [{"field": path, "left": _plain(a), "right": _plain(b)} for path, a, b in differences]
        print(json.dumps(rows, indent=2))
        return 0
    if not differences:
        print("the two experiments are equal")
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("field", overflow="fold", style="cyan")
    for column in ("left", "right"):
        table.add_column(column, overflow="fold")
    for path, a, b in differences:
        table.add_row(path, Text(compact(a)), Text(compact(b)))
    print(f"left   {left}\nright  {right}\n")
    Console(highlight=False).print(table)
    return 0


def _plain(value: Any) -> Any:
    """The value itself where JSON has it, its Python form where not."""
    from llmlab.config import compact

    return value if value is None or isinstance(value, (bool, int, float, str)) else compact(value)
