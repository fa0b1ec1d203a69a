"""Text from tokens as they come, without ever showing half of a character.

A token may end in the middle of a UTF-8 sequence (one emoji is four byte tokens), and some models spell a token
differently at the start of a text. So the decoder keeps the last tokens, decodes them together, and lets go of what no
later token can change.
"""

from collections.abc import Iterable, Iterator

from llmlab.tokenizers.base import Tokenizer

_REPLACEMENT = "\ufffd"
# UTF-8 needs up to four bytes, so at most three can wait for the rest; each shows as at most one U+FFFD until then.
_MAX_WAITING = 3


class StreamDecoder:
    """Incremental `Tokenizer.decode`.

        decoder = StreamDecoder(tokenizer)
        for index in ids:
            print(decoder.push(index), end="")
        print(decoder.finish())

    For tokenizers that spell a token the same wherever it stands (bytes, SentencePiece, byte-level BPE), what it
    returned adds up to `tokenizer.decode(ids)` exactly. A token costs the decoding of a handful of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # tokens already shown, kept so that the next ones are spelled as inside a text
        self._pending: list[int] = []  # tokens whose text may still change
        self._shown = 0  # characters of the pending tokens' text that were returned already

    def push(self, index: int) -> str:
        """Takes the next token; returns the text that is now certain, often one word, sometimes nothing."""
        return self.extend((index,))

    def extend(self, ids: Iterable[int]) -> str:
        """Takes the next tokens, at the price of one; returns the text that is now certain."""
        shown = [int(index) for index in ids if not (self._skip and int(index) in self._tokenizer.hidden_ids)]
        if not shown:
            return ""
        self._pending += shown
        text = self._text()
        waiting = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = len(text) - min(waiting, _MAX_WAITING)
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if not waiting:
            self._context, self._pending, self._shown = self._pending, [], 0
        return new

    def finish(self) -> str:
        """Ends the text: returns what was held back, with U+FFFD for an incomplete character."""
        rest = self._text()[self._shown :] if self._pending else ""
        self._context, self._pending, self._shown = [], [], 0
        return rest

    def _text(self) -> str:
        """What the pending tokens add to the text of the ones before them."""
        before, both = self._tokenizer.decode_batch(
            [self._context, self._context + self._pending], skip_special_tokens=self._skip
        )
        return both[len(before) :]


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
    """The pieces of text of `StreamDecoder`, empty ones left out."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    for index in ids:
        if piece := decoder.push(index):
            yield piece
    if piece := decoder.finish():
        yield piece
