"""The prefix language model: the first tokens see each other, the others are predicted (Raffel et al. 2020,
1910.10683, section 3.2).

    input_ids        a     b     c     d     e     f
    labels           -     -     d     e     f     g          prefix_length = 3; - is -100
    sees             abc   abc   abc   abcd  abcde abcdef

A part of the text is read in both directions, as by an encoder, and the rest is written, as by a decoder, by the same
weights. The last token of the prefix is the first that has something to predict: d is not in its sight. What an
earlier one would predict, it sees. Each row has a document of its own and a prefix of random length, all lengths
equally likely that leave something to predict.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmlab.data.corruption import Corrupter, Corruption, Row
from llmlab.data.draws import Draws
from llmlab.data.packing import IGNORE

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RandomPrefix(Corruption):
    """A prefix of random length in every row."""

    task: ClassVar[str] = "tokens after a prefix"
    framed: ClassVar[bool] = True
    previous: ClassVar[str | None] = "input_ids"

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            length = int(np.count_nonzero(row["segment_ids"]))
            prefix = 1 + draws.one_below(max(1, length - 1))  # 1 to length - 1: one token at least is left
            places = np.arange(len(row["labels"]))
            labels = np.where(places < prefix - 1, IGNORE, row["labels"]).astype(np.int32)
            return {"input_ids": row["input_ids"], "labels": labels, "prefix_length": np.int32(prefix)}

        return corrupt
