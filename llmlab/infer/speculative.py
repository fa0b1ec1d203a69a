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
the caches' slots beyond a row's length are never looked at before they are overwritten. (Sums, as causal FAVOR keeps
them, cannot be taken back: such models are refused.) The random keys of a place are made of (seed, position) alone. A
place is drafted anew after a rejection before it, but nothing had been decided by the draws that were made for it, so
that all draws that count are independent.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
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
    Drawing,
    LookupDrafter,
    ModelDrafter,
    PromptLookup,
    Proposal,
    within,
)
from llmlab.infer.rows import Rows, Start, Written, batches, bucket, chosen_tokens, until_end, vocabulary
from llmlab.infer.sampling import Counts, Needs, Sampling, SamplingRows, check_vocabulary
from llmlab.infer.steps import DecoderSteps, Inputs, Steps, prepare
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
    sampling: Sampling | Sequence[Sampling] | None = None,
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
        sampling: how tokens are drawn, from the draft too, for all prompts or one for each; the model's own
            distribution by default. Equal prompts with equal seeds get equal tokens.
        eos_id: token or tokens that end a row; None writes to the full length.
        num_tokens: only ids below are written: a model's vocabulary is rounded up, and its last rows are no tokens.
        start_ids: for an encoder-decoder, what each target begins with; None for the model's own start token.
        inputs: what both models are given besides the prompts (images), a row for each prompt.
        batch_size: prompts that are decoded together, those of about one length; None for all.

    Raises:
        ValueError: the draft does not fit the model, or a row does not fit the positions of either, or sampling names
            what there is not, or a layer of either keeps sums.
    """
    if num_drafted < 1:
        raise ValueError(f"num_drafted={num_drafted} is not positive; 4 is usual, and without a draft use generate")
    steps, params = prepare(model)
    num_tokens = vocabulary(steps, num_tokens)
    samplings = _samplings(sampling, len(prompts), num_tokens)
    needs = Needs.of(samplings)
    drafter, draft_params = _drafter(draft, steps, num_drafted, needs, num_tokens)
    form = _Form(steps, drafter, needs, num_drafted, bucket(max_new_tokens))
    end_V = chosen_tokens(num_tokens, eos_id, "eos_id")
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
        drawing = _drawing(rows, samplings, needs, max_new_tokens, num_tokens)
        text = _run(form, params, draft_params, rows, drawing, (max_new_tokens, end_V))
        token_BT, length_B, counted_B = (np.asarray(part) for part in text)
        for row, number in enumerate(rows.number_B):
            tokens = token_BT[row, rows.length_B[row] : length_B[row]].tolist()
            written[int(number)] = until_end(tokens, end_V), counted_B[row]
    total = sum((counts for _, counts in written.values()), np.zeros(5, np.int64))
    statistics = Statistics(*(int(count) for count in total))
    return Speculated(tuple(written[number][0] for number in range(len(prompts))), statistics)


def _samplings(sampling: Sampling | Sequence[Sampling] | None, count: int, num_tokens: int) -> list[Sampling]:
    """How each prompt is continued."""
    sampling = sampling or Sampling()
    every = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
    if len(every) != count:
        raise ValueError(f"sampling has {len(every)} values for {count} prompts; give one for all, or one for each")
    for one in set(every):
        check_vocabulary(one, num_tokens)
        if one.logprobs is not None:
            raise ValueError(f"logprobs={one.logprobs}: speculation reports no log-probabilities; use generate")
    return every


def _drawing(rows: Rows, samplings: Sequence[Sampling], needs: Needs, max_new_tokens: int, num_tokens: int) -> Drawing:
    """How the rows of a batch draw, at their first new token."""
    start_B = np.asarray(rows.length_B)
    some = [samplings[number] for number in rows.number_B]
    lasts = (start_B + max_new_tokens - 1).tolist()
    texts = [tokens[:length] for tokens, length in zip(np.asarray(rows.token_BS).tolist(), start_B, strict=True)]
    counts = Counts.of(texts, num_tokens) if needs.counts else None
    return Drawing(SamplingRows.of(some, starts=start_B.tolist(), lasts=lasts), counts)


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
    needs: Needs
    num_drafted: int
    room: int
    """New tokens that there is room for."""


def _drafter(
    draft: nnx.Module | PromptLookup, steps: Steps, num_drafted: int, needs: Needs, num_tokens: int
) -> tuple[Drafter, Params]:
    """The draft for compiled programs, and its parameters.

    Raises:
        ValueError: it does not fit the model.
    """
    if isinstance(draft, PromptLookup):
        return LookupDrafter(draft, num_drafted, num_tokens), {}
    own, params = prepare(draft)
    if type(own) is not type(steps) and not (isinstance(own, DecoderSteps) and isinstance(steps, DecoderSteps)):
        raise ValueError(
            f"the draft is of {type(own.config).__name__} and the model of {type(steps.config).__name__}: a draft is "
            "given what the model is given; use one of the same kind"
        )
    if own.num_scores < num_tokens:
        raise ValueError(
            f"the draft has {own.num_scores} tokens and the model writes {num_tokens}; use a draft of the same "
            "vocabulary, or give num_tokens"
        )
    return ModelDrafter(own, num_drafted, needs, num_tokens), params


@functools.partial(jax.jit, static_argnums=0)
def _run(
    form: _Form, params: Params, draft_params: Params, rows: Rows, drawing: Drawing, limits: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts and new tokens (rows, T); how many of them are real; steps, tokens, proposed, tested, accepted."""
    rows, drawing, (max_new_tokens, end_V) = jax.tree.map(jnp.asarray, (rows, drawing, limits))
    batch, given = rows.token_BS.shape
    steps, row_B, length = form.steps, jnp.arange(batch), given + form.room
    dtype = jax.tree.leaves(params)[0].dtype
    state = steps.new_state(batch, length, dtype, rows.inputs, rewind=form.num_drafted)
    hidden_BSD, state = steps.prefill(params, state, rows.token_BS, rows.position_BS, rows.inputs)
    draft_state = form.drafter.start(draft_params, rows, length)

    def step(carry: Any) -> Any:
        text_BT, length_B, done_B, state, draft_state, drawing, counted_BC = carry
        proposal, draft_state = form.drafter.propose(draft_params, draft_state, text_BT, length_B, drawing)
        token_BQ = jnp.concatenate([text_BT[row_B, length_B - 1][:, None], proposal.token_BP], axis=1)
        place_BQ = length_B[:, None] + jnp.arange(form.num_drafted + 1)
        hidden_BQD, state = steps.step(params, state, token_BQ, within(steps, place_BQ - 1))
        logits_BQV = steps.project(params, hidden_BQD)[..., : len(end_V)]
        p_BQV = _distributions(logits_BQV, proposal.token_BP, place_BQ, drawing, form.needs)
        accepted_B, token_BQ = _checked(p_BQV, proposal, place_BQ, drawing)
        room_B = rows.length_B + max_new_tokens - length_B
        written_B, ended_B = _up_to_end(token_BQ, accepted_B + 1, room_B, end_V)
        tested_B = jnp.minimum(accepted_B + 1, proposal.count_B)
        counts_BC = jnp.stack([jnp.ones_like(tested_B), written_B, proposal.count_B, tested_B, accepted_B], axis=1)
        counted_BC = counted_BC + counts_BC * ~done_B[:, None]
        # Behind a row's end stand proposals, kept or not; a row that is done stays where it is.
        text_BT = text_BT.at[row_B[:, None], place_BQ].set(token_BQ, mode="drop")
        written_B = jnp.where(done_B, 0, written_B)
        for place in range(form.num_drafted + 1):
            drawing = drawing.after(token_BQ[:, place], place < written_B)
        length_B = length_B + written_B
        done_B = done_B | ended_B | (length_B >= rows.length_B + max_new_tokens)
        return text_BT, length_B, done_B, state, draft_state, drawing, counted_BC

    logits_BV = steps.project(params, hidden_BSD[row_B, rows.length_B - 1])[:, : len(end_V)]
    p_BV = drawing.distribution(logits_BV, form.needs, rows.length_B)
    first_B = drawing.draw(p_BV, rows.length_B, REPLACE)
    text_BT = jnp.pad(rows.token_BS, ((0, 0), (0, form.room))).at[row_B, rows.length_B].set(first_B)
    done_B = end_V[first_B] | (max_new_tokens <= 1)
    counted_BC = jnp.zeros((batch, 5), jnp.int32)
    start = (text_BT, rows.length_B + 1, done_B, state, draft_state, drawing.after(first_B), counted_BC)
    text_BT, length_B, *_, counted_BC = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), step, start)
    return text_BT, length_B, counted_BC


