"""Drafts of speculative decoding: what proposes the tokens that the model then checks (see speculative.py).

    ModelDrafter     a smaller model writes them, one after the other
    LookupDrafter    what followed the last few tokens where they stood before is proposed again

A drafter is static in a compiled program, its parameters and state are traced. It gives tokens together with the
distributions that they were drawn from: acceptance is exact only with the draft's real ones.
"""

import abc
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmlab.infer.rows import Rows
from llmlab.infer.sampling import Counts, Needs, SamplingRows, processed_logits
from llmlab.infer.steps import Steps
from llmlab.nn.module import Params

# fold_in constants that separate what is drawn for one place.
DRAFT, ACCEPT, REPLACE = range(3)


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Proposes what followed the last tokens where they stood before (Saxena 2023, prompt lookup decoding)."""

    max_ngram: int = 3
    """As many of the last tokens are looked for at first, then fewer."""
    min_ngram: int = 1
    """As many at least."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(f"min_ngram={self.min_ngram} is not in 1..max_ngram={self.max_ngram}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """Tokens that a draft proposes, P for each row."""

    token_BP: Int[Array, "B P"]
    count_B: Int[Array, "B"]
    """So many of them are proposals."""
    q_BPV: Float[Array, "B P V"]
    """The distribution that each was drawn from; zeros where there is no proposal."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawing:
    """How the rows of a batch draw their tokens, at the place that they have come to."""

    rows: SamplingRows
    counts: Counts | None
    """Tokens so far, where some row has a penalty."""

    def distribution(
        self, logits_BV: Float[Array, "B V"], needs: Needs, position_B: Int[Array, "B"]
    ) -> Float[Array, "B V"]:
        """What the token of this position is drawn from; where a row is greedy, all mass is on one token."""
        return jax.nn.softmax(processed_logits(logits_BV, self.rows, needs, position_B, self.counts), axis=-1)

    def draw(self, p_BV: Float[Array, "B V"], position_B: Int[Array, "B"], purpose: int) -> Int[Array, "B"]:
        """A token for each row's position."""

        def one(p_V: jax.Array, key: jax.Array) -> jax.Array:
            return jax.random.categorical(key, jnp.log(p_V)).astype(jnp.int32)

        return jax.vmap(one)(p_BV, self.keys(position_B, purpose))

    def keys(self, position_B: Int[Array, "B"], purpose: int) -> jax.Array:
        """Random key of a position of each row, for one purpose."""

        def one(seed_2: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")  # what jax.random.key makes of a seed
            for number in (sample, position, purpose):
                key = jax.random.fold_in(key, number)
            return key

        return jax.vmap(one)(jnp.asarray(self.rows.seed_B2), jnp.asarray(self.rows.sample_B), position_B)

    def after(self, token_B: Int[Array, "B"], written_B: Bool[Array, "B"] | None = None) -> "Drawing":
        """One token further, in the rows where `written_B` is true."""
        return self if self.counts is None else replace(self, counts=self.counts.add(token_B, written_B))


class Drafter(abc.ABC):
    """See the module's docstring."""

    @abc.abstractmethod
    def start(self, params: Params, rows: Rows, length: int) -> Any:
        """State after the prompts, with room for `length` positions."""

    @abc.abstractmethod
    def propose(
        self, params: Params, state: Any, text_BT: Int[Array, "B T"], length_B: Int[Array, "B"], drawing: "Drawing"
    ) -> tuple[Proposal, Any]:
        """Tokens that may follow.

        Args:
            params: of the draft.
            state: from `start`, or the last call.
            text_BT: prompts and new tokens.
            length_B: how many there are in each row, two at least.
            drawing: how each row draws the token after its last.
        """


@dataclass(frozen=True)
class ModelDrafter(Drafter):
    """A model that writes the proposals."""

    steps: Steps
    num_drafted: int
    needs: Needs
    num_tokens: int

    def start(self, params: Params, rows: Rows, length: int) -> Any:
        dtype = jax.tree.leaves(params)[0].dtype
        state = self.steps.new_state(len(rows.token_BS), length, dtype, rows.inputs, rewind=self.num_drafted)
        return self.steps.prefill(params, state, jnp.asarray(rows.token_BS), rows.position_BS, rows.inputs)[1]

    def propose(
        self, params: Params, state: Any, text_BT: Int[Array, "B T"], length_B: Int[Array, "B"], drawing: "Drawing"
    ) -> tuple[Proposal, Any]:
        # Of what was written last, the draft has seen all but the last token; where all its proposals were accepted,
        # all but the last two. Two are run again in either case.
        position_B2 = length_B[:, None] + jnp.array([-2, -1])
        token_B2 = jnp.take_along_axis(text_BT, position_B2, axis=1)
        first, state, drawing = self._next(params, state, token_B2, position_B2, drawing)

        def step(carry: Any, _: None) -> Any:
            token_B, position_B, state, drawing = carry
            drawn, state, drawing = self._next(params, state, token_B[:, None], position_B[:, None], drawing)
            return (drawn[0], position_B + 1, state, drawing), drawn

        carry = (first[0], length_B, state, drawing)
        (_, _, state, _), rest = jax.lax.scan(step, carry, length=self.num_drafted - 1)
        token_BP, q_BPV = (
            jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1)
            for one, more in zip(first, rest, strict=True)
        )
        return Proposal(token_BP, jnp.full_like(length_B, self.num_drafted), q_BPV), state

    def _next(
        self, params: Params, state: Any, token_BS: jax.Array, position_BS: jax.Array, drawing: Drawing
    ) -> tuple[tuple[jax.Array, jax.Array], Any, Drawing]:
        """The token after these, and its distribution."""
        hidden_BSD, state = self.steps.step(params, state, token_BS, within(self.steps, position_BS))
        logits_BV = self.steps.project(params, hidden_BSD[:, -1])[:, : self.num_tokens]
        position_B = position_BS[:, -1] + 1
        q_BV = drawing.distribution(logits_BV, self.needs, position_B)
        token_B = drawing.draw(q_BV, position_B, DRAFT)
        return (token_B, q_BV), state, drawing.after(token_B)


