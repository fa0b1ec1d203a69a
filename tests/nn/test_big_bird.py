"""BigBird's attention equals the dense matrix that its definition gives, and costs what a few blocks cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention
from llmlab.nn.big_bird import BigBirdAttention
from llmlab.nn.config import Context
from llmlab.nn.kernels import sparse as sparse_kernel
from llmlab.nn.masks import Full, Mask, Padding, Segments
from llmlab.nn.module import merge, split
from llmlab.plan.cost import count
from tests.nn.dense_lists import project_back, projected
from tests.nn.linear_cost import assert_linear

DIM = 24
# Float32 against float64: sums of tens of products, each rounded to 6e-8.
CLOSE = 1e-5


def layer(config: Attention, dim: int = DIM) -> tuple[Any, Any]:
    """Graph definition, and parameters none of which is zero."""
    graphdef, params = split(config.build(dim, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / dim**0.5, jnp.float32), params)


def context(length: int, mask: Mask, draws: Any = None) -> Context:
    named = None if draws is None else {"random_blocks": jnp.asarray(draws)}
    return Context(mask=mask, position_ids=jnp.arange(length)[None], draws=named)


def rows(length: int) -> tuple[np.ndarray, np.ndarray, Mask]:
    """Which tokens are real, and their documents: padding on the left, on the right, and two documents without."""
    real, segment = np.ones((3, length), bool), np.zeros((3, length), np.int32)
    real[0, : length // 3] = False
    real[1, -(length // 4) :] = False
    segment[2, length // 2 + 1 :] = 1
    return real, segment, Padding(jnp.asarray(real)) & Segments(jnp.asarray(segment), jnp.asarray(segment))


def listed(real: np.ndarray, segment: np.ndarray, block: int, random_KCR: np.ndarray, heads: int) -> np.ndarray:
    """How often each query lists each key, by the definition, (B, N, S, T)."""
    length = real.shape[1]
    num_blocks = -(-length // block)
    blocks = np.zeros((heads, num_blocks, num_blocks), int)
    for n in range(heads):
        for i in range(num_blocks):
            if i in (0, num_blocks - 1):
                blocks[n, i] = 1
                continue
            for j in {0, num_blocks - 1, i - 1, i, i + 1}:
                blocks[n, i, j] = 1
            for j in random_KCR[n // (heads // len(random_KCR)), i - 1]:
                blocks[n, i, j] += 1
    of = np.arange(length) // block
    seen = real[:, :, None] & real[:, None, :] & (segment[:, :, None] == segment[:, None, :])
    return blocks[:, of[:, None], of] * seen[:, None]


@pytest.mark.parametrize(
    ("length", "kv_heads", "num_random", "given"), [(60, 4, 2, "seed"), (52, 2, 1, "caller"), (37, 4, 1, "first block")]
)
def test_output_and_gradients_equal_the_dense_matrix_of_the_definition(length, kv_heads, num_random, given):
    config = BigBirdAttention(
        num_heads=4,
        num_kv_heads=kv_heads,
        block_size=5,
        num_random_blocks=num_random,
        bias=True,
        seed=None if given == "first block" else 7,
        layer=1,
    )
    num_blocks = -(-length // 5)
    rng = np.random.default_rng(1)
    draws = rng.integers(0, num_blocks, (2, kv_heads, num_blocks - 2, num_random)) if given == "caller" else None
    graphdef, params = layer(config)
    x, dy = rng.normal(size=(2, 3, length, DIM)).astype(np.float32)
    real, segment, mask = rows(length)
    assert not config.full(length)

    random = config.random_blocks(num_blocks) if draws is None else draws[1]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    names = ("query", "key", "value")
    dense = projected(x, p, names, listed(real, segment, 5, random, 4))
    y = np.tensordot(dense.forward(), p["output"]["kernel"], axes=2)
    dx, gradients = np.zeros_like(x), {}
    for name, dz in zip(names, dense.backward(np.einsum("BSD,NHD->BSNH", dy, p["output"]["kernel"])), strict=True):
        more, gradients[name] = project_back(x, p[name], dz)
        dx = dx + more

    def loss(params: Any, x: jax.Array) -> Any:
        y, _ = merge(graphdef, params)(x, context(length, mask, draws))
        return jnp.sum(y * dy), y

    (_, ours), (found, dx_ours) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(x))
    assert_close(ours, y)
    assert_close(dx_ours, dx)
    assert_close({name: found[name] for name in names}, gradients)


def assert_close(ours: Any, theirs: Any) -> None:
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * largest), ours, theirs)


def test_many_blocks_a_step_compute_what_one_block_a_step_does(monkeypatch):
    graphdef, params = layer(BigBirdAttention(num_heads=2, block_size=5, num_random_blocks=2))
    _, _, mask = rows(60)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 60, DIM)), jnp.float32)

    def gradient(step_bytes: int) -> Any:
        monkeypatch.setattr(sparse_kernel, "_CPU_STEP_BYTES", step_bytes)

        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(merge(graphdef, params)(x, context(60, mask))[0]))

        return jax.jit(jax.value_and_grad(loss))(params)

    assert_close(gradient(2**30), gradient(1))


def test_short_sequences_have_full_attention():
    sparse_one, full_one = BigBirdAttention(num_heads=4, block_size=5, num_random_blocks=1), Attention(num_heads=4)
    assert sparse_one.full(35)
    assert not sparse_one.full(36)
    graphdef, params = layer(sparse_one)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 35, DIM)), jnp.float32)
    _, _, mask = rows(35)
    ours, _ = merge(graphdef, params)(x, context(35, mask))
    theirs, _ = merge(layer(full_one)[0], params)(x, context(35, mask))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_packed_documents_do_not_see_each_other():
    graphdef, params = layer(BigBirdAttention(num_heads=4, block_size=4, num_random_blocks=2))
    run = jax.jit(lambda x, mask: merge(graphdef, params)(x, context(60, mask))[0])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 60, DIM)), jnp.float32)
    _, segment, mask = rows(60)
    changed = run(jnp.where(segment[..., None] == 0, x + 1, x), mask)
    np.testing.assert_array_equal(np.asarray(run(x, mask))[segment == 1], np.asarray(changed)[segment == 1])


@pytest.mark.parametrize("num_blocks", [12, 40])
def test_random_blocks_are_distinct_not_near_not_global_and_even(num_blocks):
    config = BigBirdAttention(num_heads=200, num_random_blocks=3)
    drawn = config.random_blocks(num_blocks)
    assert drawn.shape == (200, num_blocks - 2, 3)
    query = np.arange(1, num_blocks - 1)[:, None]
    assert drawn.min() >= 1
    assert drawn.max() <= num_blocks - 2
    assert (np.abs(drawn - query) > 1).all()
    assert (np.diff(np.sort(drawn, axis=-1), axis=-1) > 0).all()
    np.testing.assert_array_equal(drawn, config.random_blocks(num_blocks))
    for query in (0, 4):  # each of the n blocks that query may see is drawn 200 * 3 / n times, within five deviations
        times = np.bincount(drawn[:, query].ravel(), minlength=num_blocks)
        allowed = np.flatnonzero(np.abs(np.arange(num_blocks) - (query + 1)) > 1)
        allowed = allowed[(allowed > 0) & (allowed < num_blocks - 1)]
        expected = 600 / len(allowed)
        assert (np.abs(times[allowed] - expected) < 5 * expected**0.5).all()


def test_layers_and_seeds_draw_different_blocks():
    drawn = [
        BigBirdAttention(num_heads=4, seed=seed, layer=number).random_blocks(40)
        for seed, number in ((0, 0), (0, 1), (1, 0), (None, 0))
    ]
    assert len({blocks.tobytes() for blocks in drawn}) == 4
    assert not drawn[-1].any()


def test_bfloat16_rounds_and_nothing_else():
    graphdef, params = layer(BigBirdAttention(num_heads=4, block_size=5, num_random_blocks=2))
    _, _, mask = rows(60)
    x = np.random.default_rng(1).normal(size=(3, 60, DIM)).astype(jnp.bfloat16)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def run(params: Any, x: jax.Array) -> Any:
        def loss(x: jax.Array) -> Any:
            y, _ = merge(graphdef, params)(x, context(60, mask))
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.jit(jax.grad(loss, has_aux=True))(x)

    ours, exact = run(half, jnp.asarray(x)), run(jax.tree.map(lambda p: p.astype(jnp.float32), half), jnp.float32(x))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # 2^-9 a rounding, some ten of them between x and here
        assert np.max(np.abs(a.astype(jnp.float32) - b)) < 0.02 * np.max(np.abs(b))


# --- cost ------------------------------------------------------------------------------------------------------------

COSTLY = BigBirdAttention(num_heads=2, block_size=32, num_random_blocks=3)


def gradient(length: int) -> tuple[Any, ...]:
    """Gradient function of a layer, parameters, input, mask."""
    graphdef, params = layer(COSTLY, 32)

    def loss(params: Any, x: jax.Array, real: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(merge(graphdef, params)(x, context(length, Padding(real)))[0]))

    return jax.grad(loss, (0, 1)), params, jnp.ones((1, length, 32)), jnp.ones((1, length), bool)


@pytest.mark.scale
def test_flops_memory_and_time_grow_with_the_length_and_not_with_its_square():
    assert_linear(*(gradient(length) for length in (4096, 8192)))


@pytest.mark.parametrize("length", [512, 505, 300])
def test_the_flop_formula_equals_the_count_of_the_program(length):
    graphdef, params = layer(dataclasses.replace(COSTLY, kernel="reference"), 32)

    def function(params: Any, x: jax.Array) -> jax.Array:
        return merge(graphdef, params)(x, context(length, Full()))[0]

    kernels = sum(p["kernel"].size for p in params.values())
    counted = count(function, params, jnp.ones((2, length, 32))).matmul_flops
    expected = 2 * length * (2 * kernels + COSTLY.context_flops(32, length))
    assert 0 <= expected - counted < 2 * length  # a number per token, rounded up


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ValueError, match="block_size=0 is not positive"):
        BigBirdAttention(num_heads=2, block_size=0)
    with pytest.raises(ValueError, match="num_random_blocks=-1 is negative"):
        BigBirdAttention(num_heads=2, num_random_blocks=-1)
    with pytest.raises(ValueError, match="layer=-1 is negative"):
        BigBirdAttention(num_heads=2, layer=-1)
    module = merge(*layer(BigBirdAttention(num_heads=2, block_size=2, num_random_blocks=1, layer=1)))
    x = jnp.ones((1, 20, DIM))
    for shape in ((1, 2, 8, 1), (2, 2, 8, 2), (2, 3, 8, 1)):
        with pytest.raises(ValueError, match=r"layer 1 needs a row of its own of shape \(2, 8, 1\)"):
            module(x, context(20, Full(), np.zeros(shape, int)))