def _distributions(
    logits_BQV: Float[Array, "B Q V"],
    draft_BP: Int[Array, "B P"],
    place_BQ: Int[Array, "B Q"],
    drawing: Drawing,
    needs: Needs,
) -> Float[Array, "B Q V"]:
    """What the model's own token at each place is drawn from, when all proposals before it are written."""

    def one(drawing: Drawing, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Drawing, jax.Array]:
        logits_BV, place_B, proposed_B = at
        return drawing.after(proposed_B), drawing.distribution(logits_BV, needs, place_B)

    following_BQ = jnp.pad(draft_BP, ((0, 0), (0, 1)))
    places_first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (logits_BQV, place_BQ, following_BQ))
    return jnp.moveaxis(jax.lax.scan(one, drawing, places_first)[1], 0, 1)


def _checked(
    p_BQV: Float[Array, "B Q V"], proposal: Proposal, place_BQ: Int[Array, "B Q"], drawing: Drawing
) -> tuple[Int[Array, "B"], Int[Array, "B Q"]]:
    """How many proposals are accepted, and what is written: those, and one token more."""
    probability_BP, other_BQV = accept(p_BQV, proposal.q_BPV, proposal.token_BP)

    def uniforms(place_B: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.uniform)(drawing.keys(place_B, ACCEPT))

    accepts_BP = jax.vmap(uniforms, 1, 1)(place_BQ[:, :-1]) < probability_BP
    accepted_B = jnp.sum(jnp.cumprod(accepts_BP, axis=1), axis=1)
    row_B = jnp.arange(len(accepted_B))
    last_B = drawing.draw(other_BQV[row_B, accepted_B], place_BQ[row_B, accepted_B], REPLACE)
    return accepted_B, jnp.pad(proposal.token_BP, ((0, 0), (0, 1))).at[row_B, accepted_B].set(last_B)


def _up_to_end(
    token_BQ: Int[Array, "B Q"], count_B: Int[Array, "B"], room_B: Int[Array, "B"], end_V: jax.Array
) -> tuple[Int[Array, "B"], jax.Array]:
    """How many of the first `count_B` tokens are written, up to an end token and to the room; which rows have ended."""
    count_B = jnp.minimum(count_B, room_B)
    ends_BQ = end_V[token_BQ] & (jnp.arange(token_BQ.shape[1]) < count_B[:, None])
    ended_B = jnp.any(ends_BQ, axis=1)
    return jnp.where(ended_B, jnp.argmax(ends_BQ, axis=1) + 1, count_B), ended_B