@dataclass(frozen=True)
class LookupDrafter(Drafter):
    """What followed the last tokens of a row the last time they stood there, in its source or in its text.

    A continuation that runs into the end of the text goes on with itself: after "a b c a b c" the repeated "a b c" is
    proposed again and again, as a text that repeats itself would go on.
    """

    lookup: PromptLookup
    num_drafted: int
    num_tokens: int

    def start(self, params: Params, rows: Rows, length: int) -> Any:
        if rows.inputs is None or "input_ids" not in rows.inputs:
            return jnp.zeros((len(rows.token_BS), 0), jnp.int32)
        return jnp.where(jnp.asarray(rows.inputs["attention_mask"]) != 0, rows.inputs["input_ids"], -1)

    def propose(
        self, params: Params, state: Any, text_BT: Int[Array, "B T"], length_B: Int[Array, "B"], drawing: "Drawing"
    ) -> tuple[Proposal, Any]:
        both_BT = jnp.concatenate([state, text_BT], axis=1)
        end_B = length_B + state.shape[1]
        start_B = jnp.full_like(end_B, -1)
        for size in range(self.lookup.min_ngram, self.lookup.max_ngram + 1):
            found_B = self._after_last(both_BT, end_B, length_B, size)
            start_B = jnp.where(found_B < 0, start_B, found_B)  # a longer match is better
        place_BP = start_B[:, None] + jnp.arange(self.num_drafted) % (end_B - start_B)[:, None]
        token_BP = jnp.take_along_axis(both_BT, jnp.maximum(place_BP, 0), axis=1)
        # Beyond the end of a source stands -1; where nothing was found there is nothing to propose.
        real_BP = jnp.cumprod((token_BP >= 0) & (start_B >= 0)[:, None], axis=1)
        q_BPV = jax.nn.one_hot(token_BP, self.num_tokens) * real_BP[..., None]
        return Proposal(jnp.maximum(token_BP, 0), jnp.sum(real_BP, axis=1), q_BPV), state

    @staticmethod
    def _after_last(
        text_BT: Int[Array, "B T"], end_B: Int[Array, "B"], length_B: Int[Array, "B"], size: int
    ) -> Int[Array, "B"]:
        """The place after the last earlier occurrence of a row's last `size` tokens; -1 where there is none."""
        place_T = jnp.arange(text_BT.shape[1])
        # An occurrence must end before the text does, and what is looked for must lie in the text itself.
        same_BT = (place_T < (end_B - size)[:, None]) & (size <= length_B)[:, None]
        for i in range(size):
            wanted_B1 = jnp.take_along_axis(text_BT, jnp.maximum(end_B - size + i, 0)[:, None], axis=1)
            same_BT &= jnp.roll(text_BT, -i, axis=1) == wanted_B1
        return jnp.max(jnp.where(same_BT, place_T + size, -1), axis=1)


def within(steps: Steps, position_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions that the model has; -1, as of padding, for proposals beyond the last one, of which nothing is kept."""
    return position_BS if steps.max_length is None else jnp.where(position_BS < steps.max_length, position_BS, -1)
