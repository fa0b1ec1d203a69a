from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmlab.tokenizers import StreamDecoder, Tokenizer, decode_stream

# Any Unicode, and what tokenizers stumble over: their own marks, their own names, white space, incomplete characters.
TRAPS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\0",
    "▁",
    "▅",
    "\ufffd",
    "\ufeff",
    "\u3000",
    "\u200d",
    "é",
    "e\u0301",
    "👩‍💻",
    "ﬁ",
    "Ġ",
]
TRAPS += [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<mask>",
    "<|user|>",
    "<|user|",
    "<0x41>",
    " ⁇ ",
    "##a",
    "[UNK]",
    "def ",
    "x",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(TRAPS)).map("".join))
# The tokenizer is not changed by encoding, so that one serves all examples.
PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(text=TEXTS)
@example(text="a▁b ▁ c▁")
@example(text="  leading,   inner  and trailing   ")
@example(text="def f():\r\n\treturn  {'é': '▅'}  # \0\n\n\n    ")
def test_decoding_gives_the_encoded_text_back(lossless: Tokenizer, text: str) -> None:
    assert lossless.decode(lossless.encode(text)) == text
    assert lossless.decode(lossless.encode(text), skip_special_tokens=False) == text


@PROPERTY
@given(texts=st.lists(TEXTS, max_size=20))
def test_a_batch_is_its_rows(tokenizer: Tokenizer, texts: list[str]) -> None:
    rows = tokenizer.encode_batch(texts)
    assert rows == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows]


@PROPERTY
@given(text=TEXTS)
def test_no_text_becomes_a_special_token_unless_it_is_parsed(lossless: Tokenizer, text: str) -> None:
    assert not set(lossless.encode(text)) & lossless.special_ids


@PROPERTY
@given(text=TEXTS)
def test_parsed_special_tokens_decode_to_their_names(lossless: Tokenizer, text: str) -> None:
    # unk is left out: SentencePiece decodes that one to its own sign for lost text.
    text = text if lossless.special.unk is None else text.replace(lossless.special.unk, "")
    ids = lossless.encode(text, parse_special_tokens=True)
    assert lossless.decode(ids, skip_special_tokens=False) == text


@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_adds_up_to_their_decoding(lossless: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, lossless.vocab_size - 1)))
    assert "".join(decode_stream(lossless, ids, skip_special_tokens=skip)) == lossless.decode(
        ids, skip_special_tokens=skip
    )


@PROPERTY
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_shows_half_a_character(lossless: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(lossless)
    pieces = [decoder.push(index) for index in lossless.encode(text)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_a_stream_shows_each_word_as_soon_as_it_is_known(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["bytes"]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert [decoder.push(byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert decoder.finish() == "😀".encode()[:3].decode(errors="replace")


@PROPERTY
@given(text=TEXTS, cuts=st.lists(st.integers(0, 8), max_size=40))
def test_several_tokens_at_a_time_show_the_same_text(lossless: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = lossless.encode(text)
    decoder, shown, at = StreamDecoder(lossless), "", 0
    for cut in (*cuts, len(ids)):
        shown += decoder.extend(ids[at : at + cut])
        at += cut
        assert text.startswith(shown.rstrip("\ufffd"))
    assert shown + decoder.finish() == lossless.decode(ids)


def test_a_stream_that_ends_can_begin_again(lossless: Tokenizer) -> None:
    decoder = StreamDecoder(lossless)
    for _ in range(2):
        shown = "".join(decoder.push(index) for index in lossless.encode(" two  words"))
        assert shown + decoder.finish() == " two  words"
