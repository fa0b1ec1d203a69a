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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.infer import decoding
from llmlab.infer.prompts import Given, stacked
from llmlab.infer.steps import EncoderDecoderSteps, Inputs, Steps

_SMALLEST = 16

Start = int | Sequence[int]
"""First tokens of a target: one, or several."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Some of the prompts, as a batch; arrays of numpy on the host, of jax inside programs."""

    number_B: Any
    """Which prompt each row is; a copy has the number of its original."""
    token_BS: Any
    """What is continued, padded on the right."""
    length_B: Any
    """How many of its tokens are real."""
    inputs: Inputs | None
    """What the model is given besides, for `Steps.prefill`."""

    @property
    def position_BS(self) -> jax.Array:
        """The position of every token; -1 for padding, which is remembered by no cache."""
        place_S = jnp.arange(self.token_BS.shape[1])
        return jnp.where(place_S < jnp.asarray(self.length_B)[:, None], place_S, -1)


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
    given = _given(steps, prompts, start_ids, inputs)
    limit = min((n for n in (steps.max_length, max_length) if n is not None), default=None)
    _check_lengths(limit, given, max_new_tokens)
    by_length = sorted(range(len(given)), key=lambda number: (len(given[number].source or ()), len(given[number].ids)))
    size = len(given) if batch_size is None else batch_size
    for first in range(0, len(given), max(size, 1)):
        numbers = by_length[first : first + size]
        numbers += [numbers[0]] * (size - len(numbers))
        some = [given[number] for number in numbers]
        token_BS, length_B = padded([one.ids for one in some], limit)
        source = 0 if some[0].source is None else bucket(max(len(one.source or ()) for one in some), limit)
        rest = stacked(some, size, token_BS.shape[1], source)
        yield Rows(np.array(numbers, np.int32), token_BS, length_B, rest)


def padded(rows: Sequence[Sequence[int]], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array (rows, length) with zeros on the right, and how long each is."""
    length_B = np.array([len(row) for row in rows], np.int32)
    token_BS = np.zeros((len(rows), bucket(int(length_B.max()), limit)), np.int32)
    for row, ids in enumerate(rows):
        token_BS[row, : len(ids)] = ids
    return token_BS, length_B


def bucket(length: int, limit: int | None = None) -> int:
    """The static length that `length` is padded to: 1, or a power of two from 16 on; at most `limit`."""
    return 1 if length == 1 else decoding.bucket(length, limit, _SMALLEST)


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
    size = steps.num_scores
    if num_tokens is not None and not 0 < num_tokens <= size:
        raise ValueError(f"num_tokens={num_tokens} is not in 1..{size}, the model's vocabulary")
    return num_tokens or size


def until_end(tokens: Sequence[int], end_V: np.ndarray) -> Written:
    """New tokens up to the first end token."""
    for place, token in enumerate(tokens):
        if end_V[token]:
            return Written(tuple(tokens[:place]), "stop")
    return Written(tuple(tokens), "length")


def _given(
    steps: Steps, prompts: Sequence[Sequence[int]], start_ids: Sequence[Start] | None, inputs: Inputs | None
) -> list[Given]:
    """What the model is given for each prompt."""
    if isinstance(steps, EncoderDecoderSteps):
        if inputs:
            raise ValueError(f"an encoder-decoder's source is the prompt; leave out inputs {', '.join(sorted(inputs))}")
        starts = _starts(steps, len(prompts), start_ids)
        return [Given(tuple(start), tuple(prompt)) for start, prompt in zip(starts, prompts, strict=True)]
    if start_ids is not None:
        raise ValueError("start_ids begin the targets of an encoder-decoder; a decoder continues its prompts")
    rest: dict[str, Any] = dict(inputs or {})
    for name, array in rest.items():
        if len(array) != len(prompts):
            raise ValueError(f"inputs: {name} has {len(array)} rows for {len(prompts)} prompts; give one for each")
    return [
        Given(tuple(prompt), inputs={name: array[number] for name, array in rest.items()} or None)
        for number, prompt in enumerate(prompts)
    ]


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


def _check_lengths(limit: int | None, given: Sequence[Given], max_new_tokens: int) -> None:
    empty = next((number for number, one in enumerate(given) if not one.ids), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no tokens; begin it with the tokenizer's bos or eos token")
    source = max((len(one.source or ()) for one in given), default=0)
    longest = max((len(one.ids) for one in given), default=0)
    # The last new token is not fed back.
    if limit is not None and max(source, longest + max_new_tokens - 1) > limit:
        raise ValueError(
            f"the longest prompt has {max(source, longest)} tokens, max_new_tokens={max_new_tokens}, and there are "
            f"{limit} positions; shorten what is longer"
        )
