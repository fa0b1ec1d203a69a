"""BART's damages, one by one, and that the decoder is asked for the whole text."""

import functools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import Denoising
from llmlab.data.denoising import permute_sentences
from llmlab.data.draws import Draws
from llmlab.data.spans import cut_out, poisson_lengths
from llmlab.data.words import Words
from llmlab.tokenizers import Bytes, SpecialTokens

TOKENIZER = Bytes(special=SpecialTokens(mask="[MASK]")).build()
WORDS = Words.of(TOKENIZER)
BOS, EOS, PAD, MASK = (TOKENIZER.token_to_id(name) for name in ("<s>", "</s>", "<pad>", "[MASK]"))
LENGTH = 64
OFF: dict[str, Any] = {"infill_rate": 0.0, "permute_sentences": False}
texts = st.text(alphabet="abc .!", min_size=1, max_size=LENGTH - 2)

build = functools.cache(lambda config: config.build(TOKENIZER, LENGTH))


def corrupt(config: Denoising, text: str, *key: int) -> dict[str, Any]:
    ids = TOKENIZER.encode(text)
    padding = LENGTH - 2 - len(ids)
    row = {
        "input_ids": np.array(ids + [PAD] * padding, np.int32),
        "segment_ids": np.array([1] * len(ids) + [0] * padding, np.int32),
    }
    return build(config)(row, Draws(*key), dict)


def read(config: Denoising, text: str, *key: int) -> list[int]:
    """What the encoder reads, without frame and padding."""
    found = corrupt(config, text, *key)
    ids = found["input_ids"][found["attention_mask"] == 1].tolist()
    assert (ids[0], ids[-1]) == (BOS, EOS)
    return ids[1:-1]


@given(text=texts, key=st.integers(0, 2**32), rotate=st.booleans())
def test_the_decoder_writes_the_text_as_it_was(text: str, key: int, rotate: bool) -> None:
    found = corrupt(Denoising(rotate=float(rotate), delete_rate=0.2), text, key)
    targets = [BOS, *TOKENIZER.encode(text), EOS]
    padding = LENGTH - len(targets)
    assert found["labels"].tolist() == targets + [-100] * padding
    assert found["decoder_input_ids"].tolist() == [EOS, *targets[:-1]] + [PAD] * padding
    assert found["decoder_attention_mask"].tolist() == [1] * len(targets) + [0] * padding


# Words that are all different, so that it is plain which are left: letters and marks by turns.
LETTERS, MARKS = "abcdefghijklmnop", "!#$%&()*+,-./:;<"


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=12), key=st.integers(0, 2**32))
def test_infilling_puts_one_mask_for_each_run_of_whole_words_and_keeps_all_else(sizes: list[int], key: int) -> None:
    words = [word for i, size in enumerate(sizes) for word in (LETTERS[i] * size, MARKS[i])]
    found = read(Denoising(infill_rate=0.3, permute_sentences=False), "".join(words), key)
    assert len(found) <= len("".join(words))
    kept: list[int] = [-1]  # numbers of the words that are left
    masks = Counter[int]()  # how many masks follow each
    position = 0
    while position < len(found):
        if found[position] == MASK:
            masks[kept[-1]] += 1
            position += 1
            continue
        word = next(i for i in range(len(words)) if words[i][0] == chr(found[position]))
        assert bytes(found[position : position + len(words[word])]).decode() == words[word]
        position += len(words[word])
        kept.append(word)
    assert kept == sorted(kept)
    for before, after in zip(kept, [*kept[1:], len(words)], strict=True):
        assert masks[before] == 1 if after > before + 1 else masks[before] <= 1
    assert len(words) - (len(kept) - 1) == math.ceil(0.3 * len(words))


@given(total=st.integers(1, 50), data=st.data(), key=st.integers(0, 2**32))
def test_pieces_that_are_cut_out_have_their_lengths_and_something_between_them(
    total: int, data: st.DataObject, key: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=6).filter(lambda x: sum(x) + len(x) - 1 <= total))
    begins, ends = cut_out(total, np.array(lengths, np.int64), Draws(key))
    assert (ends - begins).tolist() == lengths
    edges = [edge for pair in zip(begins.tolist(), ends.tolist(), strict=True) for edge in pair]
    assert edges == sorted(edges)
    assert all(0 <= edge <= total for edge in edges)
    assert all(begin > end for begin, end in zip(begins[1:], ends[:-1], strict=True))


