"""One protocol for all tokenizers.

A tokenizer maps text to a sequence of integers and back. Its vocabulary trades the model's width for its length: with
256 bytes every text can be written, at about one token a character; with 32,000 pieces of words English takes about one
token per four characters, but the embedding grows by the vocabulary and rare pieces are seen too seldom to be learnt.

Whatever library is behind it, a `Tokenizer` here keeps these promises:

- Text is text. `encode` never turns a document's "</s>" into the end-of-sequence token, unless the caller asks for it
  with `parse_special_tokens=True` (prompts with a template, cloze texts with a mask).
- Batches run in the library's native threads.
- Every id outside the vocabulary, every unknown token and every text that is no Unicode is an error, not a guess.
- What is saved opens again, without pickle, as the same tokenizer: equal `fingerprint`, equal ids.
"""

import difflib
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from llmlab.tokenizers.padding import Encoding, Side, pad, truncate
from llmlab.tokenizers.special import SpecialTokens
from llmlab.tokenizers.storage import write_manifest

Ids = Sequence[int] | Int[np.ndarray, " S"]
Texts = Callable[[], Iterator[str]]
Progress = Callable[[int, int | None, str], None]  # how much of how much (None: unknown) of what is done
Frame = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(ABC):
    """How to get a tokenizer: by training on text, by opening a file, or from nothing (bytes)."""

    @abstractmethod
    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> "Tokenizer":
        """Trains or opens the tokenizer.

        Args:
            texts: called for a fresh iterator over the documents of the training corpus; only needed for training.
            progress: called as progress(done, total, what) while the corpus is read; total is None, being unknown.

        Raises:
            ValueError: the corpus is missing, empty or too small for the vocabulary, or a file is corrupt.
            FileNotFoundError: there is nothing at the path to open.
        """


