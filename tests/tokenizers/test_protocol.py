from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.tokenizers import Bytes, BytesTokenizer, SpecialTokens, Tokenizer, pad
from llmlab.tokenizers.padding import Side
from llmlab.tokenizers.special import ROLES

SIDES = st.sampled_from(["left", "right"])


def test_bytes_are_the_bytes_of_utf8() -> None:
    text = "héllo\n\t  😀\0"
    assert Bytes().build().encode(text) == list(text.encode())


def test_the_vocabulary_goes_both_ways(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.vocabulary)
    for index in range(tokenizer.vocab_size):
        assert tokenizer.token_to_id(tokenizer.id_to_token(index)) == index
        assert tokenizer.vocabulary[tokenizer.id_to_token(index)] == index


def test_every_id_stays_below_vocab_size(tokenizer: Tokenizer, corpus: list[str]) -> None:
    ids = [index for row in tokenizer.encode_batch(corpus, add_special_tokens=True) for index in row]
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


def test_roles_have_ids_exactly_where_they_have_names(tokenizer: Tokenizer) -> None:
    for role in ROLES:
        name, index = getattr(tokenizer.special, role), getattr(tokenizer, f"{role}_id")
        assert index == (None if name is None else tokenizer.token_to_id(name))
    assert tokenizer.special_ids == {tokenizer.token_to_id(token) for token in tokenizer.special.tokens}


def test_the_longest_special_token_wins_when_parsing(trained: dict[str, Tokenizer]) -> None:
    for name in ("bytes-all-roles", "bpe-all-roles"):
        tokenizer = trained[name]
        ids = tokenizer.encode("<|user|>hi<mask></s><|user|", parse_special_tokens=True)
        names = ("<|user|>", "<mask>", "</s>", "<|user|")
        user, mask, end, short = map(tokenizer.token_to_id, names)
        assert ids == [user, *tokenizer.encode("hi"), mask, end, short]
        assert tokenizer.decode(ids) == "hi"


def test_added_special_tokens_frame_the_text(tokenizer: Tokenizer) -> None:
    special, ids = tokenizer.special, tokenizer.encode("x y")
    framed = tokenizer.encode("x y", add_special_tokens=True)
    if special.cls is not None:
        assert framed == [tokenizer.cls_id, *ids, tokenizer.sep_id]
    else:
        assert framed == [tokenizer.bos_id, *ids]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(text=st.text(max_size=20), side=SIDES, max_length=st.integers(2, 12))
def test_truncation_keeps_the_frame_and_cuts_the_text(
    trained: dict[str, Tokenizer], text: str, side: Side, max_length: int
) -> None:
    tokenizer = trained["bytes-all-roles"]
    framed = tokenizer.encode(text, add_special_tokens=True, truncation=side, max_length=max_length)
    content = list(text.encode())
    while len(content) > max_length - 2:
        content.pop(0 if side == "left" else -1)
    assert framed == [tokenizer.cls_id, *content, tokenizer.sep_id]


@given(
    rows=st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6),
    side=SIDES,
    multiple=st.none() | st.integers(1, 8),
    fixed=st.none() | st.integers(9, 20),
)
def test_padding_equals_a_literal_loop(
    rows: list[list[int]], side: Side, multiple: int | None, fixed: int | None
) -> None:
    encoding = pad(rows, pad_id=7, padding=fixed or "longest", side=side, multiple_of=multiple)
    length = fixed or max([len(row) for row in rows], default=0)
    while multiple and length % multiple:
        length += 1
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for b, row in enumerate(rows):
        for s in range(length):
            i = s if side == "right" else s - (length - len(row))
            ids[b, s], mask[b, s] = (row[i], 1) if 0 <= i < len(row) else (7, 0)
    np.testing.assert_array_equal(encoding.input_ids, ids)
    np.testing.assert_array_equal(encoding.attention_mask, mask)


def test_a_call_encodes_truncates_and_pads(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bytes"]
    encoding = tokenizer(
        ["abcdef", "x"], truncation="right", max_length=3, padding="longest", padding_side="left", pad_to_multiple_of=4
    )
    pad_id = tokenizer.pad_id
    np.testing.assert_array_equal(encoding.input_ids, [[pad_id, 97, 98, 99], [pad_id, pad_id, pad_id, 120]])
    np.testing.assert_array_equal(encoding.attention_mask, [[0, 1, 1, 1], [0, 0, 0, 1]])
    np.testing.assert_array_equal(tokenizer("ab").input_ids, [[97, 98]])


def test_ids_may_be_numpy_arrays(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bpe"]
    encoding = tokenizer(["one text", "another"], padding="longest")
    assert tokenizer.decode_batch(encoding.input_ids) == ["one text", "another"]
    assert tokenizer.decode(encoding.input_ids[0]) == "one text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "rows have from 1 to 3 tokens.*padding='longest'"),
        ({"padding": 2}, "padding=2 is shorter than the longest row, 3 tokens"),
        ({"padding": "longest", "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 is not positive"),
        ({"pad_to_multiple_of": 4}, "pad_to_multiple_of=4 needs padding"),
        ({"truncation": "left"}, "truncation='left' needs a max_length"),
        ({"max_length": 2}, "max_length=2 needs truncation"),
        ({"max_length": 1, "truncation": "left", "add_special_tokens": True}, "max_length=1 leaves no room; .* 2"),
    ],
)
def test_arguments_that_contradict_each_other_are_errors(
    trained: dict[str, Tokenizer], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained["bytes-all-roles"](["abc", "x"], **arguments)


def test_padding_without_a_pad_token_names_the_way_out() -> None:
    tokenizer = BytesTokenizer(SpecialTokens(bos=None, pad=None))
    with pytest.raises(ValueError, match="no pad token; pass pad_id="):
        tokenizer(["abc", "x"], padding="longest")
    encoding = tokenizer(["abc", "x"], padding="longest", pad_id=tokenizer.eos_id)
    np.testing.assert_array_equal(encoding.input_ids, [[97, 98, 99], [120, 256, 256]])


def test_an_unknown_token_is_an_error_that_names_the_nearest(trained: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"no token '<\|usr\|>' .*nearest are '<\|user\|>'"):
        trained["bytes-all-roles"].token_to_id("<|usr|>")


@pytest.mark.parametrize("wrong", [-1, -100, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"id {wrong} is not in this vocabulary; ids run from 0 to"):
        tokenizer.decode([0, wrong])
    with pytest.raises(ValueError, match=f"id {wrong} is not in this vocabulary"):
        tokenizer.id_to_token(wrong)


def test_a_lone_surrogate_is_an_error_that_says_where(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text 1 has a lone surrogate .* at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])


def test_special_tokens_check_themselves() -> None:
    with pytest.raises(ValueError, match="cannot be the empty string"):
        SpecialTokens(bos="")
    with pytest.raises(ValueError, match="repeats a special token"):
        SpecialTokens(extra=("<s>",))
    with pytest.raises(ValueError, match="names of bytes"):
        BytesTokenizer(SpecialTokens(extra=("<0x00>",)))


def test_one_token_may_have_two_roles() -> None:
    tokenizer = BytesTokenizer(SpecialTokens(bos="<end>", eos="<end>", pad=None))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 256, 257)
