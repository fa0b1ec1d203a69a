"""Longformer's attention equals the dense matrix that its definition gives, and costs what windows cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.config import Context
from llmlab.nn.kernels import sparse as sparse_kernel
from llmlab.nn.longformer import LongformerAttention
from llmlab.nn.masks import Full, Mask, Padding, Segments
from llmlab.nn.module import merge, split
from llmlab.nn.positions import ALiBi, Rotary
from llmlab.plan.cost import count
from tests.nn.dense_lists import project_back, projected
from tests.nn.linear_cost import assert_linear

DIM = 24
# Float32 against float64: sums of tens of products, each rounded to 6e-8.
CLOSE = 1e-5


def layer(config: LongformerAttention, dim: int = DIM, seed: int = 0) -> tuple[Any, Any]:
    """Graph definition, and parameters none of which is zero."""
    graphdef, params = split(config.build(dim, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) / dim**0.5, jnp.float32), params)


def jitted(config: LongformerAttention) -> Any:
    """The layer as a compiled function of x and context."""
    graphdef, params = layer(config)
    return jax.jit(lambda x, given: merge(graphdef, params)(x, given)[0])


def context(length: int, mask: Mask, global_tokens: Any = None) -> Context:
    """A context in which positions are indices."""
    tokens = None if global_tokens is None else jnp.asarray(global_tokens)
    return Context(mask=mask, position_ids=jnp.arange(length)[None], global_tokens=tokens)


@dataclasses.dataclass
class Rows:
    """Rows of a batch, whatever is in them."""

    real: np.ndarray
    segment: np.ndarray
    is_global: np.ndarray

    def mask(self) -> Mask:
        """As models make it."""
        segment = jnp.asarray(self.segment)
        return Padding(jnp.asarray(self.real)) & Segments(segment, segment)

    def listed(self, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """What every token lists: as a local one and as a global one, by the definition."""
        batch, length = self.real.shape
        local, global_ = np.zeros((2, batch, length, length), int)
        for b, i, j in np.ndindex(batch, length, length):
            seen = self.real[b, i] and self.real[b, j] and self.segment[b, i] == self.segment[b, j]
            if self.is_global[b, i] and self.real[b, i]:
                global_[b, i, j] = seen
            else:
                local[b, i, j] = seen and (abs(i - j) <= reach or self.is_global[b, j])
        return local, global_


def rows(length: int, num_global: int, seed: int = 0) -> Rows:
    """Padding on the left, on the right and none; two documents in the last; up to `num_global` global tokens."""
    rng = np.random.default_rng(seed)
    real = np.ones((4, length), bool)
    real[0, : length // 3] = False
    real[1, -(length // 4) :] = False
    segment = np.zeros((4, length), np.int32)
    segment[3, length // 2 + 1 :] = 1
    is_global = np.zeros((4, length), bool)
    for row, count_ in enumerate((num_global, max(num_global - 1, 0), 0, num_global)):
        is_global[row, rng.permutation(np.flatnonzero(real[row]))[:count_]] = True
    is_global[0, 0] = num_global > 0  # on padding: it is no global token
    return Rows(real, segment, is_global)


def by_definition(config: LongformerAttention, params: Any, x: np.ndarray, dy: np.ndarray, rows: Rows) -> Any:
    """Output, gradient of x, gradients of the parameters."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    times = [np.repeat(t[:, None], config.num_heads, axis=1) for t in rows.listed(config.reach)]
    names = [("query", "key", "value"), ("query_global", "key_global", "value_global")]
    parts = [projected(x, p, triple, t) for triple, t in zip(names, times, strict=True)]
    o = sum(part.forward() for part in parts)
    y = np.tensordot(o, p["output"]["kernel"], axes=2) + p["output"].get("bias", 0.0)
    gradients = {"output": {"kernel": np.einsum("BSNH,BSD->NHD", o, dy), "bias": dy.sum((0, 1))}}
    do, dx = np.einsum("BSD,NHD->BSNH", dy, p["output"]["kernel"]), np.zeros_like(x)
    for triple, part in zip(names, parts, strict=True):
        for name, dz in zip(triple, part.backward(do), strict=True):
            more, gradients[name] = project_back(x, p[name], dz)
            dx = dx + more
    return y, dx, gradients


