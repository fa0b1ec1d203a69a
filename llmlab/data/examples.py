"""Data whose rows are examples of their own: a sentence with its class, a picture, a pair of sentences.

Examples are held in memory, tokens as flat arrays: a million rows of 100 tokens are 0.4 GB. They are tokenized when
the run begins, some 20,000 short texts a second.

Which examples are for validation is decided by their content, as for documents (splitting.py), unless they come from
files of their own.
"""

import abc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from llmlab.data.config import Data, check_fraction
from llmlab.data.corrupting import attended
from llmlab.data.dataset import Batch, Dataset, Numbers, Shuffled, Table, TrainSplit, ValidationSplit, check_sizes
from llmlab.data.sources import Report
from llmlab.data.splitting import text_hash, validation_below
from llmlab.tokenizers.base import Tokenizer

_BATCH = 4096  # texts given to the tokenizer's threads at once


@dataclass(frozen=True, kw_only=True)
class Examples(Data):
    """Examples, each a row."""

    validation_fraction: float = 0.1
    """Part of the examples set aside for validation, chosen by their content; not used where validation has files of
    its own."""

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @abc.abstractmethod
    def read(self) -> tuple[list[Any], list[Any]]:
        """The examples for training and for validation.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file cannot be read.
        """

    @abc.abstractmethod
    def texts(self, example: Any) -> tuple[str, ...]:
        """The texts of an example."""

    def key(self, example: Any) -> str:
        """What decides an example's side: its first text, so that no text is on both."""
        return self.texts(example)[0]

    @abc.abstractmethod
    def content(self) -> list[Any]:
        """What the fingerprint is of: the files' own, and every choice that decides what the batches are."""

    @abc.abstractmethod
    def tables(
        self, sides: tuple[list[Any], list[Any]], tokenizer: Tokenizer, sequence_length: int | None, report: Report
    ) -> "Tables":
        """Both sides as tables of rows."""

    def training_texts(self) -> Iterator[str]:
        found = False
        for example in self.read()[0]:
            for text in self.texts(example):
                found = True
                yield text
        if not found:
            raise ValueError(f"there is no training text in {self}")

    def fingerprint(self) -> str:
        parts = [type(self).__name__, *self.content(), self.validation_fraction]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def split(self, examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Training and validation examples by the hash of their keys."""
        below = validation_below(self.validation_fraction)
        sides: tuple[list[Any], list[Any]] = ([], [])
        for example in examples:
            sides[text_hash(self.key(example)) < below].append(example)
        return sides

    def build(
        self,
        tokenizer: Tokenizer,
        *,
        sequence_length: int | None,
        batch_size: int,
        seed: int,
        cache_dir: Path | None = None,
        report: Report | None = None,
    ) -> Dataset:
        check_sizes(batch_size=batch_size, seed=seed)
        if found := self.problems(tokenizer.special, sequence_length):
            raise ValueError("; ".join(found))
        sides = self.read()
        for name, side in zip(("training", "validation"), sides, strict=True):
            if not side:
                raise ValueError(
                    f"there is no example for {name} in {self}; give validation examples of their own, or change "
                    f"validation_fraction={self.validation_fraction}"
                )
        tables = self.tables(sides, tokenizer, sequence_length, report or _no_report)
        train = TrainSplit(Shuffled(tables.train, seed), batch_size=batch_size)
        validation = ValidationSplit(tables.validation, batch_size=batch_size)
        made_from = json.dumps([self.fingerprint(), tokenizer.fingerprint, sequence_length])
        known = {text_hash(self.key(example)) for example in sides[0]}
        seen = sum(text_hash(self.key(example)) in known for example in sides[1])
        remarks = [f"{seen} of {len(sides[1])} validation examples are training examples as well"] if seen else []
        return Dataset(
            train=train,
            validation=validation,
            vocab_size=tokenizer.vocab_size,
            fingerprint=hashlib.sha256(made_from.encode()).hexdigest(),
            sources=({"source": repr(self), "fingerprint": self.fingerprint(), "rows": sum(map(len, sides))},),
            sizes={"train": {"rows": len(sides[0])}, "validation": {"rows": len(sides[1])}},
            baselines=lambda parts: tables.baselines(train, validation, parts),
            num_labels=tables.num_labels,
            remarks=(*remarks, *tables.remarks),
        )


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What `Examples.tables` gives."""

    train: Table
    """Rows to learn from."""
    validation: Table
    """Rows to measure on."""
    baselines: Callable[[TrainSplit, ValidationSplit, int], dict[str, float]]
    """(training, validation, parts of a batch) -> losses of models that need no training."""
    num_labels: int | None = None
    """How many labels there are, where rows are classified."""
    remarks: tuple[str, ...] = ()
    """What the user should know."""


@dataclass(frozen=True)
class Ragged:
    """Rows of tokens of different lengths."""

    tokens: Int32[np.ndarray, " tokens"]
    """All of them, one row after the other."""
    offsets: Int[np.ndarray, " rows_and_one"]
    """Where each row begins, and the end."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """From lists of ids."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        flat = np.fromiter((token for row in rows for token in row), np.int32, count=int(offsets[-1]))
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(
        self, numbers: Numbers, length: int, fill: int
    ) -> tuple[Int32[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
        """(tokens, whether each place has one); a row beyond the last has none. No row may be longer than `length`."""
        known = np.minimum(numbers, len(self) - 1)
        sizes = np.where(numbers < len(self), self.offsets[known + 1] - self.offsets[known], 0)
        assert sizes.max(initial=0) <= length
        here = np.arange(length) < sizes[:, None]
        places = np.where(here, self.offsets[known][:, None] + np.arange(length), 0)
        taken = self.tokens[places] if len(self.tokens) else places
        return np.where(here, taken, fill).astype(np.int32), here


class Texts(Table):
    """Rows of tokens with what belongs to them: input_ids, attention_mask, and arrays of the caller's own."""

    def __init__(self, rows: Ragged, length: int, pad_id: int, others: Mapping[str, np.ndarray]) -> None:
        """`others` have an entry more than there are rows: the blank row's."""
        self._rows = rows
        self._length = length
        self._pad_id = pad_id
        self._others = dict(others)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Numbers) -> Batch:
        ids, here = self._rows.read(numbers, self._length, self._pad_id)
        known = np.minimum(numbers, len(self))
        others = {name: array[known] for name, array in self._others.items()}
        return {"input_ids": ids, "attention_mask": shown(here)} | others


class Arrays(Table):
    """Rows of arrays in memory, the last of which is the blank row's."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values()))) - 1

    def read(self, numbers: Numbers) -> Batch:
        known = np.minimum(numbers, len(self))
        return {name: array[known] for name, array in self._arrays.items()}


class Joined(Table):
    """Two tables side by side: row i of the one with row i of the other."""

    def __init__(self, first: Table, second: Table) -> None:
        assert len(first) == len(second)
        self._tables = first, second

    def __len__(self) -> int:
        return len(self._tables[0])

    def read(self, numbers: Numbers) -> Batch:
        return self._tables[0].read(numbers) | self._tables[1].read(numbers)


def shown(here: Bool[np.ndarray, "rows length"]) -> Int32[np.ndarray, "rows length"]:
    """Attention masks of rows; that of a blank row shows its first place, as attention must have one to see."""
    blank = ~here.any(axis=1, keepdims=True)
    return np.where(blank, attended(0, here.shape[1]), here).astype(np.int32)


def encode(tokenizer: Tokenizer, texts: Sequence[str], report: Report, what: str = "tokenize") -> list[list[int]]:
    """Ids of texts, without special tokens."""
    rows: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        rows += tokenizer.encode_batch(texts[start : start + _BATCH])
        report(len(rows), len(texts), what)
    return rows


def framed(tokenizer: Tokenizer, first: list[int], second: list[int] | None, length: int) -> tuple[list[int], int]:
    """A text, or two, in the tokenizer's frame: [CLS] first [SEP], or [CLS] first [SEP] second [SEP]; and where the
    second begins. Cut to `length` tokens from the end of whatever text is longer."""
    before, after = tokenizer.frame
    if second is None:
        kept = first[: max(0, length - len(before) - len(after))]
        return [*before, *kept, *after][:length], length
    between = after if after else [i for i in (tokenizer.eos_id,) if i is not None]
    room = max(0, length - len(before) - len(between) - len(after))
    kept_second = min(len(second), max(room // 2, room - len(first)))
    kept_first = min(len(first), room - kept_second)
    row = [*before, *first[:kept_first], *between, *second[:kept_second], *after][:length]
    return row, len(before) + kept_first + len(between)


def pad_of(tokenizer: Tokenizer) -> int:
    """The tokenizer's pad token, or 0 where it has none: the attention mask hides it."""
    return 0 if tokenizer.pad_id is None else tokenizer.pad_id


def cut_remark(lengths: Sequence[int], limit: int, what: str) -> tuple[str, ...]:
    """A remark, where rows are longer than the limit."""
    longer = sum(length > limit for length in lengths)
    if not longer:
        return ()
    total, longest = len(lengths), max(lengths)
    return (f"{longer} of {total} {what} are longer than {limit} tokens (the longest {longest}) and are cut",)


def numbered(
    sides: tuple[Sequence[str], Sequence[str]], names: tuple[str, ...], where: str
) -> tuple[dict[str, int], tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]:
    """Label to number, and both sides' numbers. Names that are not given are the training labels, sorted.

    Raises:
        ValueError: a label has no number.
    """
    given = names or tuple(sorted(set(sides[0]), key=_natural))
    numbers = {name: number for number, name in enumerate(given)}
    if unknown := sorted({label for side in sides for label in side} - set(numbers)):
        listed = ", ".join(map(repr, unknown[:5]))
        raise ValueError(
            f"{where}: labels {listed}{', ...' if len(unknown) > 5 else ''} are not among "
            f"{', '.join(map(repr, given[:20]))}; name all of them: labels=(...)"
        )
    first, second = (np.array([numbers[label] for label in side], np.int32) for side in sides)
    return numbers, (first, second)


def _natural(label: str) -> tuple[bool, float, str]:
    """Numbers by their size, then everything else by its spelling."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _no_report(done: int, total: int | None, what: str) -> None:
    """Tells nobody."""
