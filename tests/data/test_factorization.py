"""XLNet's factorization order: who sees whom, and that no prediction sees its target."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import FactorizationOrder
from llmlab.data.draws import Draws
from llmlab.data.words import Words
from llmlab.tokenizers import Bytes

TOKENIZER = Bytes().build()
WORDS = Words.of(TOKENIZER)
LENGTH = 36
build = functools.cache(lambda config: config.build(TOKENIZER, LENGTH))


def row_of(segments: list[int]) -> dict[str, Any]:
    """Bytes that are all different; 36 of them, with spaces nowhere: words of one to a few letters between marks."""
    ids = np.arange(40, 40 + LENGTH, dtype=np.int32)  # ( to K: marks, digits, marks, letters
    segment_ids = np.array(segments + [0] * (LENGTH - len(segments)), np.int32)
    return {
        "input_ids": np.where(segment_ids > 0, ids, 258).astype(np.int32),
        "segment_ids": segment_ids,
        "position_ids": np.arange(LENGTH, dtype=np.int32),
    }


def corrupt(config: FactorizationOrder, row: dict[str, Any], *key: int) -> dict[str, Any]:
    return build(config)(row, Draws(*key), dict)


some_segments = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda sizes: [i + 1 for i, size in enumerate(sizes) for _ in range(size)][:LENGTH]
)


@given(segments=some_segments, key=st.integers(0, 2**32), k=st.sampled_from([2.0, 6.0]))
def test_masks_are_those_of_some_order_of_the_targets(segments: list[int], key: int, k: float) -> None:
    row = row_of(segments)
    found = corrupt(FactorizationOrder(k=k), row, key)
    real = len(segments)
    np.testing.assert_array_equal(found["attention_mask"], [1] * real + [0] * (LENGTH - real))
    np.testing.assert_array_equal(found["input_ids"], row["input_ids"])
    mapping, labels = found["target_mapping"], found["labels"]
    assert mapping.shape == (int(LENGTH / k), LENGTH)
    targets = [int(np.argmax(line)) for line in mapping if line.any()]
    assert targets == sorted(set(targets))
    np.testing.assert_array_equal(mapping.sum(axis=1), [1] * len(targets) + [0] * (len(mapping) - len(targets)))
    assert labels.tolist() == [*row["input_ids"][targets].tolist(), *[-100] * (len(labels) - len(targets))]
    assert 0 < len(targets) <= max(1, int(real / k)) or not targets
    # When does each target come? It is seen by all that come after it. The order explains every other entry.
    segment = np.array(segments)
    seen = 1 - found["perm_mask"]
    turn = np.zeros(LENGTH, int)
    for start in np.unique(segment):
        members = [t for t in targets if segment[t] == start]
        for target in members:
            turn[target] = 1 + len([other for other in members if seen[target, other]])
        assert sorted(turn[members].tolist()) == list(range(1, len(members) + 1))
    for i in range(real):
        for j in range(LENGTH):
            same = j < real and segment[i] == segment[j]
            visible = same and (turn[j] == 0 or turn[j] < turn[i])
            assert seen[i, j] == visible


@given(segments=some_segments, key=st.integers(0, 2**32))
def test_nothing_passes_on_a_target_to_its_prediction_through_any_number_of_layers(
    segments: list[int], key: int
) -> None:
    """Follow the content streams, in which every token also sees itself: none that a target's query can see, however
    far away, has seen the target."""
    found = corrupt(FactorizationOrder(k=2.0), row_of(segments), key)
    sees = found["perm_mask"] == 0
    content = sees | np.eye(LENGTH, dtype=bool)
    for _ in range(6):  # 2^6 layers
        content = (content.astype(int) @ content.astype(int)) > 0
    for line in found["target_mapping"]:
        if line.any():
            target = int(np.argmax(line))
            assert not sees[target, target]
            reached = (sees[target].astype(int) @ content.astype(int)) > 0
            assert not reached[target]


def test_targets_are_whole_words_and_one_in_k() -> None:
    row = row_of([1] * LENGTH)
    ids = np.array(TOKENIZER.encode("ab cd e fgh ij k lm no pqr s tu vwx "), np.int32)
    assert len(ids) == LENGTH
    row["input_ids"] = ids
    word = np.cumsum(WORDS.starts(ids))
    for key in range(50):
        found = corrupt(FactorizationOrder(), row, key)
        chosen = found["target_mapping"].sum(axis=0) > 0
        assert chosen.sum() == 6
        for number in set(word[chosen].tolist()):
            assert chosen[word == number].all()


def test_every_order_of_two_targets_and_every_token_is_equally_likely() -> None:
    config, row, n = FactorizationOrder(k=18.0), row_of([1] * LENGTH), 4000
    row["input_ids"] = np.full(LENGTH, ord("."), np.int32)  # every token a word
    first_seen_by_second, chosen = 0, np.zeros(LENGTH)
    for key in range(n):
        found = corrupt(config, row, key)
        a, b = np.flatnonzero(found["target_mapping"].sum(axis=0))
        first_seen_by_second += int(found["perm_mask"][b, a] == 0)
        chosen[[a, b]] += 1
    assert abs(first_seen_by_second - n / 2) < 5 * math.sqrt(n / 4)
    inner = chosen[5:-5]  # a run begins anywhere and cannot go beyond the end
    p = 2 / LENGTH
    assert abs(inner.mean() - n * p) < 0.05 * n * p
    assert chosen.min() > 0


def test_special_tokens_are_no_targets() -> None:
    row = row_of([1] * LENGTH)
    row["input_ids"][::2] = TOKENIZER.eos_id
    for key in range(30):
        assert TOKENIZER.eos_id not in corrupt(FactorizationOrder(k=2.0), row, key)["labels"].tolist()


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k=0\.5"):
        FactorizationOrder(k=0.5)
    with pytest.raises(ValueError, match="max_words=0"):
        FactorizationOrder(max_words=0)
