"""Pairs of texts from two files, line by line: translation, and whatever else turns one text into another.

    source.de    Zwei Männer stehen am Herd .        input_ids            Zwei Männer stehen am Herd . </s>
    target.en    Two men are at the stove .          decoder_input_ids    <pad> Two men are at the stove .
                                                     labels               Two men are at the stove . </s>

Line i of one file belongs to line i of the other. The decoder reads its targets one place late, behind a start token
(teacher forcing; Sutskever et al. 2014, 1409.3215); which one that is differs between families: T5 begins with its
pad token, BART with eos, and frames both texts with bos and eos (bos=True).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from llmlab.data import baselines
from llmlab.data.config import length_problems
from llmlab.data.dataset import Batch, Numbers, Table, TrainSplit, ValidationSplit
from llmlab.data.examples import Examples, Ragged, Tables, cut_remark, encode, shown
from llmlab.data.packing import IGNORE
from llmlab.data.records import text_lines
from llmlab.data.sources import Report, check_paths, find_files, fingerprint_files
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import ROLES, SpecialTokens

Paths = tuple[str, ...] | str


@dataclass(frozen=True)
class Pairs(Examples):
    """Sources and targets in files whose lines belong together; plain, .gz or .zst."""

    source: Paths
    """Files with a source on each line, or patterns."""
    target: Paths
    """Files with the targets, in the same order."""
    validation_source: Paths = ()
    """Files with sources to validate on; () to set a part of the others aside."""
    validation_target: Paths = ()
    """Files with their targets."""
    target_length: int | None = None
    """Tokens in a target row; None for train.sequence_length."""
    start: Literal["pad", "bos", "eos", "cls"] = "pad"
    """Role of the token that the decoder begins with."""
    bos: bool = False
    """Begin sources and targets with the tokenizer's bos token."""
    prefix: str = ""
    """Text before every source: "translate German to English: "."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "target", "validation_source", "validation_target"):
            value = getattr(self, name)
            object.__setattr__(self, name, check_paths(value) if value or "validation" not in name else ())
        if bool(self.validation_source) != bool(self.validation_target):
            raise ValueError("validation_source and validation_target belong together; give both or none")
        if self.target_length is not None and self.target_length < 1:
            raise ValueError(f"target_length={self.target_length} is not positive; None takes train.sequence_length")

    @property
    def task(self) -> str:
        return "sequence to sequence"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        found = length_problems(sequence_length)
        wanted = ("eos", "pad", self.start, "bos") if self.bos else ("eos", "pad", self.start)
        roles = [role for role in ROLES if role in wanted]
        if special is not None and (missing := [role for role in roles if getattr(special, role) is None]):
            found.append(
                f"Pairs puts the special tokens {', '.join(roles)} into rows, and the tokenizer has no "
                f"{' and no '.join(missing)}: name it in tokenizer.special=SpecialTokens(...)"
            )
        return found

    def read(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        train = aligned(self.source, self.target)
        if self.validation_source:
            return train, aligned(self.validation_source, self.validation_target)
        return self.split(train)

    def texts(self, example: tuple[str, str]) -> tuple[str, ...]:
        return (self.prefix + example[0], example[1])

    def framed(self, tokenizer: Tokenizer, ids: Sequence[int], length: int) -> list[int]:
        """A text's tokens as they stand in a row of at most `length`: bos, if there is one, the text, eos."""
        assert tokenizer.eos_id is not None
        before = [tokenizer.bos_id] if self.bos and tokenizer.bos_id is not None else []
        return [*before, *ids[: max(0, length - len(before) - 1)], tokenizer.eos_id][:length]

    def content(self) -> list[Any]:
        paths = (self.source, self.target, self.validation_source, self.validation_target)
        files = [fingerprint_files(find_files(some), ()) for some in paths if some]
        names = ("target_length", "start", "bos", "prefix")
        return [*files, *[getattr(self, field.name) for field in fields(self) if field.name in names]]

    def tables(
        self,
        sides: tuple[list[tuple[str, str]], list[tuple[str, str]]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        assert sequence_length is not None
        lengths = (sequence_length, self.target_length or sequence_length)
        start = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "cls": tokenizer.cls_id}
        start_id, pad_id = start[self.start], tokenizer.pad_id
        assert start_id is not None
        assert pad_id is not None
        tables: list[Table] = []
        sizes: tuple[list[int], list[int]] = ([], [])
        for side in sides:
            columns = []
            for i, length in enumerate(lengths):
                ids = encode(tokenizer, [self.texts(example)[i] for example in side], report)
                sizes[i].extend(len(row) + self.bos + 1 for row in ids)
                columns.append(Ragged.of([self.framed(tokenizer, row, length) for row in ids]))
            tables.append(PairTable(columns[0], columns[1], lengths, pad_id=pad_id, start_id=start_id))
        remarks = cut_remark(sizes[0], lengths[0], "sources") + cut_remark(sizes[1], lengths[1], "targets")

        def of_targets(train: TrainSplit, validation: ValidationSplit, parts: int) -> dict[str, float]:
            return baselines.sequences(train, validation, tokenizer.vocab_size, "decoder_input_ids")

        return Tables(train=tables[0], validation=tables[1], baselines=of_targets, remarks=remarks)


class PairTable(Table):
    """Rows of a source and a target."""

    def __init__(
        self, sources: Ragged, targets: Ragged, lengths: tuple[int, int], *, pad_id: int, start_id: int
    ) -> None:
        assert len(sources) == len(targets)
        self._sides = sources, targets
        self._lengths = lengths
        self._pad_id, self._start_id = pad_id, start_id

    def __len__(self) -> int:
        return len(self._sides[0])

    def read(self, numbers: Numbers) -> Batch:
        sources, source_here = self._sides[0].read(numbers, self._lengths[0], self._pad_id)
        targets, target_here = self._sides[1].read(numbers, self._lengths[1], self._pad_id)
        late = np.concatenate([np.full((len(numbers), 1), self._start_id, np.int32), targets[:, :-1]], axis=1)
        return {
            "input_ids": sources,
            "attention_mask": shown(source_here),
            "decoder_input_ids": np.where(target_here, late, self._pad_id).astype(np.int32),
            "decoder_attention_mask": shown(target_here),
            "labels": np.where(target_here, targets, IGNORE).astype(np.int32),
        }


def aligned(source: Sequence[str], target: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs both of whose lines have text.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file cannot be read, or one side has more lines than the other.
    """
    columns = [[text for path in find_files(paths) for _, text in text_lines(path)] for paths in (source, target)]
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{', '.join(source)} and {', '.join(target)} have {len(columns[0])} and {len(columns[1])} lines; line i "
            "of one must belong to line i of the other"
        )
    return [pair for pair in zip(*columns, strict=True) if all(re.search(r"\S", text) for text in pair)]
