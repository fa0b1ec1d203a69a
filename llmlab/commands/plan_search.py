"""`llmlab plan --search`: which mesh, remat policy and microbatches to use on a TPU topology."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.plan_arithmetic import Arithmetic, with_remat
from llmlab.plan.report import Plan
from llmlab.plan.search import AXES_TRIED, Candidate, Limits, Sizes, candidates, quick_seconds, spread

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.plan.topology import Topology

SLACK = 1.0
"""A candidate that needs more than this times the memory by arithmetic is not compiled: the compiler mostly needs a
tenth more than arithmetic says."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A candidate and what the compiler said."""

    candidate: Candidate
    plan: Plan | None
    problem: str = ""
    """Why there is no plan."""

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Those that fit first, by the time of a step; of equal ones (three digits), by what it is without overlap."""
        if self.plan is None or self.plan.times is None:
            return True, float("inf"), float("inf")
        times = self.plan.times
        return not self.plan.memory.fits, float(f"{times.seconds:.3g}"), sum(times.parts.values())


def run(experiment: "Experiment", path: Path, topology: "Topology", *, at_once: int, limit: int, as_json: bool) -> int:
    """Tries, ranks, and prints the flags to use."""
    from rich.console import Console

    if at_once < 1 or limit < 1:
        raise ValueError(f"--at-once {at_once} and --limit {limit} must be positive")
    messages = Console(stderr=True)
    with messages.status("memory by arithmetic"):
        arithmetic = Arithmetic(experiment)
        possible, chosen = choose(arithmetic, topology, limit)
    if not chosen:
        raise ValueError(nothing(experiment, topology, possible))
    messages.print(
        f"{possible} choices are possible; compiling {len(chosen)}: the experiment's own where it is one, and the most "
        "promising that fit by arithmetic (--limit changes how many)"
    )
    outcomes = sorted(compiled(experiment, path, topology, chosen, at_once, messages), key=lambda one: one.rank)
    best = outcomes[0] if outcomes[0].plan is not None and outcomes[0].plan.memory.fits else None
    if as_json:
        print(json.dumps(record(outcomes, arithmetic, topology, possible), indent=2))
        return 0
    from llmlab.display.plan_search import render

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 160
    rows = [(one.candidate, one.plan, one.problem) for one in outcomes]
    command = None
    if best is not None:
        flags = best.candidate.flags(has_remat=arithmetic.has_remat)
        command = f"llmlab train {path} {' '.join(flags)}"
    console.print(render(rows, topology.chip, command))
    return 0


def choose(arithmetic: Arithmetic, topology: "Topology", limit: int) -> tuple[int, list[Candidate]]:
    """How many candidates are possible, and those to compile, most promising first."""
    experiment, model = arithmetic.experiment, arithmetic.model
    train = experiment.train
    limits = Limits.of(arithmetic.dims, train.sequence_length, train.batch_size)
    every = list(
        candidates(experiment.mesh, topology.num_chips, limits, arithmetic.policies, slices=experiment.mesh.slices)
    )
    shapes = {name: array.shape for name, array in arithmetic.batch.items()}
    sizes = Sizes(
        model_flops=model.flops(shapes),
        parameters=model.num_parameters(),
        num_layers=arithmetic.num_layers,
        embed_dim=max(arithmetic.dims.get("embed", {1})),
        kv_dim=max(arithmetic.dims.get("kv_heads", {1})) * max(arithmetic.dims.get("head_dim", {1})),
        tokens=model.num_tokens(shapes),
        kept=arithmetic.kept("none", train.precision) * train.batch_size,
        item=4 if train.precision == "float32" else 2,
    )

    def fits(candidate: Candidate) -> bool:
        memory = arithmetic.estimate(
            mesh=candidate.mesh,
            num_devices=topology.num_chips,
            remat=candidate.remat,
            accumulation=candidate.accumulation,
            precision=train.precision,
        )
        return memory.total <= SLACK * topology.chip.memory

    fitting = [candidate for candidate in every if fits(candidate)]
    ordered = sorted(fitting, key=lambda candidate: quick_seconds(candidate, sizes, topology))
    own = written(arithmetic, topology, limits)
    others = [one for one in ordered if own is None or dataclasses.replace(one, written=True) != own]
    return len(every), [*([] if own is None else [own]), *spread(others, limit)][:limit]


def written(arithmetic: Arithmetic, topology: "Topology", limits: Limits) -> Candidate | None:
    """The experiment's own choices; None where they are not possible on these chips."""
    experiment = arithmetic.experiment
    try:
        sizes = experiment.mesh.resolve(topology.num_chips)
    except ValueError:
        return None
    if not limits.admits(sizes, experiment.train.accumulation):
        return None
    execution = getattr(arithmetic.model, "execution", None)
    return Candidate(
        mesh=dataclasses.replace(experiment.mesh, **{axis: sizes[axis] for axis in AXES_TRIED}),
        remat="none" if execution is None else execution.remat,
        accumulation=experiment.train.accumulation,
        written=True,
    )


def compiled(
    experiment: "Experiment",
    path: Path,
    topology: "Topology",
    chosen: Sequence[Candidate],
    at_once: int,
    messages: Any,
) -> list[Outcome]:
    """What the compiler says to each, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from llmlab.commands.plan import compiler, request

    requests = [request(changed(experiment, candidate), path, topology) for candidate in chosen]
    outcomes = []
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        best: Outcome | None = None
        for index, answer in compiler().answers(requests, at_once=at_once):
            failed = isinstance(answer, Exception)
            problem = str(answer).strip().splitlines()[-1] if failed else ""
            outcome = Outcome(candidate=chosen[index], plan=None if failed else answer, problem=problem)
            outcomes.append(outcome)
            best = outcome if best is None or outcome.rank < best.rank else best
            progress.update(task, advance=1, description=f"best so far: {best.candidate.label} {best.candidate.remat}")
    return outcomes


def changed(experiment: "Experiment", candidate: Candidate) -> "Experiment":
    """The experiment with a candidate's choices."""
    model: Any = experiment.model
    if "execution" in {field.name for field in dataclasses.fields(model)}:
        model = with_remat(model, candidate.remat)
    train = dataclasses.replace(experiment.train, accumulation=candidate.accumulation)
    return dataclasses.replace(experiment, model=model, mesh=candidate.mesh, train=train)


def nothing(experiment: "Experiment", topology: "Topology", possible: int) -> str:
    """Why there is nothing to compile."""
    if not possible:
        return (
            f"no mesh of {topology.num_chips} chips can share train.batch_size={experiment.train.batch_size}; use a "
            f"batch that {topology.num_chips} or a divisor of it divides"
        )
    return (
        f"none of {possible} choices fits {topology.num_chips} x {topology.chip.name} by arithmetic; use more chips, "
        "fewer tokens a row, or an optimizer with a smaller state"
    )


def record(outcomes: Sequence[Outcome], arithmetic: Arithmetic, topology: "Topology", possible: int) -> dict[str, Any]:
    """Everything, as plain data, best first."""
    return {
        "topology": topology.name,
        "possible": possible,
        "tried": [
            {
                "flags": one.candidate.flags(has_remat=arithmetic.has_remat),
                "plan": None if one.plan is None else one.plan.to_json(),
                "problem": one.problem,
            }
            for one in outcomes
        ],
    }
