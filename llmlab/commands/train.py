"""`llmlab train`: train the model of an experiment file, or go on where a run of it was cut short."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Train the model of an experiment file. Every value of the experiment is a flag:
    llmlab train experiments/quickstart.py
    llmlab train experiments/quickstart.py --help                   every value, with its default
    llmlab train experiments/quickstart.py --optimizer.peak-lr 1e-3
The run goes to runs/<file>-<hash of the config>. The same command again resumes it at its last checkpoint.
On a TPU pod or under Slurm the same command on every host trains together. Elsewhere say where they meet:
    llmlab train FILE.py --coordinator 10.0.0.1:8476 --num-processes 2 --process-id 0        and 1 on the other host
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab train`."""
    began = time.perf_counter()
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise ValueError(f"give the experiment file before the flags: llmlab train FILE.py {shlex.join(argv)}")
    arguments, flags = parser.parse_known_args(argv)
    path: Path = arguments.experiment
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the experiment file that it was made from")
    if "-h" in flags or "--help" in flags:
        print(parser.format_help())
    elif not _started(arguments):
        return 1

    from llmlab import runs
    from llmlab.sharding import cluster
    from llmlab.training.faults import Interrupted, NonFiniteError

    try:
        with runs.together():
            return _train(arguments, flags, shlex.join(["llmlab", "train", *argv]), began)
    except Interrupted as error:  # before there was an experiment
        return _left(error.exit_code)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except cluster.Departed as error:
        print(f"error: {error}", file=sys.stderr)
        return _left(error.exit_code)


def _started(arguments: argparse.Namespace) -> bool:
    """Sets the compiler's flags and the allocator, and joins the cluster, where there is one; False, and why, where
    that failed."""
    from llmlab.sharding import cluster, xla_flags
    from llmlab.training import host_memory

    xla_flags.apply(arguments.xla_flags)
    if xla_flags.expected_platform(os.environ) == "cpu":
        host_memory.keep(os.environ)
    try:
        cluster.join(
            coordinator=arguments.coordinator,
            num_processes=arguments.num_processes,
            process_id=arguments.process_id,
            timeout=arguments.coordinator_timeout,
        )
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def _left(exit_code: int) -> int:
    """The exit code, once the other processes know that this one is leaving, and the compiler keeps nobody."""
    from llmlab.sharding import cluster
    from llmlab.training.faults import exit_if_busy

    cluster.here().farewell()
    return exit_if_busy(exit_code)


def _train(arguments: argparse.Namespace, flags: Sequence[str], again: str, began: float) -> int:
    """Reads the experiment and trains. `again` is this command, `began` when it was started."""
    from llmlab import runs
    from llmlab.data.store import default_cache_dir
    from llmlab.display.terminal import terminal_report
    from llmlab.experiment import read_experiment
    from llmlab.flags import parse
    from llmlab.sharding import cluster
    from llmlab.training import compilation_cache
    from llmlab.training.checkpoint import saved_steps
    from llmlab.training.faults import Interrupted
    from llmlab.training.report import NullReport

    path: Path = arguments.experiment
    experiment = parse(read_experiment(path), flags, prog=f"llmlab train {path}", file=path.name)
    out = arguments.out or runs.default_directory(experiment, path.stem)
    speaks = cluster.here().is_first
    report = (
        NullReport()
        if arguments.quiet or not speaks
        else terminal_report(
            out.name,
            run=out,
            experiment=path,
            flags=flags,
            steps=experiment.train.steps,
            peak_lr=experiment.optimizer.peak_lr,
        )
    )
    compilation_cache.enable(default_cache_dir())
    try:
        runs.train(
            experiment,
            out,
            name=path.stem,
            report=report,
            allow_config_change=arguments.allow_config_change,
            experiment_file=path,
            seconds={"imports": time.perf_counter() - began},
        )
    except Interrupted as error:
        newest = max(saved_steps(out / "checkpoints"), default=None)
        saved = "nothing was trained yet" if newest is None else f"step {newest} is saved in {out}"
        if speaks:
            print(f"{error}; {saved}. To go on:\n  {again}", file=sys.stderr)
        return _left(error.exit_code)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab train",
        usage="llmlab train FILE.py [--out DIR] [--allow-config-change] [--quiet] [--dotted.field VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="an experiment file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run directory (runs/<file>-<hash> by default)")
    parser.add_argument(
        "--allow-config-change", action="store_true", help="go on with a run whose config differs from this one"
    )
    parser.add_argument("--quiet", action="store_true", help="show nothing but errors")
    parser.add_argument(
        "--xla-flags",
        choices=("default", "none"),
        help="XLA's flags for hiding communication on GPUs and TPUs, besides those in XLA_FLAGS and LIBTPU_INIT_ARGS",
    )
    cluster = parser.add_argument_group(
        "several processes", "found on a TPU pod and under Slurm; or all three, or $LLMLAB_COORDINATOR and so on"
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    cluster.add_argument("--num-processes", type=int, metavar="N", help="how many processes train together")
    cluster.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    cluster.add_argument(
        "--coordinator-timeout", type=int, default=300, metavar="SECONDS", help="to wait for the others (300)"
    )
    return parser
