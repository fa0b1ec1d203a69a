"""A tokenizer whose every id is known in advance, and corpora of given documents."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
from hypothesis import settings

from llmlab.data.packing import Corpus
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens

# A machine that is busy, or a disk that is slow to flush, is no failure.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")

BOS, EOS, PAD = 256, 257, 258


class ByteTokenizer:
    """One token a byte; ids 256-258 are bos, eos and pad, where there are any. Counts the texts it has encoded."""

    vocab_size = 259
    special = SpecialTokens()
    pad_id, cls_id, sep_id = PAD, None, None

    def __init__(self, *, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.bos_id, self.eos_id = bos, eos
        self.fingerprint = f"bytes-{bos}-{eos}"
        self.num_encoded = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.num_encoded += len(texts)
        return [list(text.encode()) for text in texts]


Tokenizer.register(ByteTokenizer)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return cast(Tokenizer, ByteTokenizer())


@pytest.fixture
def make_tokenizer() -> Callable[..., Tokenizer]:
    return lambda **special: cast(Tokenizer, ByteTokenizer(**special))


def _corpus(documents: Sequence[Sequence[int]], *, num_bytes: int = 0, has_bos: bool = False) -> Corpus:
    lengths = np.array([len(document) for document in documents], np.int64)
    return Corpus(
        tokens=np.array([token for document in documents for token in document], np.uint16),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        hashes=np.arange(len(lengths), dtype=np.uint64),
        num_bytes=num_bytes,
        has_bos=has_bos,
    )


@pytest.fixture(scope="session")
def corpus_of() -> Callable[..., Corpus]:
    """Corpus(documents): each a sequence of token ids."""
    return _corpus
