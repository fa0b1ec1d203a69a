"""What to try: mesh shapes x remat policies x microbatches, and in which order.

A candidate must be possible (axes divide what they split), then fit by arithmetic (llmlab.plan.memory), and only then
is it worth a compilation. The experiment's own choices are always compiled, so that what a search finds is never worse.
Others that fit are tried in the order of a quick estimate of the time of a step:

    compute    model FLOPs x recomputation / (chips x peak), recomputation 4/3 for "full", 1.1 for "dots"
    memory     what the forward pass makes for the backward pass, read and written twice and a half, once more where
               it is computed again; parameters, read and gradients written, in each microbatch; what tensor gathers
    data       gradients, all-reduced in the type of the arithmetic, once a step
    fsdp       parameters gathered for each forward and backward pass (again where "full" repeats the forward pass) and
               gradients scattered, in each microbatch
    tensor     the residual stream gathered and scattered, twice a layer, forward and backward (and again in "full")
    sequence   keys and values once around the ring, forward and twice backward
    expert     tokens to their experts and back, forward and backward

taking the longest of compute, memory and the sum of the rest (on the links of one dimension of the torus), and a fifth
of the others. It decides what is compiled first, nothing else: candidates that were compiled are ranked by their own
roofline.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmlab.plan.collectives import sent
from llmlab.plan.topology import Topology
from llmlab.sharding import Mesh

AXES_TRIED = ("data", "fsdp", "expert", "sequence", "tensor")
"""Mesh axes that a search varies; the others stay as the experiment has them."""

RECOMPUTATION = {"none": 1.0, "dots": 1.1, "full": 4 / 3}
"""Remat policy to compiled FLOPs over model FLOPs, roughly."""
PASSES = {"none": 5, "dots": 6, "full": 7}
"""Remat policy to how often what the forward pass makes goes through memory, roughly."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Choices in place of the experiment's."""

    mesh: Mesh
    remat: str
    accumulation: int
    written: bool = False
    """Whether these are the experiment's own."""

    def flags(self, *, has_remat: bool = True) -> list[str]:
        """What to write on the command line for them."""
        words = []
        for axis in AXES_TRIED:
            size = getattr(self.mesh, axis)
            if size != 1 or axis == "data":
                words += [f"--mesh.{axis}", str(size)]
        if has_remat:
            words += ["--model.execution.remat", self.remat]
        return [*words, "--train.accumulation", str(self.accumulation)]

    @property
    def label(self) -> str:
        """For people: "data=2 fsdp=32"."""
        sizes = {axis: getattr(self.mesh, axis) for axis in AXES_TRIED}
        return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an experiment admits."""

    heads: tuple[int, ...]
    """Sizes that tensor must divide: heads, hidden units."""
    experts: tuple[int, ...]
    """Sizes that expert must divide; () where there are no experts, and so no such axis."""
    length: int | None
    """Tokens of a row, which sequence must divide; None where rows are no tokens, or cannot be split."""
    batch_size: int
    """Rows of a step."""

    @classmethod
    def of(cls, dims: Mapping[str, set[int]], length: int | None, batch_size: int) -> "Limits":
        """From the sizes of the parameters' dimensions by logical name."""
        split = [size for name in ("heads", "mlp") for size in dims.get(name, ())]
        return cls(heads=tuple(split), experts=tuple(dims.get("experts", ())), length=length, batch_size=batch_size)

    def admits(self, sizes: Mapping[str, int], accumulation: int) -> bool:
        """Whether every axis divides what it splits."""
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if self.batch_size % accumulation or (self.batch_size // accumulation) % rows:
            return False
        if sizes["tensor"] > 1 and (not self.heads or any(size % sizes["tensor"] for size in self.heads)):
            return False
        if sizes["expert"] > 1 and (not self.experts or any(size % sizes["expert"] for size in self.experts)):
            return False
        # Fewer than 128 tokens a device are not worth a ring.
        return sizes["sequence"] == 1 or (self.length is not None and self.length % (128 * sizes["sequence"]) == 0)


def candidates(
    mesh: Mesh, num_devices: int, limits: Limits, policies: Sequence[str], slices: int = 1
) -> Iterator[Candidate]:
    """Every possible one, with powers of two as microbatches."""
    rest = num_devices // math.prod(max(1, mesh.sizes()[axis]) for axis in mesh.sizes() if axis not in AXES_TRIED)
    for shape in factorizations(rest, len(AXES_TRIED)):
        sizes: dict[str, int] = dict(zip(AXES_TRIED, shape, strict=True))
        if (sizes["data"] * sizes["fsdp"]) % slices:
            continue
        for exponent in range(8):
            if limits.admits(sizes, 2**exponent):
                for remat in policies:
                    changed = dataclasses.replace(mesh, **sizes)
                    yield Candidate(mesh=changed, remat=remat, accumulation=2**exponent)


def factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many factors, in order."""
    if parts == 1:
        yield (number,)
        return
    for first in (d for d in range(1, number + 1) if number % d == 0):
        for rest in factorizations(number // first, parts - 1):
            yield (first, *rest)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the quick estimate of time needs to know of an experiment."""

    model_flops: int
    """Of a step."""
    parameters: int
    """How many."""
    num_layers: int
    embed_dim: int
    kv_dim: int
    """Width of a token's keys in a layer, all heads."""
    tokens: int
    """Of a step."""
    kept: int
    """Bytes that a step's forward pass makes for its backward pass, over all devices, without rematerialisation."""
    item: int
    """Bytes of a number of the arithmetic."""


def quick_seconds(candidate: Candidate, sizes: Sizes, topology: Topology) -> float:
    """The estimate of the module's docstring."""
    chip, ways = topology.chip, candidate.mesh.resolve(topology.num_chips)
    again = 1 if candidate.remat == "full" else 0
    compute = sizes.model_flops * RECOMPUTATION[candidate.remat] / (topology.num_chips * chip.peak_flops)
    held = sizes.parameters * sizes.item / ways["tensor"]
    mine = sizes.tokens / math.prod(ways[axis] for axis in ("data", "fsdp", "expert", "sequence"))
    stream, kv_stream = (mine * dim * sizes.item * sizes.num_layers for dim in (sizes.embed_dim, sizes.kv_dim))
    passing = PASSES[candidate.remat] * sizes.kept / topology.num_chips + 6 * held * candidate.accumulation
    if ways["tensor"] > 1:
        passing += 2 * stream * 4 * (2 + again)  # gathered: written and read
    memory = passing / chip.memory_bandwidth
    travels = [
        sent("all-reduce", ways["data"], held / ways["fsdp"]),
        sent("all-gather", ways["fsdp"], held) * (3 + again) * candidate.accumulation,
        sent("all-gather", ways["tensor"], stream) * 4 * (2 + again),
        sent("all-gather", ways["sequence"], 2 * kv_stream * ways["sequence"] / ways["tensor"]) * (3 + again),
        sent("all-to-all", ways["expert"], 2 * stream) * (2 + again),
    ]
    travel = sum(travels) / (2 * chip.link_bandwidth)
    # Overlap is never perfect, and a microbatch's start and end are not overlapped: of two that take as long by their
    # longest part, the one that sends less in fewer pieces is tried first.
    longest = max(compute, memory, travel)
    return 0.8 * longest + 0.2 * (compute + memory + travel) + 0.01 * compute * math.log2(candidate.accumulation)


def spread(ordered: Sequence[Candidate], limit: int) -> list[Candidate]:
    """The first `limit`, at most three of one mesh, so that different meshes are compiled."""
    chosen: list[Candidate] = []
    per_mesh: dict[str, int] = {}
    for candidate in ordered:
        if per_mesh.get(candidate.label, 0) < 3:
            per_mesh[candidate.label] = per_mesh.get(candidate.label, 0) + 1
            chosen.append(candidate)
    return list(itertools.islice(chosen, limit))
