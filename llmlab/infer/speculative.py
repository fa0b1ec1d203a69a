"""Speculative decoding: a cheap draft proposes several tokens, the model checks all of them in one step.

    draft     d_1 .. d_k, each drawn from q_i, the draft's distribution after those before
    step      the model's distributions p_1 .. p_{k+1} at all of these places, in one pass
    accept    d_i with probability min(1, p_i(d_i) / q_i(d_i)), up to the first that is not
    replace   that one by a draw from max(0, p_i - q_i), normalised; after k accepted ones, one more drawn from p_{k+1}

Leviathan et al. 2023 (2211.17192) and Chen et al. 2023 (2302.01318). What is written has exactly the distribution of
the model's own sampling: v is written by acceptance with probability q(v) min(1, p(v) / q(v)) = min(p(v), q(v)), and
by replacement with what is missing, p(v) - min(p(v), q(v)). The draft decides only how fast: each token is accepted
with probability a = 1 - TV(p, q), so that a step of the model writes (1 - a^{k+1}) / (1 - a) tokens where acceptances
are alike and independent. A step at batch 1 reads all weights for one token as for five, so tokens per step is what is
gained, less the draft's own time; large batches have nothing to gain.

Greedy decoding is the case where p and q are all mass on one token: a proposal is accepted if it is the model's own
choice. Two drafts: another decoder of the same vocabulary (`speculative(model, draft, ...)`), and prompt lookup
(`PromptLookup`), which proposes what followed the last few tokens where they stood before, at no cost: for summaries,
code and answers that quote.

Rows advance by different numbers of tokens; all stay in one loop on the device. Rejected positions are not cleared:
the caches' slots beyond a row's length are never looked at before they are overwritten. The random keys of a place are
made of (seed, row, position) alone. A place is drafted anew after a rejection before it, but nothing had been decided
by the draws that were made for it, so that all draws that count are independent.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.infer.drafts import (
    ACCEPT,
    REPLACE,
    Drafter,
    LookupDrafter,
    ModelDrafter,
    PromptLookup,
    Proposal,
    clipped,
    distribution,
    draw,
    place_key,
)
from llmlab.infer.rows import Rows, Start, Written, batches, bucket, chosen_tokens, until_end, vocabulary
from llmlab.infer.sampling import Sampling
from llmlab.infer.steps import Inputs, Steps, prepare
from llmlab.nn.module import Params


@dataclass(frozen=True)
class Statistics:
    """What speculation did, over all rows. The first token of a row is written by the prefill and not counted."""

    steps: int
    """Steps of the model, counted for each row that was not yet at its end."""
    tokens: int
    """Tokens that they wrote."""
    proposed: int
    """Tokens of the draft."""
    tested: int
    """Those of them that were compared with the model's distribution: all up to the first rejected one."""
    accepted: int
    """Those that were accepted."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the tested tokens that were accepted: 1 - TV(p, q) on average; nan where none was tested."""
        return self.accepted / self.tested if self.tested else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Tokens for each step of the model; nan where there was none."""
        return self.tokens / self.steps if self.steps else float("nan")


@dataclass(frozen=True)
class Speculated:
    """What was written, and how."""

    rows: tuple[Written, ...]
    """For each prompt."""
    statistics: Statistics
    """Of the whole."""


def speculative(
    model: nnx.Module,
    draft: nnx.Module | PromptLookup,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_drafted: int = 4,
    sampling: Sampling | None = None,
    eos_id: int | Sequence[int] | None = None,
    num_tokens: int | None = None,
    start_ids: Sequence[Start] | None = None,
    inputs: Inputs | None = None,
    batch_size: int | None = None,
) -> Speculated:
    """Continue each prompt as the model's own sampling would, in fewer of its steps.

    Args:
        model: a decoder or an encoder-decoder.
        draft: a cheaper model of the same kind and vocabulary, or `PromptLookup()`.
        prompts: tokens to continue; for an encoder-decoder, sources.
        max_new_tokens: longest result.
        num_drafted: tokens proposed in each step.
        sampling: how tokens are drawn, from the draft too; the model's own distribution by default.
        eos_id: token or tokens that end a row; None writes to the full length.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        start_ids: for an encoder-decoder, what each target begins with; None for the model's own start token.
        inputs: what both models are given besides the prompts (images), a row for each prompt.
        batch_size: prompts that are decoded together, those of about one length; None for all.

    Raises:
        ValueError: the draft does not fit the model, or a row does not fit the positions of either.
    """
    if num_drafted < 1:
        raise ValueError(f"num_drafted={num_drafted} is not positive; 4 is usual, and without a draft use generate")
    sampling = sampling or Sampling()
    steps, params = prepare(model)
    num_tokens = vocabulary(steps, num_tokens)
    drafter, draft_params = _drafter(draft, steps, num_drafted, sampling, num_tokens)
    form = _Form(steps, drafter, replace(sampling, seed=0), num_drafted, bucket(max_new_tokens))
    end_V = chosen_tokens(num_tokens, eos_id, "eos_id")
    key = jax.random.key(sampling.seed)
    written: dict[int, tuple[Written, np.ndarray]] = {}
    for rows in batches(
        steps,
        prompts,
        max_new_tokens=max_new_tokens,
        start_ids=start_ids,
        inputs=inputs,
        batch_size=batch_size,
        max_length=drafter.steps.max_length if isinstance(drafter, ModelDrafter) else None,
    ):
        text = _run(form, params, draft_params, rows, (max_new_tokens, end_V), key)
        token_BT, length_B, counted_B = (np.asarray(part) for part in text)
        for row, number in enumerate(rows.number_B):
            tokens = token_BT[row, rows.length_B[row] : length_B[row]].tolist()
            written[int(number)] = until_end(tokens, end_V), counted_B[row]
    total = sum((counts for _, counts in written.values()), np.zeros(5, np.int64))
    statistics = Statistics(*(int(count) for count in total))
    return Speculated(tuple(written[number][0] for number in range(len(prompts))), statistics)


def accept(
    p_BQV: Float[Array, "B Q V"], q_BPV: Float[Array, "B P V"], draft_BP: Int[Array, "B P"]
) -> tuple[Float[Array, "B P"], Float[Array, "B Q V"]]:
    """How probable it is that each proposal is accepted, and what is drawn from where one is not.

    Args:
        p_BQV: the model's distributions at the places of the P proposals and at the one after them, Q = P + 1.
        q_BPV: the draft's.
        draft_BP: tokens drawn from them.

    Returns:
        Probabilities of acceptance, each given that all before were accepted; and for each place the distribution of
        the token that is written there when the proposal is the first one rejected (at the last place, when all were
        accepted).
    """
    p_draft_BP, q_draft_BP = (
        jnp.take_along_axis(x_BPV, draft_BP[..., None], axis=-1)[..., 0] for x_BPV in (p_BQV[:, :-1], q_BPV)
    )
    proposed_BP = q_draft_BP > 0
    probability_BP = jnp.where(proposed_BP, jnp.minimum(p_draft_BP / jnp.where(proposed_BP, q_draft_BP, 1), 1), 0)
    missing_BPV = jnp.maximum(p_BQV[:, :-1] - q_BPV, 0)
    mass_BP1 = jnp.sum(missing_BPV, axis=-1, keepdims=True)
    # Nothing is missing where p = q; a rejection there is rounding.
    other_BPV = jnp.where(mass_BP1 > 0, missing_BPV / jnp.where(mass_BP1 > 0, mass_BP1, 1), p_BQV[:, :-1])
    return probability_BP, jnp.concatenate([other_BPV, p_BQV[:, -1:]], axis=1)


@dataclass(frozen=True)
class _Form:
    """What a compiled run is made for."""

    steps: Steps
    drafter: Drafter
    sampling: Sampling
    num_drafted: int
    room: int
    """New tokens that there is room for."""


def _drafter(
    draft: nnx.Module | PromptLookup, steps: Steps, num_drafted: int, sampling: Sampling, num_tokens: int
) -> tuple[Drafter, Params]:
    """The draft for compiled programs, and its parameters.

    Raises:
        ValueError: it does not fit the model.
    """
    if isinstance(draft, PromptLookup):
        return LookupDrafter(draft, num_drafted, num_tokens), {}
    own, params = prepare(draft)
    if type(own) is not type(steps):
        raise ValueError(
            f"the draft is a {type(own.config).__name__} and the model a {type(steps.config).__name__}: a draft is "
            "given what the model is given; use one of the same kind"
        )
    if own.config.vocab_size < num_tokens:
        raise ValueError(
            f"the draft has {own.config.vocab_size} tokens and the model writes {num_tokens}; use a draft of the same "
            "vocabulary, or give num_tokens"
        )
    return ModelDrafter(own, num_drafted, replace(sampling, seed=0), num_tokens), params


@functools.partial(jax.jit, static_argnums=0)
def _run(
    form: _Form, params: Params, draft_params: Params, rows: Rows, limits: Any, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts and new tokens (rows, T); how many of them are real; steps, tokens, proposed, tested, accepted."""
    rows, (max_new_tokens, end_V) = jax.tree.map(jnp.asarray, (rows, limits))
    batch, given = rows.token_BS.shape
    steps, row_B = form.steps, jnp.arange(batch)
    # A step writes its proposals behind a row's end, whether they are kept or not.
    length = given + form.room + form.num_drafted + 1
    key_B = jax.vmap(lambda number: jax.random.fold_in(key, number))(rows.number_B)
    state = steps.new_state(batch, length, jax.tree.leaves(params)[0].dtype, rows.inputs)
    hidden_BSD, state = steps.prefill(params, state, rows.token_BS, rows.position_BS, rows.inputs)
    draft_state = form.drafter.start(draft_params, rows, length)

    def probabilities(hidden_BSD: jax.Array) -> jax.Array:
        logits_BSV = steps.project(params, hidden_BSD)[..., : len(end_V)]
        p_RV = distribution(logits_BSV.reshape(-1, len(end_V)), form.sampling)
        return p_RV.reshape(logits_BSV.shape)

    def step(carry: Any) -> Any:
        text_BT, length_B, done_B, state, draft_state, counted_BC = carry
        proposal, draft_state = form.drafter.propose(draft_params, draft_state, text_BT, length_B, key_B)
        token_BQ = jnp.concatenate([text_BT[row_B, length_B - 1][:, None], proposal.token_BP], axis=1)
        place_BQ = length_B[:, None] + jnp.arange(form.num_drafted + 1)
        hidden_BQD, state = steps.step(params, state, token_BQ, clipped(steps, place_BQ - 1))
        accepted_B, token_BQ = _checked(probabilities(hidden_BQD), proposal, place_BQ, key_B)
        room_B = rows.length_B + max_new_tokens - length_B
        written_B, ended_B = _up_to_end(token_BQ, accepted_B + 1, room_B, end_V)
        text_BT = jax.vmap(lambda text_T, new_Q, at: jax.lax.dynamic_update_slice(text_T, new_Q, (at,)))(
            text_BT, token_BQ, length_B
        )
        tested_B = jnp.minimum(accepted_B + 1, proposal.count_B)
        counts_BC = jnp.stack([jnp.ones_like(tested_B), written_B, proposal.count_B, tested_B, accepted_B], axis=1)
        lives_B = ~done_B
        length_B = length_B + jnp.where(lives_B, written_B, 0)
        done_B = done_B | ended_B | (length_B >= rows.length_B + max_new_tokens)
        return text_BT, length_B, done_B, state, draft_state, counted_BC + counts_BC * lives_B[:, None]

    first_B = draw(probabilities(hidden_BSD[row_B, rows.length_B - 1][:, None])[:, 0], key_B, rows.length_B, REPLACE)
    text_BT = jnp.pad(rows.token_BS, ((0, 0), (0, length - given))).at[row_B, rows.length_B].set(first_B)
    done_B = end_V[first_B] | (max_new_tokens <= 1)
    start = (text_BT, rows.length_B + 1, done_B, state, draft_state, jnp.zeros((batch, 5), jnp.int32))
    text_BT, length_B, _, _, _, counted_BC = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), step, start)
    return text_BT, length_B, counted_BC


