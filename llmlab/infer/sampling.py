"""Sampling: from the scores of the next token to a token, row by row as each request asks.

Stages, in this order; each is the identity where a request does not ask for it:

    allowed tokens      scores outside a bitmask become minus infinity (grammars: `llmlab.infer.constraints`)
    logit bias, bans    numbers added to the scores of single tokens; a ban adds minus infinity
    repetition penalty  r: positive scores of tokens seen in prompt or text are divided by r, negative ones multiplied
                        (CTRL: Keskar et al. 2019, 1909.05858; over prompt and text as most implementations have it)
    presence penalty    a: a is subtracted once from the score of a token that the new text has (OpenAI's definition:
    frequency penalty   f: f is subtracted as often as the new text has the token           over the new text alone)
    temperature t       p_i proportional to exp(z_i / t); 0 is greedy, the most probable token
    top-k               only the k most probable tokens (Fan et al. 2018, 1805.04833)
    top-p               only the smallest set of most probable tokens whose mass reaches p (nucleus sampling, Holtzman
                        et al. 2020, 1904.09751), of the mass that top-k left
    min-p               only tokens at least m times as probable as the most probable one (Nguyen et al. 2024,
                        2407.01082)
    forced tokens       the first tokens of the text, or its last, whatever the scores say

Ties: equal scores rank by token id, the lowest first. So greedy takes the lowest of the best, top-k keeps exactly k
tokens, and top-p cuts through a tie where the mass is reached; min-p looks at probabilities alone and keeps all tokens
of a tie or none.

Log-probabilities are of the model's own distribution, log softmax of the scores before all stages, as the OpenAI
interface and vLLM report them: they say what the model thought, not how the token was drawn.

The random key of a token is a function of (seed, sample number, position) alone, so what a request samples does not
depend on the batch it is decoded in. Two requests with one prompt and one seed therefore say the same; several samples
of a prompt have several sample numbers.

All values are traced, one per row: programs compile again only when a stage is needed that was not (`Needs`). Costs a
row and token, V the vocabulary: O(V), and one sort of V scores where top-k or top-p is asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from llmlab.infer.sampling_rules import GREEDY as GREEDY
from llmlab.infer.sampling_rules import Sampling as Sampling
from llmlab.infer.sampling_rules import check_vocabulary as check_vocabulary

_NO_ID = -1
# Tokens that are searched for the largest score at a time.
_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Which stages a batch needs at all: static, so that greedy decoding pays for nothing else."""

    draw: bool = False
    """Some row has a temperature above 0."""
    rank: bool = False
    """Some row has top-k or top-p: scores are sorted."""
    min_p: bool = False
    """Some row has min-p."""
    counts: bool = False
    """Some row has a penalty: tokens are counted."""
    bias: bool = False
    """Some row has biased or banned tokens."""
    forced: bool = False
    """Some row has forced tokens."""
    allowed: bool = False
    """A bitmask of allowed tokens is given."""
    logprobs: int | None = None
    """Most probable tokens to report of every row, rounded up to 0 or a power of two; None for no log-probabilities."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling], *, allowed: bool = False) -> "Needs":
        """What a batch of these requests needs."""
        warm = [s for s in samplings if s.temperature > 0]
        asked = [s.logprobs for s in samplings if s.logprobs is not None]
        return cls(
            draw=bool(warm),
            rank=any(s.top_k is not None or (s.top_p is not None and s.top_p < 1) for s in warm),
            min_p=any(s.min_p for s in warm),
            counts=any(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty for s in samplings),
            bias=any(s.logit_bias or s.banned_ids for s in samplings),
            forced=any(s.forced_ids or s.forced_last_id is not None for s in samplings),
            allowed=allowed,
            logprobs=_power_of_two(max(asked), 1) if asked else None,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The requests of a batch as arrays, one row each: B rows, J biased and F forced tokens at most."""

    temperature_B: Float[Array, "B"] | np.ndarray
    top_k_B: Int[Array, "B"] | np.ndarray
    top_p_B: Float[Array, "B"] | np.ndarray
    min_p_B: Float[Array, "B"] | np.ndarray
    repetition_B: Float[Array, "B"] | np.ndarray
    presence_B: Float[Array, "B"] | np.ndarray
    frequency_B: Float[Array, "B"] | np.ndarray
    bias_id_BJ: Int[Array, "B J"] | np.ndarray
    """Padded with an id beyond all vocabularies."""
    bias_BJ: Float[Array, "B J"] | np.ndarray
    forced_BF: Int[Array, "B F"] | np.ndarray
    """Padded with -1."""
    forced_last_B: Int[Array, "B"] | np.ndarray
    """-1 for none."""
    seed_B2: UInt32[Array, "B 2"] | np.ndarray
    """High and low half of the seed."""
    sample_B: UInt32[Array, "B"] | np.ndarray
    """Number of the sample of its request."""
    start_B: Int[Array, "B"] | np.ndarray
    """Position of the first new token."""
    last_B: Int[Array, "B"] | np.ndarray
    """Position of the last token that `max_new_tokens` allows."""

    @classmethod
    def of(
        cls,
        samplings: Sequence[Sampling],
        *,
        samples: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        lasts: Sequence[int] | None = None,
    ) -> "SamplingRows":
        """The rows of these requests, in host memory.

        Args:
            samplings: one per row.
            samples: number of the sample of its request, 0 by default.
            starts: position of the first new token, 0 by default; forced tokens are counted from it.
            lasts: position of the last token; without it `forced_last_id` forces nothing.
        """
        count = len(samplings)
        bias = [(*s.logit_bias, *((index, -math.inf) for index in s.banned_ids)) for s in samplings]
        return cls(
            temperature_B=np.array([s.temperature for s in samplings], np.float32),
            top_k_B=np.array([min(s.top_k or 2**31 - 1, 2**31 - 1) for s in samplings], np.int32),
            top_p_B=np.array([1 if s.top_p is None else s.top_p for s in samplings], np.float32),
            min_p_B=np.array([s.min_p or 0 for s in samplings], np.float32),
            repetition_B=np.array([s.repetition_penalty for s in samplings], np.float32),
            presence_B=np.array([s.presence_penalty for s in samplings], np.float32),
            frequency_B=np.array([s.frequency_penalty for s in samplings], np.float32),
            bias_id_BJ=_rectangle([[index for index, _ in row] for row in bias], 2**31 - 1, np.int32),
            bias_BJ=_rectangle([[value for _, value in row] for row in bias], 0, np.float32),
            forced_BF=_rectangle([s.forced_ids for s in samplings], _NO_ID, np.int32),
            forced_last_B=np.array(
                [_NO_ID if s.forced_last_id is None else s.forced_last_id for s in samplings], np.int32
            ),
            seed_B2=np.array([divmod(s.seed, 2**32) for s in samplings], np.uint32).reshape(count, 2),
            sample_B=np.array([0] * count if samples is None else samples, np.uint32),
            start_B=np.array([0] * count if starts is None else starts, np.int32),
            last_B=np.array([2**31 - 1] * count if lasts is None else lasts, np.int32),
        )

    def take(self, row_R: "Int[Array, 'R'] | np.ndarray") -> "SamplingRows":
        """These rows, in this order."""
        return SamplingRows(*(getattr(self, field.name)[row_R] for field in fields(self)))


