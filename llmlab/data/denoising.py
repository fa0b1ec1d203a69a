"""Denoising: the text is damaged, and written down as it was (Lewis et al. 2020, 1910.13461). BART's pretraining.

    text                A B C . D E .
    permute_sentences   D E . A B C .         sentences in a random order
    rotate              C . D E . A B         another token is the first; the model finds the beginning
    delete_rate         A C . D .             tokens are missing, and nothing shows where
    infill_rate         A _ . D _ E .         runs of words become one mask each, Poisson(3) long; a run of length 0
                                              is a mask where nothing is missing

The damages that are switched on happen in this order. BART itself was trained with infilling of 30% and with
permuted sentences, which is the default here. The encoder reads <s> damaged </s>, the decoder writes <s> text </s>,
beginning after </s>. All of the text is a target: a step costs as much decoding as encoding, several times span
corruption's for the same text.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Int

from llmlab.data.corrupting import encoder_decoder_row, text_of
from llmlab.data.corruption import Corrupter, Corruption, Row
from llmlab.data.draws import Draws
from llmlab.data.spans import cut_out, poisson_lengths
from llmlab.data.words import Words

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer

Ids = Int[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True)
class Denoising(Corruption):
    """Damages the text that the encoder reads; the decoder writes what it was."""

    task: ClassVar[str] = "sequence to sequence"
    needs: ClassVar[tuple[str, ...]] = ("bos", "eos", "pad", "mask")
    previous: ClassVar[str | None] = "decoder_input_ids"

    infill_rate: float = 0.3
    """Share of the words that are behind masks; 0 for no infilling."""
    mean_length: float = 3.0
    """Words behind a mask, on average."""
    permute_sentences: bool = True
    """Put the sentences of a row in a random order."""
    delete_rate: float = 0.0
    """Probability of each token to be left out."""
    rotate: float = 0.0
    """Share of the rows that begin with another token than their first."""

    def __post_init__(self) -> None:
        for name in ("infill_rate", "delete_rate", "rotate"):
            if not 0 <= getattr(self, name) <= (1 if name == "rotate" else 0.9):
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, {1 if name == 'rotate' else 0.9}]")
        if not self.mean_length > 0:
            raise ValueError(f"mean_length={self.mean_length} is not positive")

    def text_length(self, sequence_length: int) -> int:
        return sequence_length - 2  # <s> and </s>

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        words = Words.of(tokenizer)
        bos, eos, pad, mask = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id
        assert bos is not None
        assert eos is not None
        assert pad is not None
        assert mask is not None

        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            text = text_of(row)
            if not len(text):
                return encoder_decoder_row(text, text, sequence_length, sequence_length, pad=pad, start=eos)
            inputs = np.concatenate([[bos], self.damage(text, words, mask, draws), [eos]])
            targets = np.concatenate([[bos], text, [eos]])
            return encoder_decoder_row(inputs, targets, sequence_length, sequence_length, pad=pad, start=eos)

        return corrupt

    def damage(self, text: Ids, words: Words, mask: int, draws: Draws) -> Ids:
        """The text with all damages that are switched on; never longer than it was."""
        if self.permute_sentences:
            text = permute_sentences(text, words, draws)
        if self.rotate and draws.one() < self.rotate:
            text = np.roll(text, -draws.one_below(len(text)))
        if self.delete_rate:
            text = text[draws.uniform(len(text)) >= self.delete_rate]
        return self.infill(text, words, mask, draws) if self.infill_rate and len(text) else text

    def infill(self, text: Ids, words: Words, mask: int, draws: Draws) -> Ids:
        """The text with runs of words replaced by one mask each."""
        begins = np.flatnonzero(words.starts(text))
        count = math.ceil(self.infill_rate * len(begins))
        lengths = poisson_lengths(self.mean_length, count, draws)
        # As many masks as fit: each needs a place between words that stay, and the row must not become longer.
        lengths = lengths[np.argsort(lengths == 0, kind="stable")][: min(len(begins) - count + 1, count)]
        lengths = lengths[draws.permutation(len(lengths))]
        edges = np.append(begins, len(text))
        pieces, done = [], 0
        for begin, end in zip(*cut_out(len(begins), lengths, draws), strict=True):
            pieces += [text[edges[done] : edges[begin]], [mask]]
            done = int(end)
        return np.concatenate([*pieces, text[edges[done] :]]).astype(text.dtype)


def permute_sentences(text: Ids, words: Words, draws: Draws) -> Ids:
    """The sentences of a text in a random order."""
    cuts = np.flatnonzero(words.ends_sentence[text[:-1]] & words.starts(text)[1:]) + 1
    sentences = np.split(text, cuts)
    return np.concatenate([sentences[i] for i in draws.permutation(len(sentences))])
