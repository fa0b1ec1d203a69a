"""Corruptions: rows of text become inputs and targets of another task than predicting the next token.

A corruption is a pure function of a row and of random numbers that depend on (seed, split, row number) alone. So it is
the same on any number of hosts and after a resumption, and it is new in every epoch, since an epoch's rows have new
numbers (dynamic masking: Liu et al. 2019, 1907.11692, section 4.1). Validation rows are corrupted without the seed:
every run is measured on the same ones. Shapes are fixed by the config and the sequence length.

The random numbers are drawn row by row on the host, about 0.1 ms a row, while the device computes the step before.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer
    from llmlab.tokenizers.special import SpecialTokens

Row = dict[str, Any]
"""The arrays of one row, without the batch dimension. (This module costs nothing to import: numpy's types stay out.)"""
Corrupter = Callable[[Row, Any, Callable[[], Row]], Row]
"""(row, Draws, another document's row) -> row."""


@dataclass(frozen=True, kw_only=True)
class Corruption(abc.ABC):
    """What is done to the rows of a text."""

    task: ClassVar[str]
    """What the rows are for: objectives name the tasks they can be trained on."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Roles of the special tokens that are put into rows."""
    whole_row: ClassVar[bool] = True
    """Whether a row is rewritten as a whole, so that documents can only be kept apart in rows of their own."""
    framed: ClassVar[bool] = False
    """Whether documents come with the tokenizer's begin and end around them, as a language model reads them."""
    compares: ClassVar[bool] = False
    """Whether it puts different documents together, which must then be told apart: isolate=True."""
    previous: ClassVar[str | None] = None
    """Array that holds, at the place of each target in `labels`, the target before it; None where none does."""

    @abc.abstractmethod
    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> "Corrupter":
        """The function that is applied to every row.

        A row has `text_length` entries: input_ids; labels, the next tokens; segment_ids, 0 where there is no token;
        position_ids. The shapes that come out do not depend on the row.
        """

    def text_length(self, sequence_length: int) -> int:
        """Tokens of text in a row, such that the corrupted row has `sequence_length`."""
        return sequence_length

    def problems(self, special: "SpecialTokens", sequence_length: int) -> list[str]:
        """Why it cannot be done with these special tokens and this length; empty where it can."""
        found = []
        if missing := [role for role in self.needs if getattr(special, role) is None]:
            fields = ", ".join(f"{role}={_USUAL[role]!r}" for role in missing)
            found.append(
                f"{type(self).__name__} puts the special tokens {', '.join(self.needs)} into rows, and the tokenizer "
                f"has no {' and no '.join(missing)}: give it one, tokenizer.special=SpecialTokens({fields}, ...)"
            )
        if self.text_length(sequence_length) < 1:
            found.append(f"train.sequence_length={sequence_length} leaves no room for text with {type(self).__name__}")
        return found


_USUAL = {
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "unk": "<unk>",
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
}


def check_rate(name: str, rate: float) -> None:
    """Raises a ValueError unless the rate is above 0 and below 1."""
    if not 0 < rate < 1:
        raise ValueError(f"{name}={rate} must be between 0 and 1, both excluded")