def test_every_arrangement_of_pieces_is_equally_likely() -> None:
    n, seen = 5000, Counter()
    for i in range(n):
        seen[tuple(cut_out(6, np.array([2, 1]), Draws(i))[0].tolist())] += 1
    arrangements = [(a, b) for a in range(7) for b in range(7) if a + 2 < b and b + 1 <= 6]
    assert set(seen) == set(arrangements)
    p = 1 / len(arrangements)
    assert max(abs(count - n * p) for count in seen.values()) < 5 * math.sqrt(n * p * (1 - p))


@given(total=st.integers(0, 60), key=st.integers(0, 2**32), shortest=st.integers(0, 1))
def test_poisson_lengths_add_up(total: int, key: int, shortest: int) -> None:
    lengths = poisson_lengths(3.0, total, Draws(key), shortest=shortest)
    assert lengths.sum() == total
    assert (lengths >= shortest).all()
    assert not total or lengths[-1] > 0


def test_lengths_are_poisson_but_for_the_last() -> None:
    lengths = np.concatenate([poisson_lengths(3.0, 60, Draws(i))[:8] for i in range(1000)])  # 8 of 3 are 24 of 60
    n = len(lengths)
    for k in range(8):
        p = 3.0**k * math.exp(-3) / math.factorial(k)
        assert abs(np.count_nonzero(lengths == k) - n * p) < 5 * math.sqrt(n * p * (1 - p))


@given(text=texts, key=st.integers(0, 2**32))
def test_sentences_are_permuted_whole(text: str, key: int) -> None:
    def sentences(text: str) -> Counter[str]:
        return Counter(re.findall(r"[^.!]*[.!]", text))

    text += "."
    found = TOKENIZER.decode(permute_sentences(np.array(TOKENIZER.encode(text), np.int32), WORDS, Draws(key)))
    assert sentences(found) == sentences(text)
    assert len(found) == len(text)


def test_all_orders_of_sentences_are_equally_likely() -> None:
    config, n = Denoising(infill_rate=0.0), 3000
    seen = Counter(TOKENIZER.decode(read(config, "a.b.c.", i)) for i in range(n))
    assert set(seen) == {"a.b.c.", "a.c.b.", "b.a.c.", "b.c.a.", "c.a.b.", "c.b.a."}
    assert max(abs(count - n / 6) for count in seen.values()) < 5 * math.sqrt(n / 6 * 5 / 6)


def test_rotation_begins_with_any_token_in_its_share_of_the_rows() -> None:
    config, n = Denoising(rotate=0.5, **OFF), 3000
    seen = Counter(TOKENIZER.decode(read(config, "abcde", i)) for i in range(n))
    assert set(seen) == {"abcde", "bcdea", "cdeab", "deabc", "eabcd"}
    for text, count in seen.items():
        p = 0.1 if text != "abcde" else 0.6
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_deletion_leaves_each_token_out_with_its_rate_and_keeps_the_order() -> None:
    config, n = Denoising(delete_rate=0.2, **OFF), 2000
    gone = Counter()
    for i in range(n):
        found = TOKENIZER.decode(read(config, "abcdefgh", i))
        assert list(found) == sorted(found)
        gone.update(set("abcdefgh") - set(found))
    assert max(abs(gone[c] - 0.2 * n) for c in "abcdefgh") < 5 * math.sqrt(n * 0.2 * 0.8)


def test_nothing_switched_on_changes_nothing() -> None:
    assert TOKENIZER.decode(read(Denoising(**OFF), "a b. c!", 0)) == "a b. c!"


def test_settings_out_of_range_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"infill_rate": 1.0}, {"delete_rate": -0.1}, {"rotate": 1.5}, {"mean_length": 0.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Denoising(**wrong)
