"""`llmlab plan`: what an experiment needs and how fast it could be, before any hardware is there."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.plan.jobs import Compiler
    from llmlab.plan.report import Plan
    from llmlab.plan.topology import Topology

DESCRIPTION = """\
Compile an experiment's train step for TPUs that are not here, and print what it needs and how fast it could be:
    llmlab plan experiments/plans/llama2_7b.py --topology v5p:4x4x4
    llmlab plan FILE.py --topology v5e:4x8 --mesh.fsdp 32 --train.batch-size 64
    llmlab plan FILE.py --topology v5p:4x4x4 --search        try meshes, remat policies and microbatches; rank what fits
    llmlab plan FILE.py --memory 80GB --devices 1            arithmetic alone, for GPUs: what fits, and with which flags
Further flags are the experiment's own: llmlab train FILE.py --help lists them.
The TPU compiler is needed for --topology, and no TPU: pip install 'llmlab[tpu]'.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab plan`."""
    parser = _parser()
    arguments, flags = parser.parse_known_args(argv)
    if (arguments.topology is None) == (arguments.memory is None):
        raise ValueError("give --topology v5p:4x4x4 for TPUs, or --memory 80GB --devices 1 for the arithmetic alone")
    if arguments.memory is not None and arguments.search:
        raise ValueError("--search compiles for TPUs and needs --topology; --memory tries every choice by itself")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process computes nothing, and libtpu must not start here

    from llmlab.experiment import read_experiment
    from llmlab.flags import parse

    path: Path = arguments.experiment
    experiment = parse(read_experiment(path), flags, prog=f"llmlab plan {path}", file=path.name)
    memory: str | None = arguments.memory
    if memory is not None:
        from llmlab.commands.plan_memory import run
        from llmlab.plan.memory import parse_size

        return run(experiment, path, parse_size(memory), arguments.devices, as_json=arguments.json)
    from llmlab.plan.topology import Topology, check_compiler

    topology = Topology.parse(arguments.topology, experiment.mesh.slices)
    check_compiler()
    if arguments.search:
        from llmlab.commands import plan_search

        experiment.validate()
        return plan_search.run(
            experiment, path, topology, at_once=arguments.at_once, limit=arguments.limit, as_json=arguments.json
        )
    experiment.validate(num_devices=topology.num_chips)
    return _single(experiment, path, topology, as_json=arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab plan",
        usage="llmlab plan FILE.py --topology NAME [--search] [--json] [--dotted.field VALUE ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", type=Path, metavar="FILE.py", help="experiment file or run directory")
    parser.add_argument("--topology", metavar="NAME", help="TPU chips and how they are wired: v5p:4x4x4, v5e:4x8")
    parser.add_argument("--search", action="store_true", help="try meshes x remat x microbatches, and rank what fits")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="compilations side by side (2)")
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="compilations, its own choices first (12)")
    parser.add_argument("--memory", metavar="SIZE", help="memory of a device, for the arithmetic alone: 80GB")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many such devices (1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def compiler() -> "Compiler":
    """What compiles, in processes of their own, with answers kept in llmlab's cache directory."""
    from llmlab.commands.plan_worker import MARK
    from llmlab.data.store import default_cache_dir
    from llmlab.plan.compile import remarks, versions
    from llmlab.plan.jobs import Compiler

    return Compiler(
        module="llmlab.commands.plan_worker",
        mark=MARK,
        remarks=remarks,
        cache=default_cache_dir() / "plans",
        versions=versions(),
    )


def request(experiment: "Experiment", path: Path, topology: "Topology") -> dict[str, Any]:
    """What the worker is asked."""
    from llmlab.config import to_json

    file = path if path.suffix == ".py" else path / "experiment.py"
    return {
        "config": to_json(experiment),
        "file": str(file.resolve()) if file.exists() else None,
        "topology": topology.name,
    }


def _single(experiment: "Experiment", path: Path, topology: "Topology", *, as_json: bool) -> int:
    from rich.console import Console

    from llmlab.display.plan import render

    asked = request(experiment, path, topology)
    stages = {
        "load": "loading the compiler",
        "build": "building the program",
        "trace": "tracing the step",
        "compile": f"compiling for {topology.num_chips} x {topology.chip.name} (a minute for billions of parameters)",
        "read": "reading the compiled program",
    }
    console = Console(stderr=True)
    with console.status(stages["load"]) as status:
        plan = compiler().answer(asked, lambda name: status.update(stages[name]))
    if as_json:
        print(json.dumps(record(plan, experiment, topology), indent=2))
        return 0
    out = Console(highlight=False)
    if not sys.stdout.isatty():
        out.width = 160
    out.print(render(plan, topology.chip, ascii_only=out.options.ascii_only, title=path.stem))
    return 0


def record(plan: "Plan", experiment: "Experiment", topology: "Topology") -> Mapping[str, Any]:
    """A plan with the constants that it was made with."""
    from dataclasses import asdict

    settings = {
        "batch_size": experiment.train.batch_size,
        "sequence_length": experiment.train.sequence_length,
        "accumulation": experiment.train.accumulation,
        "precision": experiment.train.precision,
    }
    return {**plan.to_json(), "settings": settings, "chip": asdict(topology.chip)}
