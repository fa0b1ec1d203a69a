"""Blocks, wherever they lie and however a prompt is cut, give the hidden states of the whole forward pass."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.engine import programs
from llmlab.infer.engine.paged import PagedCache, check_layers, gather, new_pools, scatter, slots
from llmlab.infer.engine.programs import Program, levels
from llmlab.infer.steps import prepare
from llmlab.models import t5
from llmlab.nn.cache import KVCache, Stored
from llmlab.nn.favor import FavorAttention
from llmlab.nn.feed_forward import MLP
from llmlab.nn.module import merge
from llmlab.nn.moe import Capacity, ExpertChoice, MixtureOfExperts, TopK
from tests.drawing import built
from tests.infer.engine.tiny import CONFIGS, LLAMA, model

SIZE, NONE = 4, 99
# Rows of 11 and 6 positions; blocks lie anywhere, and those after a row's last are none.
TABLE_BW = np.array([[7, 2, 5, NONE], [3, 8, NONE, NONE]], np.int32)


def cut(length: int, pieces: list[int]) -> list[np.ndarray]:
    """Positions of two rows in calls of these lengths, right-padded; the second row is 6 positions long."""
    calls, start = [], 0
    for piece in pieces:
        row = np.arange(start, start + piece)
        calls.append(np.stack([np.where(row < length, row, -1), np.where(row < 6, row, -1)]).astype(np.int32))
        start += piece
    return calls


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[12], [5, 5, 2], [1] * 11])
def test_paged_states_are_those_of_the_whole_forward_pass(name: str, pieces: list[int]) -> None:
    steps, params = prepare(model(name))
    ids = np.random.default_rng(0).integers(0, 259, (2, 12)).astype(np.int32)
    program = Program(steps=steps, num_tokens=259, max_steps=1, levels=levels(1))
    whole = jax.jit(lambda params: merge(steps.graphdef, params).hidden_states(jnp.asarray(ids)).states)(params)
    pools = new_pools(steps.config, 9, SIZE, jnp.float32)
    seen: list[Any] = []
    for position_BS in cut(11, pieces):
        token_BS = np.take_along_axis(ids, np.maximum(position_BS, 0), axis=1)
        hidden_BSD, pools = programs.prefill(program, params, pools, token_BS, position_BS, TABLE_BW)
        seen.append(hidden_BSD)
    states = np.concatenate(seen, axis=1)
    scale = float(jnp.abs(whole).max())
    np.testing.assert_allclose(states[0, :11], whole[0, :11], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(states[1, :6], whole[1, :6], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_what_is_stored_is_read_back_and_nothing_else_is_touched(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    key, value = (jnp.asarray(rng.normal(size=(2, 12, 2, 3)), jnp.float32) for _ in range(2))
    junk = jnp.full((9, SIZE, 2, 3), 9.0)
    pool = KVCache(Stored.of(junk, dtype), Stored.of(junk, dtype))
    position_BS = jnp.asarray(cut(11, [12])[0])
    cache, keys, values = PagedCache(pool, jnp.asarray(TABLE_BW)).update(key, value, position_BS)
    for read, given in ((keys, key), (values, value)):
        rounded = Stored.of(given, dtype).read(jnp.float32)
        for row, length in enumerate((11, 6)):
            np.testing.assert_array_equal(read[row, :length], rounded[row, :length])
            np.testing.assert_array_equal(read[row, length:], 0)
    untouched = [block for block in range(9) if block not in TABLE_BW]
    for leaf, before in zip(jax.tree.leaves(cache.pool), jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(leaf[np.array(untouched)], before[np.array(untouched)])
        np.testing.assert_array_equal(leaf[5, :, 3], before[5, :, 3])  # position 11 of the first row, which was padding


def test_a_window_that_is_put_back_changes_nothing_else() -> None:
    rng = np.random.default_rng(2)
    pool = KVCache(*(Stored(jnp.asarray(rng.normal(size=(9, 1, SIZE, 2)), jnp.float32)) for _ in range(2)))
    table_BW, position_BS = jnp.asarray(TABLE_BW), jnp.array([[9, 10, -1], [5, -1, -1]])
    window = gather(pool, table_BW, jnp.array([11, 6]))
    again = scatter(pool, slots(window, position_BS), table_BW, position_BS)
    for leaf, before in zip(jax.tree.leaves(again), jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(leaf, before)


def test_infinities_that_a_former_owner_left_are_not_met() -> None:
    steps, params = prepare(model("llama"))
    program = Program(steps=steps, num_tokens=259, max_steps=1, levels=levels(1))
    token_BS, position_BS = np.ones((2, 12), np.int32), cut(11, [12])[0]
    results = []
    for junk in (0.0, np.nan):
        pools = jax.tree.map(lambda leaf, junk=junk: leaf + junk, new_pools(steps.config, 9, SIZE, jnp.float32))
        hidden_BSD, _ = programs.prefill(program, params, pools, token_BS, position_BS, TABLE_BW)
        results.append(np.where(position_BS[..., None] >= 0, hidden_BSD, 0))
    np.testing.assert_array_equal(results[0], results[1])


def experts(router: Any) -> Any:
    ffn = MixtureOfExperts(num_experts=2, experts_per_token=1, expert=MLP(hidden_dim=8), router=router)
    return replace(LLAMA, pattern=(replace(LLAMA.pattern[0], ffn=ffn),))


PERFORMER = replace(LLAMA, pattern=(replace(LLAMA.pattern[0], mixer=FavorAttention(num_heads=2, causal=True)),))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            PERFORMER,
            "FavorAttention keeps no keys",
        ),
        (experts(TopK(capacity=Capacity())), "limited number of a call's tokens"),
        (experts(ExpertChoice()), "limited number of a call's tokens"),
    ],
)
def test_layers_whose_state_is_no_keys_and_values_are_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"layer 0 cannot be served from blocks: .*{reason}"):
        check_layers(config)


def test_experts_without_a_limit_are_served() -> None:
    check_layers(experts(TopK()))


def test_an_encoder_decoder_is_refused() -> None:
    from llmlab.infer.engine.engine import Engine
    from tests.infer.engine.tiny import tokenizer

    config = t5.t5(embed_dim=16, num_layers=1, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=259, num_buckets=8)
    with pytest.raises(ValueError, match="the engine serves decoders"):
        Engine(built(config), tokenizer())
