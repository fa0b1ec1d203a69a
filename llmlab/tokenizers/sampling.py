"""The text that a tokenizer is trained on: a bounded, uniform, reproducible sample of the corpus.

Piece counts settle long before a corpus ends, while training time grows with the text. So at most `max_bytes` are kept,
in one pass and in memory bounded by them, however long the corpus is: every document is cut into blocks of about
4,000 characters, each block draws a number by hashing its place in the corpus, and the blocks with the smallest numbers
stay. That is a uniform sample without replacement, and it depends on nothing but the corpus and the seed.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from llmlab.tokenizers.base import Progress

# Characters; at most 16 KiB of UTF-8. Much smaller than any sample, so that the bound is nearly reached.
_BLOCK = 4096
SMALLEST_SAMPLE = 1 << 16
_REPORT_BYTES = 1_000_000


@dataclass(frozen=True)
class Sample:
    """Parts of documents, in the order of the corpus."""

    blocks: tuple[str, ...]
    """The text that was kept: whole documents, or the blocks that follow each other in one."""
    num_bytes: int
    """Size of the blocks, in bytes of UTF-8."""
    corpus_bytes: int
    """Size of the whole corpus."""
    num_documents: int
    """Documents of the whole corpus."""

    def __str__(self) -> str:
        if self.num_bytes == self.corpus_bytes:
            return f"{megabytes(self.num_bytes)} of text"
        return f"{megabytes(self.num_bytes)} of text (sampled from {megabytes(self.corpus_bytes)})"


def sample_text(
    texts: Iterable[str], max_bytes: int | None, *, seed: int = 0, progress: Progress | None = None
) -> Sample:
    """At most `max_bytes` bytes of the documents, or all of them (None).

    Raises ValueError for a corpus without any text, and for text that is no Unicode.
    """
    kept: list[tuple[int, int, int, str, int]] = []  # a heap: (-number, document, index, block, bytes), largest first
    limit = 1 << 64  # numbers from here on are out: at least one of them was dropped already
    documents = size = corpus_bytes = next_report = 0
    for document in texts:
        for index, block in enumerate(cut(document, _BLOCK, "\n")):
            try:
                block_bytes = len(block.encode())
            except UnicodeEncodeError:
                raise ValueError(
                    f"document {documents} of the corpus has a lone surrogate, which is no Unicode text; read it with "
                    "errors='replace'"
                ) from None
            corpus_bytes += block_bytes
            number = _draw(seed, documents, index)
            if number < limit:
                heapq.heappush(kept, (-number, documents, index, block, block_bytes))
                size += block_bytes
            while max_bytes is not None and size > max_bytes:
                negative, _, _, _, dropped = heapq.heappop(kept)
                limit, size = -negative, size - dropped
        documents += 1
        if progress is not None and corpus_bytes > next_report + _REPORT_BYTES:
            next_report = corpus_bytes
            progress(documents, None, "documents")
    if progress is not None:
        progress(documents, documents, "documents")
    blocks = tuple(_joined(sorted((document, index, block) for _, document, index, block, _ in kept)))
    if not any(block.strip() for block in blocks):
        raise ValueError(
            f"the corpus holds no text to train a tokenizer on ({documents:,} documents, {corpus_bytes:,} bytes); "
            "check the data's paths and patterns"
        )
    return Sample(blocks, size, corpus_bytes, documents)


def _joined(blocks: list[tuple[int, int, str]]) -> Iterator[str]:
    """Blocks (document, index, text) in order, those put together again that follow each other in a document."""
    for _, run in groupby(enumerate(blocks), lambda entry: (entry[1][0], entry[1][1] - entry[0])):
        yield "".join(block for _, (_, _, block) in run)


def cut(text: str, limit: int, separator: str) -> Iterator[str]:
    """Consecutive parts of at most `limit` characters that end in `separator` where they can."""
    start = 0
    while start < len(text):
        end = start + limit
        if end < len(text):
            end = text.rfind(separator, start, end) + 1 or end
        yield text[start:end]
        start = end


def megabytes(num_bytes: int) -> str:
    """A size as a person reads it."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"


def _draw(seed: int, document: int, block: int) -> int:
    """A number below 2**64 for a place in the corpus."""
    return int.from_bytes(hashlib.blake2b(b"%d %d %d" % (seed, document, block), digest_size=8).digest(), "big")
