"""Where words and sentences begin and end in a row of tokens, as the tokenizer's vocabulary tells.

Corruptions that take whole words need no text: how a token is spelled decides whether it goes on with the word before
it. Tokenizers mark that differently; '▁' (SentencePiece) and 'Ġ' (byte-level BPE) are the space before a word, '##'
(WordPiece) means inside a word, and a byte is itself. With every token spelled in bytes, one rule serves all: a token
belongs to the word before it where that one ends, and this one begins, with a letter, a digit, '_' or a byte of a
character beyond ASCII. So punctuation stands alone, as in BERT's own splitting.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from llmlab.tokenizers.base import Tokenizer

_INSIDE = "##"
_MARKS = ("▁", "Ġ", _INSIDE)


@dataclass(frozen=True)
class Words:
    """What is known of every id of a vocabulary."""

    begins_inside: Bool[np.ndarray, " vocab"]
    """The token can go on with a word."""
    ends_inside: Bool[np.ndarray, " vocab"]
    """A word can go on after the token."""
    ends_sentence: Bool[np.ndarray, " vocab"]
    """The token ends in '.', '!' or '?', or breaks the line."""
    ordinary: Bool[np.ndarray, " vocab"]
    """The id exists and is no special token: text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Words":
        """Read off the vocabulary."""
        size = tokenizer.vocab_size
        begins, ends, stops, ordinary = (np.zeros(size, bool) for _ in range(4))
        starts = [sum(token.startswith(mark) for token in tokenizer.vocabulary) for mark in _MARKS]
        mark = _MARKS[int(np.argmax(starts))] if any(starts) else ""
        for token, index in tokenizer.vocabulary.items():
            if index in tokenizer.special_ids:
                continue
            text = _spelling(token, mark)
            ordinary[index] = True
            begins[index] = token.startswith(_INSIDE) if mark == _INSIDE else bool(text) and _is_inner(text[0])
            ends[index] = mark == _INSIDE or (bool(text) and _is_inner(text[-1]))
            stops[index] = text.rstrip().endswith((b".", b"!", b"?")) or b"\n" in text
        return cls(begins, ends, stops, ordinary)

    def starts(self, ids: Int[np.ndarray, " tokens"]) -> Bool[np.ndarray, " tokens"]:
        """Whether each token begins a word; special tokens are words of their own."""
        inside = self.begins_inside[ids[1:]] & self.ends_inside[ids[:-1]]
        return np.concatenate([np.ones(min(len(ids), 1), bool), ~inside])


def _is_inner(byte: int) -> bool:
    return byte >= 0x80 or chr(byte).isalnum() or byte == ord("_")


def _spelling(token: str, mark: str) -> bytes:
    """The bytes of text that a token stands for."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes([int(match[1], 16)])
    if mark == "Ġ":
        return bytes(_BYTES.get(character, 0x80) for character in token)
    if mark == "▁":
        return token.replace("▁", " ").encode()
    return token.removeprefix(_INSIDE).encode() if mark == _INSIDE else token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes a byte as the Latin-1 character of that number where it is visible, the others, in order,
    as those from U+0100 on (Radford et al. 2019)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_level_alphabet()
