"""The bytes of a text's tokens add up to the text, whatever the tokenizer."""

import pytest

from llmlab.infer.server.spelling import Spelling, TextOffset
from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, SpecialTokens, Tokenizer

CORPUS = ["the cat sat on the mat. The déjà vu of a 🙂 cat, again and again: the end.\n"] * 40
TEXT = "the 🙂 sat,  déjà\n\ta new ☃ word"
TOKENIZERS = {
    "bytes": lambda: Bytes().build(),
    "byte-level": lambda: ByteLevelBPE(vocab_size=290, special=SpecialTokens()).build(lambda: iter(CORPUS)),
    "sentencepiece": lambda: SentencePiece(vocab_size=330, kind="bpe").build(lambda: iter(CORPUS)),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def test_the_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(spelling.bytes_of, ids)).decode() == TEXT
    assert any(spelling.readable(index).startswith("bytes:\\x") for index in ids)  # the snowman was not seen


def test_offsets_are_where_tokens_start_in_the_text(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(TEXT)
    starts = spelling.starts(ids, TextOffset())
    complete = [len(b"".join(map(spelling.bytes_of, ids[:n])).decode(errors="ignore")) for n in range(len(ids))]
    assert starts == complete


def test_a_special_token_is_its_name_and_takes_no_place_in_the_text(tokenizer: Tokenizer) -> None:
    spelling = Spelling(tokenizer)
    assert tokenizer.bos_id is not None
    assert spelling.readable(tokenizer.bos_id) == "<s>"
    ids = [tokenizer.bos_id, *tokenizer.encode("cat")]
    assert spelling.starts(ids, TextOffset())[:2] == [0, 0]
    assert spelling.bytes_of(tokenizer.vocab_size + 5) == b""
