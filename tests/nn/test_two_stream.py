"""Two-stream attention against its equations written out in float64 NumPy, one query and key at a time."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.config import Memory
from llmlab.nn.masks import Full
from llmlab.nn.two_stream import (
    Stream,
    TwoStreamAttention,
    TwoStreamContext,
    cut,
    distance_blocks,
    encoded_distances,
    sheared,
)

BATCH, LENGTH, TARGETS, MEMORY, DIM, HEADS, HEAD_DIM = 2, 5, 2, 3, 8, 2, 4
KEYS = MEMORY + LENGTH


def layer() -> Any:
    built = TwoStreamAttention(num_heads=HEADS).build(DIM, rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(built)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.5 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, drawn))


def literal(module: Any, queries: Any, places: Any, seen: Any, allowed: Any, other: Any, sign: Any) -> np.ndarray:
    """Equations of the module's docstring: rows of queries (B, Q, D), their places, keys (B, T, D)."""
    kernels = {
        name: np.asarray(getattr(module, name).kernel[...], np.float64)
        for name in ("query", "key", "value", "distance", "output")
    }
    w, r, s = (
        np.asarray(getattr(module, f"{name}_bias")[...], np.float64) for name in ("content", "distance", "segment")
    )
    segments = np.asarray(module.segments[...], np.float64)
    out = np.zeros((*queries.shape[:2], DIM))
    for b in range(queries.shape[0]):
        for i, place in enumerate(places[b]):
            heads = np.zeros((HEADS, HEAD_DIM))
            for n in range(HEADS):
                q = queries[b, i] @ kernels["query"][:, n]
                scores = np.zeros(KEYS)
                for j in range(KEYS):
                    distance = sign[b] * (MEMORY + place - j)
                    angles = distance / 10000 ** (np.arange(0, DIM, 2) / DIM)
                    encoded = np.concatenate([np.sin(angles), np.cos(angles)])
                    score = (q + w[n]) @ (seen[b, j] @ kernels["key"][:, n])
                    score += (q + r[n]) @ (encoded @ kernels["distance"][:, n])
                    score += (q + s[n]) @ segments[int(other[b, i, j]), n]
                    scores[j] = score / math.sqrt(HEAD_DIM) if allowed[b, i, j] else -np.inf
                weights = np.exp(scores - scores.max())
                heads[n] = (weights / weights.sum()) @ (seen[b] @ kernels["value"][:, n])
            out[b, i] = np.einsum("NH,NHD->D", heads, kernels["output"])
    return out


@pytest.mark.parametrize("backwards", [False, True])
def test_both_streams_equal_the_equations(backwards: bool) -> None:
    module, rng = layer(), np.random.default_rng(2)
    h, g, before = (rng.normal(size=(BATCH, n, DIM)).astype(np.float32) for n in (LENGTH, TARGETS, MEMORY))
    allowed = rng.random((BATCH, LENGTH + TARGETS, KEYS)) < 0.6
    allowed[..., 0] = True
    other = rng.random((BATCH, LENGTH + TARGETS, KEYS)) < 0.5
    targets = np.array([[3, 0], [4, 2]], np.int32)
    places = np.concatenate([np.tile(np.arange(LENGTH), (BATCH, 1)), targets], axis=1)
    sign = np.where(np.arange(BATCH) < BATCH // 2, 1, -1) if backwards else np.ones(BATCH)
    distances = [encoded_distances(KEYS, LENGTH, DIM, backwards=b) for b in ((False, True) if backwards else (False,))]
    context = TwoStreamContext(
        mask=Full(),
        position_ids=jnp.zeros((BATCH, LENGTH + TARGETS), jnp.int32),
        distances_GRD=jnp.asarray(distances),
        content=Stream(
            first_BQ=None, allowed_BQT=jnp.asarray(allowed[:, :LENGTH]), other_BQT=jnp.asarray(other[:, :LENGTH])
        ),
        query=Stream(
            first_BQ=jnp.asarray(LENGTH - targets),
            allowed_BQT=jnp.asarray(allowed[:, LENGTH:]),
            other_BQT=jnp.asarray(other[:, LENGTH:]),
        ),
    )
    x = np.concatenate([h, g], axis=1)
    y, memory = module(jnp.asarray(x), context, cache=Memory(states=jnp.asarray(before)))
    expected = literal(module, x, places, np.concatenate([before, h], axis=1), allowed, other, sign)
    # float32 against float64; values of size one to ten
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(memory.states, h)


def test_shearing_takes_from_every_row_one_entry_further_left() -> None:
    x = np.arange(2 * 4 * 10).reshape(1, 2, 4, 10).astype(np.float32)
    expected = np.stack([x[:, :, i, 4 - i : 4 - i + 6] for i in range(4)], axis=2)
    np.testing.assert_array_equal(sheared(jnp.asarray(x), 6), expected)


def test_the_gradient_of_a_shear_is_that_of_plain_slices() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 11))
    weights = jax.random.normal(jax.random.key(1), (3, 2, 4, 6))

    def plain(x: jax.Array) -> jax.Array:
        return jnp.stack([x[:, :, i, 4 - i : 10 - i] for i in range(4)], axis=2)

    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(jnp.asarray(f(x)) * weights))(x) for f in (lambda x: sheared(x, 6), plain)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_queries", [1, 3, 4, 10, 128])
@pytest.mark.parametrize("both_ways", [True, False])
def test_a_block_of_queries_has_the_distances_that_they_meet_and_few_others(num_queries: int, both_ways: bool) -> None:
    num_keys = num_queries + 7
    num_distances = num_keys + (num_queries if both_ways else 1)
    seen = []
    for block, met in distance_blocks(num_queries, num_keys, num_distances):
        for i in range(block.start, block.stop):
            seen.append(i)
            assert met.start <= num_queries - i
            assert met.stop >= min(num_queries - i + num_keys, num_distances)
        assert met.stop - met.start <= num_keys + -(-num_queries // 4)
    assert seen == list(range(num_queries))


def test_the_gradient_of_a_cut_is_that_of_a_plain_gather() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 11))
    first = jnp.array([[0, 5, 2, 2], [3, 1, 4, 5]])
    weights = jax.random.normal(jax.random.key(1), (3, 2, 4, 6))
    at = first.tolist()

    def plain(x: jax.Array) -> jax.Array:
        rows = [[[x[n, b, q, at[b][q] : at[b][q] + 6] for q in range(4)] for b in range(2)] for n in range(3)]
        return jnp.array(rows)

    def ours(x: jax.Array) -> jax.Array:
        return jnp.asarray(cut(x, first, 6))

    np.testing.assert_array_equal(ours(x), plain(x))
    found, expected = (jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * f(x))))(x) for f in (ours, plain))
    np.testing.assert_array_equal(found, expected)


def test_an_odd_width_needs_a_head_width() -> None:
    with pytest.raises(ValueError, match="embed_dim=10 is not divisible by num_heads=4; use 8 or 12, or set head_dim"):
        TwoStreamAttention(num_heads=4).build(10, rngs=nnx.Rngs(params=0))
