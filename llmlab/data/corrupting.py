"""Corruptions at work: tables and streams whose rows are corrupted as they are read."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from llmlab.data.corruption import Corrupter, Row
from llmlab.data.dataset import Batch, Numbers, Stream, Table
from llmlab.data.draws import Draws
from llmlab.data.packing import IGNORE

_TRAIN, _VALIDATION = 4, 5  # what the numbers of a row are drawn for: apart from the permutations' 0 to 3


class CorruptedTable(Table):
    """A table's rows, corrupted: the same for every seed."""

    def __init__(self, rows: Table, corrupter: Corrupter) -> None:
        self._rows = rows
        self._corrupter = corrupter

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Numbers) -> Batch:
        return _corrupt(self._rows, numbers, self._corrupter, lambda number: Draws(0, number, 0, 0, _VALIDATION))


class CorruptedStream(Stream):
    """A stream's rows, corrupted: each time anew."""

    def __init__(self, rows: Stream, corrupter: Corrupter, seed: int) -> None:
        self._rows = rows
        self._corrupter = corrupter
        self._seed = seed

    def read(self, numbers: Numbers) -> Batch:
        return _corrupt(self._rows, numbers, self._corrupter, lambda number: Draws(self._seed, number, 0, 0, _TRAIN))

    def epochs(self, rows: int) -> tuple[float, ...]:
        return self._rows.epochs(rows)


def _corrupt(rows: Table | Stream, numbers: Numbers, corrupter: Corrupter, draws_of: Callable[[int], Draws]) -> Batch:
    batch = rows.read(numbers)
    corrupted = []
    for place, number in enumerate(map(int, numbers)):
        draws = draws_of(number)
        row = {name: array[place] for name, array in batch.items()}
        corrupted.append(corrupter(row, draws, lambda number=number, draws=draws: _first(rows.other(number, draws))))
    if not corrupted:  # no rows, but of the right shapes
        blank = {name: np.zeros_like(array, shape=array.shape[1:]) for name, array in batch.items()}
        empty = corrupter(blank, Draws(0), lambda: blank)
        return {name: np.zeros((0, *np.shape(array)), np.asarray(array).dtype) for name, array in empty.items()}
    return {name: np.stack([row[name] for row in corrupted]) for name in corrupted[0]}


def _first(batch: Batch) -> Row:
    return {name: array[0] for name, array in batch.items()}


def text_of(row: Row) -> Int[np.ndarray, " tokens"]:
    """The tokens of a row, without padding."""
    return row["input_ids"][row["segment_ids"] > 0]


def filled(values: Int[np.ndarray, " tokens"], length: int, fill: int) -> Int[np.ndarray, " length"]:
    """The values, and then `fill`, as int32 of this length; the values must fit."""
    assert len(values) <= length, f"{len(values)} values do not fit in {length}"
    return np.concatenate([values, np.full(length - len(values), fill)]).astype(np.int32)


def attended(count: int, length: int) -> Int[np.ndarray, " length"]:
    """An attention mask of so many real tokens. A blank row shows its first place: attention must have one to see."""
    return (np.arange(length) < max(count, 1)).astype(np.int32)


def encoder_decoder_row(
    inputs: Int[np.ndarray, " inputs"],
    targets: Int[np.ndarray, " targets"],
    length: int,
    num_targets: int,
    *,
    pad: int,
    start: int,
) -> Row:
    """What an encoder-decoder is trained on: the decoder reads `start` and its targets, one place late."""
    read = np.concatenate([[start], targets[:-1]]) if len(targets) else targets
    return {
        "input_ids": filled(inputs, length, pad),
        "attention_mask": attended(len(inputs), length),
        "decoder_input_ids": filled(read, num_targets, pad),
        "decoder_attention_mask": attended(len(read), num_targets),
        "labels": filled(targets, num_targets, IGNORE),
    }
