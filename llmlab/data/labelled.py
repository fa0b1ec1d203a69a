"""Texts and words with labels, from files of records (records.py): what encoders are fine-tuned on.

    LabelledTexts     {"text": "a gripping film", "label": "positive"}                   one class a row
    LabelledWords     {"words": ["Ada", "left", "London"], "labels": ["PER", "O", "LOC"]}    one class a word

A row is the tokenizer's frame around the text, [CLS] text [SEP]; with a second text, [CLS] text [SEP] pair [SEP],
token_type_ids 0 for the first part and 1 for the second. A word's label stands at its first token; its other tokens,
special ones and padding are not counted (-100; Devlin et al. 2018, 1810.04805, section 5.3). Longer rows are cut.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from llmlab.data import baselines
from llmlab.data.config import length_problems
from llmlab.data.dataset import Table, TrainSplit, ValidationSplit
from llmlab.data.examples import Examples, Ragged, Tables, Texts, cut_remark, encode, framed, numbered, pad_of
from llmlab.data.packing import IGNORE
from llmlab.data.records import Record, field_of, label_of, read_records
from llmlab.data.sources import Report, check_paths, find_files, fingerprint_files
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens


@dataclass(frozen=True)
class Records(Examples):
    """Examples from files of records."""

    paths: tuple[str, ...] | str
    """Files (.jsonl, .csv, .tsv; plain, .gz or .zst), or patterns."""
    validation: tuple[str, ...] | str = ()
    """Files to validate on; () to set a part of the others aside."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns, where its first line does not say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "paths", check_paths(self.paths))
        object.__setattr__(self, "validation", check_paths(self.validation) if self.validation else ())

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        return length_problems(sequence_length)

    @abc.abstractmethod
    def check(self, record: Record, where: str) -> Any:
        """The example of a record. Raises a ValueError, naming the place, for a record that has not got its fields."""

    def read(self) -> tuple[list[Any], list[Any]]:
        def examples(paths: Sequence[str]) -> list[Any]:
            return [self.check(record, where) for where, record in read_records(paths, self.columns)]

        train = examples(self.paths)
        return (train, examples(self.validation)) if self.validation else self.split(train)

    def content(self) -> list[Any]:
        files = [fingerprint_files(find_files(paths), ()) for paths in (self.paths, self.validation) if paths]
        apart = ("paths", "validation", "validation_fraction")
        return files + [[field.name, getattr(self, field.name)] for field in fields(self) if field.name not in apart]


