"""Bytes as tokens: no training, no unknown text, the shortest vocabulary and the longest sequences.

A text of n bytes is n tokens, ids 0 to 255; special tokens follow from 256 on. English costs about four times the
tokens of a trained vocabulary, which attention pays for twice, but spelling, rare scripts and noise cost nothing extra
(ByT5: Xue et al. 2021, 2105.13626).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmlab.tokenizers.base import Frame, Progress, Texts, Tokenizer, TokenizerConfig, conventional_frame
from llmlab.tokenizers.between import decode_between, encode_between
from llmlab.tokenizers.special import SpecialTokens


@dataclass(frozen=True, kw_only=True)
class Bytes(TokenizerConfig):
    """One token per byte of UTF-8."""

    special: SpecialTokens = SpecialTokens()
    """The special tokens, which get the ids from 256 on."""

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "BytesTokenizer":
        """The tokenizer; there is nothing to train."""
        return BytesTokenizer(self.special)


class BytesTokenizer(Tokenizer):
    """Ids are bytes; `vocabulary` spells them <0x00> to <0xFF>."""

    kind: ClassVar[str] = "bytes"
    model_file: ClassVar[str] = "bytes.json"

    def __init__(self, special: SpecialTokens) -> None:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        if clash := sorted(set(names) & set(special.tokens)):
            raise ValueError(f"special tokens {clash} are the names of bytes; choose others")
        super().__init__([*names, *special.tokens], special)

    @classmethod
    def open(cls, path: Path, special: SpecialTokens) -> "BytesTokenizer":
        """The tokenizer whose `save` wrote this file."""
        tokenizer = cls(special)
        if path.read_bytes() != tokenizer.model_bytes():
            raise ValueError(f"{path} is damaged: it does not list the special tokens of the manifest beside it")
        return tokenizer

    def model_bytes(self) -> bytes:
        """The special tokens in the order of their ids: all there is to know."""
        return (json.dumps({"256": list(self.special.tokens)}) + "\n").encode()

    def _frame(self) -> Frame:
        return conventional_frame(self.special, self._ids)

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        special = {token: self._ids[token] for token in self.special.tokens} if parse_special_tokens else {}
        return encode_between(texts, special, lambda parts: [list(part.encode()) for part in parts])

    def _decode(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return decode_between(
            batch,
            self._special_ids,
            skip_special_tokens,
            lambda rows: [bytes(row).decode("utf-8", errors="replace") for row in rows],
        )
