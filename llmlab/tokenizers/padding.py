"""From rows of different lengths to a rectangle: truncation, padding, attention mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int32

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Encoding:
    """A batch of token sequences (B sequences, S tokens, padding included)."""

    input_ids: Int32[np.ndarray, "B S"]
    """Token ids."""
    attention_mask: Int32[np.ndarray, "B S"]
    """1 for a token, 0 for padding."""


def truncate(rows: list[list[int]], side: Side | None, max_length: int | None, *, reserved: int = 0) -> list[list[int]]:
    """Cuts rows to `max_length - reserved` tokens at the given side; `reserved` tokens are added around them later.

    Raises ValueError unless `side` and `max_length` come together and leave room.
    """
    if side is None and max_length is None:
        return rows
    if max_length is None:
        raise ValueError(f"truncation={side!r} needs a max_length")
    if side is None:
        raise ValueError(f"max_length={max_length} needs truncation='right' (keep the start) or 'left' (keep the end)")
    room = max_length - reserved
    if max_length < 1 or room < 0:
        raise ValueError(f"max_length={max_length} leaves no room; the least is {max(1, reserved)}")
    if side == "right":
        return [row[:room] for row in rows]
    return [row[max(0, len(row) - room) :] for row in rows]


def pad(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int | None,
    padding: Literal["longest"] | int | None = "longest",
    side: Side = "right",
    multiple_of: int | None = None,
) -> Encoding:
    """Makes one rectangle of the rows.

    Raises ValueError where a row is longer than a fixed `padding`, where rows differ and padding is None, and where
    padding is needed and `pad_id` is None.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    if multiple_of is not None and multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of={multiple_of} is not positive")
    if padding is None:
        if multiple_of is not None:
            raise ValueError(f"pad_to_multiple_of={multiple_of} needs padding='longest' or a length")
        if any(length != longest for length in lengths):
            raise ValueError(
                f"rows have from {min(lengths)} to {longest} tokens and make no rectangle; pass padding='longest', "
                "or a length"
            )
    length = padding if isinstance(padding, int) else longest
    if length < longest:
        raise ValueError(
            f"padding={padding} is shorter than the longest row, {longest} tokens; raise it, or cut rows with "
            f"truncation='right', max_length={padding}"
        )
    if multiple_of is not None:
        length = -(-length // multiple_of) * multiple_of
    if pad_id is None and any(own < length for own in lengths):
        raise ValueError(
            "this tokenizer has no pad token; pass pad_id= (that of eos, say: the attention mask hides it anyway)"
        )
    input_ids = np.full((len(rows), length), 0 if pad_id is None else pad_id, np.int32)
    attention_mask = np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        input_ids[number, place] = row
        attention_mask[number, place] = 1
    return Encoding(input_ids, attention_mask)
