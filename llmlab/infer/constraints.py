"""Constrained decoding: whatever the model prefers, the text has the form that was asked for.

    JsonSchema   the text is JSON that the schema accepts
    Regex        the whole text matches a regular expression
    Grammar      the text is a sentence of a context-free grammar, in Lark's notation

A grammar over bytes says after each step which bytes may come next; a token may be drawn if all of its bytes may, one
after the other. Walking the vocabulary's prefix tree along the grammar finds these tokens (llguidance does so in about
50 microseconds for 128,000 tokens) and their bitmask is an input of the sampling program. The scores of all other
tokens become minus infinity, so the model's preferences are renormalised over what is allowed, token by token: not the
model's distribution conditioned on the whole text being valid, which would have to look ahead (Lew et al. 2023,
2306.03081).

The end-of-sequence token is allowed where the text is complete. A text that is cut off by `max_new_tokens` is a prefix
of a valid one; a form with a bound on its length is always completed, given the tokens.
"""

import abc
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from llmlab.tokenizers import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Constraint(abc.ABC):
    """The form of a text; frozen and hashable."""

    @abc.abstractmethod
    def grammar(self) -> str:
        """The form in llguidance's notation."""


@dataclass(frozen=True)
class JsonSchema(Constraint):
    """JSON that a schema accepts; {"type": "object"} for any object."""

    schema: str
    """The schema as JSON; `JsonSchema.of` takes a mapping."""
    whitespace: bool = False
    """Let the model put white space between the parts, any amount of it; else as json.dumps(separators=(",", ":"))."""

    @classmethod
    def of(cls, schema: Mapping[str, Any], *, whitespace: bool = False) -> "JsonSchema":
        """The form of a schema that is given as a mapping."""
        return cls(json.dumps(schema), whitespace)

    def grammar(self) -> str:
        try:
            schema = json.loads(self.schema)
        except ValueError as error:
            raise ValueError(f"the schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise ValueError(f"a JSON schema is an object, not {type(schema).__name__}: {self.schema[:80]}")
        matcher = _llguidance().LLMatcher
        return matcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": self.whitespace})


@dataclass(frozen=True)
class Regex(Constraint):
    """Text that a regular expression matches from beginning to end (Rust's syntax, which has no look-around)."""

    pattern: str

    def grammar(self) -> str:
        return _llguidance().LLMatcher.grammar_from_regex(self.pattern)


@dataclass(frozen=True)
class Grammar(Constraint):
    """Sentences of a context-free grammar, in Lark's notation; the rule `start` is the text."""

    lark: str

    def grammar(self) -> str:
        return _llguidance().LLMatcher.grammar_from_lark(self.lark)


class Matcher:
    """Follows one text along its grammar."""

    def __init__(self, matcher: "LLMatcher", tokenizer: "LLTokenizer") -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._eos = frozenset(tokenizer.eos_tokens)

    def allowed(self) -> Int32[np.ndarray, " W"]:
        """Which tokens may come next: bit i of word w for token 32 w + i."""
        words = -(-self._tokenizer.vocab_size // 32)  # where that divides, llguidance gives one more
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)[:words]

    def accept(self, token: int) -> None:
        """Takes the next token.

        Raises:
            ValueError: the grammar does not allow it, or a limit on its complexity is reached.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not fit the constraint: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> "Matcher":
        """An independent one, as far along."""
        return Matcher(self._matcher.deep_copy(), self._tokenizer)


def matcher(constraint: Constraint, tokenizer: Tokenizer) -> Matcher:
    """What follows a text of this form, spelled by this tokenizer.

    The first call for a tokenizer builds the prefix tree of its vocabulary (about a second for 100,000 tokens).

    Raises:
        ValueError: the form cannot be compiled, or the tokenizer has no end-of-sequence token or no bytes.
        ImportError: llguidance is not installed.
    """
    vocabulary = _vocabulary(tokenizer)
    library = _llguidance().LLMatcher
    grammar = constraint.grammar()
    found = library(vocabulary, grammar, log_level=0)
    if found.is_error():
        raise ValueError(f"this {type(constraint).__name__} cannot be followed: {found.get_error()}")
    return Matcher(found, vocabulary)


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> "LLTokenizer":
    """The tokenizer as llguidance sees it: the bytes of every token."""
    if tokenizer.eos_id is None:
        raise ValueError("a constrained text ends with an end-of-sequence token, and this tokenizer has none")
    library = _llguidance()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        try:
            return library.LLTokenizer(tokenizer.library.to_str(), tokenizer.vocab_size, tokenizer.eos_id)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"llguidance cannot spell this vocabulary in bytes: {error}") from None
    return library.LLTokenizer(library.TokenizerWrapper(_Spelled(tokenizer)), tokenizer.vocab_size)


class _Spelled:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eos_id is not None
        self._tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens: Sequence[bytes] = list(_spellings(tokenizer))
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _spellings(tokenizer: Tokenizer) -> Iterator[bytes]:
    """Bytes of every token, by id; a special token's are its name, which no text is made of."""
    for index in range(tokenizer.vocab_size):
        name = tokenizer.id_to_token(index)
        if index in tokenizer.special_ids:
            yield name.encode()
        elif isinstance(tokenizer, BytesTokenizer):
            yield bytes([index])
        elif isinstance(tokenizer, SentencePieceTokenizer):
            is_byte = tokenizer.processor.is_byte(index)
            yield bytes([int(name[1:-1], 16)]) if is_byte else name.replace("▁", " ").encode()
        else:
            raise ValueError(f"the bytes of a {tokenizer.kind} tokenizer's tokens are not known")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("constrained decoding needs llguidance: pip install 'llmlab[serve]'") from error
    return llguidance
