"""Compile a train step for a TPU topology, and read from the result what it will need and do.

To be called in a process of its own, whose environment has `llmlab.plan.topology.ENVIRONMENT`. What the compiler has
to say beyond its result goes to the process's stderr; `remarks` finds in it what a user should know.
"""

import importlib.metadata
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from llmlab.plan.collectives import Collective, collectives
from llmlab.plan.hlo import Module
from llmlab.plan.report import Flops, Memory, Plan, Traffic
from llmlab.plan.roofline import roofline, seconds
from llmlab.plan.topology import Topology
from llmlab.plan.work import Work, work
from llmlab.training.program import Program

GIB = 2**30
Stage = Callable[[str], None]


def plan(program: Program, topology: Topology, *, stage: Stage = lambda name: None) -> Plan:
    """Compiles a program's train step and reads the result.

    Args:
        program: built on a placement over `topology.devices()`.
        topology: what those devices are.
        stage: called with the name of each stage as it begins.
    """
    began = time.perf_counter()
    memory = held(program, topology)
    about: dict[str, Any] = {
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "mesh": {name: size for name, size in program.placement.mesh.shape.items() if size > 1},
        "tokens": program.model.num_tokens(program.shapes),
        "num_parameters": program.num_parameters,
        "versions": versions(),
    }
    stage("trace")
    lowered = program.train_step.lower(program.state, program.batch)
    stage("compile")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error))
        if needed is None:
            raise
        refused = Memory(**{**vars(memory), "needed": needed})
        return Plan(
            **about,
            memory=refused,
            warnings=tuple(whole_arrays(program)),
            compile_seconds=time.perf_counter() - began,
        )
    stage("read")
    found, done, unknown_loops, coords = read(compiled.as_text(), program)
    model_flops = program.model.flops(program.shapes)
    return Plan(
        **about,
        memory=with_compiler(memory, compiled.memory_analysis()),
        flops=Flops(
            model=model_flops,
            compiled=done.flops * topology.num_chips,
            kernels=done.kernel_flops * topology.num_chips,
        ),
        traffic=tuple(grouped(found, topology, coords)),
        times=roofline(topology, done, found, model_flops, coords),
        warnings=(*whole_arrays(program), *dear_gathers(found), *uncounted(done, unknown_loops)),
        compile_seconds=time.perf_counter() - began,
    )


def read(text: str | None, program: Program) -> tuple[list[Collective], Work, list[str], list[tuple[int, ...]]]:
    """Collectives, work of a chip, loops of unknown length, and the place of every device in its slice."""
    module = Module.parse(text)
    devices = list(program.placement.mesh.devices.flat)
    indices = [getattr(device, "slice_index", None) or 0 for device in devices]  # v4 devices have none
    slices = indices if len(set(indices)) > 1 else []
    found = collectives(module, dict(program.placement.mesh.shape), slices)
    done = work(module)
    return found, done, list(module.unknown_loops), [tuple(device.coords) for device in devices]