@dataclass(frozen=True)
class LabelledText:
    """A text, or two, and its class."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledTexts(Records):
    """Texts, or pairs of texts, with a class each."""

    text: str = "text"
    """Name of the field that holds the text."""
    pair: str | None = None
    """Name of the field that holds a second text; None for none."""
    label: str = "label"
    """Name of the field that holds the class: text or a whole number."""
    labels: tuple[str, ...] = ()
    """The classes in the order of their numbers; () for those of the training examples, sorted."""
    token_types: bool = True
    """Give token_type_ids, where there is a second text; false for models without token types (RoBERTa)."""

    @property
    def task(self) -> str:
        return "classes of texts"

    def check(self, record: Record, where: str) -> LabelledText:
        names = [self.text, *([] if self.pair is None else [self.pair])]
        texts = tuple(field_of(record, name, where) for name in names)
        return LabelledText(texts, label_of(record, self.label, where))

    def texts(self, example: LabelledText) -> tuple[str, ...]:
        return example.texts

    def tables(
        self,
        sides: tuple[list[LabelledText], list[LabelledText]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        assert sequence_length is not None
        types = self.pair is not None and self.token_types
        return text_tables(
            sides, self.labels, tokenizer, sequence_length, report, token_types=types, where=str(self.paths)
        )


def text_tables(
    sides: tuple[list[LabelledText], list[LabelledText]],
    names: tuple[str, ...],
    tokenizer: Tokenizer,
    sequence_length: int,
    report: Report,
    *,
    token_types: bool = False,
    where: str,
) -> Tables:
    """Both sides as rows of framed tokens with a class each.

    Args:
        sides: training and validation examples, all with as many texts.
        names: the classes in the order of their numbers; () for those of the training examples, sorted.
        tokenizer: turns texts into ids, and has the frame.
        sequence_length: tokens of a row.
        report: called with the progress.
        token_types: give token_type_ids.
        where: the examples' place, for messages.
    """
    named = ([e.label for e in sides[0]], [e.label for e in sides[1]])
    classes, labels = numbered(named, names, where)
    tables, sizes = [], []
    for side, numbers in zip(sides, labels, strict=True):
        columns = [encode(tokenizer, list(texts), report) for texts in zip(*(e.texts for e in side), strict=True)]
        seconds = columns[1] if len(columns) > 1 else [None] * len(side)
        rows = [framed(tokenizer, *pair, sequence_length) for pair in zip(columns[0], seconds, strict=True)]
        others = {"labels": np.append(numbers, IGNORE).astype(np.int32)}
        if token_types:
            others["token_type_ids"] = types_of(rows, sequence_length)
        tables.append(Texts(Ragged.of([row for row, _ in rows]), sequence_length, pad_of(tokenizer), others))
        frame = sum(map(len, tokenizer.frame)) + (len(columns) > 1)
        sizes += [sum(map(len, parts)) + frame for parts in zip(*columns, strict=True)]
    return labelled_tables(tables, len(classes), cut_remark(sizes, sequence_length, "rows"))


@dataclass(frozen=True)
class LabelledSentence:
    """Words and a class for each."""

    words: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelledWords(Records):
    """Sentences, given as words, with a class for each word."""

    words: str = "words"
    """Name of the field that holds the list of words; in a table, words are separated by spaces."""
    label: str = "labels"
    """Name of the field that holds the list of their classes."""
    labels: tuple[str, ...] = ()
    """The classes in the order of their numbers; () for those of the training examples, sorted."""

    @property
    def task(self) -> str:
        return "classes of tokens"

    def check(self, record: Record, where: str) -> LabelledSentence:
        columns = []
        for name in (self.words, self.label):
            value = field_of(record, name, where, object)
            value = value.split() if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(item, (str, int)) for item in value):
                raise ValueError(f"{where}: field {name!r} holds no list of words or numbers")
            columns.append(tuple(map(str, value)))
        if len(columns[0]) != len(columns[1]):
            raise ValueError(f"{where}: {len(columns[0])} words and {len(columns[1])} labels; give one to each word")
        return LabelledSentence(*columns)

    def texts(self, example: LabelledSentence) -> tuple[str, ...]:
        return (" ".join(example.words),)

    def tables(
        self,
        sides: tuple[list[LabelledSentence], list[LabelledSentence]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        assert sequence_length is not None
        named = tuple([label for e in side for label in e.labels] for side in sides)
        names, _ = numbered((named[0], named[1]), self.labels, str(self.paths))
        before, after = tokenizer.frame
        room = max(0, sequence_length - len(before) - len(after))
        tables, sizes = [], []
        for side in sides:
            # The space before a word is part of its first token in most vocabularies, and no token in others.
            words = [word if i == 0 else f" {word}" for e in side for i, word in enumerate(e.words)]
            tokens = iter(encode(tokenizer, words, report))
            rows, labels = [], np.full((len(side) + 1, sequence_length), IGNORE, np.int32)
            for number, example in enumerate(side):
                ids: list[int] = []
                for label in example.labels:
                    if len(ids) < room and (word := next(tokens)):
                        labels[number, len(before) + len(ids)] = names[label]
                        ids += word
                    elif len(ids) >= room:
                        ids += next(tokens)
                sizes.append(len(ids) + len(before) + len(after))
                rows.append([*before, *ids[:room], *after][:sequence_length])
            tables.append(Texts(Ragged.of(rows), sequence_length, pad_of(tokenizer), {"labels": labels}))
        return labelled_tables(tables, len(names), cut_remark(sizes, sequence_length, "sentences"))


def types_of(rows: list[tuple[list[int], int]], length: int) -> np.ndarray:
    """0 for the first text of each row and for padding, 1 for the second; and the blank row's."""
    types = np.zeros((len(rows) + 1, length), np.int32)
    for number, (row, second) in enumerate(rows):
        types[number, second : len(row)] = 1
    return types


def labelled_tables(tables: list[Texts], num_labels: int, remarks: tuple[str, ...]) -> Tables:
    """Both sides, with what knowing the frequencies of the classes achieves."""

    def of_classes(train: TrainSplit, validation: ValidationSplit, parts: int) -> dict[str, float]:
        return {"class frequencies": baselines.targets(train, validation, num_labels)}

    first, second = tables
    pair: tuple[Table, Table] = first, second
    return Tables(train=pair[0], validation=pair[1], baselines=of_classes, num_labels=num_labels, remarks=remarks)
