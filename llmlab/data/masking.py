"""Masked language modelling: some tokens are hidden, and predicted from all the others.

    chosen      15% of the tokens of a row                         (Devlin et al. 2018, 1810.04805, section 3.1)
    shown as    [MASK] in 80% of the cases, a random token in 10%, itself in 10%: at fine-tuning there is no [MASK],
                so the model must have learnt to look at what stands there
    predicted   the chosen tokens, and no others

    TokenMasking    tokens one by one, or whole words (BERT's later release)
    SpanMasking     runs of whole words, Geo(0.2) long but at most 10, 3.8 on average; a run is shown in one of the
                    three ways as a whole (Joshi et al. 2020, 1907.10529, section 3.1)

Every row has the same number of places for predictions, 15% of its length, so that the head's matmul over the
vocabulary is done for those and not for the other 85% of the positions. In a row of 8 with two places:

    input_ids           the    [MASK] sat    on     the    mat    .      .         (the last one is a random token)
    labels              -100   cat    -100   -100   -100   -100   -100   today
    masked_positions    1      7                                                  -1 where there is no prediction
"""

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Bool, Int

from llmlab.data.corrupting import filled
from llmlab.data.corruption import Corrupter, Corruption, Row, check_rate
from llmlab.data.draws import Draws
from llmlab.data.packing import IGNORE
from llmlab.data.spans import choose_spans, words_of
from llmlab.data.words import Words

if TYPE_CHECKING:
    from llmlab.tokenizers.base import Tokenizer

_MASK, _RANDOM, _SAME = range(3)  # how a chosen token is shown


@dataclass(frozen=True, kw_only=True)
class Masking(Corruption):
    """How tokens are hidden; which ones, is the subclass's affair."""

    task: ClassVar[str] = "masked tokens"
    needs: ClassVar[tuple[str, ...]] = ("mask",)
    whole_row: ClassVar[bool] = False
    framed: ClassVar[bool] = True

    rate: float = 0.15
    """Share of the tokens that are predicted."""
    mask: float = 0.8
    """Of these, the share that shows as the mask token."""
    random: float = 0.1
    """Of these, the share that shows as a random token; the rest shows as it is."""

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise ValueError(f"mask={self.mask} and random={self.random} must be shares that add up to at most 1")

    def num_predictions(self, num_tokens: int) -> int:
        """How many of so many tokens are predicted: at least one, where there is any."""
        return max(1, round(self.rate * num_tokens)) if num_tokens else 0

    @abc.abstractmethod
    def choose(
        self, starts: Bool[np.ndarray, " tokens"], maskable: Bool[np.ndarray, " tokens"], count: int, draws: Draws
    ) -> Int[np.ndarray, " tokens"]:
        """Which tokens are predicted, at most `count`: a number for each, -1 for those that are not; tokens of equal
        numbers are shown in the same way.

        Args:
            starts: where words begin.
            maskable: which tokens may be chosen.
            count: how many.
            draws: random numbers.
        """

    def masker(self, tokenizer: "Tokenizer", sequence_length: int) -> "Masker":
        """The function that hides tokens of a row."""
        return Masker(self, tokenizer, sequence_length)

    def build(self, tokenizer: "Tokenizer", sequence_length: int) -> Corrupter:
        masker = self.masker(tokenizer, sequence_length)

        def corrupt(row: Row, draws: Draws, other: object) -> Row:
            kept = {name: array for name, array in row.items() if name not in ("input_ids", "labels")}
            return masker(row["input_ids"], row["segment_ids"] > 0, draws) | kept

        return corrupt


class Masker:
    """Hides tokens of a row of fixed length."""

    def __init__(self, config: Masking, tokenizer: "Tokenizer", sequence_length: int) -> None:
        assert tokenizer.mask_id is not None
        self._config = config
        self._mask_id = tokenizer.mask_id
        self._words = Words.of(tokenizer)
        self._random = np.flatnonzero(self._words.ordinary)
        self._places = config.num_predictions(sequence_length)

    def __call__(self, ids: Int[np.ndarray, " tokens"], real: Bool[np.ndarray, " tokens"], draws: Draws) -> Row:
        """input_ids, labels and masked_positions of a row; `real` says which of its tokens are not padding."""
        config = self._config
        maskable = real & self._words.ordinary[ids]
        count = min(config.num_predictions(int(maskable.sum())), self._places)
        unit = config.choose(self._words.starts(ids), maskable, count, draws)
        chosen = np.flatnonzero(unit >= 0)
        kinds = np.searchsorted([config.mask, config.mask + config.random], draws.uniform(len(ids)), side="right")
        kind = kinds[unit[chosen]]  # one draw for each unit
        random = self._random[draws.below(len(self._random), len(chosen))]
        shown, labels = ids.copy(), np.full_like(ids, IGNORE)
        shown[chosen] = np.select([kind == _MASK, kind == _RANDOM], [self._mask_id, random], ids[chosen])
        labels[chosen] = ids[chosen]
        return {"input_ids": shown, "labels": labels, "masked_positions": filled(chosen, self._places, -1)}


@dataclass(frozen=True, kw_only=True)
class TokenMasking(Masking):
    """Hides tokens one by one, or word by word."""

    whole_words: bool = False
    """Choose words and hide all of their tokens, each shown in its own way; a word that is more than what is left to
    be chosen is passed over."""

    def choose(
        self, starts: Bool[np.ndarray, " tokens"], maskable: Bool[np.ndarray, " tokens"], count: int, draws: Draws
    ) -> Int[np.ndarray, " tokens"]:
        chosen = np.full(len(starts), -1)
        if self.whole_words:
            begins, ends = words_of(starts, maskable)
            for number in draws.permutation(len(begins)):
                begin, end = int(begins[number]), int(ends[number])
                if end - begin <= count:
                    chosen[begin:end] = np.arange(begin, end)
                    count -= end - begin
                if not count:
                    break
        else:
            candidates = np.flatnonzero(maskable)
            places = candidates[draws.permutation(len(candidates))[:count]]
            chosen[places] = places
        return chosen


@dataclass(frozen=True, kw_only=True)
class SpanMasking(Masking):
    """Hides runs of whole words."""

    p: float = 0.2
    """Of the geometric distribution of a run's number of words."""
    max_words: int = 10
    """Longer runs are drawn again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("p", self.p)
        if self.max_words < 1:
            raise ValueError(f"max_words={self.max_words} is not positive")

    def choose(
        self, starts: Bool[np.ndarray, " tokens"], maskable: Bool[np.ndarray, " tokens"], count: int, draws: Draws
    ) -> Int[np.ndarray, " tokens"]:
        cumulative = 1 - (1 - self.p) ** np.arange(1, self.max_words + 1)

        def length(draws: Draws) -> int:  # "drawn again" in one draw: the distribution cut off at max_words
            return 1 + int(np.searchsorted(cumulative, draws.one() * cumulative[-1], side="right"))

        chosen = np.full(len(starts), -1)
        for begin, end in choose_spans(words_of(starts, maskable), count, length, draws):
            chosen[begin:end] = begin
        return chosen
