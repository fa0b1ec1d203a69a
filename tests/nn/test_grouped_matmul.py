"""Grouped matmul: every implementation gives every row times its expert's matrix; more experts cost no more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.moe import blocked
from llmlab.nn.moe.grouped import IMPLEMENTATIONS, Implementation, grouped_matmul
from llmlab.plan.cost import count
from tests import tpu_compiler

NAMES = ("dense", "blocked", "megablox")

# Rows, and how many of them each expert has: blocks that are full, just not full and just overfull, steps likewise,
# empty groups first, last and between, rows beyond the groups, fewer rows than a block, no rows at all.
SIZES = {
    "mixed": (594, [5, 0, 300, 256, 33]),
    "rows beyond": (700, [5, 0, 300, 256, 33]),
    "block and step": (577, [0, 512, 32, 33, 0]),
    "blocks of 512": (1100, [600, 500]),
    "few": (15, [1, 2, 3, 4, 5]),
    "one expert has all": (290, [0, 0, 290, 0, 0]),
    "none": (40, [0, 0, 0, 0, 0]),
}


@pytest.fixture(autouse=True)
def without_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pallas kernels run in Python."""
    kernels: list[Any] = list(IMPLEMENTATIONS["megablox"])
    interpreted = Implementation(*(functools.partial(kernel, interpret=True) for kernel in kernels))
    monkeypatch.setitem(IMPLEMENTATIONS, "megablox", interpreted)


def problem(num_rows: int, sizes: list[int], dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Rows, matrices, group sizes, and the direction in which the result is differentiated."""
    random = np.random.default_rng(len(sizes) + num_rows)
    shapes = [(num_rows, 16), (len(sizes), 16, 24), (num_rows, 24)]
    x, w, direction = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return x, w, jnp.asarray(sizes), direction


@functools.partial(jax.jit, static_argnums=0)
def solve(name: Any, x: jax.Array, w: jax.Array, sizes: jax.Array, direction: jax.Array) -> tuple[jax.Array, ...]:
    """Result, gradient of the rows, gradient of the matrices."""

    def loss(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = grouped_matmul(x, w, sizes, name)
        return jnp.sum((y * direction).astype(jnp.float32)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, *gradients


def expected(x: Any, w: Any, sizes: Any, direction: Any) -> tuple[np.ndarray, ...]:
    """The same in float64, one row at a time."""
    x, w, direction = (np.asarray(array, np.float64) for array in (x, w, direction))
    y, dx, dw = np.zeros_like(direction), np.zeros_like(x), np.zeros_like(w)
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ w[expert]
        dx[row] = w[expert] @ direction[row]
        dw[expert] += np.outer(x[row], direction[row])
    return y, dx, dw


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_row_meets_the_matrix_of_its_expert(name: str, sizes: str) -> None:
    arrays = problem(*SIZES[sizes])
    for ours, exact in zip(solve(name, *arrays), expected(*arrays), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)  # sums of up to 300 products in float32


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rounds_once_at_the_end(name: str) -> None:
    arrays = problem(*SIZES["rows beyond"], jnp.bfloat16)
    for ours, exact in zip(solve(name, *arrays), expected(*arrays), strict=True):
        assert ours.dtype == jnp.bfloat16
        # sums in float32, then one rounding: half a unit in the last of 8 places
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=1e-2)


def test_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = problem(*SIZES["few"])
    for platform, function in (("cpu", "blocked_matmul"), ("gpu", "blocked_matmul"), ("tpu", "megablox_matmul")):
        monkeypatch.setattr("llmlab.nn.moe.grouped.platform", lambda platform=platform: platform)
        assert function in str(jax.make_jaxpr(lambda *a: grouped_matmul(*a))(*arrays[:3]))


def test_flops_are_those_of_the_rows_and_a_few_in_vain() -> None:
    num_rows, dim, width = 2048, 16, 24
    for name in ("blocked", "megablox"):
        for num_experts in (4, 32):
            spare = blocked.block_rows(num_rows, num_experts) // 8 - 1 if name == "blocked" else 0
            sizes = jnp.full(num_experts, num_rows // num_experts)
            shapes = [(num_rows, dim), (num_experts, dim, width), sizes.shape, (num_rows, width)]
            arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            arrays[2] = jax.ShapeDtypeStruct(sizes.shape, jnp.int32)
            one = 2 * (num_rows + spare * num_experts) * dim * width
            assert count(functools.partial(solve, name), *arrays).matmul_flops == 3 * one


PROGRAM = """
import json
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.module import split, merge, logical_axes
from llmlab.nn.moe import MixtureOfExperts, TopK
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = Mesh(data=1, fsdp=2, expert=2).build(devices)
config = MixtureOfExperts(num_experts=8, experts_per_token=2, expert=GatedMLP(hidden_dim=512))
graphdef, params = split(nnx.eval_shape(lambda: config.build(256, rngs=nnx.Rngs(params=0))))


def gradient(params, x):
    def loss(params, x):
        y, auxiliary = merge(graphdef, params)(x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + auxiliary["router_z"]

    return jax.grad(loss, argnums=(0, 1))(params, x)


with activate(mesh):
    where = mesh.shardings(logical_axes(merge(graphdef, params)), params)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=s), params, where)
    shape = (4, 1024, 256)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=active_sharding(shape, "batch", "sequence", None))
    compiled = jax.jit(gradient).lower(params, x).compile()
print(json.dumps({
    "kernels": compiled.as_text().count("tpu_custom_call"),
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
}))
"""


def test_a_mixture_compiles_to_megablox_for_tpu() -> None:
    result = tpu_compiler.run(PROGRAM)
    # Gate, up, down: forward, gradient of the rows, of the matrices; in further rounds of the exchange forward, and for
    # the gradient all but the last product of the forward pass once more.
    assert result["kernels"] == 9 + 3 + 8
    # A device's 4,096 rows of 512 numbers are 4 MB, and about ten such arrays live at once. Each row's own copy of a
    # matrix would be 1 GB.
    assert result["temporary"] < 60e6
