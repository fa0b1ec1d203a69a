"""Two segments of text in a row, and the question how they belong together, beside masked tokens.

    [CLS] A A A A [SEP] B B B [SEP]                 token_type_ids  0 0 0 0 0 0 1 1 1 1

    NextSentence     B follows A in its document (0), or is from another document (1), half and half
                     (Devlin et al. 2018, 1810.04805, section 3.1)
    SentenceOrder    A and B follow each other in this order (0), or were swapped (1): topics do not give the answer
                     away, as they do above (Lan et al. 2019, 1909.11942, section 3.1)

A document is cut into pieces that fill a row; each is cut in two where a sentence ends, or between words where none
does. Where B is another document's, it begins at a sentence of that document, and what followed A is not read in this
epoch; other epochs deal otherwise.
"""

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Int

from llmlab.data.corrupting import attended, filled, text_of
from llmlab.data.corruption import Corrupter, Corruption, Row
from llmlab.data.draws import Draws
from llmlab.data.masking import Masking, TokenMasking
from llmlab.data.packing import IGNORE
from llmlab.data.words import Words
from llmlab.tokenizers.special import SpecialTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmlab.tokenizers.base import Tokenizer

Ids = Int[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True)
class SentencePair(Corruption):
    """How rows of two segments are made; which segments, is the subclass's affair."""

    task: ClassVar[str] = "masked tokens and sentence pairs"
    needs: ClassVar[tuple[str, ...]] = ("cls", "sep", "pad")
    compares: ClassVar[bool] = True

    masking: Masking = TokenMasking()
    """What is hidden in both segments."""

    def text_length(self, sequence_length: int) -> int:
        return sequence_length - 3  # [CLS], [SEP], [SEP]

    def problems(self, special: SpecialTokens, sequence_length: int) -> list[str]:
        found = super().problems(special, sequence_length)
        if not found and self.text_length(sequence_length) < 2:
            found.append(f"train.sequence_length={sequence_length} leaves no room for two segments; use at least 5")
        return found + [text for text in self.masking.problems(special, sequence_length) if text not in found]

    @abc.abstractmethod
    def pair(self, text: Ids, words: Words, draws: Draws, other: "Callable[[], Ids]") -> tuple[Ids, Ids, int]:
        """Segments A and B and their label, -100 where the text is too short to ask.

        Args:
            text: a piece of a document, at least one token.
            words: of the vocabulary.
            draws: random numbers.
            other: gives a piece of another document.
        """

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        words, masker = Words.of(tokenizer), self.masking.masker(tokenizer, sequence_length)
        cls, sep, pad = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id
        assert cls is not None
        assert sep is not None
        assert pad is not None

        def corrupt(row: Row, draws: Draws, other: "Callable[[], Row]") -> Row:
            text = text_of(row)
            if len(text):
                a, b, label = self.pair(text, words, draws, lambda: text_of(other()))
            else:  # a blank row
                a, b, label = text, text, IGNORE
            ids = np.concatenate([[cls], a, [sep], *([b, [sep]] if len(b) else [])]) if len(text) else text
            real = np.arange(sequence_length) < len(ids)
            return masker(filled(ids, sequence_length, pad), real, draws) | {
                "attention_mask": attended(len(ids), sequence_length),
                "token_type_ids": (real & (np.arange(sequence_length) >= len(a) + 2)).astype(np.int32),
                "next_sentence_label": np.int32(label),
            }

        return corrupt


@dataclass(frozen=True, kw_only=True)
class NextSentence(SentencePair):
    """Does B follow A, or is it from another document?"""

    def pair(self, text: Ids, words: Words, draws: Draws, other: "Callable[[], Ids]") -> tuple[Ids, Ids, int]:
        cut = _cut(text, words, draws)
        if cut is not None and draws.one() < 0.5:
            return text[:cut], text[cut:], 0
        if cut is None:  # a single word
            cut = (len(text) + 1) // 2
        room, strange = max(1, len(text) - cut), other()
        # the sentence in which a random token stands that has enough text after it
        begin = draws.one_below(max(1, len(strange) - room + 1))
        begins = np.flatnonzero(words.ends_sentence[strange[:-1]] & words.starts(strange)[1:]) + 1
        begin = max([0, *begins[begins <= begin].tolist()])
        return text[:cut], strange[begin : begin + room], 1


@dataclass(frozen=True, kw_only=True)
class SentenceOrder(SentencePair):
    """Do A and B stand in their order, or were they swapped?"""

    def pair(self, text: Ids, words: Words, draws: Draws, other: "Callable[[], Ids]") -> tuple[Ids, Ids, int]:
        cut = _cut(text, words, draws)
        if cut is None:
            return text, text[:0], IGNORE
        if draws.one() < 0.5:
            return text[:cut], text[cut:], 0
        return text[cut:], text[:cut], 1


def _cut(text: Ids, words: Words, draws: Draws) -> int | None:
    """Where to cut in two: after a sentence, or else between words; None in a single word."""
    begins = words.starts(text)[1:]
    after_sentences = np.flatnonzero(begins & words.ends_sentence[text[:-1]]) + 1
    places = after_sentences if len(after_sentences) else np.flatnonzero(begins) + 1
    return int(places[draws.one_below(len(places))]) if len(places) else None
