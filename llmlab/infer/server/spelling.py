"""Tokens as bytes: what log-probabilities are reported for.

A token of a text need not be text: the four tokens of an emoji are each a part of its UTF-8. The interface gives every
token's bytes, which add up to the text's, and a readable string.
"""

import codecs
import functools
import json
from collections.abc import Iterator, Sequence

from llmlab.tokenizers import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

_SPACE = "▁"


class Spelling:
    """The bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoders = _decoder_kinds(tokenizer)
        self.bytes_of = functools.lru_cache(maxsize=65536)(self._bytes_of)

    def _bytes_of(self, index: int) -> bytes:
        """Bytes of a token; a special token's are its name, and those of an id that is no token are none."""
        tokenizer = self._tokenizer
        try:
            name = tokenizer.id_to_token(index)
        except ValueError:
            return b""  # the model's vocabulary is larger than the tokenizer's
        if index in tokenizer.special_ids:
            return name.encode()
        if isinstance(tokenizer, BytesTokenizer):
            return bytes([index])
        if isinstance(tokenizer, SentencePieceTokenizer):
            is_byte = tokenizer.processor.is_byte(index)
            return bytes([int(name[1:-1], 16)]) if is_byte else name.replace(_SPACE, " ").encode()
        if "ByteLevel" in self._decoders:
            return bytes(_BYTE_OF[character] for character in name) if _BYTE_OF.keys() >= set(name) else name.encode()
        if "ByteFallback" in self._decoders and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[1:-1], 16)])
        if self._decoders & {"ByteFallback", "Metaspace"}:
            return name.replace(_SPACE, " ").encode()
        return tokenizer.decode([index], skip_special_tokens=False).encode()

    def readable(self, index: int) -> str:
        """The token as a string; for a part of a character its bytes, written `bytes:\\xf0\\x9f`."""
        spelled = self.bytes_of(index)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def starts(self, ids: Sequence[int], before: "TextOffset") -> list[int]:
        """At which character of the text each token starts; `before` goes on after them."""
        hidden = self._tokenizer.hidden_ids
        return [before.advance(b"" if index in hidden else self.bytes_of(index)) for index in ids]


class TextOffset:
    """Counts the characters of a text whose bytes come token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = 0

    def advance(self, spelled: bytes) -> int:
        """Characters that were complete before these bytes."""
        start = self._characters
        self._characters += len(self._decoder.decode(spelled))
        return start


def _decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    """Types of the steps by which a tokenizer.json decodes."""

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield str(value.get("type"))
            for inner in value.get("decoders", ()):
                yield from walk(inner)

    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return frozenset()
    return frozenset(walk(json.loads(tokenizer.model_bytes()).get("decoder")))


def _byte_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