def _rectangle(rows: Sequence[Sequence[float]], fill: int, dtype: type) -> np.ndarray:
    """Rows of different lengths side by side; the width is 0 or a power of two from 8 on, to compile seldom."""
    longest = max((len(row) for row in rows), default=0)
    result = np.full((len(rows), _power_of_two(longest, 8)), fill, dtype)
    for number, row in enumerate(rows):
        result[number, : len(row)] = row
    return result


def _power_of_two(number: int, least: int) -> int:
    """0, or the smallest power of two that is neither below the number nor below `least`."""
    return 0 if number == 0 else max(least, 1 << (number - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counts:
    """Which tokens rows have had so far: what penalties look at. B rows, V tokens."""

    prompt_BV: Bool[Array, "B V"] | np.ndarray
    """Whether the prompt has the token."""
    text_BV: Int[Array, "B V"] | np.ndarray
    """How often the new text has it."""

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], num_tokens: int, texts: Sequence[Sequence[int]] | None = None
    ) -> "Counts":
        """Counts of rows with these prompts, and what they have written already, in host memory.

        Ids from `num_tokens` on (an image's places) are not counted: they are never drawn.
        """
        prompt_BV = np.zeros((len(prompts), num_tokens), bool)
        text_BV = np.zeros((len(prompts), num_tokens), np.int32)
        for row, prompt in enumerate(prompts):
            prompt_BV[row, _drawable(prompt, num_tokens)] = True
            if texts is not None:
                np.add.at(text_BV[row], _drawable(texts[row], num_tokens), 1)
        return cls(prompt_BV, text_BV)

    def add(self, token_B: Int[Array, "B"], counted_B: Bool[Array, "B"] | None = None) -> "Counts":
        """With one more token of each row's text, where `counted_B` is true."""
        one_B = jnp.ones_like(token_B) if counted_B is None else counted_B.astype(jnp.int32)
        rows_B = jnp.arange(len(token_B))
        return Counts(self.prompt_BV, jnp.asarray(self.text_BV).at[rows_B, token_B].add(one_B))


