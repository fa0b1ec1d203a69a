"""Span corruption: runs of tokens are cut out, and written down one after the other (Raffel et al. 2020, 1910.10683,
section 3.1.4). T5's pretraining.

    text                 Thank you for inviting me to your party last week
    input_ids            Thank you <X> me to your party <Y> week </s>
    labels               <X> for inviting <Y> last </s>
    decoder_input_ids    <pad> <X> for inviting <Y> last

15% of the tokens are noise, in runs of 3 on average. A row of n tokens has round(0.15 n) noise tokens in
round(0.15 n / 3) runs; where the runs begin and how long they are is random, their number is not, so that inputs and
targets have the same lengths in all full rows. Kept and noise runs take turns and the last is noise, so that the end
of a row is never seen by the encoder (as in the authors' code). Rows hold as many tokens as make the inputs exactly
`sequence_length` long, and the targets follow from that: 512 inputs of 568 tokens with 114 targets. The decoder's rows
are short: a step costs little more than a masked language model's on the same text.

Each run is replaced by a sentinel, a token of its own (<extra_id_0>, <extra_id_1>, ...), which the tokenizer must
have: `SpecialTokens(extra=sentinels(n))`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Bool, Int

from llmlab.data.corrupting import encoder_decoder_row, text_of
from llmlab.data.corruption import Corrupter, Corruption, Row, check_rate
from llmlab.data.draws import Draws
from llmlab.tokenizers.special import SpecialTokens

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer


def sentinels(count: int) -> tuple[str, ...]:
    """T5's names for so many sentinels."""
    return tuple(f"<extra_id_{i}>" for i in range(count))


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Corruption):
    """Cuts runs of tokens out of the inputs, for the decoder to write."""

    task: ClassVar[str] = "sequence to sequence"
    needs: ClassVar[tuple[str, ...]] = ("eos", "pad")
    previous: ClassVar[str | None] = "decoder_input_ids"

    rate: float = 0.15
    """Share of the tokens that are cut out."""
    mean_length: float = 3.0
    """Tokens of a run, on average."""

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        if self.mean_length < 1:
            raise ValueError(f"mean_length={self.mean_length} is less than the shortest run, 1")

    def noise(self, num_tokens: int) -> tuple[int, int]:
        """(noise tokens, runs) of a text of so many tokens, at least 2."""
        noise = min(max(round(num_tokens * self.rate), 1), num_tokens - 1)
        return noise, min(max(round(noise / self.mean_length), 1), num_tokens - noise)

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        """(inputs, targets) of a text of so many tokens, at least 2; </s> ends both."""
        noise, runs = self.noise(num_tokens)
        return num_tokens - noise + runs + 1, noise + runs + 1

    def text_length(self, sequence_length: int) -> int:
        length = 2
        while self.lengths(length + 1)[0] <= sequence_length:
            length += 1
        return length if self.lengths(length)[0] <= sequence_length else 0

    def problems(self, special: SpecialTokens, sequence_length: int) -> list[str]:
        found = super().problems(special, sequence_length)
        if found:
            return found
        needed = self.noise(self.text_length(sequence_length))[1]
        present = len(set(sentinels(needed)) & set(special.extra))
        if present < needed:
            found.append(
                f"SpanCorruption needs {needed} sentinels for rows of {sequence_length} tokens, <extra_id_0> to "
                f"<extra_id_{needed - 1}>, and the tokenizer has {present}: give it "
                f"tokenizer.special=SpecialTokens(extra=sentinels({needed}), ...), with sentinels from llmlab.data"
            )
        return found

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        full = self.text_length(sequence_length)
        num_targets = self.lengths(full)[1]
        marks = np.array([tokenizer.token_to_id(name) for name in sentinels(self.noise(full)[1])])
        eos, pad = tokenizer.eos_id, tokenizer.pad_id
        assert eos is not None
        assert pad is not None

        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            text = text_of(row)
            if len(text) < 2:  # nothing to cut out, or nothing left
                return encoder_decoder_row(text, text[:0], sequence_length, num_targets, pad=pad, start=pad)
            noise = noise_mask(len(text), *self.noise(len(text)), draws)
            inputs = np.append(_replace(text, noise, marks), eos)
            targets = np.append(_replace(text, ~noise, marks), eos)
            return encoder_decoder_row(inputs, targets, sequence_length, num_targets, pad=pad, start=pad)

        return corrupt


def noise_mask(length: int, noise: int, runs: int, draws: Draws) -> Bool[np.ndarray, " length"]:
    """Which tokens are cut out: kept and noise tokens in `runs` runs each, by turns, kept ones first.

    Both are divided into runs at random, all divisions into non-empty runs equally likely.
    """
    kept, cut = (_divide(total, runs, draws) for total in (length - noise, noise))
    lengths = np.stack([kept, cut], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * runs) % 2 == 1, lengths)


def _divide(total: int, parts: int, draws: Draws) -> Int[np.ndarray, " parts"]:
    """Lengths of so many non-empty parts of a total."""
    cuts = np.sort(draws.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _replace(
    text: Int[np.ndarray, " tokens"], gone: Bool[np.ndarray, " tokens"], marks: Int[np.ndarray, " marks"]
) -> Int[np.ndarray, " left"]:
    """The text with each run of tokens that are gone replaced by the next mark."""
    begins = gone & ~np.concatenate([[False], gone[:-1]])
    number = np.cumsum(begins) - 1
    return np.where(gone, marks[np.maximum(number, 0)], text)[~gone | begins]
