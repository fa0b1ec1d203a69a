"""LSH and local attention against their definition in float64, one token at a time; parity with transformers is in
tests/models."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.config import Context
from llmlab.nn.lsh import LocalAttention, LSHAttention, hashed, rotations
from llmlab.nn.masks import Causal, Full, Mask, Padding, Segments, SlidingWindow
from llmlab.nn.module import merge, split

ROWS, LENGTH, DIM, HEADS, WIDTH = 2, 14, 6, 2, 3


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def real_tokens(length: int = LENGTH) -> np.ndarray:
    """3 tokens of padding before row 0, 2 after row 1."""
    place = np.arange(length)
    return np.stack([place >= 3, place < length - 2])


def context(mask: Mask, length: int = LENGTH, **more: Any) -> Context:
    return Context(mask=mask, position_ids=jnp.broadcast_to(jnp.arange(length), (ROWS, length)), **more)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, orders: np.ndarray, real: np.ndarray, config: Any, causal: bool
) -> np.ndarray:
    """One head: q, k, v (S, H); tokens of all rounds in the order in which they are cut into chunks (R, S)."""
    shared = isinstance(config, LSHAttention)
    line, chunk = orders.reshape(-1), min(config.chunk, len(q))
    num_chunks = len(line) // chunk
    neighbours = range(-config.before, config.after + 1) if num_chunks > 1 else range(1)
    found: list[list[tuple[float, np.ndarray]]] = [[] for _ in q]
    for slot, i in enumerate(line):
        window = [line[(slot // chunk + n) % num_chunks * chunk :][:chunk] for n in neighbours]
        keys = np.concatenate(window)
        allowed = [j for j in keys if real[j] and (j <= i or not causal) and (j != i or not shared)]
        if not allowed:  # oneself, however often; its logit is -1e5
            found[i].append((-1e5 + math.log(max(1, sum(keys == i))), v[i]))
            continue
        logits = k[allowed] @ q[i]
        found[i].append((np.logaddexp.reduce(logits), np.exp(logits - np.logaddexp.reduce(logits)) @ v[allowed]))
    total = [np.logaddexp.reduce([lse for lse, _ in rounds]) for rounds in found]
    return np.stack([sum(np.exp(lse - t) * o for lse, o in rounds) for rounds, t in zip(found, total, strict=True)])


def by_definition(params: Any, x: np.ndarray, config: Any, mask: Mask, draws: np.ndarray | None) -> np.ndarray:
    """The layer in float64; draws are the rotations."""
    real = real_tokens() if mask.find(Padding) else np.ones((ROWS, LENGTH), bool)
    padded = -(-LENGTH // config.chunk) * config.chunk if config.chunk < LENGTH else LENGTH
    y = np.zeros(x.shape)
    for b in range(ROWS):
        row = np.concatenate([x[b], np.zeros((padded - LENGTH, DIM))])
        seen = np.concatenate([real[b], np.zeros(padded - LENGTH, bool)])
        for n in range(HEADS):
            h = {name: row @ p["kernel"][:, n] for name, p in params.items() if name != "output"}
            if draws is None:
                q, k, orders = h["query"], h["key"] / math.sqrt(WIDTH), np.arange(padded)[None]
            else:
                q = h["query_key"]
                k = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) / math.sqrt(WIDTH)
                orders = np.stack([bucket_order(q @ draws[n, :, r], seen, config) for r in range(config.num_hashes)])
                orders = orders if padded > config.chunk else np.arange(padded)[None]
            o = attend(q, k, h["value"], orders, seen, config, mask.find(Causal) is not None)
            y[b] += o[:LENGTH] @ params["output"]["kernel"][n]
    return y


def bucket_order(turned: np.ndarray, real: np.ndarray, config: LSHAttention) -> np.ndarray:
    """Tokens by bucket, then by place; padding last."""
    factors = config.buckets(len(turned))
    keys = []
    for place, row in enumerate(turned):
        bucket, start, unit = 0, 0, 1
        for factor in factors:
            part = row[start : start + factor // 2]
            bucket += unit * int(np.argmax(np.concatenate([part, -part])))
            start, unit = start + factor // 2, unit * factor
        keys.append((bucket if real[place] else math.prod(factors), place))
    return np.array([place for _, place in sorted(keys)])


CASES: dict[str, tuple[Any, Mask]] = {
    "lsh": (LSHAttention(num_heads=HEADS, chunk=4, num_buckets=4), Full()),
    "lsh, causal, 3 rounds, factors": (
        LSHAttention(num_heads=HEADS, chunk=4, num_buckets=(2, 4), num_hashes=3),
        Causal() & Padding(jnp.asarray(real_tokens())),
    ),
    "lsh, padded, both sides, default buckets": (
        LSHAttention(num_heads=HEADS, chunk=4, after=1, num_hashes=2),
        Padding(jnp.asarray(real_tokens())),
    ),
    "lsh, one chunk": (LSHAttention(num_heads=HEADS, chunk=LENGTH), Causal()),
    "local, causal": (LocalAttention(num_heads=HEADS, chunk=4, before=2), Causal()),
    "local, padded": (
        LocalAttention(num_heads=HEADS, chunk=4, before=1, after=1),
        Padding(jnp.asarray(real_tokens())),
    ),
    "local, one chunk": (LocalAttention(num_heads=HEADS, chunk=64), Full()),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient_are_those_of_the_definition(name):
    config, mask = CASES[name]
    graphdef, params = split(config.build(DIM, rngs=nnx.Rngs(params=0)))
    params = jax.tree.map(lambda p: 2 * p, params)
    x, direction, draws = normal(0, ROWS, LENGTH, DIM), normal(1, ROWS, LENGTH, DIM), None
    if isinstance(config, LSHAttention):
        draws = normal(2, HEADS, WIDTH, config.num_hashes, sum(config.buckets(16)) // 2)
    fixed = None if draws is None else {"lsh_rotations": jnp.float32(draws)}
    alone = np.zeros((ROWS, LENGTH), bool)  # tokens that see only themselves
    if mask.find(Causal) is not None and draws is not None:
        alone |= np.arange(LENGTH) == 0
        if mask.find(Padding) is not None:
            alone[0, 1:4] = True
    direction[alone] = 0

    def value(params, x):
        y, _ = merge(graphdef, params)(x, context(mask, draws=fixed))
        return jnp.sum(y * direction), y

    (_, y), slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, jnp.float32(x))
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = by_definition(exact, x, config, mask, draws)
    np.testing.assert_allclose(np.asarray(y)[~alone], expected[~alone], atol=5e-6)
    # among logits of -1e5, where float32 steps by 0.008
    np.testing.assert_allclose(np.asarray(y)[alone], expected[alone], atol=0.02 * np.abs(expected).max())
    leaves, tree = jax.tree.flatten((exact, x))
    for number, slope in enumerate(jax.tree.leaves(slopes)):
        # central differences along a direction: error h^2 ~ 1e-10; so small a step moves no token to another bucket
        along, moved = normal(10 + number, *slope.shape), []
        for step in (1e-5, -1e-5):
            weights, rows = tree.unflatten([p + step * along if i == number else p for i, p in enumerate(leaves)])
            moved.append(np.sum(by_definition(weights, rows, config, mask, draws) * direction))
        assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(np.sum(np.asarray(slope) * along), abs=2e-4)


def test_what_padding_holds_changes_nothing():
    for config in (LSHAttention(num_heads=HEADS, chunk=4, num_hashes=2), LocalAttention(num_heads=HEADS, chunk=4)):
        built, x, real = (
            config.build(DIM, rngs=nnx.Rngs(params=0)),
            jnp.float32(normal(0, ROWS, LENGTH, DIM)),
            real_tokens(),
        )
        padding = context(Padding(jnp.asarray(real)))
        before, after = (built(z, padding)[0] for z in (x, jnp.where(real[..., None], x, 50.0)))
        np.testing.assert_array_equal(np.asarray(before)[real], np.asarray(after)[real])


def test_near_vectors_fall_into_one_bucket_and_opposite_ones_do_not():
    x = jnp.float32(normal(0, 1, 1, 50, 16))
    turn = jnp.asarray(rotations(0, 1, 16, 4, 8))
    buckets = np.asarray(hashed(jnp.concatenate([x, 1.001 * x, -x], axis=2), turn, (16,)))
    here, near, opposite = np.split(buckets, 3, axis=-1)
    np.testing.assert_array_equal(here, near)  # argmax does not mind a factor
    assert not (here == opposite).any()
    assert buckets.min() >= 0
    assert buckets.max() < 16


def test_buckets_follow_the_length_and_are_factored_when_they_are_many():
    config = LSHAttention(num_heads=1, chunk=4, max_length=64)  # beyond 2 max(sqrt(64 / 4), 4) = 8 buckets: factors
    assert config.buckets(8) == (4,)
    assert config.buckets(16) == (8,)
    assert config.buckets(24) == (8,)  # 12 is no power of two
    assert config.buckets(32) == (4, 4)
    assert config.buckets(64) == (4, 8)
    assert LSHAttention(num_heads=1, num_buckets=(2, 6)).buckets(64) == (2, 6)


def test_rotations_follow_the_seed_the_draws_or_the_training_step():
    x = jnp.float32(normal(0, ROWS, LENGTH, DIM))

    @functools.cache
    def compiled(seed: int | None) -> Any:
        built = LSHAttention(num_heads=HEADS, chunk=2, num_buckets=8, seed=seed).build(DIM, rngs=nnx.Rngs(params=0))
        return jax.jit(lambda key, draws: built(x, context(Full(), draws=draws), key)[0])

    def run(seed: int | None, key: Any = None, draws: Any = None) -> np.ndarray:
        return np.asarray(compiled(seed)(key, draws))

    first, second = jax.random.key(0), jax.random.key(1)
    drawn = {"lsh_rotations": jnp.asarray(rotations(3, HEADS, WIDTH, 1, 4))}
    np.testing.assert_allclose(run(3), run(0, draws=drawn), atol=1e-6)  # two programs: rounding
    assert not np.allclose(run(0), run(3))
    np.testing.assert_array_equal(run(0, first), run(0, second))
    assert not np.allclose(run(None, first), run(None, second))


def test_what_it_cannot_do_is_refused():
    x, documents = jnp.zeros((ROWS, LENGTH, DIM)), jnp.ones((ROWS, LENGTH), jnp.int32)
    for config in (LSHAttention(num_heads=HEADS), LocalAttention(num_heads=HEADS)):
        built = config.build(DIM, rngs=nnx.Rngs(params=0))
        with pytest.raises(ValueError, match="a row of its own"):
            built(x, context(Segments(documents, documents)))
        with pytest.raises(ValueError, match="cannot apply SlidingWindow"):
            built(x, context(SlidingWindow(left=3)))
    with pytest.raises(ValueError, match=r"num_buckets=\(4, 3\) is odd in \[3\]"):
        LSHAttention(num_heads=2, num_buckets=(4, 3))
    with pytest.raises(ValueError, match="num_hashes=0"):
        LSHAttention(num_heads=2, num_hashes=0)
    with pytest.raises(ValueError, match="before=-1"):
        LocalAttention(num_heads=2, before=-1)
