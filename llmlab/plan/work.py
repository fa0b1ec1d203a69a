"""What one chip computes and moves in a step, counted in the compiled program: loops times their trips.

FLOPs are those of matrix products: 2 for each multiply-add of every dot and convolution, also inside fusions. The TPU
compiler writes a product of matrices as a convolution with a window that slides over padding; places where the window
is over padding do no work and do not count. Kernels (Pallas) are opaque to the compiler and cost what the table below
says. Attention kernels count every pair of query and key, masked or not, as the models' own formula does; the kernel
skips blocks that a causal mask hides, so it does up to half of that. Products of experts do the rows that there are:
counted are those of even use, where the name of the operation tells how many of an array's rows that is.

Bytes are those between the chip's main memory and its compute units (llmlab.plan.main_memory).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmlab.plan.hlo import Computation, Instruction, Module
from llmlab.plan.main_memory import traffic

EVEN_ROWS = re.compile(r"even_rows_(\d+)_of_(\d+)")
"""Part of an operation's name: how many rows of an array even use of experts fills (llmlab.nn.moe.exchange)."""


@dataclass
class Work:
    """Of one chip in one step."""

    flops: int = 0
    """Of matrix products, kernels included."""
    kernel_flops: int = 0
    """Those of kernels."""
    traffic: int = 0
    """Bytes between main memory and compute units."""
    evenly: bool = False
    """Whether products of experts are among them that count as even use has them."""
    unknown_kernels: set[str] = field(default_factory=set)
    """Kernels that are in no table, whose FLOPs do not count."""


def work(module: Module) -> Work:
    """FLOPs and bytes of a compiled program, loops multiplied."""
    total = Work()
    for run in module.runs():
        instruction, inside = run.instruction, run.computation
        if instruction.opcode == "dot":
            total.flops += run.times * dot_flops(instruction, inside)
        elif instruction.opcode == "convolution":
            total.flops += run.times * convolution_flops(instruction, inside)
        elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
            flops = kernel_flops(instruction, inside)
            if flops is not None and (found := EVEN_ROWS.search(instruction.source)):
                used, room = int(found[1]), int(found[2])
                flops, total.evenly = flops * used // room, total.evenly or used < room
            if flops is None:
                total.unknown_kernels.add(re.sub(r"[.\d]+$", "", instruction.name))
            else:
                total.flops += run.times * flops
                total.kernel_flops += run.times * flops
        if run.fusion is None:
            total.traffic += run.times * traffic(instruction, inside, module.computations)
    return total


def dot_flops(instruction: Instruction, inside: Computation) -> int:
    """2 x result x contracted dimensions."""
    left = inside.operand_shapes(instruction)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
    return 2 * instruction.shapes[0].size * math.prod(left.dims[dim] for dim in dims)


def convolution_flops(instruction: Instruction, inside: Computation) -> int:
    """2 x rows x features in x features out x (places where the window meets data, each dimension)."""
    left, kernel = inside.operand_shapes(instruction)[:2]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    of_left, of_kernel, of_result = labels.groups()
    result = instruction.shapes[0]
    flops = 2 * result.dims[of_result.index("b")] * kernel.dims[of_kernel.index("i")]
    flops *= kernel.dims[of_kernel.index("o")]
    window = _window(instruction.attributes, sum(label.isdigit() for label in of_left))
    for dim, place in enumerate(window):
        label = str(dim)
        sizes = (left.dims[of_left.index(label)], kernel.dims[of_kernel.index(label)])
        flops *= _meetings(*sizes, result.dims[of_result.index(label)], place)
    return flops


def _window(attributes: str, num_dims: int) -> list[dict[str, int]]:
    """Stride, padding in front and dilations of every spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    written = dict(part.split("=") for part in found[1].split()) if found else {}
    places = [{"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1} for _ in range(num_dims)]
    for name in ("stride", "pad", "lhs_dilate", "rhs_dilate"):
        for place, value in zip(places, written[name].split("x") if name in written else (), strict=False):
            place[name] = int(value.split("_")[0])
    return places


def _meetings(left: int, kernel: int, result: int, place: Mapping[str, int]) -> int:
    """Pairs of a place in the result and a tap of the kernel that meet an element of the left operand."""
    position = np.arange(result)[:, None] * place["stride"] - place["pad"] + np.arange(kernel) * place["rhs_dilate"]
    last = (left - 1) * place["lhs_dilate"]
    return int(np.count_nonzero((position >= 0) & (position <= last) & (position % place["lhs_dilate"] == 0)))


# Part of a kernel's name -> products of queries and keys that it makes along the width of keys, and along that of
# values: each is 2 x queries x keys x width.
_ATTENTION = (
    ("splash_mqa_fwd", 1, 1),  # scores; values
    ("splash_mqa_dkv", 2, 2),  # scores again, gradient of keys; gradients of the weights, of values
    ("splash_mqa_dq", 2, 1),  # scores again, gradient of queries; gradient of the weights
    ("splash_mha_fwd", 1, 1),
    ("splash_mha_dkv", 2, 2),
    ("splash_mha_dq", 2, 1),
    ("relative_fwd", 1, 1),
    ("relative_dkv", 2, 2),
    ("relative_dq", 2, 1),
)


def kernel_flops(instruction: Instruction, inside: Computation) -> int | None:
    """FLOPs of a Pallas kernel by its name and shapes; None for one that is not known here."""
    name, shapes = instruction.name, inside.operand_shapes(instruction)
    floating = [shape for shape in shapes if shape.dtype in ("bf16", "f32", "f16") and len(shape.dims) > 1]
    for part, of_keys, of_values in _ATTENTION:
        if part in name:  # queries (..., group, S, H), keys (..., T, H), values (..., T, V)
            queries, keys, values = floating[:3]
            width = of_keys * keys.dims[-1] + of_values * values.dims[-1]
            return 2 * queries.size // queries.dims[-1] * keys.dims[-2] * width
    if "tgmm" in name:  # megablox, gradient of the experts' matrices: (D, R) and (R, F)
        left, right = floating[:2]
        return 2 * left.size * right.dims[-1]
    if "gmm" in name:  # rows (R, D) times the matrix of their expert (E, D, F)
        rows, result = floating[0], instruction.shapes[0]
        return 2 * rows.size * result.dims[-1]
    return None
