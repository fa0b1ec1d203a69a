"""Sentences, to be told from each other: each is encoded twice and must find itself (SimCSE; Gao et al. 2021).

Rows are the tokenizer's frame around each sentence, cut and padded to one length. `loss_mask` is 0 in the rows that
fill up the last validation batch: they are nobody's negatives.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlab.data.config import length_problems
from llmlab.data.dataset import TrainSplit, ValidationSplit
from llmlab.data.examples import Examples, Ragged, Tables, Texts, cut_remark, encode, framed, pad_of
from llmlab.data.sources import Report, Source
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens


@dataclass(frozen=True)
class Sentences(Examples):
    """The documents of a source, each of them a sentence: TextFiles(..., separator="\\n")."""

    source: Source
    """The sentences."""
    validation: Source | None = None
    """Sentences to validate on; None to set a part of the others aside."""

    @property
    def task(self) -> str:
        return "sentences"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        return length_problems(sequence_length)

    def read(self) -> tuple[list[str], list[str]]:
        train = [document.text for document in self.source.documents()]
        if self.validation is None:
            return self.split(train)
        return train, [document.text for document in self.validation.documents()]

    def texts(self, example: str) -> tuple[str, ...]:
        return (example,)

    def content(self) -> list[Any]:
        return [self.source.fingerprint(), None if self.validation is None else self.validation.fingerprint()]

    def tables(
        self, sides: tuple[list[str], list[str]], tokenizer: Tokenizer, sequence_length: int | None, report: Report
    ) -> Tables:
        assert sequence_length is not None
        tables, sizes = [], []
        frame = sum(map(len, tokenizer.frame))
        for side in sides:
            ids = encode(tokenizer, side, report)
            sizes += [len(row) + frame for row in ids]
            rows = Ragged.of([framed(tokenizer, row, None, sequence_length)[0] for row in ids])
            tables.append(Texts(rows, sequence_length, pad_of(tokenizer), {"loss_mask": counted(len(side))}))
        return Tables(
            train=tables[0],
            validation=tables[1],
            baselines=guessing,
            remarks=cut_remark(sizes, sequence_length, "sentences"),
        )


def counted(rows: int) -> np.ndarray:
    """1 for each row, and 0 for the blank one."""
    return np.append(np.ones(rows), 0).astype(np.float32)


def guessing(train: TrainSplit, validation: ValidationSplit, parts: int) -> dict[str, float]:
    """What it costs to think all rows equally likely that are compared with each other: log of their number.

    Part i of a batch, where it is computed in several, is the rows i, i + parts, ...
    """
    total, count = 0.0, 0
    for step in range(validation.num_batches):
        real = validation.batch(step)["loss_mask"]
        for part in range(parts):
            rows = int(real[part::parts].sum())
            total += rows * float(np.log(max(rows, 1)))
            count += rows
    return {"any row of the batch": total / count if count else float("nan")}