def held(program: Program, topology: Topology) -> Memory:
    """What a chip holds before a step begins, by the arrays' shapes and shardings."""
    state = program.state
    return Memory(
        capacity=topology.chip.memory,
        parameters=bytes_per_device(state.params),
        optimizer=bytes_per_device(state.optimizer_state),
        other=bytes_per_device((state.step, state.ema, state.loss_scale, program.scalars.frozen)),
        batch=bytes_per_device(program.batch),
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of a device's share of all arrays of a tree of jax.ShapeDtypeStruct with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def with_compiler(memory: Memory, analysis: Any) -> Memory:
    """Completed by what the compiler says of itself (`compiled.memory_analysis()`).

    Its `temp_size_in_bytes` sums what is not all there at once, and a program may have more than the chip has; its
    peak, arguments included, is what it checks against the chip.
    """
    return Memory(
        **{
            **vars(memory),
            "padding": analysis.argument_size_in_bytes - memory.arguments,
            "temporaries": max(0, analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes),
            "program": analysis.generated_code_size_in_bytes,
        }
    )


def grouped(found: Iterable[Collective], topology: Topology, coords: Sequence[tuple[int, ...]]) -> list[Traffic]:
    """Collectives summed by kind and axes, most bytes first."""
    rows: dict[tuple[str, tuple[str, ...], bool], list[Collective]] = defaultdict(list)
    for collective in found:
        rows[collective.kind, collective.axes, collective.num_slices > 1].append(collective)
    traffic = [
        Traffic(
            kind=kind,
            axes=axes,
            crosses_slices=crosses,
            count=sum(collective.times for collective in group),
            sent=round(sum(collective.times * collective.sent_bytes for collective in group)),
            seconds=sum(
                seconds(collective, topology, coords)
                + collective.times * collective.slow_bytes / topology.chip.slow_bandwidth
                for collective in group
            ),
        )
        for (kind, axes, crosses), group in rows.items()
    ]
    return sorted(traffic, key=lambda row: -row.sent)


def whole_arrays(program: Program, at_least: int = 64 * 2**20) -> list[str]:
    """A warning for arrays of the state that every chip holds whole, each of them large."""
    if program.placement.mesh.size == 1:
        return []
    large = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(program.state)[0]:
        size = leaf.size * leaf.dtype.itemsize
        if size >= at_least and leaf.sharding.is_fully_replicated:
            large.append((size, jax.tree_util.keystr(path, simple=True, separator=".")))
    if not large:
        return []
    large.sort(reverse=True)
    names = ", ".join(f"{name} ({size / GIB:.2f} GiB)" for size, name in large[:3])
    more = f" and {len(large) - 3} more" if len(large) > 3 else ""
    total = sum(size for size, _ in large) / GIB
    return [f"every chip holds {total:.2f} GiB of arrays whole: {names}{more}; mesh.fsdp splits them"]


def dear_gathers(found: Sequence[Collective]) -> list[str]:
    """A warning for gathers that the compiler made all-reduces of."""
    dear = [collective for collective in found if collective.gathers]
    sent = sum(collective.times * collective.sent_bytes for collective in dear)
    if sent < GIB:
        return []
    axes = " and ".join(dict.fromkeys(axis for collective in dear for axis in collective.axes))
    return [
        f"arrays are gathered over {axes} by all-reduces, {sent / GIB:.0f} GiB where half would do: the compiler does "
        "so where a chip's share of a dimension is no multiple of 128; fewer chips on that axis are better"
    ]


def uncounted(done: Work, unknown_loops: Sequence[str]) -> list[str]:
    """Warnings about what the counts above leave out."""
    found = [f"the FLOPs of kernel {name} are unknown and not counted" for name in sorted(done.unknown_kernels)]
    if done.evenly:
        found.append("experts are taken to be used evenly; where they are not, the busiest chip does more than this")
    return found + [
        f"the trip count of loop {loop} does not show; it counts once" for loop in dict.fromkeys(unknown_loops)
    ]


_SIZE = r"([\d.]+)([KMGT]?)i?B?"


def memory_needed(message: str) -> int | None:
    """Bytes that the compiler wanted, from its message that there are not so many; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    patterns = (rf"Used {_SIZE} of", rf"\({_SIZE}\) exceeds available", rf"required[^.]*? {_SIZE}\b")
    for pattern in patterns:
        if found := re.search(pattern, message):
            return round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return None


def remarks(stderr: str) -> list[str]:
    """What the compiler's own output says that a user should know, each once."""
    found: dict[str, int] = {}
    for line in stderr.splitlines():
        if re.search(r"[Ii]nvoluntary (full )?remat|rematerialization .*cannot|Can't reduce memory use below", line):
            text = re.sub(r"^\S*\s*[\d:. ]+\d+\s+\S+:\d+\]\s*", "", line).strip()
            found[text] = found.get(text, 0) + 1
    return [text if times == 1 else f"{text} ({times} times)" for text, times in found.items()]


def versions() -> dict[str, str]:
    """Of what decides the result."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
