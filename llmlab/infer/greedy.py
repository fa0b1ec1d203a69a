"""Greedy decoding with an encoder-decoder: at each step the token that scores highest.

    encode    all sources in one pass; the first decoder step keeps the memory's keys and values in every layer
    decode    one position per row and step, until all rows have ended

With the keys and values of memory and target kept, a target of N tokens over a source of T costs one encoder pass and
N decoder positions; without them every step would project the whole memory again in each layer, and run all positions
before. The result is that of calling the whole model on the target so far and taking the argmax of its last position.
Greedy decoding finds no better sequence than beam search does, at a fraction of the cost, and needs no length rule.

Shapes are static: sources are right-padded to a multiple of 16 and the last group of rows filled up, so that few
programs are compiled.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.infer.steps import State, Steps, prepare
from llmlab.models.encoder_decoder import EncoderDecoderModel
from llmlab.nn.module import Params

_MULTIPLE = 16


def greedy(
    model: EncoderDecoderModel,
    sources: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    start_ids: Sequence[int] | None = None,
    num_tokens: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """The target that the model writes for each source, without start and end.

    Args:
        model: an encoder-decoder.
        sources: tokens as in training, with whatever begins and ends them there.
        max_new_tokens: longest target.
        eos_id: token that ends a target; None decodes to the full length.
        start_ids: first decoder token of every row; None for the model's own `decoder_start_id`.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        batch_size: sources that are decoded together; those of about one length are.

    Raises:
        ValueError: a source or target is longer than the model's positions, or there is no start token.
    """
    starts = _starts(model, sources, start_ids)
    _check_lengths(model, sources, max_new_tokens)
    steps, params = prepare(model)
    targets: list[list[int]] = [[] for _ in sources]
    by_length = sorted(range(len(sources)), key=lambda row: len(sources[row]))
    for first in range(0, len(sources), batch_size):
        rows = by_length[first : first + batch_size]
        length = _padded(max(len(sources[row]) for row in rows), model.config.max_length)
        ids, mask = (np.zeros((batch_size, length), np.int32) for _ in range(2))
        start_B = np.full(batch_size, starts[rows[0]], np.int32)
        mask[:, 0] = 1  # a row that is not there, or an empty source: attention must have something to see
        for i, row in enumerate(rows):
            ids[i, : len(sources[row])] = sources[row]
            mask[i, : len(sources[row])] = 1
            start_B[i] = starts[row]
        limits = (max_new_tokens, eos_id, num_tokens)
        written = np.asarray(_decode(steps, limits, params, ids, mask, start_B, np.int32(len(rows))))
        for i, row in enumerate(rows):
            targets[row] = _until(written[i].tolist(), eos_id)
    return targets


def _starts(
    model: EncoderDecoderModel, sources: Sequence[Sequence[int]], start_ids: Sequence[int] | None
) -> Sequence[int]:
    start = model.config.decoder_start_id
    if start_ids is None:
        if start is None:
            raise ValueError(
                "the model has no decoder_start_id: its targets begin with tokens of their own; give start_ids"
            )
        return [start] * len(sources)
    if len(start_ids) != len(sources):
        raise ValueError(f"there are {len(start_ids)} start_ids and {len(sources)} sources; give one to each")
    return start_ids


def _check_lengths(model: EncoderDecoderModel, sources: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not positive")
    limit, longest = model.config.max_length, max((len(source) for source in sources), default=0)
    if limit is not None and max(longest, max_new_tokens) > limit:
        raise ValueError(
            f"the longest source has {longest} tokens, max_new_tokens={max_new_tokens}, and the model {limit} "
            "positions; shorten what is longer"
        )


def _padded(length: int, limit: int | None) -> int:
    padded = max(-(-length // _MULTIPLE) * _MULTIPLE, _MULTIPLE)
    return padded if limit is None else min(padded, limit)


def _until(tokens: list[int], eos_id: int | None) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    steps: Steps,
    limits: tuple[int, int | None, int | None],
    params: Params,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    start_B: jax.Array,
    num_rows: jax.Array,
) -> jax.Array:
    """Targets (rows, max_new_tokens); what follows an end means nothing. Rows from `num_rows` on are not waited for."""
    length, eos_id, num_tokens = limits
    batch, source = len(input_ids), {"input_ids": input_ids, "attention_mask": attention_mask}

    def positions(position: Any) -> jax.Array:
        return jnp.full((batch, 1), position, jnp.int32)

    def best(hidden_B1D: jax.Array) -> jax.Array:
        return jnp.argmax(steps.project(params, hidden_B1D[:, 0])[:, :num_tokens], axis=-1).astype(jnp.int32)

    def ended(token_B: jax.Array) -> jax.Array:
        return token_B == (-1 if eos_id is None else eos_id)

    empty = steps.new_state(batch, length, jax.tree.leaves(params)[0].dtype, source)
    hidden_B1D, state = steps.prefill(params, empty, start_B[:, None], positions(0), source)
    token_B = best(hidden_B1D)
    written_BS = jnp.zeros((batch, length), jnp.int32).at[:, 0].set(token_B)
    done_B = ended(token_B) | (jnp.arange(batch) >= num_rows)

    def unfinished(carry: Any) -> jax.Array:
        position, _, done_B, _, _ = carry
        return (position < length) & ~jnp.all(done_B)

    def step(carry: tuple[Any, jax.Array, jax.Array, jax.Array, State]) -> Any:
        position, token_B, done_B, written_BS, state = carry
        hidden_B1D, state = steps.step(params, state, token_B[:, None], positions(position))
        token_B = best(hidden_B1D)
        written_BS = jax.lax.dynamic_update_slice(written_BS, token_B[:, None], (0, position))
        return position + 1, token_B, done_B | ended(token_B), written_BS, state

    return jax.lax.while_loop(unfinished, step, (1, token_B, done_B, written_BS, state))[3]
