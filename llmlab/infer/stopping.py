"""Where a text ends: stop strings, found across the borders of tokens, in text that is shown while it is written.

A stop string may begin in one token and end three tokens later, and the tokens that a model chooses need not be those
that the stop string is encoded to: so it is looked for in the text. The text before it is given out as soon as it is
certain not to be part of one:

    stop "\\n\\nUser:"    text so far "Yes.\\n"    given out "Yes."    held back "\\n", which may begin the stop string

A stop string ends the text where its last character comes. Of several that end at the same character the longest
counts, and of what comes after nothing is kept. None of this depends on how the text is cut into tokens.
"""

from collections.abc import Sequence

from llmlab.tokenizers import StreamDecoder, Tokenizer

# Tokens of the prompt that the text is spelled after: SentencePiece and WordPiece spell the first word of a text
# without the space before it, and the new text is no first word. One token would do; special tokens show nothing.
_CONTEXT = 4


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; raises ValueError for an empty one."""
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError("a stop string is empty and would end every text at once; leave it out")
    return strings


class StopStrings:
    """Lets text through up to the first stop string.

    finder = StopStrings(("END",))
    finder.push("to the E")    # "to the "
    finder.push("nd EN")       # "End "
    finder.push("D of it")     # "", and finder.found == "END"
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        """`include` gives out the stop string as well."""
        self._stop = check_stop(stop)
        self._include = include
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    @property
    def any(self) -> bool:
        """Whether there are stop strings."""
        return bool(self._stop)

    def push(self, text: str) -> str:
        """Takes more text; returns what is certain. After a stop string nothing is."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            end, _, self.found = min(ends)
            certain = self._held[: end if self._include else end - len(self.found)]
            self._held = ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """Ends the text: returns what was held back for a stop string that never came."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string begins with, not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


class GrowingText:
    """The text of a row as its tokens come: whole characters, up to the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, include_stop: bool = False, after: Sequence[int] = ()
    ) -> None:
        """
        Args:
            tokenizer: spells the tokens.
            stop: strings that end the text.
            include_stop: keep the stop string.
            after: tokens that the text follows on, which decide how its first word is spelled.
        """
        self._decoder = StreamDecoder(tokenizer)
        for index in after[-_CONTEXT:]:
            if index < tokenizer.vocab_size:  # the places of images may lie beyond
                self._decoder.push(index)
        self._stop = StopStrings(stop, include=include_stop)
        self.text = ""
        """All that was given out."""

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings."""
        return self._stop.any

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None where none did."""
        return self._stop.found

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is now certain."""
        return self.extend((token,))

    def extend(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens, at the price of one; returns the text that is now certain."""
        return self._give(self._stop.push(self._decoder.extend(tokens)))

    def finish(self) -> str:
        """Ends the text: returns what was held back, with U+FFFD for an incomplete character."""
        certain = self._stop.push(self._decoder.finish())
        return self._give(certain + self._stop.finish())

    def _give(self, text: str) -> str:
        self.text += text
        return text
