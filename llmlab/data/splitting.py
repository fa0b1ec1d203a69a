"""Which documents are for validation: a question that each document answers by itself.

A document's side depends on its text alone. It does not change when others are added, removed or reordered, a copy of
a document is never on the other side, and every seed and every experiment validates on the same documents.
"""

import hashlib


def text_hash(text: str) -> int:
    """64 bits that depend on nothing but the text (BLAKE2b of its UTF-8)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def validation_below(fraction: float) -> int:
    """Documents whose hash is below this number are for validation: a `fraction` of them, on average."""
    return int(fraction * 2**64)
