"""Generation: prompts in, text out, one token at a time.

    prefill   all prompt positions in one pass; fills the caches and scores the first new token
    decode    one position per row and step, in runs of a few steps per call so that Python is not in every token

Shapes are static: prompts are right-padded to a bucket (a power of two) and caches have a bucket's length, so each
pair of buckets compiles once however many prompts follow. A row's result does not depend on the other rows.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.infer.sampling import Sampling, sample
from llmlab.infer.steps import State, Steps, prepare
from llmlab.models.decoder import DecoderModel
from llmlab.nn.module import Params
from llmlab.tokenizers import StreamDecoder, Tokenizer

_SMALLEST_BUCKET = 64
# Tokens per device call: dispatch costs about 0.1 ms, a streamed burst of 8 still looks continuous.
_STEPS_PER_CALL = 8


TextStream = Callable[[int, str], None]
"""Called with the number of the prompt and each new piece of its text."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    """The new text, without the prompt."""
    token_ids: tuple[int, ...]
    """The new tokens, without the end-of-sequence token."""
    finish_reason: str
    """"stop" at an end-of-sequence token, "length" at max_new_tokens, "position" where the model's positions end."""


def generate(
    model: DecoderModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stream: TextStream | None = None,
) -> list[Completion]:
    """Continue each prompt.

    Args:
        model: a decoder.
        tokenizer: the one it was trained with.
        prompts: one or several; an empty prompt starts from the tokenizer's bos (or eos) token.
        max_new_tokens: new tokens per prompt at most.
        sampling: how tokens are drawn; the model's own distribution by default.
        stream: called with every new piece of text as it comes.

    Raises:
        ValueError: a prompt does not fit the model's positions, or there is nothing to start from.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        return []
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not positive")
    ids = [_start(tokenizer, prompt) for prompt in prompts]
    limit = model.config.max_length
    longest = max(len(row) for row in ids)
    if limit is not None and longest >= limit:
        raise ValueError(
            f"the prompt has {longest} tokens and the model has {limit} positions; shorten it to at most {limit - 1}"
        )
    rows = [_Row(number, len(row), StreamDecoder(tokenizer), stream) for number, row in enumerate(ids)]
    num_tokens = tokenizer.vocab_size
    for tokens_B in generate_ids(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, num_tokens=num_tokens):
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            row.push(token, tokenizer.eos_id, max_new_tokens, limit)
        if all(row.reason for row in rows):
            break
    return [Completion(row.text, tuple(row.tokens), row.reason) for row in rows]


class _Row:
    """One prompt's continuation as it grows."""

    def __init__(self, number: int, prompt_length: int, decoder: StreamDecoder, stream: TextStream | None) -> None:
        self.number, self.prompt_length, self.decoder, self.stream = number, prompt_length, decoder, stream
        self.tokens: list[int] = []
        self.text, self.reason = "", ""

    def push(self, token: int, eos_id: int | None, max_new_tokens: int, limit: int | None) -> None:
        """Take the next token, unless the row has ended."""
        if self.reason:
            return
        if token == eos_id:
            self.reason = "stop"
        else:
            self.tokens.append(token)
            self._show(self.decoder.push(token))
            if len(self.tokens) == max_new_tokens:
                self.reason = "length"
            elif limit is not None and self.prompt_length + len(self.tokens) > limit:
                self.reason = "position"  # this token would be fed back at a position that the model does not have
        if self.reason:
            self._show(self.decoder.finish())

    def _show(self, text: str) -> None:
        self.text += text
        if text and self.stream is not None:
            self.stream(self.number, text)


def _start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens that the model continues: bos where the tokenizer has one, then the prompt."""
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = first + tokenizer.encode(prompt)
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]  # what stands before a document where documents end with eos and have no bos
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no bos or eos token to start from; give a prompt")
    return ids


def generate_ids(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    num_tokens: int | None = None,
) -> Iterator[np.ndarray]:
    """The next token of every row, again and again: int arrays of shape (rows,), at most `max_new_tokens` of them.

    Stops by itself only at the limits of length; what ends a sequence is the caller's to decide. Only ids below
    `num_tokens` are drawn: a model's vocabulary is rounded up, and its last rows are no tokens.
    """
    sampling = sampling or Sampling()
    steps, params = prepare(model)
    lengths = np.array([len(row) for row in prompts], np.int32)
    longest = int(lengths.max())
    prompt_bucket = bucket(longest, model.config.max_length)
    cache_length = bucket(longest + max_new_tokens, model.config.max_length)
    input_ids = np.zeros((len(prompts), prompt_bucket), np.int32)
    for row, ids in enumerate(prompts):
        input_ids[row, : len(ids)] = ids
    state = steps.new_state(len(prompts), cache_length, jax.tree.leaves(params)[0].dtype)
    # The compiled programs take the key as an argument: another seed does not compile again.
    key, rule = jax.random.key(sampling.seed), replace(sampling, seed=0)
    tokens_B, state = _prefill(steps, rule, num_tokens, params, state, input_ids, lengths, key)
    yield np.asarray(tokens_B)
    position_B, remaining = lengths, max_new_tokens - 1
    while remaining > 0:
        tokens_SB, state = _decode(steps, rule, num_tokens, params, state, tokens_B, position_B, key)
        tokens_B, position_B = tokens_SB[-1], position_B + _STEPS_PER_CALL
        yield from np.asarray(tokens_SB)[:remaining]
        remaining -= _STEPS_PER_CALL


def bucket(length: int, limit: int | None) -> int:
    """The static length that `length` is padded to: a power of two, at most `limit`."""
    size = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return size if limit is None else min(size, limit)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _prefill(
    steps: Steps,
    sampling: Sampling,
    num_tokens: int | None,
    params: Params,
    state: State,
    input_ids: jax.Array,
    length_B: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, State]:
    """First new token of every row, and the state with the prompts in it."""
    position_BS = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    hidden_BSD, state = steps.prefill(params, state, input_ids, position_BS)
    last_BD = jnp.take_along_axis(hidden_BSD, (length_B - 1)[:, None, None], axis=1)[:, 0]
    logits_BV = steps.project(params, last_BD)[:, :num_tokens]
    return sample(logits_BV, sampling, key, jnp.arange(len(length_B)), length_B), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    steps: Steps,
    sampling: Sampling,
    num_tokens: int | None,
    params: Params,
    state: State,
    tokens_B: jax.Array,
    position_B: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, State]:
    """The next tokens (steps, rows) of every row, given the last one and its position."""
    rows_B = jnp.arange(len(tokens_B))

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        tokens_B, position_B, state = carry
        hidden_BSD, state = steps.step(params, state, tokens_B[:, None], position_B[:, None])
        logits_BV = steps.project(params, hidden_BSD[:, 0])[:, :num_tokens]
        tokens_B = sample(logits_BV, sampling, key, rows_B, position_B + 1)
        return (tokens_B, position_B + 1, state), tokens_B

    (_, _, state), tokens_SB = jax.lax.scan(step, (tokens_B, position_B, state), length=_STEPS_PER_CALL)
    return tokens_SB, state
