import io
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece

from llmlab.tokenizers import SentencePiece, SentencePieceTokenizer, SpecialTokens, Tokenizer, load_tokenizer

Kind = Literal["unigram", "bpe", "char", "word"]
KINDS: tuple[Kind, ...] = ("unigram", "bpe", "char", "word")
NAMES = ("unigram", "unigram-across-words", "bpe", "bpe-indentation", "char")


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_library_on_its_own(
    trained: dict[str, Tokenizer], name: str, corpus: list[str], tmp_path: Path
) -> None:
    trained[name].save(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [*corpus, "unseen: żółć 😀", " \t  x", ""]
    assert trained[name].encode_batch(texts) == [library.encode(text) for text in texts]
    assert trained[name].decode_batch(library.encode(texts)) == library.decode(library.encode(texts))
    assert [trained[name].id_to_token(i) for i in range(library.vocab_size())] == [
        library.id_to_piece(i) for i in range(library.vocab_size())
    ]
    assert (trained[name].unk_id, trained[name].bos_id, trained[name].eos_id, trained[name].pad_id) == (
        library.unk_id(),
        library.bos_id(),
        library.eos_id(),
        library.pad_id(),
    )


def test_training_is_the_librarys_own_on_the_lines_of_the_text(corpus: list[str]) -> None:
    text = corpus[0]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        pad_id=3,
        user_defined_symbols=["\n"],
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    ours = SentencePiece(kind="bpe", vocab_size=400).build(lambda: iter([text]))
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert list(ours.vocabulary) == [library.id_to_piece(i) for i in range(400)]
    assert ours.encode(text) == library.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_vocabulary_asked_for(kind: Kind, corpus: list[str]) -> None:
    size = 330 if kind == "char" else 400
    assert SentencePiece(vocab_size=size, kind=kind).build(lambda: iter(corpus)).vocab_size == size


def test_character_models_learn_the_characters_and_word_models_the_words(trained: dict[str, Tokenizer]) -> None:
    characters = [trained["char"].id_to_token(index) for index in trained["char"].encode("def f(x):")]
    assert characters == list("def▁f(x):")
    words = [trained["word"].id_to_token(index) for index in trained["word"].encode(" return the text")]
    assert words == ["▁return", "▁the", "▁text"]


def test_indentation_is_one_token(trained: dict[str, Tokenizer]) -> None:
    plain, symbols = trained["bpe"], trained["bpe-indentation"]
    text = "x:\n        y"
    assert plain.encode(text) == [plain.token_to_id(token) for token in ("x", ":", "\n", "▁" * 8, "y")]
    assert symbols.encode(text) == [symbols.token_to_id(token) for token in ("x", ":", "\n" + "▁" * 8, "y")]


def test_pieces_cross_words_only_when_allowed(trained: dict[str, Tokenizer]) -> None:
    def crossing(tokenizer: Tokenizer) -> list[str]:
        return [token for token in tokenizer.vocabulary if "▁" in token.strip("▁")]

    assert not crossing(trained["unigram"])
    assert crossing(trained["unigram-across-words"])


def test_digits_can_be_split(corpus: list[str]) -> None:
    tokenizer = SentencePiece(kind="bpe", vocab_size=500, split_digits=True).build(
        lambda: iter([*corpus, "1234 " * 99])
    )
    assert [tokenizer.id_to_token(index) for index in tokenizer.encode("1234")] == list("1234")


def test_without_byte_fallback_unknown_text_is_the_unknown_token(corpus: list[str]) -> None:
    tokenizer = SentencePiece(vocab_size=300, kind="bpe", byte_fallback=False).build(lambda: iter(corpus))
    ids = tokenizer.encode("😀")
    assert ids == [tokenizer.unk_id]
    assert tokenizer.decode(ids) == " ⁇ "


def test_a_long_line_is_trained_on_and_not_dropped() -> None:
    # The library leaves out sentences beyond 4,192 bytes without a word; this corpus is one line of 60,000.
    line = "alpha beta gamma delta " * 2600
    tokenizer = SentencePiece(vocab_size=290, kind="bpe").build(lambda: iter([line]))
    assert {"▁alpha", "▁beta", "▁gamma", "▁delta"} <= set(tokenizer.vocabulary)


@pytest.mark.parametrize("reserved", ["\0", "▅", "▁"])
def test_a_line_with_a_reserved_character_is_trained_on_and_not_dropped(reserved: str) -> None:
    config = SentencePiece(vocab_size=282, kind="bpe")
    tokenizer, apart = (
        config.build(lambda between=between: iter([f"alpha beta{between}gamma\n" * 500]))
        for between in (reserved, "\n")
    )
    assert tokenizer.vocabulary == apart.vocabulary
    assert {"alpha", "gamma"} <= set(tokenizer.vocabulary)


def test_training_is_silent(capfd: pytest.CaptureFixture[str], corpus: list[str]) -> None:
    for kind in KINDS:
        SentencePiece(vocab_size=330 if kind == "char" else 400, kind=kind).build(lambda: iter(corpus))
        with pytest.raises(ValueError, match="vocab_size"):
            SentencePiece(vocab_size=10**6, kind=kind).build(lambda: iter(corpus))
    assert capfd.readouterr() == ("", "")


def test_training_again_gives_the_same_model(corpus: list[str]) -> None:
    config = SentencePiece(vocab_size=400)
    first, second = (config.build(lambda: iter(corpus)) for _ in range(2))
    assert isinstance(first, SentencePieceTokenizer)
    assert first.model_bytes() == second.model_bytes()
    assert first.fingerprint == second.fingerprint


def test_training_does_not_depend_on_the_number_of_cores(corpus: list[str], tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import json, os, sys
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from llmlab.tokenizers import SentencePiece
        print(SentencePiece(vocab_size=400).build(lambda: iter(json.load(sys.stdin))).fingerprint)
    """)
    if not sys.platform.startswith("linux"):
        pytest.skip("cores can be taken away on Linux only")
    one_core = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(corpus), capture_output=True, text=True, check=True
    )
    assert one_core.stdout.strip() == SentencePiece(vocab_size=400).build(lambda: iter(corpus)).fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the quick brown fox jumps over the lazy dog\n" * 40, "abc abd bcd " * 30])
def test_a_vocabulary_beyond_the_corpus_is_an_error_that_names_the_largest(kind: Kind, text: str) -> None:
    with pytest.raises(ValueError, match="vocab_size=9000 is more than this corpus supports") as caught:
        SentencePiece(vocab_size=9000, kind=kind).build(lambda: iter([text]))
    largest = int(str(caught.value).split("use vocab_size=")[1].split(",")[0])
    assert SentencePiece(vocab_size=largest, kind=kind).build(lambda: iter([text])).vocab_size == largest
    with pytest.raises(ValueError, match="more than this corpus supports"):
        SentencePiece(vocab_size=largest + 1, kind=kind).build(lambda: iter([text]))


def test_a_vocabulary_below_the_characters_is_an_error_that_names_the_smallest(corpus: list[str]) -> None:
    with pytest.raises(ValueError, match="vocab_size=270 is too small") as caught:
        SentencePiece(vocab_size=270).build(lambda: iter(corpus))
    smallest = int(str(caught.value).split("use at least ")[1].split(",")[0])
    assert SentencePiece(vocab_size=smallest).build(lambda: iter(corpus)).vocab_size == smallest


def test_a_vocabulary_without_room_is_an_error_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=261 leaves no room .* take 261; use at least 262"):
        SentencePiece(vocab_size=261)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"special": SpecialTokens()}, "always has an unknown token"),
        ({"symbols": ("",)}, "symbols="),
        ({"symbols": ("<s>",)}, "must be no special tokens"),
        ({"symbols": ("▁",)}, "without '▁'"),
        ({"character_coverage": 0.0}, "character_coverage=0.0"),
        ({"max_piece_length": 0}, "max_piece_length=0"),
        ({"max_training_bytes": 5}, "max_training_bytes=5 is less than 65536"),
    ],
)
def test_a_config_checks_itself(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentencePiece(**arguments)


@pytest.mark.parametrize("texts", [[], ["", "\n \n"]])
def test_an_empty_corpus_is_an_error(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"holds no text to train a tokenizer on \\({len(texts)} documents"):
        SentencePiece().build(lambda: iter(texts))
    with pytest.raises(ValueError, match="needs texts; to open one, set its path"):
        SentencePiece().build()


def test_a_lone_surrogate_in_the_corpus_is_an_error_that_names_the_document() -> None:
    with pytest.raises(ValueError, match="document 1 of the corpus has a lone surrogate"):
        SentencePiece().build(lambda: iter(["fine", "\udc00"]))


def test_a_config_opens_a_path(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained["bpe"].save(tmp_path / "own")
    opened = SentencePiece(path=str(tmp_path / "own")).build()
    assert opened.fingerprint == trained["bpe"].fingerprint
    trained["bytes"].save(tmp_path / "bytes")
    with pytest.raises(ValueError, match="is a bytes tokenizer, not SentencePiece"):
        SentencePiece(path=str(tmp_path / "bytes")).build()


def test_a_foreign_model_is_taken_as_the_library_takes_it(corpus: list[str], tmp_path: Path) -> None:
    # The library's defaults: NFKC, a leading space, white space collapsed, no pad, a model without any of our choices.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(corpus).split("\n")),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        control_symbols=["[CLS]", "[SEP]", "<turn>"],
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.special == SpecialTokens(
            bos="<s>", eos="</s>", pad=None, unk="<unk>", cls="[CLS]", sep="[SEP]", extra=("<turn>",)
        )
        texts = ["def f(x):  return ﬁve", " a▁b", "[CLS] 😀"]
        assert tokenizer.encode_batch(texts) == [library.encode(text) for text in texts]
        assert tokenizer.decode_batch(library.encode(texts)) == library.decode(library.encode(texts))


def test_sampling_blocks_keeps_the_statistics_of_pieces(corpus: list[str]) -> None:
    # Two halves of a corpus, told apart by their words: a sample of a fifth must have both.
    documents = ["left alpha beta\n" * 300, "right gamma delta\n" * 300] * 40
    tokenizer = SentencePiece(vocab_size=300, kind="bpe", max_training_bytes=1 << 16).build(lambda: iter(documents))
    found = Counter(token.strip("▁") for token in tokenizer.vocabulary)
    assert {"left", "right", "alpha", "gamma"} <= set(found)
