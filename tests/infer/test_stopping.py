"""Stop strings: what is given out does not depend on how the text is cut, and never has a part of a stop string."""

import random

import pytest

from llmlab.infer.stopping import GrowingText, StopStrings, check_stop
from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece


def literal(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """The text up to the first place where it ends with a stop string; the longest one counts."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_any_cut_of_the_text_gives_the_definition(include):
    draw = random.Random(0)
    stopped = 0
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=12))
        stop = tuple("".join(draw.choices("ab", k=draw.randint(2, 5))) for _ in range(draw.randint(0, 3)))
        finder, given, rest = StopStrings(stop, include=include), "", text
        expected, found = literal(text, stop, include)
        while rest:
            size = draw.randint(1, 4)
            given += finder.push(rest[:size])
            rest = rest[size:]
            assert expected.startswith(given)  # nothing was shown that would have to be taken back
        given += finder.finish()
        assert (given, finder.found) == (expected, found)
        stopped += found is not None
    assert 200 < stopped < 1800


def test_text_is_given_out_as_soon_as_it_is_certain():
    finder = StopStrings(("END", "\n\n"))
    assert [finder.push(piece) for piece in ("to the E", "nd EN", "x\n", "y\n", "\nmore", "and more")] == [
        "to the ",
        "End ",
        "ENx",
        "\ny",
        "",
        "",
    ]
    assert finder.found == "\n\n"
    assert finder.finish() == ""


def test_characters_split_over_tokens_and_stop_strings_split_over_characters():
    tokenizer = Bytes().build()
    growing = GrowingText(tokenizer, ("€!",))
    given = [growing.push(token) for token in tokenizer.encode("é€€!no")]
    assert "".join(given) == "é€"
    assert growing.text == "é€"
    assert growing.stopped == "€!"
    assert "\ufffd" not in "".join(given)


def test_what_is_incomplete_at_the_end_is_given_out():
    tokenizer = Bytes().build()
    growing = GrowingText(tokenizer, ("abc",))
    given = "".join(growing.push(token) for token in [*b"xab", 0xE2, 0x82])
    assert given == "x"
    assert growing.finish() == "ab\ufffd"
    growing = GrowingText(tokenizer, ("abc",))
    given = "".join(growing.push(token) for token in b"xab")
    assert (given, growing.finish(), growing.text) == ("x", "ab", "xab")


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_the_text_continues_the_prompt(dummy_prefix):
    corpus = ["the cat sat on the mat and the dog sat on the log"] * 30
    config = SentencePiece(vocab_size=276, add_dummy_prefix=dummy_prefix, character_coverage=1.0)
    for tokenizer in (config.build(lambda: iter(corpus)), ByteLevelBPE(vocab_size=279).build(lambda: iter(corpus))):
        prompt = tokenizer.encode("the cat")
        rest = tokenizer.encode("the cat sat on the mat")[len(prompt) :]
        assert tokenizer.decode(prompt) == "the cat"
        growing = GrowingText(tokenizer, after=prompt)
        assert "".join(growing.push(token) for token in rest) + growing.finish() == " sat on the mat"


def test_an_empty_stop_string_is_refused():
    assert check_stop(None) == ()
    assert check_stop("a") == ("a",)
    with pytest.raises(ValueError, match="leave it out"):
        check_stop(["a", ""])