def computed(graphdef: Any, params: Any, x: np.ndarray, dy: np.ndarray, given: Context) -> Any:
    """The same from the layer."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, _ = merge(graphdef, params)(x, given)
        return jnp.sum(y * dy), y

    (_, y), (gradients, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, jnp.asarray(x))
    return y, dx, gradients


def assert_close(ours: Any, theirs: Any) -> None:
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=CLOSE * largest), ours, theirs)


@pytest.mark.parametrize(
    ("length", "reach", "num_global", "kv_heads"),
    [(1, 3, 0, 4), (37, 5, 3, 4), (75, 20, 4, 2), (50, 40, 0, 1), (17, 1, 17, 4)],
)
def test_output_and_gradients_equal_the_dense_matrix_of_the_definition(length, reach, num_global, kv_heads):
    config = LongformerAttention(
        num_heads=4, num_kv_heads=kv_heads, reach=reach, max_global=num_global, bias=True, output_bias=True
    )
    graphdef, params = layer(config)
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, 4, length, DIM)).astype(np.float32)
    batch = rows(length, num_global)
    given = context(length, batch.mask(), batch.is_global if num_global else None)
    ours, theirs = computed(graphdef, params, x, dy, given), by_definition(config, params, x, dy, batch)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_dropout_drops_single_weights_forward_and_backward():
    """The factor of (query, key) is that of plain attention's kernels, so that tiling cannot change it."""
    config = LongformerAttention(num_heads=4, reach=5, dropout=0.3)
    graphdef, params = layer(config)
    x, dy = np.random.default_rng(1).normal(size=(2, 1, 40, DIM)).astype(np.float32)
    key = jax.random.key(3)
    module = merge(graphdef, params)
    scoring = module.scoring(Full(), jax.random.split(key, 2)[0])
    index = np.arange(40)
    factor = np.asarray(scoring.kept(40, (1, 4, 40, 40), index, index), np.float64)
    assert np.isclose((factor == 0).mean(), 0.3, atol=0.03)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    times = (np.abs(index[:, None] - index) <= 5)[None, None].repeat(4, axis=1)
    dense = projected(x, p, ("query", "key", "value"), times, factor)
    y = np.tensordot(dense.forward(), p["output"]["kernel"], axes=2)
    _, dx_value = dense.forward(), project_back(x, p["value"], dense.backward(_outputs_of(dy, p))[2])[1]

    def loss(params: Any) -> Any:
        y, _ = merge(graphdef, params)(jnp.asarray(x), context(40, Full()), key)
        return jnp.sum(y * dy), y

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_close(ours, y)
    assert_close(gradients["value"], dx_value)


def _outputs_of(dy: np.ndarray, p: Any) -> np.ndarray:
    return np.einsum("BSD,NHD->BSNH", dy, p["output"]["kernel"])


def test_many_blocks_a_step_compute_what_one_block_a_step_does(monkeypatch):
    config = LongformerAttention(num_heads=2, reach=20, max_global=2)
    graphdef, params = layer(config)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 75, DIM)), jnp.float32)
    batch = rows(75, 2)
    given = context(75, batch.mask(), batch.is_global)

    def gradient(step_bytes: int) -> Any:
        monkeypatch.setattr(sparse_kernel, "_CPU_STEP_BYTES", step_bytes)

        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(merge(graphdef, params)(x, given)[0]))

        return jax.jit(jax.value_and_grad(loss))(params)

    assert_close(gradient(2**30), gradient(1))


def test_packed_documents_give_what_they_give_alone():
    """Windows and global tokens belong to the document: where it stands in a row changes nothing."""
    config = LongformerAttention(num_heads=4, reach=20, max_global=6, position=Rotary())
    module = jitted(config)
    rng = np.random.default_rng(2)
    lengths = (30, 30, 30)  # starts at different places of a block
    documents = [rng.normal(size=(1, n, DIM)).astype(np.float32) for n in lengths]
    tokens = [np.isin(np.arange(n), rng.permutation(n)[: i % 3 + 1])[None] for i, n in enumerate(lengths)]
    segment = jnp.asarray(np.repeat(np.arange(3), lengths)[None])
    packed = Context(
        mask=Segments(segment, segment),
        position_ids=jnp.concatenate([jnp.arange(n) for n in lengths])[None],
        global_tokens=jnp.asarray(np.concatenate(tokens, axis=1)),
    )
    together = module(jnp.concatenate(documents, axis=1), packed)
    alone = [module(jnp.asarray(d), context(d.shape[1], Full(), t)) for d, t in zip(documents, tokens, strict=True)]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=0, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    config = LongformerAttention(num_heads=4, reach=20, max_global=4)
    module = jitted(config)
    batch = rows(60, 4)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 60, DIM)), jnp.float32)
    given = context(60, batch.mask(), batch.is_global)
    first = batch.segment == 0
    changed = module(jnp.where(first[..., None], x + 1, x), given)
    np.testing.assert_array_equal(np.asarray(module(x, given))[~first], np.asarray(changed)[~first])