def _drawable(ids: Sequence[int], num_tokens: int) -> np.ndarray:
    return np.array([index for index in ids if index < num_tokens], np.int64)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities in the model's own distribution, natural logarithms; any leading shape, here rows B."""

    chosen_B: Float[Array, "*B"]
    """Of the token itself."""
    top_id_BN: Int[Array, "*B N"]
    """The most probable tokens, best first; equals by id."""
    top_BN: Float[Array, "*B N"]
    """Theirs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """The next token of every row."""

    token_B: Int[Array, "B"]
    logprobs: Logprobs | None
    """None where no row asked for them."""


def choose(
    logits_BV: Float[Array, "B V"],
    rows: SamplingRows,
    needs: Needs,
    position_B: Int[Array, "B"],
    counts: Counts | None = None,
    allowed_BW: Int[Array, "B W"] | UInt32[Array, "B W"] | None = None,
) -> Choice:
    """The next token of every row.

    Args:
        logits_BV: scores of the next token, as the model gives them.
        rows: how each row draws.
        needs: which stages to run (static); what is not needed is skipped for all rows.
        position_B: position that the new token will take.
        counts: tokens so far, where `needs.counts`; `Counts.add` the chosen ones before the next call.
        allowed_BW: where `needs.allowed`, bit i of word w (32 bits, lowest first) tells whether token 32 w + i may be
            drawn.
    """
    scores_BV = _scores(logits_BV, rows, needs, counts, allowed_BW)
    token_B = _first_largest(scores_BV)
    if needs.draw:
        drawn_B = jax.vmap(_draw)(_warm(scores_BV, rows, needs), rows.seed_B2, rows.sample_B, position_B)
        token_B = jnp.where(rows.temperature_B == 0, token_B, drawn_B)
    if needs.forced:
        forced_B = _forced(rows, position_B)
        token_B = jnp.where(forced_B == _NO_ID, token_B, forced_B)
    logprobs = None if needs.logprobs is None else logprobs_of(logits_BV, token_B, needs.logprobs)
    return Choice(token_B, logprobs)


def _first_largest(scores_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The token of the largest score, the first of equals.

    Looked for among groups of tokens and then inside one: XLA compares pairs of (score, token) one by one, which for 16
    rows of 8,192 takes 0.2 ms on CPU, and the largest of every group many at a time (0.03 ms).
    """
    num_rows, num_scores = scores_BV.shape
    pad = -num_scores % _GROUP
    scores_BGM = jnp.pad(scores_BV, ((0, 0), (0, pad)), constant_values=-jnp.inf).reshape(num_rows, -1, _GROUP)
    group_B = jnp.argmax(scores_BGM.max(axis=-1), axis=-1)
    inside_BM = jnp.take_along_axis(scores_BGM, group_B[:, None, None], axis=1)[:, 0]
    return (group_B * _GROUP + jnp.argmax(inside_BM, axis=-1)).astype(jnp.int32)


