"""Contrastive search: probable tokens whose states are unlike those before them.

    x_t = argmax over the k most probable v of   (1 - alpha) p(v | x_<t)  -  alpha max_{j<t} cos(h_v, h_j)

Su et al. 2022 (A Contrastive Framework for Neural Text Generation, 2202.06417, equation 5). Greedy and beam search
write what they have written before: a repeated token has nearly the state that it had, and nothing counts against
that. Here it does: h_v is the state of the candidate in its place, h_j are those of the prompt and of all new tokens,
and `alpha` weighs how likely a token is against how much it repeats (0 is greedy decoding; 0.6 with k = 4 is usual).
Nothing is drawn: the same prompt gives the same text. It presumes states that tell tokens apart; where all of a
model's states point into one direction (small GPT-2 models), the penalty says little.

The states of k candidates cost k rows in every step, and the cosines O(t D) for each; the chosen candidate's states
then serve the next step, so that a token is run once.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from llmlab.infer.rows import Rows, Start, Written, batches, bucket, chosen_tokens, until_end, vocabulary
from llmlab.infer.steps import Inputs, Steps, prepare
from llmlab.nn.module import Params


def contrastive_search(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    top_k: int = 4,
    alpha: float = 0.6,
    eos_id: int | Sequence[int] | None = None,
    banned_ids: Sequence[int] = (),
    num_tokens: int | None = None,
    start_ids: Sequence[Start] | None = None,
    inputs: Inputs | None = None,
    batch_size: int | None = None,
) -> list[Written]:
    """What contrastive search writes for each prompt.

    Args:
        model: a decoder or an encoder-decoder (states are those of the target then).
        prompts: tokens to continue; for an encoder-decoder, sources.
        max_new_tokens: longest result.
        top_k: candidates of each step, the most probable tokens.
        alpha: weight of the degeneration penalty, 0 to 1.
        eos_id: token or tokens that end a row; None writes to the full length.
        banned_ids: tokens that are never written.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        start_ids: for an encoder-decoder, what each target begins with; None for the model's own start token.
        inputs: what the model is given besides the prompts (images), a row for each prompt.
        batch_size: prompts that are decoded together, those of about one length; None for all.

    Raises:
        ValueError: numbers that make no search, or a row that does not fit the model's positions.
    """
    steps, params = prepare(model)
    num_tokens = vocabulary(steps, num_tokens)
    if not 1 <= top_k <= num_tokens:
        raise ValueError(f"top_k={top_k} is not in 1..{num_tokens}, the vocabulary; 4 to 8 are usual")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in [0, 1]; 0 is greedy decoding, 0.6 is usual")
    end_V = chosen_tokens(num_tokens, eos_id, "eos_id")
    banned_V = chosen_tokens(num_tokens, banned_ids, "banned_ids")
    if np.all(banned_V):
        raise ValueError("banned_ids leave no token to write; allow one")
    written: dict[int, Written] = {}
    for rows in batches(
        steps, prompts, max_new_tokens=max_new_tokens, start_ids=start_ids, inputs=inputs, batch_size=batch_size
    ):
        rules = (max_new_tokens, float(alpha), end_V, banned_V)
        token_BN = np.asarray(_search(steps, (top_k, bucket(max_new_tokens)), params, rows, rules))
        for number, tokens in zip(rows.number_B, token_BN[:, :max_new_tokens].tolist(), strict=True):
            written[int(number)] = until_end(tokens, end_V)
    return [written[number] for number in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(steps: Steps, form: tuple[int, int], params: Params, rows: Rows, rules: Any) -> jax.Array:
    """New tokens (rows, room); what follows an end, or `max_new_tokens`, means nothing."""
    top_k, room = form
    rows, (max_new_tokens, alpha, end_V, banned_V) = jax.tree.map(jnp.asarray, (rows, rules))
    batch, given = rows.token_BS.shape
    row_B = jnp.arange(batch)
    prompt_R = jnp.repeat(row_B, top_k)
    state = steps.new_state(batch, given + room, jax.tree.leaves(params)[0].dtype, rows.inputs)
    hidden_BSD, state = steps.prefill(params, state, rows.token_BS, rows.position_BS, rows.inputs)

    def probabilities(hidden_BD: jax.Array) -> jax.Array:
        logits_BV = steps.project(params, hidden_BD)[:, : len(end_V)]
        return jax.nn.softmax(jnp.where(banned_V, -jnp.inf, logits_BV), axis=-1)

    def unfinished(carry: Any) -> jax.Array:
        count, done_B = carry[:2]
        return (count < max_new_tokens) & ~jnp.all(done_B)

    def step(carry: Any) -> Any:
        count, done_B, p_BV, seen_BTD, token_BN, source_R, state = carry
        position_B = rows.length_B + count
        p_BK, token_BK = jax.lax.top_k(p_BV, top_k)
        position_R1 = position_B[prompt_R][:, None]
        hidden_RSD, state = steps.step(params, state.take(source_R), token_BK.reshape(-1, 1), position_R1)
        hidden_BKD = hidden_RSD.reshape(batch, top_k, -1)
        unit_BKD = _unit(hidden_BKD)
        known_BT = jnp.arange(seen_BTD.shape[1]) < position_B[:, None]
        best_B = jnp.argmax((1 - alpha) * p_BK - alpha * _likeness(unit_BKD, seen_BTD, known_BT), axis=-1)
        token_B = token_BK[row_B, best_B]
        seen_BTD = seen_BTD.at[row_B, position_B].set(unit_BKD[row_B, best_B])
        p_BV = probabilities(hidden_BKD[row_B, best_B])
        # All candidates of a row go on from the state of the chosen one.
        source_R = (row_B * top_k + best_B)[prompt_R]
        token_BN = token_BN.at[:, count].set(token_B)
        return count + 1, done_B | end_V[token_B], p_BV, seen_BTD, token_BN, source_R, state

    p_BV = probabilities(hidden_BSD[row_B, rows.length_B - 1])
    seen_BTD = jnp.pad(_unit(hidden_BSD), ((0, 0), (0, room), (0, 0)))
    token_BN = jnp.zeros((batch, room), jnp.int32)
    rows_R = jnp.arange(batch * top_k)
    start = (jnp.asarray(0), jnp.zeros(batch, bool), p_BV, seen_BTD, token_BN, rows_R, state.take(prompt_R))
    return jax.lax.while_loop(unfinished, step, start)[4]


def _unit(hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """States of length one, float32; a state of zeros stays one."""
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.maximum(jnp.linalg.norm(hidden, axis=-1, keepdims=True), 1e-12)


def _likeness(
    unit_BKD: Float[Array, "B K D"], seen_BTD: Float[Array, "B T D"], known_BT: Bool[Array, "B T"]
) -> Float[Array, "B K"]:
    """The largest cosine of each candidate with what came before it."""
    cosine_BKT = jnp.einsum("BKD,BTD->BKT", unit_BKD, seen_BTD)
    return jnp.max(jnp.where(known_BT[:, None], cosine_BKT, -jnp.inf), axis=-1)