class Tokenizer(ABC):
    """Text <-> token ids.

    Subclasses say how plain text is encoded and decoded, and what their model file is; everything else is here.
    """

    kind: ClassVar[str]
    """What `llmlab_tokenizer.json` calls this class."""
    model_file: ClassVar[str]
    """Name of the model's file in a saved directory."""

    def __init__(self, tokens: Sequence[str | None], special: SpecialTokens) -> None:
        """`tokens` lists the vocabulary by id, None where an id is unused."""
        self.special = special
        self._tokens = tuple(tokens)
        self._ids = {token: index for index, token in enumerate(self._tokens) if token is not None}
        self._special_ids = {self.token_to_id(token): token for token in special.tokens}
        self._special_id_set = frozenset(self._special_ids)

    # --- what a subclass provides ---

    @abstractmethod
    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        """Ids of each text, in native threads, without special tokens around them."""

    @abstractmethod
    def _decode(self, batch: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """Texts of rows whose ids are all in the vocabulary."""

    @abstractmethod
    def model_bytes(self) -> bytes:
        """Content of the model's file."""

    @abstractmethod
    def _frame(self) -> Frame:
        """What `frame` returns, once."""

    # --- vocabulary ---

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._tokens)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id. Tokens are in the model's own spelling: SentencePiece writes a space as '▁', for instance."""
        return self._ids

    def token_to_id(self, token: str) -> int:
        """Id of a token. Raises ValueError, with the nearest ones that exist, for a token not in the vocabulary."""
        index = self._ids.get(token)
        if index is None:
            near = difflib.get_close_matches(token, self._ids, n=3)
            hint = f"the nearest are {', '.join(map(repr, near))}" if near else "encode() splits text into tokens"
            raise ValueError(f"there is no token {token!r} in this vocabulary of {self.vocab_size}; {hint}")
        return index

    def id_to_token(self, index: int) -> str:
        """Token of an id. Raises ValueError for an id that the vocabulary does not have."""
        token = self._tokens[index] if 0 <= index < len(self._tokens) else None
        if token is None:
            raise ValueError(f"id {index} is not in this vocabulary; ids run from 0 to {self.vocab_size - 1}")
        return token

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a sequence, None where there is none."""
        return self._role(self.special.bos)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a sequence, None where there is none."""
        return self._role(self.special.eos)

    @property
    def pad_id(self) -> int | None:
        """Id of the token that fills rows, None where there is none."""
        return self._role(self.special.pad)

    @property
    def unk_id(self) -> int | None:
        """Id of the token for text that the vocabulary cannot express, None where there is none."""
        return self._role(self.special.unk)

    @property
    def cls_id(self) -> int | None:
        """Id of the token that begins an encoder's input, None where there is none."""
        return self._role(self.special.cls)

    @property
    def sep_id(self) -> int | None:
        """Id of the token that ends a part of an encoder's input, None where there is none."""
        return self._role(self.special.sep)

    @property
    def mask_id(self) -> int | None:
        """Id of the token that hides a word, None where there is none."""
        return self._role(self.special.mask)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens, the user-defined ones included."""
        return self._special_id_set

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out with `skip_special_tokens=True`."""
        return self._special_id_set

    def _role(self, token: str | None) -> int | None:
        return None if token is None else self._ids[token]

    @functools.cached_property
    def frame(self) -> Frame:
        """The ids that `add_special_tokens=True` puts before and after a text."""
        return self._frame()

    # --- text to ids ---

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = False,
        parse_special_tokens: bool = False,
        truncation: Side | None = None,
        max_length: int | None = None,
    ) -> list[int]:
        """Ids of one text; the arguments are those of `encode_batch`."""
        return self.encode_batch(
            [text],
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
            truncation=truncation,
            max_length=max_length,
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = False,
        parse_special_tokens: bool = False,
        truncation: Side | None = None,
        max_length: int | None = None,
    ) -> list[list[int]]:
        """Ids of each text, computed in native threads.

        Args:
            texts: any number of strings.
            add_special_tokens: put the model's own frame around each text ([CLS] ... [SEP], or <s> before).
            parse_special_tokens: read a special token's name in the text as that token. Off, it is ordinary text.
            truncation: which end of a text that is too long is cut off; special tokens added around it stay.
            max_length: the longest row, in tokens, added special tokens included.

        Raises:
            ValueError: a text has a lone surrogate, or `truncation` and `max_length` do not come together.
        """
        texts = list(texts)
        try:
            rows = self._encode(texts, parse_special_tokens)
        except (RuntimeError, TypeError, ValueError):
            require_unicode(texts)
            raise
        before, after = self.frame if add_special_tokens else ((), ())
        rows = truncate(rows, truncation, max_length, reserved=len(before) + len(after))
        return [[*before, *row, *after] for row in rows] if before or after else rows

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        add_special_tokens: bool = False,
        parse_special_tokens: bool = False,
        truncation: Side | None = None,
        max_length: int | None = None,
        padding: Literal["longest"] | int | None = None,
        padding_side: Side = "right",
        pad_to_multiple_of: int | None = None,
        pad_id: int | None = None,
    ) -> Encoding:
        """A batch as arrays: `input_ids` and `attention_mask`, both int32 of shape (texts, length).

        Args:
            texts: one text (a batch of one) or several.
            add_special_tokens, parse_special_tokens, truncation, max_length: as in `encode_batch`.
            padding: "longest" pads to the longest row, a number to that length; None requires rows of equal length.
            padding_side: where the padding goes; decoders that generate want it on the left.
            pad_to_multiple_of: round the padded length up, for hardware that prefers it or to compile less often.
            pad_id: what to pad with; by default the tokenizer's pad token.

        Raises:
            ValueError: rows do not fit in the length, or differ in length without padding, or there is no pad token.
        """
        rows = self.encode_batch(
            [texts] if isinstance(texts, str) else texts,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
            truncation=truncation,
            max_length=max_length,
        )
        return pad(
            rows,
            pad_id=self.pad_id if pad_id is None else pad_id,
            padding=padding,
            side=padding_side,
            multiple_of=pad_to_multiple_of,
        )

    # --- ids to text ---

    def decode(self, ids: Ids, *, skip_special_tokens: bool = True) -> str:
        """Text of one sequence of ids. Raises ValueError for ids that are not in the vocabulary."""
        return self.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def decode_batch(
        self, batch: Sequence[Ids] | Int[np.ndarray, "B S"], *, skip_special_tokens: bool = True
    ) -> list[str]:
        """Text of each row, computed in native threads.

        With `skip_special_tokens=False` special tokens appear by name. Bytes that are no UTF-8 become U+FFFD. Raises
        ValueError for ids that are not in the vocabulary.
        """
        rows = [row.tolist() if isinstance(row, np.ndarray) else list(map(int, row)) for row in batch]
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.vocab_size:
                wrong = next(index for index in row if not 0 <= index < self.vocab_size)
                raise ValueError(f"id {wrong} is not in this vocabulary; ids run from 0 to {self.vocab_size - 1}")
        return self._decode(rows, skip_special_tokens)

    # --- identity and storage ---

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that determines ids: the kind, the special tokens and the model's file.

        Equal fingerprints mean equal tokenizers, across runs and machines.
        """
        special = json.dumps(self.special.to_json(), sort_keys=True)
        return hashlib.sha256(b"\0".join([self.kind.encode(), special.encode(), self.model_bytes()])).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that `save` writes beside the manifest."""
        return {self.model_file: self.model_bytes()}

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer into a directory (made if missing) that `load_tokenizer` opens again."""
        manifest = {
            "kind": self.kind,
            "model_file": self.model_file,
            "special": self.special.to_json(),
            "fingerprint": self.fingerprint,
        }
        write_manifest(Path(directory), manifest, self.files())

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<{self.kind} tokenizer, vocabulary of {self.vocab_size}, {self.fingerprint[:8]}>"


def conventional_frame(special: SpecialTokens, ids: Mapping[str, int]) -> Frame:
    """[CLS] ... [SEP] for encoders, which have both; for decoders <s>, where it exists, and nothing after the text.

    The end-of-sequence token is what a decoder writes, and what the data pipeline puts after each document: a prompt
    that ended in it would have nothing to be continued.
    """
    if special.cls is not None and special.sep is not None:
        return (ids[special.cls],), (ids[special.sep],)
    return () if special.bos is None else (ids[special.bos],), ()


def require_unicode(texts: Sequence[str]) -> None:
    """Raises ValueError for the first text that UTF-8 cannot express: one with half of a surrogate pair."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number} has a lone surrogate ({text[error.start]!r} at character {error.start}), which is no "
                "Unicode text; it was decoded wrongly: read it with errors='replace', or clean it with "
                "text.encode('utf-8', 'replace').decode()"
            ) from None
