"""`llmlab distill`: a student of a teacher beside the same student without one; and the teacher's words on disk."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment

DESCRIPTION = """\
Train a student with its teacher, and once more without, and say what the teacher was worth:
    llmlab distill FILE.py --objective.teacher RUN
    llmlab distill cache FILE.py --out DIR        write down what the teacher says of every row, once (see --help there)
The file's config() has objective=Distill(...) or data=TeacherTexts(...); every value is a flag, as for llmlab train.
Both runs, report.md and results.json go to runs/<file>-<hash>-distill. The same command again goes on where it was cut
short.
"""
CACHE_DESCRIPTION = """\
Write the teacher's predictions on the rows that the experiment will read, and train from them afterwards:
    llmlab distill cache FILE.py --out caches/mine --entries 32
    llmlab train FILE.py --objective.cache caches/mine
The same command again computes what is missing: after an interruption, or for an experiment of more steps.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab distill`."""
    if argv and argv[0] == "cache":
        return _cache(argv[1:])
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    arguments, flags = parser.parse_known_args(argv)

    from llmlab.training.faults import Interrupted, NonFiniteError, exit_if_busy

    try:
        return _compare(arguments, flags)
    except Interrupted as error:
        print(f"{error}. To go on:\n  {shlex.join(['llmlab', 'distill', *argv])}", file=sys.stderr)
        return exit_if_busy(error.exit_code)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _read(path: Path, flags: Sequence[str], prog: str) -> "Experiment":
    from llmlab.experiment import read_experiment
    from llmlab.flags import parse

    return parse(read_experiment(path), flags, prog=prog, file=path.name)


def _compare(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    from llmlab import runs
    from llmlab.config import config_hash
    from llmlab.data.store import default_cache_dir
    from llmlab.display.terminal import terminal_report
    from llmlab.distill import gains
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.training import compilation_cache
    from llmlab.training.directory import write_json, write_text
    from llmlab.training.report import NullReport

    leave_out_absent_tpu()
    path: Path = arguments.experiment
    experiment = _read(path, flags, f"llmlab distill {path}")
    jobs = {"student": experiment, "scratch": gains.without_teacher(experiment)}
    for each in jobs.values():
        each.validate()
    gains.check_comparable(experiment)
    out = arguments.out or Path("runs") / f"{path.stem}-{config_hash(experiment)}-distill"
    quiet = arguments.quiet or arguments.json
    compilation_cache.enable(default_cache_dir())
    trained = {}
    for name, job in jobs.items():
        report = NullReport() if quiet else terminal_report(f"{out.name}/{name}", steps=job.train.steps)
        trained[name] = runs.train(job, out / name, name=f"{path.stem}-{name}", report=report, experiment_file=path)
    results = gains.compare(
        experiment,
        trained["student"],
        trained["scratch"],
        tell=lambda text: None if quiet else print(text, file=sys.stderr),
    )
    from llmlab.commands import distill_tables

    write_json(out / "results.json", results)
    write_text(out / "report.md", distill_tables.markdown(results, title=path.stem))
    if arguments.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        distill_tables.show(results, out)
    return 0


def _cache(argv: Sequence[str]) -> int:
    parser = _cache_parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    arguments, flags = parser.parse_known_args(argv)

    from llmlab.distill.cache import DiskFull

    try:
        return _write_cache(arguments, flags)
    except DiskFull as error:
        print(f"error: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted. To go on:\n  {shlex.join(['llmlab', 'distill', 'cache', *argv])}", file=sys.stderr)
        return 130


def _write_cache(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    from llmlab.data.store import default_cache_dir
    from llmlab.distill.cache import Cache
    from llmlab.distill.objective import Distill
    from llmlab.distill.writing import write_cache
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.training import compilation_cache

    leave_out_absent_tpu()
    path: Path = arguments.experiment
    experiment = _read(path, flags, f"llmlab distill cache {path}")
    objective = experiment.objective
    if not isinstance(objective, Distill):
        raise ValueError(f"objective={type(objective).__name__} has no teacher; give objective=Distill(teacher=...)")
    experiment = dataclasses.replace(experiment, objective=dataclasses.replace(objective, cache=None))
    experiment.validate()
    compilation_cache.enable(default_cache_dir())
    cache: Cache = write_cache(
        experiment,
        arguments.out,
        kind="sampled" if arguments.sampled else "top-k",
        entries=arguments.entries,
        dtype=arguments.dtype,
        rows_per_shard=arguments.rows_per_shard,
        progress=lambda done, total: None if arguments.quiet else _progress(done, total),
    )
    size = sum(file.stat().st_size for file in cache.directory.glob("rows-*.zst"))
    places = cache.rows * cache.layout.places
    about: dict[str, Any] = {"rows": cache.rows, "places": places, "bytes": size, "bytes_per_place": size / places}
    if arguments.json:
        print(json.dumps(about))
    else:
        print(
            f"{cache.rows:,} rows of {cache.layout.places} places, {size / 1e6:,.1f} MB ({size / places:.0f} a place). "
            f"Train from it:\n  llmlab train {path} --objective.cache {arguments.out}"
        )
    return 0


def _progress(done: int, total: int) -> None:
    print(f"{done:,} of {total:,} rows", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab distill",
        usage="llmlab distill FILE.py [--out DIR] [--json] [--quiet] [--dotted.field VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="an experiment file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where both runs and the report go")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--quiet", action="store_true", help="show nothing but the table and errors")
    return parser


def _cache_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab distill cache",
        usage="llmlab distill cache FILE.py --out DIR [--entries N] [--sampled] [--dotted.field VALUE ...]",
        description=CACHE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="an experiment file")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the cache's directory")
    parser.add_argument("--entries", type=int, default=32, metavar="N", help="tokens kept of every distribution (32)")
    parser.add_argument("--sampled", action="store_true", help="draw the tokens, in place of the most probable ones")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of log-probabilities")
    parser.add_argument("--rows-per-shard", type=int, default=512, metavar="N", help="rows of a file (512)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument("--quiet", action="store_true", help="show nothing but the end and errors")
    return parser