def processed_logits(
    logits_BV: Float[Array, "B V"],
    rows: SamplingRows,
    needs: Needs,
    position_B: Int[Array, "B"],
    counts: Counts | None = None,
    allowed_BW: Int[Array, "B W"] | UInt32[Array, "B W"] | None = None,
) -> Float[Array, "B V"]:
    """Logits of the distribution that `choose` draws from, after all stages; minus infinity outside its support.

    For a greedy or forced row that is one token alone. What speculation compares and tests enumerate.
    """
    scores_BV = _scores(logits_BV, rows, needs, counts, allowed_BW)
    result_BV = _only(jnp.argmax(scores_BV, axis=-1), scores_BV.shape[-1])
    if needs.draw:
        result_BV = jnp.where(rows.temperature_B[:, None] == 0, result_BV, _warm(scores_BV, rows, needs))
    if needs.forced:
        forced_B = _forced(rows, position_B)
        result_BV = jnp.where(forced_B[:, None] == _NO_ID, result_BV, _only(forced_B, scores_BV.shape[-1]))
    return result_BV


def logprobs_of(logits: Float[Array, "*B V"], token: Int[Array, "*B"], top: int) -> Logprobs:
    """Log-probabilities of the tokens and of the `top` most probable ones under the model's scores."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    best, best_id = jax.lax.top_k(logprobs, min(top, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, token[..., None], axis=-1)[..., 0]
    return Logprobs(chosen, best_id, best)


def _scores(
    logits_BV: jax.Array, rows: SamplingRows, needs: Needs, counts: Counts | None, allowed_BW: jax.Array | None
) -> jax.Array:
    """Scores after everything that acts on single tokens: bitmask, bias, bans, penalties."""
    z_BV = logits_BV.astype(jnp.float32)
    if needs.allowed:
        assert allowed_BW is not None
        z_BV = jnp.where(unpacked(allowed_BW, z_BV.shape[-1]), z_BV, -jnp.inf)
    if needs.bias:
        rows_B1 = jnp.arange(len(z_BV))[:, None]
        z_BV = z_BV.at[rows_B1, rows.bias_id_BJ].add(rows.bias_BJ, mode="drop")
    if needs.counts:
        assert counts is not None
        seen_BV = counts.prompt_BV | (counts.text_BV > 0)
        factor_B1 = rows.repetition_B[:, None]
        z_BV = jnp.where(seen_BV, jnp.where(z_BV > 0, z_BV / factor_B1, z_BV * factor_B1), z_BV)
        z_BV = z_BV - rows.frequency_B[:, None] * counts.text_BV - rows.presence_B[:, None] * (counts.text_BV > 0)
    return z_BV


def unpacked(bits_BW: Int[Array, "B W"] | UInt32[Array, "B W"], num_tokens: int) -> Bool[Array, "B V"]:
    """Bitmask words as booleans, one per token."""
    bits_BW = bits_BW.astype(jnp.uint32)
    bits = (bits_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(bits_BW), -1)[:, :num_tokens].astype(bool)


def _warm(scores_BV: jax.Array, rows: SamplingRows, needs: Needs) -> jax.Array:
    """Logits after temperature, top-k, top-p and min-p; rows of temperature 0 as if it were 1."""
    best_B1 = jnp.max(scores_BV, axis=-1, keepdims=True)
    temperature_B1 = jnp.where(rows.temperature_B == 0, 1, rows.temperature_B)[:, None]
    logits_BV = (scores_BV - best_B1) / temperature_B1  # at most 0, so that no temperature leaves float32
    keep_BV = jnp.ones(logits_BV.shape, bool)
    if needs.rank:
        keep_BV = _ranked(scores_BV, temperature_B1, rows)
    if needs.min_p:
        keep_BV = keep_BV & (logits_BV >= jnp.log(rows.min_p_B)[:, None])
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def _ranked(scores_BV: jax.Array, temperature_B1: jax.Array, rows: SamplingRows) -> jax.Array:
    """Which tokens top-k and top-p keep.

    What they keep are the first tokens of the ranking, so the last one that is kept tells all others: the sorted scores
    need not be put back into the vocabulary's order.
    """
    token_BV = jnp.broadcast_to(jnp.arange(scores_BV.shape[-1]), scores_BV.shape)
    worse_BV, order_BV = jax.lax.sort((-scores_BV, token_BV), num_keys=1, is_stable=True)  # equals keep their order
    in_k_BV = token_BV < rows.top_k_B[:, None]
    ranked_BV = jnp.where(in_k_BV, (worse_BV[:, :1] - worse_BV) / temperature_B1, -jnp.inf)
    probabilities_BV = jax.nn.softmax(ranked_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # p = 1 keeps everything: the sum of many float32 probabilities may reach 1 before the last of them.
    reached_BV = (before_BV >= rows.top_p_B[:, None]) & (rows.top_p_B[:, None] < 1)
    num_tokens = scores_BV.shape[-1]
    num_p_B = jnp.where(jnp.any(reached_BV, axis=-1), jnp.argmax(reached_BV, axis=-1), num_tokens)  # 1 at least
    last_B1 = jnp.minimum(num_p_B, jnp.minimum(rows.top_k_B, num_tokens))[:, None] - 1
    bar_B1 = -jnp.take_along_axis(worse_BV, last_B1, axis=-1)
    bar_id_B1 = jnp.take_along_axis(order_BV, last_B1, axis=-1)
    return (scores_BV > bar_B1) | ((scores_BV == bar_B1) & (token_BV <= bar_id_B1))


def _draw(logits_V: jax.Array, seed_2: ArrayLike, sample: ArrayLike, position: ArrayLike) -> jax.Array:
    """A token of one row."""
    key = jax.random.wrap_key_data(jnp.asarray(seed_2), impl="threefry2x32")  # what jax.random.key makes of a seed
    key_token = jax.random.fold_in(jax.random.fold_in(key, sample), position)
    return jax.random.categorical(key_token, logits_V).astype(jnp.int32)


def _forced(rows: SamplingRows, position_B: jax.Array) -> jax.Array:
    """The token that a row must take at this position; -1 for a free choice."""
    step_B = position_B - rows.start_B
    result_B = jnp.where(position_B == rows.last_B, rows.forced_last_B, _NO_ID)
    width = rows.forced_BF.shape[1]
    if width == 0:
        return result_B
    at_B1 = jnp.clip(step_B, 0, width - 1)[:, None]
    first_B = jnp.take_along_axis(jnp.asarray(rows.forced_BF), at_B1, axis=1)[:, 0]
    first_B = jnp.where((step_B >= 0) & (step_B < width), first_B, _NO_ID)
    return jnp.where(first_B == _NO_ID, result_B, first_B)


def _only(token_B: jax.Array, num_tokens: int) -> jax.Array:
    """Logits of the distribution that has one token."""
    return jnp.where(token_B[:, None] == jnp.arange(num_tokens), 0.0, -jnp.inf)