def _checked(
    p_BQV: Float[Array, "B Q V"], proposal: Proposal, place_BQ: Int[Array, "B Q"], key_B: jax.Array
) -> tuple[Int[Array, "B"], Int[Array, "B Q"]]:
    """How many proposals are accepted, and what is written: those, and one token more."""
    probability_BP, other_BQV = accept(p_BQV, proposal.q_BPV, proposal.token_BP)

    def uniform(key: jax.Array, place_P: jax.Array) -> jax.Array:
        return jax.vmap(lambda place: jax.random.uniform(place_key(key, place, ACCEPT)))(place_P)

    accepts_BP = jax.vmap(uniform)(key_B, place_BQ[:, :-1]) < probability_BP
    accepted_B = jnp.sum(jnp.cumprod(accepts_BP, axis=1), axis=1)
    row_B = jnp.arange(len(accepted_B))
    last_B = draw(other_BQV[row_B, accepted_B], key_B, place_BQ[row_B, accepted_B], REPLACE)
    return accepted_B, jnp.pad(proposal.token_BP, ((0, 0), (0, 1))).at[row_B, accepted_B].set(last_B)


def _up_to_end(
    token_BQ: Int[Array, "B Q"], count_B: Int[Array, "B"], room_B: Int[Array, "B"], end_V: jax.Array
) -> tuple[Int[Array, "B"], jax.Array]:
    """How many of the first `count_B` tokens are written, up to an end token and to the room; which rows have ended."""
    count_B = jnp.minimum(count_B, room_B)
    ends_BQ = end_V[token_BQ] & (jnp.arange(token_BQ.shape[1]) < count_B[:, None])
    ended_B = jnp.any(ends_BQ, axis=1)
    return jnp.where(ended_B, jnp.argmax(ends_BQ, axis=1) + 1, count_B), ended_B
