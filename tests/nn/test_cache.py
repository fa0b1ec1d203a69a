"""Caches hold what they were given: rolling ones as the whole history, rounded ones to within their rounding."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.cache import KVCache, MemoryCache, RollingCache, Stored
from llmlab.nn.config import Cache, Context, Room
from llmlab.nn.masks import Causal, Mask, Padding
from llmlab.nn.module import merge, split
from llmlab.nn.positions import Rotary

DIM, LENGTH, WINDOW = 16, 24, 5
WIDE = Attention(num_heads=4, num_kv_heads=2, position=Rotary(), kernel="reference")
NARROW = replace(WIDE, window=WINDOW)
X = jax.random.normal(jax.random.key(0), (2, LENGTH, DIM))
# Where calls end: chunks that are longer than the window, shorter, and single tokens.
CHUNKS = (9, 12, 13, 14, 17, 24)


@cache
def layer(config: Attention) -> tuple[Any, Any]:
    return split(config.build(DIM, rngs=nnx.Rngs(params=1)))


def attend(config: Attention, params: Any, x: jax.Array, position: jax.Array, mask: Mask, cache: Any) -> Any:
    model = merge(layer(config)[0], params)
    return model(x, Context(mask=mask, position_ids=position), None, cache)


def rows(*starts: int, length: int) -> jax.Array:
    return jnp.stack([jnp.arange(start, start + length) for start in starts])


def in_chunks(config: Attention, state: Cache, mask: Mask, x: jax.Array = X) -> tuple[jax.Array, Any]:
    """All positions, cut into calls."""

    def run(params: Any, state: Any) -> Any:
        outputs, start = [], 0
        for stop in CHUNKS:
            o, state = attend(config, params, x[:, start:stop], rows(start, start, length=stop - start), mask, state)
            outputs.append(o)
            start = stop
        return jnp.concatenate(outputs, axis=1), state

    return jax.jit(run)(layer(config)[1], state)


def whole(config: Attention, mask: Mask, x: jax.Array = X) -> jax.Array:
    run = jax.jit(lambda params: attend(config, params, x, rows(0, 0, length=x.shape[1]), mask, None)[0])
    return run(layer(config)[1])


def room(length: int = LENGTH, dtype: Any = jnp.float32, rewind: int = 0) -> Room:
    return Room(batch_size=2, length=length, dtype=dtype, memory_length=7, rewind=rewind)


def assert_same(got: jax.Array, want: jax.Array) -> None:
    # float32 sums of a few products in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_a_layer_with_a_window_gets_a_rolling_cache_where_the_sequence_is_longer():
    rolling = NARROW.new_cache(DIM, room())
    assert isinstance(rolling, RollingCache)
    assert rolling.key.num_slots == WINDOW
    assert isinstance(NARROW.new_cache(DIM, room(length=WINDOW)), KVCache)
    assert isinstance(WIDE.new_cache(DIM, room()), KVCache)
    assert NARROW.new_cache(DIM, room(rewind=3)).key.num_slots == WINDOW + 3


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "a mask over slots"])
def test_a_rolling_cache_attends_as_the_whole_sequence_does(masked: bool) -> None:
    mask: Mask = Causal()
    if masked:  # slot t is position t, whatever the cache does: the mask covers all positions
        real = np.ones((2, LENGTH), bool)
        real[0, [2, 8, 9, 15]] = real[1, [0, 1, 20]] = False
        mask = mask & Padding(jnp.asarray(real))
    got, state = in_chunks(NARROW, NARROW.new_cache(DIM, room()), mask)
    assert_same(got, whole(NARROW, mask))
    assert sorted(state.position_BT[0].tolist()) == list(range(LENGTH - WINDOW, LENGTH))
    assert state.position_BT[0, (LENGTH - 1) % WINDOW] == LENGTH - 1


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["contiguous", "rolling"])
def test_padding_is_stored_nowhere_and_attends_to_nothing(config: Attention) -> None:
    """Row 0 begins with 3 tokens of padding, row 1 ends with 4; then one row waits while the other goes on."""
    place = jnp.arange(12)
    position = jnp.stack([jnp.where(place < 3, -1, place - 3), jnp.where(place < 8, place, -1)])
    x = jnp.where(position[..., None] < 0, 50.0, jnp.take_along_axis(X, jnp.maximum(position, 0)[..., None], axis=1))

    def run(params: Any, state: Any) -> Any:
        o, state = attend(config, params, x, position, Causal(), state)
        x1 = jnp.stack([X[0, 9:10], jnp.full((1, DIM), 50.0)])
        o1, state = attend(config, params, x1, jnp.array([[9], [-1]]), Causal(), state)
        o2, state = attend(config, params, jnp.stack([X[0, 10:11], X[1, 8:9]]), jnp.array([[10], [8]]), Causal(), state)
        return o, o1, o2, state

    o, o1, o2, state = jax.jit(run)(layer(config)[1], config.new_cache(DIM, room()))
    want = whole(config, Causal())
    assert_same(o[0, 3:], want[0, :9])
    assert_same(o[1, :8], want[1, :8])
    assert_same(o1[0, 0], want[0, 9])
    assert_same(o2[:, 0], jnp.stack([want[0, 10], want[1, 8]]))
    assert not np.asarray(o1[1]).any()  # no key is seen, and the output has no bias
    stored = np.abs(state.key.data_BKTH).max(axis=(0, 1, 3))
    assert stored.max() < 50 * DIM**-0.5  # keys of padding are 50 times as large as those of tokens


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["contiguous", "rolling"])
@pytest.mark.parametrize("again", [1, 3])
def test_positions_can_be_taken_back(config: Attention, again: int) -> None:
    """Four tokens that were not meant are stored from position 10 on, then the real ones, one or three at a time."""
    wrong = jnp.full((2, 4, DIM), 3.0)

    def run(params: Any, state: Any) -> Any:
        _, state = attend(config, params, X[:, :10], rows(0, 0, length=10), Causal(), state)
        _, state = attend(config, params, wrong, rows(10, 10, length=4), Causal(), state)
        outputs = []
        for start in range(10, 16, again):
            x = X[:, start : start + again]
            o, state = attend(config, params, x, rows(start, start, length=again), Causal(), state)
            outputs.append(o)
        return jnp.concatenate(outputs, axis=1)

    got = jax.jit(run)(layer(config)[1], config.new_cache(DIM, room(rewind=4)))
    assert_same(got, whole(config, Causal())[:, 10:16])


def bound_D(q: jax.Array, k: jax.Array, v: jax.Array, kernel_NHD: jax.Array, dtype: Any) -> np.ndarray:
    """How far rounding of keys and values can move each number of a layer's output: theory, nothing measured.

    A number of a key or value is off by e: 2^-8 of itself in bfloat16, max / 254 of its head in int8. Logits are then
    off by d = scale sum |q| e; each weight of the softmax by a factor between exp(-2 d) and exp(2 d), so all of them
    together by at most exp(2 d) - 1; and the mean of values by that times the largest, and by their own e.
    """
    sizes_q, sizes_k, sizes_v = (np.abs(np.asarray(x, np.float64)) for x in (q, k, v))
    off_k, off_v = (
        x * 2.0**-8 if dtype == jnp.bfloat16 else np.broadcast_to(x.max(-1, keepdims=True) / 254, x.shape)
        for x in (sizes_k, sizes_v)
    )
    off_k = off_k.repeat(q.shape[2] // k.shape[2], axis=2)
    d = np.einsum("bsnh,btnh->bnst", sizes_q, off_k).max() / math.sqrt(q.shape[-1])
    of_heads = (math.exp(2 * d) - 1) * sizes_v.max() + off_v.max()
    assert of_heads < 0.5 * sizes_v.max()  # it says something
    return of_heads * np.abs(np.asarray(kernel_NHD)).sum(axis=(0, 1)) + 1e-5


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["contiguous", "rolling"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bfloat16", "int8"])
def test_a_rounded_cache_is_off_by_what_rounding_can_do(config: Attention, dtype: Any) -> None:
    graphdef, params = layer(config)
    got, _ = in_chunks(config, config.new_cache(DIM, room(dtype=dtype)), Causal())
    error = np.abs(np.asarray(got) - np.asarray(whole(config, Causal())))
    q, k, v = merge(graphdef, params).placed(X, Context(mask=Causal(), position_ids=rows(0, 0, length=LENGTH)))
    assert error.max() > 1e-4  # something was rounded
    assert (error <= bound_D(q, k, v, params["output"]["kernel"], dtype)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=["float32", "bfloat16", "int8"])
def test_numbers_come_back_to_within_their_rounding(dtype: Any) -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 32)) * np.logspace(-6, 6, 5)[:, None, None]
    x[0, 0, 0] = 0.0
    stored = Stored.of(jnp.float32(x), dtype)
    read = np.asarray(stored.read(jnp.float32), np.float64)
    assert stored.dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_array_equal(read, np.float32(x))
    elif dtype == jnp.bfloat16:
        assert (np.abs(read - x) <= 2.0**-8 * np.abs(x)).all()
    else:  # half a unit; float32 makes the scale and the product 2^-22 inexact
        assert (np.abs(read - x) <= np.abs(x).max(-1, keepdims=True) * (1 / 254 + 2.0**-22)).all()
        assert np.abs(np.asarray(stored.data_BKTH)).max() == 127
    assert not read[0, 0, 0].any()


def test_a_memory_is_read_as_it_was_stored() -> None:
    cross = CrossAttention(num_heads=4)
    graphdef, params = split(cross.build(DIM, rngs=nnx.Rngs(params=0)))
    memory, x = X[:, :7], X[:, 7:10]

    def run(params: Any, state: Any) -> Any:
        model, place = merge(graphdef, params), rows(0, 0, length=3)
        first, state = model(x, Context(mask=Causal(), position_ids=place, memory=memory), None, state)
        again, _ = model(x, Context(mask=Causal(), position_ids=place), None, state)
        plain, _ = model(x, Context(mask=Causal(), position_ids=place, memory=memory))
        return first, again, plain

    for dtype in (jnp.float32, jnp.int8):
        state = cross.new_cache(DIM, room(dtype=dtype))
        assert isinstance(state, MemoryCache)
        first, again, plain = jax.jit(run)(params, state)
        np.testing.assert_array_equal(first, again)
        if dtype == jnp.float32:
            assert_same(first, plain)
        else:
            q, k, v = merge(graphdef, params).project(x, memory)
            assert (np.abs(first - plain) <= bound_D(q, k, v, params["output"]["kernel"], dtype)).all()
            assert np.abs(first - plain).max() > 1e-4


def test_a_cache_that_is_only_an_update_is_one() -> None:
    class Plain(Cache):
        def update(self, key: jax.Array, value: jax.Array, position_ids: jax.Array) -> Any:
            return self, key, value

    got = attend(WIDE, layer(WIDE)[1], X, rows(0, 0, length=LENGTH), Causal(), Plain())[0]
    assert_same(got, whole(WIDE, Causal()))


def test_a_storage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot store int32; use float32, bfloat16 or int8"):
        WIDE.new_cache(DIM, room(dtype=jnp.int32))


def test_a_longer_cache_holds_the_same() -> None:
    state = KVCache.empty((2, 3, 2, 4), jnp.int8)
    state, *_ = state.update(jnp.ones((2, 2, 2, 4)), jnp.ones((2, 2, 2, 4)), rows(0, 1, length=2))
    grown = state.grown(6)
    assert grown.key.num_slots == 6
    np.testing.assert_array_equal(grown.value.read(jnp.float32)[:, :3], state.value.read(jnp.float32))
