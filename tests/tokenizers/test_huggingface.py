import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from llmlab.tokenizers import (
    ByteLevelBPE,
    HuggingFace,
    HuggingFaceTokenizer,
    SpecialTokens,
    StreamDecoder,
    Tokenizer,
    WordPiece,
    load_tokenizer,
)
from llmlab.tokenizers.padding import Side

NAMES = ("byte-level-bpe", "byte-level-bpe-all-roles", "wordpiece")
TEXTS = ["def f(x):\n    return x", "", "unseen: żółć 😀", "[MASK] <s> </s>"]


def bert(directory: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as found in the wild: BERT's, with padding and truncation stored in the file."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b", "hello", "world", ",", "the"]
    library = tokenizers.Tokenizer(
        models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    library.enable_padding(length=16)
    library.enable_truncation(3)
    library.save(str(directory / "tokenizer.json"))
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_library_on_its_own(
    trained: dict[str, Tokenizer], name: str, corpus: list[str], tmp_path: Path
) -> None:
    trained[name].save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for framed in (False, True):
        rows = trained[name].encode_batch([*corpus, *TEXTS], add_special_tokens=framed, parse_special_tokens=True)
        assert rows == [library.encode(text, add_special_tokens=framed).ids for text in [*corpus, *TEXTS]]
        for skip in (False, True):
            expected = [library.decode(row, skip_special_tokens=skip) for row in rows]
            assert trained[name].decode_batch(rows, skip_special_tokens=skip) == expected
    assert dict(trained[name].vocabulary) == library.get_vocab()


def test_byte_level_bpe_is_the_librarys_own_training(corpus: list[str]) -> None:
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(corpus, vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>", "<pad>"])
    ours = ByteLevelBPE(vocab_size=400).build(lambda: iter(corpus))
    assert dict(ours.vocabulary) == library.get_vocab()
    assert ours.encode_batch(corpus) == [library.encode(text).ids for text in corpus]


def test_wordpiece_training_is_deterministic_where_the_librarys_is_not(corpus: list[str]) -> None:
    def librarys_own() -> dict[str, int]:
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=500, show_progress=False))
        return library.get_vocab()

    # If the first assertion fails, the library was mended and the second may be had more simply.
    assert len({json.dumps(librarys_own(), sort_keys=True) for _ in range(5)}) > 1
    assert len({WordPiece(vocab_size=500).build(lambda: iter(corpus)).fingerprint for _ in range(5)}) == 1


def test_wordpiece_spells_words_by_its_own_vocabulary(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["wordpiece"]
    text = "The TEXTWRAP module wraps a paragraph of text, see: zzz"

    def longest_prefix_first(word: str) -> list[str]:
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if mark + word[start:end] in tokenizer.vocabulary]
            if not ends:
                return ["[UNK]"]
            pieces.append(mark + word[start : ends[0]])
            start = ends[0]
        return pieces

    words = text.lower().replace(",", " ,").replace(":", " :").split()
    expected = [piece for word in words for piece in longest_prefix_first(word)]
    assert [tokenizer.id_to_token(index) for index in tokenizer.encode(text)] == expected
    assert tokenizer.encode("日本") == [tokenizer.unk_id] * 2


def test_a_file_from_the_wild_opens_with_its_roles_and_without_its_padding(tmp_path: Path) -> None:
    library = bert(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.special == SpecialTokens(
        bos=None, eos=None, pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]", mask="[MASK]"
    )
    assert tokenizer.encode("Hello, world ab") == [9, 11, 10, 5, 8]
    assert tokenizer.encode("the [MASK]", parse_special_tokens=True) == [12, 4]
    assert tokenizer.encode("the [MASK]") == [12, 1, 1, 1]
    assert tokenizer.decode([2, 9, 11, 10, 3]) == library.decode([2, 9, 11, 10, 3]) == "hello, world"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [3, 4, 6, 20])
