"""Words of tokens are the words of the text, whatever tokenizer cut it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.words import Words
from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, Tokenizer, TokenizerConfig, WordPiece

TEXTS = [
    "The internationalisation of internationalised internationals is naïvely straightforward. Isn't it?\n",
    "def straightforward_name(first, second_2): return first[0] + second_2  # naïve\n",
    "Über 20 Straßen; 1984 (mostly) straightforward! Say: international, naïve, 日本語 text.\n\tDone",
]
TOKENIZERS: dict[str, TokenizerConfig] = {
    "unigram": SentencePiece(vocab_size=330),
    "bpe": SentencePiece(vocab_size=340, kind="bpe"),
    "byte-level": ByteLevelBPE(vocab_size=320),
    "wordpiece": WordPiece(vocab_size=160),
    "bytes": Bytes(),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param].build(lambda: iter(TEXTS * 3))


def words_by_hand(text: str) -> list[str]:
    """Runs of letters, digits and '_', or of characters beyond ASCII that are no spaces; other marks one by one."""
    return re.findall(r"(?:[A-Za-z0-9_]|[^\x00-\x7f])+|[^\sA-Za-z0-9_]", text)


def grouped(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each word, white space left out."""
    array = np.array(ids, np.int32)
    pieces = np.split(array, np.flatnonzero(Words.of(tokenizer).starts(array))[1:])
    return [word for piece in pieces if (word := tokenizer.decode(piece).strip())]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_grouped_into_the_words_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    expected = words_by_hand(tokenizer.decode(ids))
    found = grouped(tokenizer, ids)
    # A piece may hold several marks (".\n", "[0]"): a word is never cut and never merged with another one.
    assert [word for word in found if words_by_hand(word) == [word]] == [word for word in expected if word in found]
    assert [word for group in found for word in words_by_hand(group)] == expected
    inner = re.compile(r"[\w]{2,}")
    assert {word for word in expected if inner.fullmatch(word)} <= set(found)


def test_an_empty_row_has_no_word(tokenizer: Tokenizer) -> None:
    assert Words.of(tokenizer).starts(np.zeros(0, np.int32)).tolist() == []


def test_special_tokens_are_no_text_and_words_of_their_own(tokenizer: Tokenizer) -> None:
    words = Words.of(tokenizer)
    assert not words.ordinary[sorted(tokenizer.special_ids)].any()
    special, (inside, *_) = min(tokenizer.special_ids), tokenizer.encode("a")
    assert words.starts(np.array([inside, special, special], np.int32)).tolist() == [True, True, True]


@given(text=st.text(alphabet="ab.!? \n", max_size=30))
def test_sentences_of_bytes_end_after_stops_and_line_breaks(text: str) -> None:
    tokenizer = Bytes().build()
    ends = Words.of(tokenizer).ends_sentence[np.array(tokenizer.encode(text), np.int32)]
    assert ends.tolist() == [character in ".!?\n" for character in text]


def test_a_sentence_ends_with_the_piece_that_has_the_stop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("It is. Done")
    ends = [tokenizer.decode(ids[: i + 1]) for i in np.flatnonzero(Words.of(tokenizer).ends_sentence[ids])]
    assert [text.rstrip().lower() for text in ends] == ["it is."] or [text.rstrip().lower() for text in ends] == [
        "it is ."
    ]
