"""Blank infilling: runs of tokens are blanked out, and written after the text, in a random order (Du et al. 2022,
2103.10360). GLM's pretraining.

    text                 a  b  c  d  e  f                       blanks: c, e f
    input_ids            a  b  [M] d  [M] | <s> e   f   | <s> c
    labels               -  -  -   -  -   | e   f   </s>| c   </s>        - is -100
    position_ids         0  1  2   3  4   | 4   4   4   | 2   2
    block_position_ids   0  0  0   0  0   | 1   2   3   | 1   2
    prefix_length        5

The corrupted text is read in both directions, as by an encoder; the blanks are written one token after the other, each
seeing the text, the blanks before it, and its own tokens so far: the prefix language model's mask. One stack of layers
understands and generates. Two positions say where a token is: its blank in the text, and its place in the blank, so
that the model is not told how long a blank is. Models with one kind of position (GLM-130B, with rotary ones) take the
places in the row instead: two_dimensional=False leaves both arrays out.

15% of the tokens are blanked, in runs whose lengths are Poisson(3), at least 1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmlab.data.corrupting import filled, text_of
from llmlab.data.corruption import Corrupter, Corruption, Row, check_rate
from llmlab.data.draws import Draws
from llmlab.data.packing import IGNORE
from llmlab.data.spans import cut_out, poisson_lengths

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Blanks(Corruption):
    """Blanks out runs of tokens and writes them after the text."""

    task: ClassVar[str] = "blanks"
    needs: ClassVar[tuple[str, ...]] = ("mask", "bos", "eos", "pad")
    previous: ClassVar[str | None] = "input_ids"

    rate: float = 0.15
    """Share of the tokens that are blanked out."""
    mean_length: float = 3.0
    """Of the Poisson distribution of a blank's length."""
    two_dimensional: bool = True
    """Give position_ids and block_position_ids; false for models whose positions are the places in the row."""

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        if self.mean_length < 1:
            raise ValueError(f"mean_length={self.mean_length} is less than the shortest blank, 1")

    def limits(self, num_tokens: int) -> tuple[int, int]:
        """(tokens blanked, most blanks) of a text of so many tokens: at least one, where there are two."""
        blanked = min(max(1, round(self.rate * num_tokens)), num_tokens - 1) if num_tokens > 1 else 0
        return blanked, min(-(-blanked // 2), num_tokens - blanked + 1)

    def text_length(self, sequence_length: int) -> int:
        # a blank costs two tokens: its mask, and the <s> or </s> that its own tokens do not make up for
        length = 0
        while length + 1 + 2 * self.limits(length + 1)[1] <= sequence_length:
            length += 1
        return length if length > 1 else 0

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        mask, bos, eos, pad = tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        assert mask is not None
        assert bos is not None
        assert eos is not None
        assert pad is not None

        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            text = text_of(row)
            blanked, most = self.limits(len(text))
            lengths = poisson_lengths(self.mean_length, blanked, draws, shortest=1)[:most]
            begins, ends = cut_out(len(text), lengths, draws)
            kept, masks, done = [], [], 0
            for begin, end in zip(begins, ends, strict=True):
                kept += [text[done:begin], [mask]]
                masks.append(sum(map(len, kept)) - 1)
                done = int(end)
            kept.append(text[done:])
            prefix = np.concatenate(kept)
            inputs, labels = [prefix], [np.full(len(prefix), IGNORE)]
            places, inner = [np.arange(len(prefix))], [np.zeros(len(prefix), np.int64)]
            for number in draws.permutation(len(lengths)):
                blank = text[begins[number] : ends[number]]
                inputs.append(np.append(bos, blank))
                labels.append(np.append(blank, eos))
                places.append(np.full(len(blank) + 1, masks[number]))
                inner.append(np.arange(1, len(blank) + 2))
            positions = {
                "position_ids": filled(np.concatenate(places), sequence_length, 0),
                "block_position_ids": filled(np.concatenate(inner), sequence_length, 0),
            }
            return {
                "input_ids": filled(np.concatenate(inputs), sequence_length, pad),
                "labels": filled(np.concatenate(labels), sequence_length, IGNORE),
                "prefix_length": np.int32(len(prefix)),
            } | (positions if self.two_dimensional else {})

        return corrupt
