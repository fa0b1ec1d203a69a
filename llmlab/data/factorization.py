"""Permutation language modelling: tokens are predicted one after the other, in a random order (Yang et al. 2019,
1906.08237).

    log p(x) = sum_t log p(x_{z_t} | x_{z_1} ... x_{z_{t-1}})        z: a random order, the factorization order

Every token is predicted from a random subset of the others, so the model learns to look to both sides and yet predicts
autoregressively, without mask tokens. The tokens stay where they are; only who sees whom follows the order. As the
first of an order have nothing to be predicted from, only the last 1/K are targets (partial prediction, section 2.3;
K = 6). They are runs of one to five whole words, short ones more often (as in the authors' code).

    perm_mask[i, j]         1 where i must not see j: j is a target that comes later than i, or i itself, or i is no
                            target. Tokens that are no targets are seen by all and see each other.
    target_mapping[p, j]    1 where prediction p is that of the token at j: one row per target, in the order of places
    labels[p]               the token at j

A prediction's query stream knows the place j and what is visible from there; "j does not see j" holds for it, while
the content stream of the model lets every token see itself.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llmlab.data.corrupting import filled
from llmlab.data.corruption import Corrupter, Corruption, Row
from llmlab.data.draws import Draws
from llmlab.data.packing import IGNORE
from llmlab.data.spans import choose_spans, words_of
from llmlab.data.words import Words

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class FactorizationOrder(Corruption):
    """A random order of the tokens, of which the last are predicted."""

    task: ClassVar[str] = "permuted tokens"
    whole_row: ClassVar[bool] = False
    framed: ClassVar[bool] = True

    k: float = 6.0
    """One in so many tokens is a target."""
    max_words: int = 5
    """Words in the longest run of targets; a run of n words is drawn with a probability proportional to 1 / n."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} is less than 1: there are no more targets than tokens")
        if self.max_words < 1:
            raise ValueError(f"max_words={self.max_words} is not positive")

    def num_predictions(self, num_tokens: int) -> int:
        """How many of so many tokens are targets: at least one, where there is any."""
        return max(1, int(num_tokens / self.k)) if num_tokens else 0

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        words, places = Words.of(tokenizer), self.num_predictions(sequence_length)
        shares = np.cumsum(1 / np.arange(1, self.max_words + 1))

        def length(draws: Draws) -> int:
            return 1 + int(np.searchsorted(shares, draws.one() * shares[-1], side="right"))

        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            ids, segments = row["input_ids"], row.get("segment_ids")
            real = (row["attention_mask"] if segments is None else segments) > 0
            usable = real & words.ordinary[ids]
            count = min(self.num_predictions(int(usable.sum())), places)
            spans = list(choose_spans(words_of(words.starts(ids), usable), count, length, draws))
            targets = np.sort(np.concatenate([np.arange(*span) for span in spans])) if spans else np.zeros(0, np.int64)
            # When each token's turn comes: those that are no targets first, all at once.
            turn = np.zeros(len(ids), np.int64)
            turn[targets] = 1 + draws.permutation(len(targets))
            hidden = (turn[None, :] > 0) & (turn[None, :] >= turn[:, None])
            if segments is not None:
                hidden |= segments[:, None] != segments[None, :]
            mapping = np.zeros((places, len(ids)), np.float32)
            mapping[np.arange(len(targets)), targets] = 1
            return {
                "input_ids": ids,
                "attention_mask": real.astype(np.int32),
                "perm_mask": (hidden | ~real[None, :]).astype(np.float32),
                "target_mapping": mapping,
                "labels": filled(ids[targets], places, IGNORE),
            }

        return corrupt
