"""Rows that a model writes itself, to be judged by the teacher (Agarwal et al. 2023, 2306.13649: GKD).

    row from the data      p p p p t t t t          prompt p, text t
    written by the student p p p p s s s s          the loss is on s: what the teacher says there

A student that only ever sees texts of others is never told what to do after its own mistakes; at its own places it is.
With probability `fraction` a step's rows are written by the student as it is at that moment, as part of the step: a
function of parameters, batch and key, so a resumed run writes the same. No gradient flows through what was chosen.
With by="teacher" the teacher writes, which is sequence-level distillation (Kim and Rush 2016, 1606.07947) by samples.

A row costs one pass over the prompt and one position of a cached decode for each token that is written.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from llmlab.infer.sampling import Needs, Sampling, SamplingRows, choose
from llmlab.infer.steps import EncoderDecoderSteps, prepare
from llmlab.objectives import Batch
from llmlab.objectives.cross_entropy import IGNORED


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """How rows are written."""

    fraction: float = 0.5
    """Of the steps whose rows are written by a model instead of read from the data."""
    prompt: int = 1
    """Tokens of each row that are kept; in an encoder-decoder the source is kept, and the target begins anew."""
    by: Literal["student", "teacher"] = "student"
    """Who writes."""
    temperature: float = 1.0
    """Of the distribution that tokens are drawn from; 0 takes the most probable."""
    eos_id: int | None = None
    """Token after which nothing of a row counts; None counts all of it."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"on_policy.fraction={self.fraction} is not in (0, 1]; leave on_policy out for none")
        if self.prompt < 1:
            raise ValueError(f"on_policy.prompt={self.prompt} is not positive: a model continues something")
        Sampling(temperature=self.temperature)

    def rewritten(self, writer: Any, batch: Batch, key: jax.Array) -> Batch:
        """The batch, or with probability `fraction` one of the same shapes that the model wrote.

        Args:
            writer: a decoder or an encoder-decoder.
            batch: rows of a single text each are continued; of what was packed beside it, nothing remains apart.
            key: of this step.

        Raises:
            ValueError: the prompt leaves nothing to write, or the model does not write text.
        """
        key_coin, key_tokens = jax.random.split(key)
        coin = jax.random.uniform(key_coin) < self.fraction
        return jax.lax.cond(coin, lambda: self.written(writer, batch, key_tokens), lambda: batch)

    def written(self, writer: Any, batch: Batch, key: jax.Array) -> Batch:
        """A batch that the model wrote."""
        steps, _ = prepare(writer)
        if isinstance(steps, EncoderDecoderSteps):
            return self._targets(writer, batch, key)
        ids, kept = batch["input_ids"], self.prompt
        length = ids.shape[1]
        if kept >= length:
            raise ValueError(f"on_policy.prompt={kept} leaves nothing of a row of {length} tokens to write")
        new = continuations(writer, ids[:, :kept], length + 1 - kept, key, self.temperature)
        text = jnp.concatenate([ids[:, :kept], new], axis=1)
        labels = text[:, 1:]
        before = jnp.arange(length) < kept - 1
        labels = jnp.where(before, IGNORED, self._ended(labels, kept - 1))
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        one_text = {"segment_ids": jnp.ones_like(ids), "position_ids": positions, "attention_mask": jnp.ones_like(ids)}
        given = {"input_ids": text[:, :-1], "labels": labels} | one_text
        return batch | {name: array.astype(batch[name].dtype) for name, array in given.items() if name in batch}

    def _targets(self, writer: Any, batch: Batch, key: jax.Array) -> Batch:
        start = batch["decoder_input_ids"][:, :1]
        length = batch["decoder_input_ids"].shape[1]
        source = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        new = continuations(writer, start, length, key, self.temperature, source)
        labels = self._ended(new, 0)
        seen = labels != IGNORED
        given = {
            "decoder_input_ids": jnp.where(seen, jnp.concatenate([start, new[:, :-1]], axis=1), start),
            "decoder_attention_mask": seen,
            "labels": labels,
        }
        return batch | {name: array.astype(batch[name].dtype) for name, array in given.items() if name in batch}

    def _ended(self, labels: Int[Array, "B S"], first: int) -> Int[Array, "B S"]:
        """Labels, -100 beyond the first end of a text from the place `first` on."""
        if self.eos_id is None:
            return labels
        ends = (labels == self.eos_id) & (jnp.arange(labels.shape[1]) >= first)
        return jnp.where(jnp.cumsum(ends, axis=1) - ends > 0, IGNORED, labels)


def continuations(
    writer: Any,
    prompt_ids: Int[Array, "B P"],
    count: int,
    key: jax.Array,
    temperature: float = 1.0,
    inputs: Batch | None = None,
) -> Int[Array, "B N"]:
    """`count` tokens that a model draws after each prompt, without gradient; to be traced.

    Args:
        writer: a decoder, or an encoder-decoder, whose prompt is what its target begins with.
        prompt_ids: tokens, none of them padding.
        count: tokens of each row.
        key: of all draws; a token's depends on its row and its place.
        temperature: of the distribution; 0 takes the most probable token.
        inputs: of an encoder-decoder, `input_ids` and `attention_mask` of the source.
    """
    steps, params = prepare(writer)
    params = jax.lax.stop_gradient(params)
    rows, prompt = prompt_ids.shape
    sampling = Sampling(temperature=temperature)
    needs, requests = Needs.of([sampling]), SamplingRows.of([sampling] * rows, samples=range(rows))
    requests = replace(requests, seed_B2=jnp.broadcast_to(jax.random.bits(key, (2,), jnp.uint32), (rows, 2)))
    positions = jnp.broadcast_to(jnp.arange(prompt), prompt_ids.shape)
    state = steps.new_state(rows, prompt + count, jax.tree.leaves(params)[0].dtype, inputs)
    hidden, state = steps.prefill(params, state, prompt_ids, positions, inputs)

    def draw(hidden_BD: jax.Array, place: jax.Array) -> jax.Array:
        position_B = jnp.broadcast_to(place, (rows,))
        return choose(steps.project(params, hidden_BD), requests, needs, position_B).token_B.astype(prompt_ids.dtype)

    first = draw(hidden[:, -1], jnp.asarray(prompt))

    def step(carry: Any, place: jax.Array) -> tuple[Any, jax.Array]:
        token_B, state = carry
        at = jnp.broadcast_to(place, (rows, 1))
        hidden, state = steps.step(params, state, token_B[:, None], at)
        token_B = draw(hidden[:, 0], place + 1)
        return (token_B, state), token_B

    _, rest = jax.lax.scan(step, (first, state), prompt + jnp.arange(count - 1))
    return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)
