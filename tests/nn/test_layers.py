"""Dense, norms, feed-forward and embedding against float64 NumPy."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention
from llmlab.nn.dense import Dense, contract, contract_rows
from llmlab.nn.dropout import dropout
from llmlab.nn.embedding import Embedding, SegmentEmbedding
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.norms import BatchNorm, LayerNorm, RMSNorm
from tests.drawing import drawn

# float32 has 24 bits: 6e-8 relative per operation, a few dozen operations deep
assert_close = partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)


def rngs(seed: int = 0) -> nnx.Rngs:
    return nnx.Rngs(params=seed)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"),
    [
        ((("embed", 6),), (("heads", 2), ("head_dim", 3)), (2, 5, 6)),
        ((("heads", 2), ("head_dim", 3)), (("embed", 6),), (2, 5, 2, 3)),
    ],
)
def test_dense_is_the_contraction_plus_bias(inputs, outputs, shape):
    layer = drawn(lambda: Dense(inputs, outputs, bias=True, rngs=rngs()))
    x = normal(1, *shape)
    expected = np.tensordot(f64(x), f64(layer.kernel[...]), axes=len(inputs)) + f64(layer.bias[...])
    assert_close(layer(x), expected)


def test_dense_gradients_equal_those_of_tensordot():
    x, kernel, dy = normal(1, 2, 5, 2, 3), normal(2, 2, 3, 7), normal(3, 2, 5, 7)
    ours = jax.grad(lambda x, k: jnp.sum(contract(x, k, 2) * dy), (0, 1))(x, kernel)
    theirs = jax.grad(lambda x, k: jnp.sum(jnp.tensordot(x, k, axes=2) * dy), (0, 1))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6), (3, 5, 6), (65, 6)])
def test_a_product_with_rows_of_outputs_and_its_gradients_are_those_of_the_transposed_matrix(shape):
    x, kernel, dy = normal(1, *shape), normal(2, 7, 6), normal(3, *shape[:-1], 7)
    assert_close(contract_rows(x, kernel), f64(x) @ f64(kernel).T)
    ours = jax.grad(lambda x, k: jnp.sum(contract_rows(x, k) * dy), (0, 1))(x, kernel)
    theirs = jax.grad(lambda x, k: jnp.sum((x @ k.T) * dy), (0, 1))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("num_rows", "side"), [(1, 1), (8, 0), (64, 0), (65, 1)])
def test_in_a_product_of_few_rows_on_cpu_the_matrix_is_the_operand_that_is_not_repacked(num_rows, side):
    compiled = jax.jit(contract_rows).lower(normal(1, num_rows, 48), normal(2, 96, 48)).compile().as_text()
    assert compiled is not None
    products = re.findall(r"= f32\[[\d,]+\]\S* dot\(%?([\w.-]+), %?([\w.-]+)\)", compiled)
    assert len(products) == 1
    (shape,) = re.findall(rf"%?{re.escape(products[0][side])} = f32\[([\d,]+)\]", compiled)
    assert shape == "96,48"


def test_dense_starts_with_variance_one_over_inputs():
    kernel = Dense((("embed", 400),), (("mlp", 500),), bias=False, rngs=rngs()).kernel[...]
    # 200,000 draws: the standard deviation is known to 1/sqrt(2 * 200,000) = 0.16%; five of those
    assert abs(float(jnp.std(kernel)) * math.sqrt(400) - 1) < 0.008


def test_layer_norm_is_its_equation():
    layer = drawn(lambda: LayerNorm(epsilon=1e-3).build(8, rngs=rngs()))
    x = f64(normal(1, 2, 3, 8))
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 1e-3) * f64(layer.scale[...]) + f64(layer.bias[...])
    assert_close(layer(jnp.asarray(x, jnp.float32)), expected)


def test_layer_norm_without_bias_has_none():
    assert LayerNorm(bias=False).build(8, rngs=rngs()).bias is None


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_is_its_equation(offset):
    config = RMSNorm(epsilon=1e-3, offset=offset)
    np.testing.assert_array_equal(config.build(8, rngs=rngs()).scale[...], 1 - offset)
    layer = drawn(lambda: config.build(8, rngs=rngs()))
    x = f64(normal(1, 2, 3, 8))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * (offset + f64(layer.scale[...]))
    assert_close(layer(jnp.asarray(x, jnp.float32)), expected)


def test_batch_norm_takes_statistics_over_tokens():
    layer = drawn(lambda: BatchNorm(epsilon=1e-3).build(8, rngs=rngs()))
    x = f64(normal(1, 2, 3, 8))
    flat = x.reshape(-1, 8)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-3) * f64(layer.scale[...]) + f64(layer.bias[...])
    assert_close(layer(jnp.asarray(x, jnp.float32)), expected)


@pytest.mark.parametrize("config", [LayerNorm(), LayerNorm(bias=False), RMSNorm(), RMSNorm(offset=1.0)])
def test_norm_gradients_equal_those_of_the_plain_equation(config):
    layer = drawn(lambda: config.build(16, rngs=rngs()))
    graphdef, state = nnx.split(layer)
    x, dy = normal(1, 2, 3, 16), normal(2, 2, 3, 16)

    def plain(state, x):
        centred = x - jnp.mean(x, -1, keepdims=True) if isinstance(config, LayerNorm) else x
        y = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + config.epsilon)
        y = y * (state["scale"][...] + (config.offset if isinstance(config, RMSNorm) else 0))
        return jnp.sum((y + state["bias"][...] if "bias" in state else y) * dy)

    ours = jax.grad(lambda s, x: jnp.sum(nnx.merge(graphdef, s)(x) * dy), (0, 1))(state, x)
    theirs = jax.grad(plain, (0, 1))(state, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("config", [LayerNorm(), RMSNorm(), BatchNorm()])
def test_norm_statistics_are_float32_in_bfloat16(config):
    layer = config.build(512, rngs=rngs())
    # a large mean: bfloat16 sums of 512 such values would lose the variance altogether
    x = (normal(1, 4, 512) + 8).astype(jnp.bfloat16)
    exact = layer(x.astype(jnp.float32))
    assert layer(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(layer(x).astype(jnp.float32), exact, rtol=2**-8, atol=2**-8)  # one rounding, at the end


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_its_equation(activation):
    layer = drawn(lambda: MLP(hidden_dim=12, activation=activation).build(8, rngs=rngs()))
    x = normal(1, 2, 3, 8)
    h = ACTIVATIONS[activation](f64(x) @ f64(layer.up.kernel[...]) + f64(layer.up.bias[...]))
    expected = h @ f64(layer.down.kernel[...]) + f64(layer.down.bias[...])
    np.testing.assert_allclose(layer(x)[0], expected, rtol=2e-5, atol=2e-5)  # sums of products of size 10


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "silu"])  # GLU, GEGLU, SwiGLU
def test_gated_mlp_is_its_equation(activation):
    layer = drawn(lambda: GatedMLP(hidden_dim=12, activation=activation).build(8, rngs=rngs()))
    x = normal(1, 2, 3, 8)
    h = ACTIVATIONS[activation](f64(x) @ f64(layer.gate.kernel[...])) * (f64(x) @ f64(layer.up.kernel[...]))
    np.testing.assert_allclose(layer(x)[0], h @ f64(layer.down.kernel[...]), rtol=2e-5, atol=5e-5)


def test_embedding_looks_up_rows_and_scores_by_inner_product():
    layer = Embedding(10, 4, rngs=rngs())
    ids = jnp.array([[1, 9], [0, 1]])
    table = np.asarray(layer.table[...])
    np.testing.assert_array_equal(layer(ids), table[np.asarray(ids)])
    x = normal(1, 2, 3, 4)
    assert_close(layer.attend(x), f64(x) @ f64(layer.table[...]).T)


def test_embedding_gradient_sums_over_repeated_tokens():
    layer = Embedding(5, 3, rngs=rngs())
    graphdef, state = nnx.split(layer)
    ids, dy = jnp.array([2, 2, 0]), normal(1, 3, 3)
    gradient = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(ids) * dy))(state)["table"][...]
    expected = np.zeros((5, 3))
    np.add.at(expected, [2, 2, 0], f64(dy))
    assert_close(gradient, expected)


def test_segment_embedding_adds_the_row_of_the_type():
    layer = SegmentEmbedding(2, 4, rngs=rngs())
    x, types = normal(1, 1, 3, 4), jnp.array([[0, 1, 1]])
    np.testing.assert_array_equal(layer(x, types), x + layer.types.table[...][np.array([[0, 1, 1]])])


def test_dropout_keeps_the_mean_and_zeroes_the_stated_fraction():
    y = dropout(jnp.ones(100_000), 0.25, jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    # binomial standard deviation sqrt(.25 * .75 / 100,000) = 0.0014; five of those
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.007


def test_dropout_without_a_key_is_the_identity():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None) is x


@pytest.mark.parametrize(("query_gain", "expected"), [(None, 1 / 4), (1.0, 1.0)])
def test_queries_start_smaller_under_a_larger_scale_unless_told_not_to(query_gain, expected):
    plain = Attention(num_heads=2, head_dim=16).build(8, rngs=rngs())
    config = Attention(num_heads=2, head_dim=16, scale=1.0, query_gain=query_gain)
    layer = config.build(8, rngs=rngs())
    assert_close(layer.query.kernel[...], expected * plain.query.kernel[...])
    np.testing.assert_array_equal(layer.key.kernel[...], plain.key.kernel[...])


def test_a_query_gain_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"query_gain=0.0 is not positive"):
        Attention(num_heads=2, query_gain=0.0)
