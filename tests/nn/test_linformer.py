"""Linformer's attention against its equation in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.config import Context
from llmlab.nn.linformer import LinformerAttention
from llmlab.nn.masks import Causal, Full, Mask, Padding, Segments
from llmlab.nn.module import logical_axes, merge, split

ROWS, LENGTH, DIM, HEADS, WIDTH, MIXTURES = 2, 9, 6, 2, 3, 4


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def layer(sharing: Any = "headwise", **settings: Any) -> Any:
    config = LinformerAttention(num_heads=HEADS, max_length=12, projected=MIXTURES, sharing=sharing, **settings)
    return config.build(DIM, rngs=nnx.Rngs(params=0))


def context(mask: Mask, length: int = LENGTH) -> Context:
    return Context(mask=mask, position_ids=jnp.broadcast_to(jnp.arange(length), (ROWS, length)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_the_equation(params: Any, x_BSD: np.ndarray, real_BS: np.ndarray, sharing: str) -> np.ndarray:
    """The layer in float64, one row and head at a time."""
    y = np.zeros(x_BSD.shape)
    for b in range(ROWS):
        for n in range(HEADS):
            q, k, v = (x_BSD[b] @ params[p]["kernel"][:, n] + params[p]["bias"][n] for p in ("query", "key", "value"))
            keys = params["mix_keys"]
            values = keys if sharing == "key-value" else params["mix_values"]
            if sharing == "none":
                keys, values = keys[n], values[n]
            places = np.flatnonzero(real_BS[b])
            mixed_k, mixed_v = keys[:, places] @ k[places], values[:, places] @ v[places]
            o = softmax(q @ mixed_k.T / math.sqrt(WIDTH)) @ mixed_v
            y[b] += o @ params["output"]["kernel"][n]
    return y


@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value"])
def test_output_and_gradient_are_those_of_the_equation(sharing):
    graphdef, params = split(layer(sharing, bias=True))
    params = {name: jax.tree.map(lambda p: p + 0.1, part) for name, part in params.items()}  # biases are no zeros
    x, direction = normal(0, ROWS, LENGTH, DIM), normal(1, ROWS, LENGTH, DIM)
    real = np.ones((ROWS, LENGTH), bool)
    real[0, :2] = real[1, 6:] = False

    def value(params, x):
        y, _ = merge(graphdef, params)(x, context(Padding(jnp.asarray(real))))
        return jnp.sum(y * direction), y

    (_, y), slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, jnp.float32(x))
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    np.testing.assert_allclose(y, by_the_equation(exact, x, real, sharing), atol=3e-6)
    leaves, tree = jax.tree.flatten((exact, x))
    for number, slope in enumerate(jax.tree.leaves(slopes)):
        # central differences along a direction: error h^2 ~ 1e-10, and 1e-15 / h ~ 1e-10 by rounding
        along, moved = normal(10 + number, *slope.shape), []
        for step in (1e-5, -1e-5):
            nudged = [leaf + step * along if i == number else leaf for i, leaf in enumerate(leaves)]
            weights, rows = tree.unflatten(nudged)
            moved.append(np.sum(by_the_equation(weights, rows, real, sharing) * direction))
        assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(np.sum(np.asarray(slope) * along), abs=1e-4)


def test_padding_after_a_row_changes_nothing_whatever_it_holds():
    built, x = layer(bias=True), jnp.float32(normal(0, ROWS, LENGTH, DIM))
    whole, _ = built(x.at[:, 6:].set(1e4), context(Padding(jnp.broadcast_to(jnp.arange(LENGTH) < 6, (ROWS, LENGTH)))))
    short, _ = built(x[:, :6], context(Full(), 6))
    np.testing.assert_allclose(whole[:, :6], short, atol=1e-6)  # sums of 9 terms or of 6: rounding


def test_a_row_of_padding_gives_zeros():
    y, _ = layer()(jnp.ones((ROWS, LENGTH, DIM)), context(Padding(jnp.zeros((ROWS, LENGTH), bool))))
    np.testing.assert_array_equal(y, 0)


def test_projections_start_with_variance_one_over_their_rows():
    config = LinformerAttention(num_heads=4, max_length=500, projected=100, sharing="none")
    built = config.build(8, rngs=nnx.Rngs(params=0))
    # 200,000 draws: the standard deviation is known to 0.16%; five of those
    assert abs(float(jnp.std(built.mix_keys[...])) * 10 - 1) < 0.008
    assert logical_axes(built)["mix_keys"] == ("heads", "mixtures", "position")
    assert logical_axes(layer())["mix_keys"] == ("mixtures", "position")


def test_dropout_needs_a_key():
    built, x = layer(dropout=0.5), jnp.float32(normal(0, ROWS, LENGTH, DIM))
    still, moved = built(x, context(Full()))[0], built(x, context(Full()), jax.random.key(0))[0]
    np.testing.assert_array_equal(still, layer()(x, context(Full()))[0])
    assert not np.allclose(still, moved)


def test_what_it_cannot_do_is_refused():
    x = jnp.zeros((ROWS, LENGTH, DIM))
    documents = jnp.ones((ROWS, LENGTH), jnp.int32)
    with pytest.raises(ValueError, match="cannot hide the future"):
        layer()(x, context(Causal()))
    with pytest.raises(ValueError, match="would mix the documents"):
        layer()(x, context(Segments(documents, documents)))
    with pytest.raises(ValueError, match="max_length=13"):
        layer()(jnp.zeros((ROWS, 13, DIM)), context(Full(), 13))
    with pytest.raises(ValueError, match="projected=0"):
        LinformerAttention(num_heads=2, max_length=4, projected=0)