def test_truncation_and_padding_equal_the_librarys(tmp_path: Path, side: Side, max_length: int) -> None:
    library = bert(tmp_path)
    library.enable_truncation(max_length, direction=side)
    library.enable_padding(direction=side, pad_id=0, pad_token="[PAD]", pad_to_multiple_of=4)
    texts = ["hello, world", "the", "a b a b a b the world", ""]
    expected = library.encode_batch(texts)
    encoding = load_tokenizer(tmp_path)(
        texts,
        add_special_tokens=True,
        truncation=side,
        max_length=max_length,
        padding="longest",
        padding_side=side,
        pad_to_multiple_of=4,
    )
    assert encoding.input_ids.tolist() == [row.ids for row in expected]
    assert encoding.attention_mask.tolist() == [row.attention_mask for row in expected]


def test_roles_come_from_the_files_beside_it(tmp_path: Path) -> None:
    bert(tmp_path)
    config = {"cls_token": {"content": "[CLS]", "lstrip": False}, "bos_token": "a", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "[SEP]", "additional_special_tokens": ["<new>"]})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special.roles == {"bos": "a", "eos": "[SEP]", "cls": "[CLS]"}
    assert set(tokenizer.special.extra) == {"<new>", "[PAD]", "[UNK]", "[MASK]"}
    assert tokenizer.token_to_id("<new>") == 13  # a token that only the config names is appended
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.vocabulary == tokenizer.vocabulary
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_stream_of_wordpiece_puts_spaces_between_words(trained: dict[str, Tokenizer]) -> None:
    tokenizer = trained["wordpiece"]
    ids = tokenizer.encode("wraps a paragraph of text , and more")
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(index) for index in ids) + decoder.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("config", [ByteLevelBPE(vocab_size=9000), WordPiece(vocab_size=9000)])
def test_a_vocabulary_beyond_the_corpus_is_an_error_that_names_the_largest(
    config: ByteLevelBPE | WordPiece, corpus: list[str]
) -> None:
    with pytest.raises(ValueError, match="vocab_size=9000 is more than this corpus supports") as caught:
        config.build(lambda: iter(corpus))
    largest = int(str(caught.value).split("use vocab_size=")[1].split(",")[0])
    assert type(config)(vocab_size=largest).build(lambda: iter(corpus)).vocab_size == largest


def test_configs_check_themselves(corpus: list[str]) -> None:
    with pytest.raises(ValueError, match="vocab_size=259 leaves no room for tokens: 259 are reserved"):
        ByteLevelBPE(vocab_size=259)
    with pytest.raises(ValueError, match="needs a token for unknown words"):
        WordPiece(special=SpecialTokens())
    with pytest.raises(ValueError, match="vocab_size=90 is too small: special tokens and twice the"):
        WordPiece(vocab_size=90).build(lambda: iter(corpus))
    with pytest.raises(ValueError, match="holds no text"):
        ByteLevelBPE().build(lambda: iter([]))
    with pytest.raises(ValueError, match=r"needs texts; to open one, use HuggingFace\(path="):
        WordPiece().build()


def test_a_config_opens_a_path(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    bert(tmp_path)
    assert isinstance(HuggingFace(path=str(tmp_path)).build(), HuggingFaceTokenizer)
    trained["bytes"].save(tmp_path / "bytes")
    with pytest.raises(ValueError, match="is a bytes tokenizer, not one of the tokenizers library"):
        HuggingFace(path=str(tmp_path / "bytes")).build()


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_transformers_opens_what_is_saved(trained: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the parity extra)")
    trained[name].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = trained[name].encode(text, add_special_tokens=True, parse_special_tokens=True)
        assert theirs(text)["input_ids"] == ids
    for role, token in trained[name].special.roles.items():
        assert getattr(theirs, f"{role}_token") == token
        assert getattr(theirs, f"{role}_token_id") == getattr(trained[name], f"{role}_id")
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_tokenizer(tmp_path / "theirs")
    assert back.special.roles == trained[name].special.roles
    assert dict(back.vocabulary) == dict(trained[name].vocabulary)
