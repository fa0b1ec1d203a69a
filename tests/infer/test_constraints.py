"""Whatever is drawn among the allowed tokens has the form that was asked for, in every kind of vocabulary."""

import builtins
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llmlab.infer.constraints import Constraint, Grammar, JsonSchema, Matcher, Regex, matcher
from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, SpecialTokens, Tokenizer

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "is true": {"type": "boolean"},
        "name": {"enum": ["x", "yé"]},
        "list": {"type": "array", "items": {"type": "null"}, "maxItems": 3},
    },
    "required": ["age", "is true", "name", "list"],
    "additionalProperties": False,
}


def is_valid(text: str) -> bool:
    """The schema, by hand."""
    value = json.loads(text)
    assert list(value) == ["age", "is true", "name", "list"]
    return (
        type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and isinstance(value["is true"], bool)
        and value["name"] in ("x", "yé")
        and len(value["list"]) <= 3
        and all(item is None for item in value["list"])
    )


FORMS: list[tuple[Constraint, Callable[[str], Any]]] = [
    (JsonSchema.of(SCHEMA), is_valid),
    (JsonSchema.of(SCHEMA, whitespace=True), is_valid),
    (Regex(r"[a-f]{2,4}(-[0-9]{1,2})? é"), re.compile(r"[a-f]{2,4}(-[0-9]{1,2})? é").fullmatch),
    (Grammar('start: "(" start ")" | "x"'), re.compile(r"(\(*)x(\)*)").fullmatch),
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    def corpus() -> Iterator[str]:
        return iter(['the cat sat on the mat, is true or not; {"list": [null], "is true": true, "age": 10}'] * 30)

    return {
        "bytes": Bytes().build(),
        "sentencepiece": SentencePiece(vocab_size=300, kind="bpe").build(corpus),
        "byte-level": ByteLevelBPE(vocab_size=280).build(corpus),
    }


def walk(follow: Matcher, tokenizer: Tokenizer, seed: int, most: int = 300) -> list[int]:
    """Tokens drawn among the allowed ones until the text ends."""
    draw, ids = random.Random(seed), []
    while not follow.ended and len(ids) < most:
        bits = np.unpackbits(follow.allowed().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: tokenizer.vocab_size]).tolist()
        assert (tokenizer.eos_id in allowed) == follow.complete
        if follow.complete and draw.random() < 0.5:
            break
        ids.append(draw.choice([index for index in allowed if index != tokenizer.eos_id]))
        follow.accept(ids[-1])
    return ids


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "byte-level"])
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_whatever_is_drawn_has_the_form(tokenizers, kind, form):
    constraint, accepts = FORMS[form]
    tokenizer, complete = tokenizers[kind], 0
    for seed in range(10):
        follow = matcher(constraint, tokenizer)
        text = tokenizer.decode(walk(follow, tokenizer, seed))
        complete += follow.complete
        if follow.complete:
            assert accepts(text), text
    assert complete >= 5  # brackets and white space may go on without end


def test_a_copy_goes_its_own_way(tokenizers):
    follow = matcher(Regex("ab?"), tokenizers["bytes"])
    follow.accept(ord("a"))
    other = follow.copy()
    follow.accept(ord("b"))
    assert follow.ended
    assert other.complete
    assert not other.ended
    with pytest.raises(ValueError, match="token 120 does not fit"):
        other.accept(ord("x"))


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Regex("(a"), "Regex cannot be followed.*unclosed group"),
        (Grammar("nope"), "Grammar cannot be followed"),
        (JsonSchema('{"type": "zzz"}'), "Invalid type"),
        (JsonSchema("[1]"), "is an object, not list"),
        (JsonSchema("{"), "not JSON"),
    ],
)
def test_what_cannot_be_followed_is_refused(tokenizers, constraint, words):
    with pytest.raises(ValueError, match=re.compile(words, re.DOTALL)):
        matcher(constraint, tokenizers["bytes"])


def test_a_text_must_be_able_to_end():
    with pytest.raises(ValueError, match="end-of-sequence token"):
        matcher(Regex("a"), Bytes(special=SpecialTokens(eos=None)).build())


def test_without_the_library_it_says_what_to_install(monkeypatch, tokenizers):
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "llguidance":
            raise ImportError("absent")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"llmlab\[serve\]"):
        matcher(Regex("a"), tokenizers["bytes"])


TEXT = " ".join(f"{i} yes {i * i} no" for i in range(200))


def test_the_mask_has_as_many_words_as_the_vocabulary_needs_also_where_32_divides_it() -> None:
    for size in (287, 288, 289):
        tokenizer = ByteLevelBPE(vocab_size=size).build(lambda: iter([TEXT] * 3))
        allowed = matcher(Regex("(yes|no)"), tokenizer).allowed()
        assert len(allowed) == -(-tokenizer.vocab_size // 32)
        firsts = {i for i in range(tokenizer.vocab_size) if allowed[i // 32] >> (i % 32) & 1}
        assert firsts == {
            i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) in {"y", "ye", "yes", "n", "no"}
        }