def test_bfloat16_rounds_and_nothing_else():
    config = LongformerAttention(num_heads=4, reach=20, max_global=3)
    graphdef, params = layer(config)
    batch = rows(75, 3)
    x = np.random.default_rng(1).normal(size=(4, 75, DIM)).astype(jnp.bfloat16)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    given = context(75, batch.mask(), batch.is_global)

    def run(params: Any, x: jax.Array) -> Any:
        def loss(x: jax.Array) -> Any:
            y, _ = merge(graphdef, params)(x, given)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        dx, y = jax.jit(jax.grad(loss, has_aux=True))(x)
        return y, dx

    ours, exact = run(half, jnp.asarray(x)), run(jax.tree.map(lambda p: p.astype(jnp.float32), half), jnp.float32(x))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # 2^-9 a rounding, some ten of them between x and here
        assert np.max(np.abs(a.astype(jnp.float32) - b)) < 0.02 * np.max(np.abs(b))


# --- cost ------------------------------------------------------------------------------------------------------------

COSTLY = LongformerAttention(num_heads=2, reach=64, max_global=16)


def gradient(config: LongformerAttention, length: int, dim: int = 32) -> tuple[Any, Any, Any, Any]:
    """Gradient function of a layer with global tokens, parameters, input, tokens."""
    graphdef, params = layer(config, dim)
    x, tokens = jnp.ones((1, length, dim)), jnp.arange(length)[None] < config.max_global

    def loss(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
        given = Context(mask=Padding(tokens | True), position_ids=jnp.arange(length)[None], global_tokens=tokens)
        return jnp.sum(jnp.square(merge(graphdef, params)(x, given)[0]))

    return jax.grad(loss, (0, 1)), params, x, tokens


@pytest.mark.scale
def test_flops_memory_and_time_grow_with_the_length_and_not_with_its_square():
    assert_linear(*(gradient(COSTLY, length) for length in (4096, 8192)))


@pytest.mark.parametrize("num_global", [0, 16])
def test_the_flop_formula_equals_the_count_of_the_program(num_global):
    config = dataclasses.replace(COSTLY, max_global=num_global, kernel="reference")
    graphdef, params = layer(config, 32)
    length, x = 256, jnp.ones((2, 256, 32))
    tokens = jnp.zeros((2, length), bool) if num_global else None

    def function(params: Any, x: jax.Array) -> jax.Array:
        return merge(graphdef, params)(x, context(length, Full(), tokens))[0]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(function(params, x)))

    kernels = sum(p["kernel"].size for p in params.values())
    expected = 2 * length * (2 * kernels + config.context_flops(32, length))
    assert count(function, params, x).matmul_flops == expected
    # backward: twice the products, and those of queries and keys near them once more
    again = 2 * 2 * 32 * length * (config.grid(length).near + num_global)
    assert count(jax.grad(loss, (0, 1)), params, x).matmul_flops == 3 * expected + again


# --- errors ----------------------------------------------------------------------------------------------------------


def test_too_many_global_tokens_are_an_error_or_where_that_cannot_be_known_nan():
    config = LongformerAttention(num_heads=2, reach=4, max_global=2)
    module = merge(*layer(config))
    x = jnp.ones((2, 20, DIM))
    tokens = np.zeros((2, 20), bool)
    tokens[1, :3] = True
    with pytest.raises(ValueError, match=r"3 global tokens and max_global=2; set max_global=3"):
        module(x, context(20, Full(), tokens))
    y = jax.jit(lambda tokens: module(x, context(20, Full(), tokens))[0])(tokens)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    real = jnp.asarray(~tokens | (np.arange(20) > 0))  # one of the three is padding
    assert np.isfinite(jitted(config)(x, context(20, Padding(real), tokens))).all()


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ValueError, match="reach=0 is not positive"):
        LongformerAttention(num_heads=2, reach=0)
    with pytest.raises(ValueError, match="max_global=-1 is negative"):
        LongformerAttention(num_heads=2, reach=1, max_global=-1)
    with pytest.raises(ValueError, match="LongformerAttention has a pattern of its own, and window=3"):
        LongformerAttention(num_heads=2, reach=1, window=3)
    with pytest.raises(ValueError, match=r"ALiBi\(\) cannot be its position"):
        LongformerAttention(num_heads=2, reach=1, position=ALiBi())
    module = merge(*layer(LongformerAttention(num_heads=2, reach=1)))
    x, tokens = jnp.ones((1, 5, DIM)), np.ones((1, 5), bool)
    with pytest.raises(ValueError, match="max_global=0; set it"):
        module(x, context(5, Full(), tokens))
