"""Tokenizers of every kind, trained once per worker on a little real source code."""

import inspect
import json.decoder
import json.encoder
import textwrap

import pytest

from llmlab.tokenizers import (
    ByteLevelBPE,
    Bytes,
    SentencePiece,
    SpecialTokens,
    Tokenizer,
    TokenizerConfig,
    WordPiece,
)

ALL_ROLES = SpecialTokens(
    unk="<unk>", cls="<cls>", sep="<sep>", mask="<mask>", extra=("<|user|>", "<|assistant|>", "<|user|")
)

CONFIGS: dict[str, TokenizerConfig] = {
    "bytes": Bytes(),
    "bytes-all-roles": Bytes(special=ALL_ROLES),
    "unigram": SentencePiece(vocab_size=500, max_training_bytes=1 << 16),
    "unigram-across-words": SentencePiece(vocab_size=500, max_training_bytes=1 << 16, split_by_whitespace=False),
    "bpe": SentencePiece(vocab_size=500, kind="bpe"),
    "bpe-indentation": SentencePiece(vocab_size=500, kind="bpe", symbols=("\n", "\n    ", "\n        ", "\n\n")),
    "bpe-all-roles": SentencePiece(vocab_size=500, kind="bpe", special=ALL_ROLES),
    "char": SentencePiece(vocab_size=330, kind="char"),
    "word": SentencePiece(vocab_size=500, kind="word"),
    "byte-level-bpe": ByteLevelBPE(vocab_size=500),
    "byte-level-bpe-all-roles": ByteLevelBPE(vocab_size=500, special=ALL_ROLES),
    "wordpiece": WordPiece(vocab_size=500),
}
LOSSY = {"wordpiece"}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [inspect.getsource(module) for module in (textwrap, json.decoder, json.encoder)]


@pytest.fixture(scope="session")
def trained(corpus: list[str]) -> dict[str, Tokenizer]:
    """Built on first use, kept for the session."""

    class Lazily(dict[str, Tokenizer]):
        def __missing__(self, name: str) -> Tokenizer:
            self[name] = CONFIGS[name].build(lambda: iter(corpus))
            return self[name]

    return Lazily()


@pytest.fixture(params=list(CONFIGS))
def tokenizer(request: pytest.FixtureRequest, trained: dict[str, Tokenizer]) -> Tokenizer:
    return trained[request.param]


@pytest.fixture(params=[name for name in CONFIGS if name not in LOSSY])
def lossless(request: pytest.FixtureRequest, trained: dict[str, Tokenizer]) -> Tokenizer:
    return trained[request.param]
