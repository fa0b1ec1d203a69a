"""Prompts as the rows of a batch, for strategies that write whole batches.

What a prompt is depends on the model: a decoder continues it; an encoder-decoder reads it as a source and continues a
target of its own, which begins with a start token. Here that difference ends: `token_BS` is what is continued, and
`inputs` what the model is given besides.

Shapes are static: prompts are right-padded to a power of two, and the last batch is filled up with copies of its first
row, so that few programs are compiled however many prompts there are. A copy computes what its original does, so no
program needs to know of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.infer.steps import EncoderDecoderSteps, Inputs, Steps

_SMALLEST = 16

Start = int | Sequence[int]
"""First tokens of a target: one, or several."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Some of the prompts, as a batch."""

    number_B: np.ndarray | jax.Array
    """Which prompt each row is; a copy has the number of its original."""
    token_BS: np.ndarray | jax.Array
    """What is continued, padded on the right."""
    length_B: np.ndarray | jax.Array
    """How many of its tokens are real."""
    inputs: Inputs | None
    """What the model is given besides, for `Steps.prefill`."""

    @property
    def position_BS(self) -> jax.Array:
        """The position of every token."""
        return jnp.broadcast_to(jnp.arange(self.token_BS.shape[1]), self.token_BS.shape)


@dataclass(frozen=True)
class Written:
    """What was written for one prompt."""

    token_ids: tuple[int, ...]
    """The new tokens, without the one that ended them."""
    finish_reason: str
    """"stop" at an end token, "length" at max_new_tokens."""


def batches(
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    start_ids: Sequence[Start] | None = None,
    inputs: Inputs | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> Iterator[Rows]:
    """The prompts in batches of rows of about one length.

    Args:
        steps: the model that they are for.
        prompts: tokens to continue; for an encoder-decoder, sources.
        max_new_tokens: that every row must have positions for.
        start_ids: for an encoder-decoder, what each target begins with; None for the model's own start token.
        inputs: what the model is given besides the prompts (images), a row for each prompt.
        batch_size: rows of a batch; None for all prompts at once.
        max_length: positions that there are, where another model has less of them than this one.

    Raises:
        ValueError: a prompt is empty or has no room, or the start of a target is not known.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not positive")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive; None takes all prompts at once")
    encodes = isinstance(steps, EncoderDecoderSteps)
    if start_ids is not None and not encodes:
        raise ValueError("start_ids begin the targets of an encoder-decoder; a decoder continues its prompts")
    continued = _starts(steps, len(prompts), start_ids) if encodes else prompts
    limit = min((n for n in (steps.max_length, max_length) if n is not None), default=None)
    _check_lengths(limit, prompts, continued, max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    size = len(prompts) if batch_size is None else batch_size
    for first in range(0, len(prompts), max(size, 1)):
        numbers = by_length[first : first + size]
        numbers += [numbers[0]] * (size - len(numbers))
        rest = {name: np.asarray(value)[numbers] for name, value in (inputs or {}).items()}
        if encodes:
            source_BT, length_B = padded([prompts[number] for number in numbers], limit)
            # An empty source: attention must have something to see.
            real_BT = np.arange(source_BT.shape[1]) < np.maximum(length_B, 1)[:, None]
            rest = {"input_ids": source_BT, "attention_mask": real_BT, **rest}
        token_BS, length_B = padded([continued[number] for number in numbers], limit)
        yield Rows(np.array(numbers, np.int32), token_BS, length_B, rest or None)


def padded(rows: Sequence[Sequence[int]], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array (rows, length) with zeros on the right, and how long each is."""
    length_B = np.array([len(row) for row in rows], np.int32)
    token_BS = np.zeros((len(rows), bucket(int(length_B.max()), limit)), np.int32)
    for row, ids in enumerate(rows):
        token_BS[row, : len(ids)] = ids
    return token_BS, length_B


def bucket(length: int, limit: int | None = None) -> int:
    """The static length that `length` is padded to: 1, or a power of two from 16 on; at most `limit`."""
    size = 1 if length == 1 else max(_SMALLEST, 1 << (length - 1).bit_length())
    return size if limit is None else min(size, limit)


def chosen_tokens(num_tokens: int, ids: int | Sequence[int] | None, name: str) -> np.ndarray:
    """Which of the tokens are among `ids`, as booleans over the vocabulary.

    Raises:
        ValueError: an id is no token.
    """
    numbers = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    strange = [number for number in numbers if not 0 <= number < num_tokens]
    if strange:
        raise ValueError(f"{name}={strange} are no tokens: there are {num_tokens}, from 0 on")
    chosen_V = np.zeros(num_tokens, bool)
    chosen_V[numbers] = True
    return chosen_V


def vocabulary(steps: Steps, num_tokens: int | None) -> int:
    """How many tokens may be written: `num_tokens`, or the model's whole vocabulary.

    Raises:
        ValueError: the model has fewer.
    """
    size = steps.config.vocab_size
    if num_tokens is not None and not 0 < num_tokens <= size:
        raise ValueError(f"num_tokens={num_tokens} is not in 1..{size}, the model's vocabulary")
    return num_tokens or size


def until_end(tokens: Sequence[int], end_V: np.ndarray) -> Written:
    """New tokens up to the first end token."""
    for place, token in enumerate(tokens):
        if end_V[token]:
            return Written(tuple(tokens[:place]), "stop")
    return Written(tuple(tokens), "length")


def _starts(steps: Steps, count: int, start_ids: Sequence[Start] | None) -> Sequence[Sequence[int]]:
    """What the targets begin with."""
    if start_ids is None:
        start = steps.config.decoder_start_id
        if start is None:
            raise ValueError(
                "the model has no decoder_start_id: its targets begin with tokens of their own; give start_ids"
            )
        return [[start]] * count
    if len(start_ids) != count:
        raise ValueError(f"there are {len(start_ids)} start_ids and {count} sources; give one to each")
    return [[start] if isinstance(start, int) else list(start) for start in start_ids]


def _check_lengths(
    limit: int | None, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    empty = next((number for number, row in enumerate(continued) if not row), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no tokens; begin it with the tokenizer's bos or eos token")
    longest = max((len(row) for row in prompts), default=0)
    # The last new token is not fed back.
    needed = max((len(row) for row in continued), default=1) + max_new_tokens - 1
    if limit is not None and max(longest, needed) > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens, max_new_tokens={max_new_tokens}, and there are {limit} "
            "positions; shorten what is longer"
        )
