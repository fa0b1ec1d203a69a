"""Greedy decoding: at each step the token that scores highest.

    prefill   what is given, in one pass: the prompts, or the sources and the first tokens of the targets
    step      one position per row, until all rows have ended

With the keys and values of all positions kept, n tokens after a prompt of p cost p + n positions; without them every
step would run all positions before. The result is that of calling the whole model on the tokens so far and taking the
argmax of its last position. Greedy decoding finds no better sequence than beam search does, at a fraction of the cost,
and needs no length rule.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmlab.infer.rows import Rows, Start, batches, bucket, chosen_tokens, until_end, vocabulary
from llmlab.infer.steps import Inputs, Steps, prepare
from llmlab.nn.module import Params


def greedy(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    start_ids: Sequence[Start] | None = None,
    num_tokens: int | None = None,
    inputs: Inputs | None = None,
    batch_size: int | None = 64,
) -> list[list[int]]:
    """What the model writes for each prompt, without start and end.

    Args:
        model: a decoder or an encoder-decoder.
        prompts: tokens to continue; for an encoder-decoder, sources as in training, with whatever begins and ends them
            there.
        max_new_tokens: longest result.
        eos_id: token or tokens that end a row; None decodes to the full length.
        start_ids: first decoder token or tokens of every source; None for the model's own `decoder_start_id`.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        inputs: what the model is given besides the prompts (images), a row for each prompt.
        batch_size: prompts that are decoded together, those of about one length; None for all.

    Raises:
        ValueError: a row does not fit the model's positions, or there is no start token.
    """
    steps, params = prepare(model)
    num_tokens = vocabulary(steps, num_tokens)
    end_V = chosen_tokens(num_tokens, eos_id, "eos_id")
    written: list[list[int]] = [[] for _ in prompts]
    for rows in batches(
        steps, prompts, max_new_tokens=max_new_tokens, start_ids=start_ids, inputs=inputs, batch_size=batch_size
    ):
        token_BN = np.asarray(_decode(steps, bucket(max_new_tokens), params, rows, max_new_tokens, end_V))
        for number, tokens in zip(rows.number_B, token_BN[:, :max_new_tokens].tolist(), strict=True):
            written[number] = list(until_end(tokens, end_V).token_ids)
    return written


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    steps: Steps, room: int, params: Params, rows: Rows, max_new_tokens: jax.Array | int, end_V: jax.Array
) -> jax.Array:
    """New tokens (rows, room); what follows an end, or `max_new_tokens`, means nothing."""
    rows = jax.tree.map(jnp.asarray, rows)
    batch, given = rows.token_BS.shape
    row_B = jnp.arange(batch)
    state = steps.new_state(batch, given + room, jax.tree.leaves(params)[0].dtype, rows.inputs)
    hidden_BSD, state = steps.prefill(params, state, rows.token_BS, rows.position_BS, rows.inputs)

    def best(hidden_BD: jax.Array) -> jax.Array:
        return jnp.argmax(steps.project(params, hidden_BD)[:, : len(end_V)], axis=-1).astype(jnp.int32)

    token_B = best(hidden_BSD[row_B, rows.length_B - 1])
    written_BN = jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token_B)

    def unfinished(carry: Any) -> jax.Array:
        count, _, done_B, _, _ = carry
        return (count < max_new_tokens) & ~jnp.all(done_B)

    def step(carry: Any) -> Any:
        count, token_B, done_B, written_BN, state = carry
        position_B = rows.length_B + count - 1
        hidden_BSD, state = steps.step(params, state, token_B[:, None], position_B[:, None])
        token_B = best(hidden_BSD[:, 0])
        written_BN = jax.lax.dynamic_update_slice(written_BN, token_B[:, None], (0, count))
        return count + 1, token_B, done_B | end_V[token_B], written_BN, state

    start = (jnp.asarray(1, jnp.int32), token_B, jnp.asarray(end_V)[token_B], written_BN, state)
    return jax.lax.while_loop(unfinished, step, start)[3]
