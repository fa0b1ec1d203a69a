"""What a run is trained on: one source, or a mixture of several, and how their documents become batches."""

import abc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmlab.data.corruption import Corruption
from llmlab.data.mixing import check_weights
from llmlab.data.sources import Report, Source
from llmlab.data.splitting import text_hash, validation_below
from llmlab.data.tasks import NEXT_TOKENS

if TYPE_CHECKING:
    from llmlab.data.dataset import Dataset
    from llmlab.tokenizers.base import Tokenizer
    from llmlab.tokenizers.special import SpecialTokens


@dataclass(frozen=True)
class Weighted:
    """A source and its share of a mixture."""

    source: Source
    """The documents."""
    weight: float = 1.0
    """Share of the training rows, relative to the other parts' weights."""
    validation: Source | None = None
    """Documents to validate on; None to set a part of the source's own aside."""


@dataclass(frozen=True, kw_only=True)
class Data(abc.ABC):
    """What a run is trained on, and how that becomes batches."""

    @property
    @abc.abstractmethod
    def task(self) -> str:
        """What the batches are for; objectives name the tasks they can be trained on."""

    def problems(self, special: "SpecialTokens | None", sequence_length: int | None) -> list[str]:
        """Why there can be no batches of this length with a tokenizer of these special tokens (None: not known yet).

        What can be told without reading anything; empty where nothing is wrong.
        """
        return []

    @abc.abstractmethod
    def training_texts(self) -> Iterator[str]:
        """The texts of the training side, never of the validation side: what a tokenizer may be trained on.

        Raises:
            ValueError: there is none, or a source cannot be read.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content and all choices made here: equal data, equal fingerprint."""

    @abc.abstractmethod
    def build(
        self,
        tokenizer: "Tokenizer",
        *,
        sequence_length: int | None,
        batch_size: int,
        seed: int,
        cache_dir: Path | None = None,
        report: Report | None = None,
    ) -> "Dataset":
        """The data set: tokenized now, or the last time, and ready for `batch(step)`.

        Args:
            tokenizer: Turns text into ids.
            sequence_length: Tokens in a row; None where rows have no tokens.
            batch_size: Rows in a batch, over all hosts.
            seed: Decides the order of training rows, and what is drawn for each.
            cache_dir: Where token stores are kept; None for $LLMLAB_CACHE, or ~/.cache/llmlab.
            report: Called with the progress of tokenization.

        Raises:
            FileNotFoundError: a source is not there.
            ValueError: a source cannot be read or is empty, or one side of the split has no document.
        """


@dataclass(frozen=True, kw_only=True)
class PackedText(Data):
    """Documents, split, tokenized and packed into rows."""

    isolate: bool = True
    """Keep documents that share a row apart (segment ids); false for plain concatenation, as GPT-2 was trained."""
    bos: bool = True
    """Begin documents with the tokenizer's bos token, where it has one: so their first token is predicted as well."""
    validation_fraction: float = 0.03
    """Part of the documents set aside for validation, chosen by their content; not used where a source brings its own
    validation documents."""
    corruption: Corruption | None = None
    """What is done to the rows; None to predict the next token."""

    @property
    def task(self) -> str:
        return NEXT_TOKENS if self.corruption is None else self.corruption.task

    def problems(self, special: "SpecialTokens | None", sequence_length: int | None) -> list[str]:
        if sequence_length is None or self.corruption is None:
            return length_problems(sequence_length)
        found = [] if special is None else self.corruption.problems(special, sequence_length)
        if self.corruption.compares and not self.isolate:
            found.append(f"{type(self.corruption).__name__} puts different documents together: set data.isolate=True")
        return found

    def __post_init__(self) -> None:
        check_fraction(self.validation_fraction)

    @abc.abstractmethod
    def weighted(self) -> tuple[Weighted, ...]:
        """The sources and their weights."""

    def training_texts(self) -> Iterator[str]:
        found = False
        for part in self.weighted():
            below = 0 if part.validation else validation_below(self.validation_fraction)
            for document in part.source.documents():
                if text_hash(document.text) >= below:
                    found = True
                    yield document.text
        if not found:
            raise ValueError(f"there is no training document with text in it in {self}")

    def fingerprint(self) -> str:
        parts = [
            [part.source.fingerprint(), part.weight, part.validation.fingerprint() if part.validation else None]
            for part in self.weighted()
        ]
        choices: list[object] = [self.isolate, self.bos, self.validation_fraction]
        if self.corruption is not None:
            choices.append(repr(self.corruption))
        return hashlib.sha256(json.dumps([parts, choices]).encode()).hexdigest()

    def build(
        self,
        tokenizer: "Tokenizer",
        *,
        sequence_length: int | None,
        batch_size: int,
        seed: int,
        cache_dir: Path | None = None,
        report: Report | None = None,
    ) -> "Dataset":
        from llmlab.data.building import build

        if found := self.problems(tokenizer.special, sequence_length):
            raise ValueError("; ".join(found))
        assert sequence_length is not None
        return build(
            self,
            tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            cache_dir=cache_dir,
            report=report,
        )


def length_problems(sequence_length: int | None) -> list[str]:
    """What is wrong where rows of text have no length; empty where they have one."""
    return ["rows of text need a length: set train.sequence_length"] if sequence_length is None else []


def check_fraction(fraction: float) -> None:
    """Raises a ValueError unless it leaves something for both sides."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation_fraction={fraction} must be between 0 and 1, both excluded; to train on all of a source, give "
            "it validation documents of their own: validation=TextFiles(...)"
        )


@dataclass(frozen=True)
class Packed(PackedText):
    """One source's documents, split, tokenized and packed into rows."""

    source: Source
    """The documents."""
    validation: Source | None = None
    """Documents to validate on; None to set a part of the source's own aside."""

    def weighted(self) -> tuple[Weighted, ...]:
        return (Weighted(self.source, 1.0, self.validation),)


@dataclass(frozen=True)
class Mixture(PackedText):
    """Several sources, each giving its share of the training rows; validation is on all their validation documents."""

    parts: tuple[Weighted, ...]
    """The sources and their weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights([part.weight for part in self.parts])

    def weighted(self) -> tuple[Weighted, ...]:
        return self.parts
