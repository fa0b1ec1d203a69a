"""Experts on sorted rows: every implementation gives what a row's expert makes of it; more experts cost no more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.dropout import factor_at
from llmlab.nn.moe import blocked, megablox
from llmlab.nn.moe.grouped import grouped_mlp
from llmlab.nn.moe.mlp import Draw, Hidden, Matrices
from llmlab.plan.cost import count
from tests import tpu_compiler
from tests.selection import at_scale_but

NAMES = ("dense", "blocked", "megablox")
DIM, WIDTH = 16, 12

# Rows, and how many of them each expert has: pieces that are full, just not full and just overfull, all at once, empty
# groups first, last and between, rows beyond the groups, fewer rows than a piece, no rows at all.
SIZES = {
    "mixed": (594, [5, 0, 300, 256, 33]),
    "rows beyond": (700, [5, 0, 300, 256, 33]),
    "block and step": (577, [0, 512, 32, 33, 0]),
    "blocks of 512": (1100, [600, 500]),
    "every piece": (1030, [511, 519]),
    "few": (15, [1, 2, 3, 4, 5]),
    "few, and rows beyond": (20, [1, 2, 0, 4, 5]),
    "one expert has all": (290, [0, 0, 290, 0, 0]),
    "none": (40, [0, 0, 0, 0, 0]),
}


@pytest.fixture(autouse=True)
def without_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pallas kernels run in Python."""
    for name in ("megablox_matmul", "megablox_matmul_transposed", "megablox_outer"):
        monkeypatch.setattr(megablox, name, functools.partial(getattr(megablox, name), interpret=True))


def problem(
    num_rows: int, sizes: list[int], *, gated: bool, bias: bool, rate: float = 0.0, dtype: Any = jnp.float32
) -> tuple[Hidden, tuple[Any, ...]]:
    """What stands between the matrices; rows, matrices, sizes, dropout, and the direction of the derivative."""
    random = np.random.default_rng(len(sizes) + num_rows)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), dtype)

    def matrices(inputs: int, outputs: int) -> Matrices:
        kernel = drawn(len(sizes), inputs, outputs) / np.asarray(inputs**0.5, dtype)
        return Matrices(kernel, drawn(len(sizes), outputs) if bias else None)

    first = tuple(matrices(DIM, WIDTH) for _ in range(1 + gated))
    draw = None
    if rate > 0.0:
        draw = Draw(jnp.asarray([3, 4], jnp.uint32), jnp.asarray(random.permutation(num_rows)), jnp.arange(WIDTH))
    x, direction = drawn(num_rows, DIM), drawn(num_rows, DIM)
    return Hidden("tanh", gated, rate), (x, first, matrices(WIDTH, DIM), jnp.asarray(sizes), draw, direction)


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(
    name: Any, hidden: Hidden, x: Any, first: Any, last: Any, sizes: Any, draw: Any, direction: Any
) -> tuple[jax.Array, ...]:
    """Result, gradient of the rows, gradients of the matrices."""

    def loss(x: jax.Array, first: Any, last: Any) -> tuple[jax.Array, jax.Array]:
        y = grouped_mlp(hidden, x, first, last, sizes, draw, name)
        return jnp.sum((y * direction).astype(jnp.float32)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, first, last)
    return y, *jax.tree.leaves(gradients)


def expected(
    hidden: Hidden, x: Any, first: Any, last: Any, sizes: Any, draw: Any, direction: Any
) -> tuple[np.ndarray, ...]:
    """The same in float64, one row at a time, its derivatives by hand."""
    exact = functools.partial(np.asarray, dtype=np.float64)
    first, last = jax.tree.map(exact, (first, last))
    dfirst, dlast = jax.tree.map(np.zeros_like, (first, last))
    y, dx = np.zeros_like(exact(x)), np.zeros_like(exact(x))
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        row_x, dy = exact(x[row]), exact(direction[row])
        pre = [row_x @ one.kernel[e] + (0.0 if one.bias is None else one.bias[e]) for one in first]
        factor = np.ones(WIDTH)
        if draw is not None:
            factor = exact(factor_at(hidden.dropout, draw.seed, (WIDTH,), draw.choice[row], draw.unit_F))
        act, rest = np.tanh(pre[0]), pre[1] if hidden.gated else 1.0
        h = act * rest * factor
        y[row] = h @ last.kernel[e] + (0.0 if last.bias is None else last.bias[e])
        dh = last.kernel[e] @ dy * factor
        dpre = [dh * rest * (1 - act**2), dh * act][: len(pre)]
        for matrices, gradient, inputs, outputs in (
            (last, dlast, h, dy),
            *((one, done, row_x, done_pre) for one, done, done_pre in zip(first, dfirst, dpre, strict=True)),
        ):
            gradient.kernel[e] += np.outer(inputs, outputs)
            if matrices.bias is not None:
                gradient.bias[e] += outputs
        dx[row] = sum(one.kernel[e] @ done for one, done in zip(first, dpre, strict=True))
    return y, dx, *jax.tree.leaves((dfirst, dlast))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", at_scale_but(("mixed", "few, and rows beyond", "none"), SIZES))
