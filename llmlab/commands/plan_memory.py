"""`llmlab plan --memory 80GB --devices 1`: what can be trained on the memory there is, by arithmetic alone."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.plan_arithmetic import Arithmetic
from llmlab.plan.memory import Estimate
from llmlab.plan.search import RECOMPUTATION
from llmlab.sharding import Mesh

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.optim import Optimizer
    from llmlab.training.step import Precision

USABLE = 0.92
"""Part of the memory that arithmetic may fill; driver, allocator and what is not counted take the rest."""

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to train, and the memory that it takes."""

    optimizer: str
    own: bool
    """Whether the optimizer is the experiment's."""
    mesh: Mesh
    precision: "Precision"
    remat: str
    accumulation: int
    memory: Estimate

    @property
    def cost(self) -> tuple[bool, bool, float]:
        """What is wished least, first: another optimizer, float32, arithmetic done twice."""
        slower = RECOMPUTATION[self.remat] * (1 + 0.02 * (self.accumulation.bit_length() - 1))
        return not self.own, self.precision == "float32", slower * (1.02 if self.mesh.fsdp > 1 else 1.0)

    def flags(self, *, has_remat: bool) -> list[str]:
        """For the command line; another optimizer is chosen in the file."""
        words = ["--train.precision", self.precision, "--train.accumulation", str(self.accumulation)]
        words += ["--model.execution.remat", self.remat] if has_remat else []
        return [*words, *_mesh_flags(self.mesh)]


def run(experiment: "Experiment", path: Path, memory: int, devices: int, *, as_json: bool) -> int:
    """Prints what fits."""
    from rich.console import Console

    if devices < 1:
        raise ValueError(f"--devices {devices} is not positive")
    with Console(stderr=True).status("asking jax what the backward pass keeps"):
        arithmetic = Arithmetic(experiment)
        found = sorted(choices(arithmetic, devices), key=lambda choice: choice.cost)
    if not found:
        raise ValueError(
            f"train.batch_size={experiment.train.batch_size} cannot be shared by {devices} devices; "
            f"use a multiple of {devices}"
        )
    fitting = [choice for choice in found if choice.memory.total <= USABLE * memory]
    if as_json:
        print(json.dumps(record(arithmetic, found, fitting, memory, devices), indent=2))
        return 0
    from llmlab.display.plan_memory import render

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 160
    rows = [as_row(choice, arithmetic) for choice in (fitting[:_SHOWN] or least(found))]
    states = [as_row(choice, arithmetic) for choice in leanest(found)]
    size = {"parameters": arithmetic.model.num_parameters(), "memory": memory, "usable": USABLE, "devices": devices}
    command = f"llmlab train {path} {' '.join(fitting[0].flags(has_remat=arithmetic.has_remat))}" if fitting else None
    console.print(render(size, states, rows, command, fits=len(fitting), tried=len(found)))
    return 0


def choices(arithmetic: Arithmetic, devices: int) -> list[Choice]:
    """All that are possible."""
    experiment = arithmetic.experiment
    precisions: dict[Precision, None] = dict.fromkeys(("bfloat16", experiment.train.precision, "float32"))
    found = []
    for optimizer in optimizers(experiment.optimizer):
        for mesh in meshes(experiment.mesh, devices):
            for accumulation in microbatches(experiment.train.batch_size, devices):
                for precision in precisions:
                    for remat in arithmetic.policies:
                        memory = arithmetic.estimate(
                            mesh=mesh,
                            num_devices=devices,
                            remat=remat,
                            accumulation=accumulation,
                            precision=precision,
                            optimizer=optimizer,
                        )
                        found.append(
                            Choice(
                                optimizer=type(optimizer).__name__,
                                own=optimizer is experiment.optimizer,
                                mesh=mesh,
                                precision=precision,
                                remat=remat,
                                accumulation=accumulation,
                                memory=memory,
                            )
                        )
    return found


def optimizers(own: "Optimizer") -> list["Optimizer"]:
    """The experiment's, and those with a smaller state at the same learning rate."""
    from llmlab.optim import SGD, Adafactor, AdamW, Lion

    others = [kind for kind in (AdamW, Lion, Adafactor, SGD) if not isinstance(own, kind)]
    return [own, *(kind(peak_lr=own.peak_lr, schedule=own.schedule) for kind in others)]


def meshes(mesh: Mesh, devices: int) -> list[Mesh]:
    """One device; else the state split over all of them, and whole on each."""
    ones = dict.fromkeys(mesh.sizes(), 1)
    if devices == 1:
        return [dataclasses.replace(mesh, **{**ones, "data": 1})]
    return [dataclasses.replace(mesh, **{**ones, **split}) for split in ({"fsdp": devices}, {"data": devices})]


def microbatches(batch_size: int, devices: int) -> list[int]:
    """Parts of the batch: powers of two, and rows one by one."""
    rows, rest = divmod(batch_size, devices)
    if rest:
        return []
    powers = [2**exponent for exponent in range(rows.bit_length()) if rows % 2**exponent == 0]
    return sorted({*powers, rows})


def least(found: list[Choice]) -> list[Choice]:
    """Those that need least, where nothing fits."""
    return sorted(found, key=lambda choice: choice.memory.total)[:5]


def leanest(found: list[Choice]) -> list[Choice]:
    """The choice of each optimizer that needs least."""
    best: dict[str, Choice] = {}
    for choice in found:
        if choice.optimizer not in best or choice.memory.total < best[choice.optimizer].memory.total:
            best[choice.optimizer] = choice
    return list(best.values())


def as_row(choice: Choice, arithmetic: Arithmetic) -> dict[str, Any]:
    """Plain data."""
    return {
        "optimizer": choice.optimizer,
        "own": choice.own,
        "mesh": {axis: size for axis, size in choice.mesh.sizes().items() if size > 1},
        "precision": choice.precision,
        "remat": choice.remat,
        "accumulation": choice.accumulation,
        "memory": {**vars(choice.memory), "total": choice.memory.total},
        "flags": choice.flags(has_remat=arithmetic.has_remat),
    }


def record(
    arithmetic: Arithmetic, found: list[Choice], fitting: list[Choice], memory: int, devices: int
) -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "num_parameters": arithmetic.model.num_parameters(),
        "memory": memory,
        "usable": USABLE,
        "devices": devices,
        "fits": [as_row(choice, arithmetic) for choice in fitting],
        "least": [as_row(choice, arithmetic) for choice in leanest(found)],
    }


def _mesh_flags(mesh: Mesh) -> list[str]:
    sizes = {axis: size for axis, size in mesh.sizes().items() if size > 1}
    if not sizes:
        return []
    return [word for axis, size in {"data": 1, **sizes}.items() for word in (f"--mesh.{axis}", str(size))]
