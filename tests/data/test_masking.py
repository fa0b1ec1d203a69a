"""Masked language modelling: who is hidden, how, and that nothing else is."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.data import SpanMasking, TokenMasking
from llmlab.data.draws import Draws
from llmlab.data.masking import Masking
from llmlab.data.words import Words
from llmlab.tokenizers import Bytes, SpecialTokens, Tokenizer

TOKENIZER: Tokenizer = Bytes(special=SpecialTokens(mask="[MASK]", cls="[CLS]", sep="[SEP]")).build()
MASK = TOKENIZER.token_to_id("[MASK]")
WORDS = Words.of(TOKENIZER)
CONFIGS = [TokenMasking(), TokenMasking(whole_words=True), SpanMasking(), TokenMasking(rate=0.4, mask=0.5, random=0.5)]
texts = st.text(alphabet="abc .!", min_size=1, max_size=60)


def row_of(text: str, length: int) -> dict[str, Any]:
    ids = [TOKENIZER.cls_id, *TOKENIZER.encode(text)][:length]
    padding = length - len(ids)
    return {
        "input_ids": np.array(ids + [TOKENIZER.pad_id] * padding, np.int32),
        "labels": np.zeros(length, np.int32),
        "segment_ids": np.array([1] * len(ids) + [0] * padding, np.int32),
        "position_ids": np.arange(length, dtype=np.int32),
    }


build = functools.cache(lambda config, length: config.build(TOKENIZER, length))


def mask(config: Masking, row: dict[str, Any], *key: int) -> dict[str, Any]:
    return build(config, len(row["input_ids"]))(row, Draws(*key), lambda: row)


@pytest.mark.parametrize("config", CONFIGS)
@given(text=texts, length=st.sampled_from([1, 2, 7, 40, 64]), key=st.integers(0, 2**32))
def test_chosen_tokens_are_labels_and_all_others_are_seen_as_they_are(
    config: Masking, text: str, length: int, key: int
) -> None:
    row = row_of(text, length)
    found = mask(config, row, key)
    ids, labels, shown = row["input_ids"], found["labels"], found["input_ids"]
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(shown[~chosen], ids[~chosen])
    ordinary = (ids < 256) & (row["segment_ids"] > 0)
    assert not chosen[~ordinary].any(), "special tokens and padding are never predicted"
    assert set(shown[chosen]) <= {MASK, *range(256)}
    # positions: exactly the chosen ones, in order, then -1
    places = max(1, round(config.rate * length))
    assert found["masked_positions"].tolist() == [*np.flatnonzero(chosen), *[-1] * (places - chosen.sum())]
    most = max(1, round(config.rate * ordinary.sum())) if ordinary.any() else 0
    whole = isinstance(config, SpanMasking) or (isinstance(config, TokenMasking) and config.whole_words)
    assert chosen.sum() <= most if whole else chosen.sum() == most
    for name in ("segment_ids", "position_ids"):
        np.testing.assert_array_equal(found[name], row[name])


@pytest.mark.parametrize("config", [TokenMasking(whole_words=True), SpanMasking()])
@given(text=texts, key=st.integers(0, 2**32))
def test_words_are_hidden_whole(config: Masking, text: str, key: int) -> None:
    row = row_of(text, 64)
    chosen = mask(config, row, key)["labels"] != -100
    word = np.cumsum(WORDS.starts(row["input_ids"]))
    for number in set(word[chosen].tolist()):
        assert chosen[word == number].all()
    # ... and as many as fit: no free word is as short as what is left
    ordinary = row["input_ids"] < 256
    left = max(1, round(0.15 * ordinary.sum())) - chosen.sum()
    free = [np.count_nonzero(word == n) for n in set(word[ordinary].tolist()) if not chosen[word == n].any()]
    assert not [size for size in free if size <= left]


def counts(config: Masking, rows: int) -> tuple[int, int, int, int]:
    """(chosen, shown as the mask, shown as another token, shown as they are) of rows of 200 letters."""
    row = row_of("x" + " x" * 99, 201)
    found = [mask(config, row, i) for i in range(rows)]
    chosen = np.concatenate([f["labels"] != -100 for f in found])
    shown = np.concatenate([f["input_ids"] for f in found])[chosen]
    target = np.concatenate([f["labels"] for f in found])[chosen]
    masked, same = np.count_nonzero(shown == MASK), np.count_nonzero(shown == target)
    return len(shown), int(masked), int(len(shown) - masked - same), int(same)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_ways_to_show_a_chosen_token_have_their_shares(config: Masking) -> None:
    total, masked, random, same = counts(config, 400)
    # Runs are shown as a whole: as many draws as runs. A random token is the same as the target 1 time in 256.
    draws = total / 6.2 if isinstance(config, SpanMasking) else total
    for count, p in (
        (masked, config.mask),
        (random, config.random * 255 / 256),
        (same, 1 - config.mask - config.random * 255 / 256),
    ):
        assert abs(count / total - p) <= 5 * math.sqrt(p * (1 - p) / draws) + 1e-9, (count / total, p)


def test_every_token_is_chosen_equally_often() -> None:
    row, n = row_of("abcdefghij", 11), 4000
    chosen = np.sum([mask(TokenMasking(rate=0.2), row, i)["labels"] != -100 for i in range(n)], axis=0)
    np.testing.assert_array_less(np.abs(chosen[1:] - 0.2 * n), 5 * math.sqrt(n * 0.2 * 0.8))


def test_random_tokens_are_all_ordinary_tokens_equally_often() -> None:
    config, row = TokenMasking(rate=0.9, mask=0.0, random=1.0), row_of("x" * 200, 201)
    shown = np.concatenate([f["input_ids"][f["labels"] != -100] for f in (mask(config, row, i) for i in range(300))])
    frequency = np.bincount(shown, minlength=256)
    assert len(frequency) == 256
    n, p = len(shown), 1 / 256
    # 256 comparisons: five and a half standard deviations are exceeded by one of them once in 10^5
    np.testing.assert_array_less(np.abs(frequency - n * p), 5.5 * math.sqrt(n * p * (1 - p)))


@settings(max_examples=5)
@given(p=st.floats(0.1, 0.9), longest=st.integers(1, 12))
def test_lengths_of_runs_are_geometric_and_cut_off(p: float, longest: int) -> None:
    # Words of one byte each, runs far apart: one run of at most `longest` words where only that many may be chosen.
    config = SpanMasking(p=p, max_words=longest, rate=0.5)
    starts, n = np.ones(400, bool), 300
    lengths = []
    for i in range(n):
        unit = config.choose(starts, starts, longest, Draws(i))
        first = unit[unit >= 0]
        lengths.append(np.unique(first, return_counts=True))
    # The first run of each row is the longest possible under the draw; take rows with a single run of full count apart.
    runs = np.array([counts[0] for _, counts in lengths if len(counts) == 1])
    assert (runs == longest).all()
    weights = p * (1 - p) ** np.arange(longest)
    share, expected = len(runs) / n, weights[-1] / weights.sum()
    edge = longest / 400  # a run that begins near the end is cut there
    assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / n) + edge + 1e-9


def test_runs_of_spans_have_the_papers_mean_length() -> None:
    # Joshi et al. 2020, section 3.1: Geo(0.2) cut at 10 has a mean of 3.8
    weights = 0.2 * 0.8 ** np.arange(10)
    assert np.average(np.arange(1, 11), weights=weights) == pytest.approx(3.8, abs=0.01)


def test_rates_out_of_range_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"rate": 0.0}, {"rate": 1.0}, {"mask": 0.9, "random": 0.2}, {"mask": -0.1}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TokenMasking(**wrong)
    with pytest.raises(ValueError, match="max_words=0"):
        SpanMasking(max_words=0)