def test_every_row_meets_the_matrices_of_its_expert(name: str, sizes: str) -> None:
    hidden, arrays = problem(*SIZES[sizes], gated=True, bias=False)
    for ours, exact in zip(solve(name, hidden, *arrays), expected(hidden, *arrays), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)  # sums of up to 600 products in float32


@pytest.mark.scale
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gated", [True, False])
def test_biases_and_dropped_units_are_each_row_its_own(name: str, gated: bool) -> None:
    hidden, arrays = problem(*SIZES["rows beyond"], gated=gated, bias=True, rate=0.25)
    for ours, exact in zip(solve(name, hidden, *arrays), expected(hidden, *arrays), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rounds_what_is_kept_and_sums_in_float32(name: str) -> None:
    hidden, arrays = problem(*SIZES["rows beyond"], gated=True, bias=False, dtype=jnp.bfloat16)
    for ours, exact in zip(solve(name, hidden, *arrays), expected(hidden, *arrays), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Each of the three layers of numbers is rounded to 8 places: a few units in the last of the largest.
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=2**-6 * np.abs(exact).max())


def test_experts_without_rows_are_not_read() -> None:
    """Their matrices are not numbers, and nothing shows it."""
    hidden, (x, first, last, sizes, draw, direction) = problem(*SIZES["block and step"], gated=True, bias=False)
    idle = (sizes == 0)[:, None, None]
    first, last = jax.tree.map(lambda kernel: jnp.where(idle, jnp.nan, kernel), (first, last))
    results = solve("blocked", hidden, x, first, last, sizes, draw, direction)
    assert all(bool(jnp.all(jnp.isfinite(result))) for result in results)


def test_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, (*arrays, _, _) = problem(*SIZES["few"], gated=True, bias=False)
    for platform, function in (("cpu", "blocked_mlp"), ("gpu", "blocked_mlp"), ("tpu", "megablox_matmul")):
        monkeypatch.setattr("llmlab.nn.moe.grouped.platform", lambda platform=platform: platform)
        assert function in str(jax.make_jaxpr(functools.partial(grouped_mlp, hidden))(*arrays))


@pytest.mark.scale
def test_flops_are_those_of_the_rows_and_a_few_in_vain() -> None:
    num_rows = 2048
    for name in ("blocked", "megablox"):
        for num_experts in (4, 32):
            spare = blocked.pieces(num_rows, num_experts)[-1] - 1 if name == "blocked" else 0
            hidden, arrays = problem(num_rows, [num_rows // num_experts] * num_experts, gated=True, bias=False)
            one = 2 * (num_rows + spare * num_experts) * DIM * WIDTH
            assert count(functools.partial(solve, name, hidden), *arrays).matmul_flops == 9 * one


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


@pytest.mark.scale
def test_a_mixture_compiles_to_megablox_for_tpu() -> None:
    result = tpu_compiler.run(PROGRAM)
    # Gate, up, down: forward, gradient of the rows, of the matrices; in further rounds of the exchange forward, and for
    # the gradient all but the last product of the forward pass once more.
    assert result["kernels"] == 9 + 3 + 8
    # A device's 4,096 rows of 512 numbers are 4 MB, and about ten such arrays live at once. Each row's own copy of a
    # matrix would be 1 GB.
    assert result["temporary"] < 60e6
