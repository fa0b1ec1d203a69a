"""Masks against literal loops."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.nn.masks import (
    All,
    Causal,
    Full,
    Groups,
    Marked,
    Mask,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
    Visibility,
)

ROWS, QUERIES, KEYS = 2, 6, 7
SEGMENT_Q = np.array([[1, 1, 2, 2, 3, 3], [1, 2, 2, 2, 2, 9]])
SEGMENT_K = np.array([[1, 1, 2, 2, 3, 3, 4], [1, 2, 2, 2, 2, 3, 3]])
REAL = np.array([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0]], bool)

GROUPS = np.array([[[q % 2, q > 2, q < 4] for q in range(6)], [[1, q % 3, 0] for q in range(6)]]).astype(bool)

RULES = {
    "full": (Full(), lambda b, q, k: True),
    "causal": (Causal(), lambda b, q, k: k <= q),
    "window": (SlidingWindow(2, 1), lambda b, q, k: q - 2 <= k <= q + 1),
    "left window": (SlidingWindow(left=2), lambda b, q, k: q - 2 <= k),
    "prefix": (Prefix(jnp.array([3, 0])), lambda b, q, k: k < (3, 0)[b] or k <= q),
    "groups": (Groups(jnp.array(GROUPS), 3), lambda b, q, k: GROUPS[b, q, k // 3]),
    "marked": (Marked(jnp.array(REAL)), lambda b, q, k: k <= q or (REAL[b, q] and REAL[b, k])),
    "padding": (Padding(jnp.array(REAL)), lambda b, q, k: REAL[b, k]),
    "segments": (
        Segments(jnp.array(SEGMENT_Q), jnp.array(SEGMENT_K)),
        lambda b, q, k: SEGMENT_Q[b, q] == SEGMENT_K[b, k],
    ),
}


def evaluate(mask: Mask, query: np.ndarray | jax.Array, kv: np.ndarray | jax.Array) -> np.ndarray:
    allowed = np.asarray(mask.allowed(query, kv))
    return np.broadcast_to(allowed, (ROWS, *allowed.shape[1:]))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("traced", [False, True], ids=["numpy index", "traced index"])
def test_a_mask_allows_what_its_sentence_says(name: str, traced: bool) -> None:
    mask, rule = RULES[name]
    want = np.array([[[rule(b, q, k) for k in range(KEYS)] for q in range(QUERIES)] for b in range(ROWS)])
    query, kv = np.arange(QUERIES), np.arange(KEYS)
    function = jax.jit(mask.allowed) if traced else mask.allowed
    got = np.broadcast_to(np.asarray(function(query, kv)), want.shape)
    np.testing.assert_array_equal(got, want)
    # any block, contiguous or not, and per-row query indices, are parts of the whole
    np.testing.assert_array_equal(evaluate(mask, query[2:5], kv[1:4]), want[:, 2:5, 1:4])
    np.testing.assert_array_equal(evaluate(mask, jnp.array([4, 1]), kv), want[:, [4, 1]])
    per_row = jnp.array([[5], [2]])
    np.testing.assert_array_equal(evaluate(mask, per_row, kv), np.stack([want[0, [5]], want[1, [2]]]))


def test_and_allows_what_all_terms_allow() -> None:
    terms = [mask for mask, _ in RULES.values()]
    query, kv = np.arange(QUERIES), np.arange(KEYS)
    want = functools.reduce(operator.and_, [evaluate(mask, query, kv) for mask in terms])
    np.testing.assert_array_equal(evaluate(functools.reduce(operator.and_, terms), query, kv), want)


def test_and_flattens_and_drops_full() -> None:
    mask = Full() & Causal() & (SlidingWindow(3) & Full())
    assert mask == All((Causal(), SlidingWindow(3)))
    assert mask.find(SlidingWindow) == SlidingWindow(3)
    assert mask.find(Padding) is None
    assert Full() & Causal() == Causal()
    assert (Full() & Full()).terms == ()


def test_masks_pass_through_jit_with_static_structure() -> None:
    mask = Causal() & SlidingWindow(1, 0) & RULES["padding"][0]
    lengths = jax.jit(lambda m: jnp.asarray(m.kv_range(4, 6, KEYS)))(mask)  # would raise if left were traced
    assert lengths.tolist() == [3, 6]


static = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(SlidingWindow, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
)


@settings(deadline=None, max_examples=100)
@given(
    masks=st.lists(static, min_size=1, max_size=3),
    start=st.integers(0, 20),
    size=st.integers(1, 6),
    num_keys=st.integers(1, 20),
)
def test_no_allowed_key_lies_outside_kv_range(masks: list[Mask], start: int, size: int, num_keys: int) -> None:
    mask = functools.reduce(operator.and_, masks)
    first, stop = mask.kv_range(start, start + size, num_keys)
    assert 0 <= first <= stop <= num_keys
    allowed = np.asarray(mask.allowed(np.arange(26), np.arange(20)))  # one shape for all examples: one compilation
    assert not allowed[:, start : start + size, :first].any()
    assert not allowed[:, start : start + size, stop:num_keys].any()


def test_kv_range_of_a_band_is_the_band() -> None:
    mask = Causal() & SlidingWindow(left=16)
    assert mask.kv_range(64, 96, 1000) == (48, 96)
    assert Causal().kv_range(64, 96, 80) == (0, 80)


def test_a_negative_window_is_an_error_that_names_the_value() -> None:
    with pytest.raises(ValueError, match="left=-1 is negative"):
        SlidingWindow(left=-1)


def test_a_mask_is_taken_apart_into_what_linear_attention_knows() -> None:
    real, later = jnp.asarray(REAL), jnp.asarray(~REAL | (np.arange(KEYS) > 2))
    ids = jnp.asarray(SEGMENT_K)
    seen = Visibility.of(Padding(real) & Causal() & Segments(ids, ids) & Padding(later), "test")
    assert seen.causal
    np.testing.assert_array_equal(seen.real_BT, real & later)
    np.testing.assert_array_equal(seen.segments_BT, ids)
    assert Visibility.of(Full(), "test") == Visibility(causal=False, real_BT=None, segments_BT=None)
    with pytest.raises(ValueError, match="cannot apply Prefix"):
        Visibility.of(Prefix(jnp.array([2, 3])), "SomeLayer")
