"""What was generated for a prompt, and a row of a batch while it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmlab.infer.constraints import Matcher
from llmlab.infer.sampling import Choice, Logprobs
from llmlab.infer.stopping import GrowingText

TextStream = Callable[[int, str], None]
"""Called with the number of the completion (that of the prompt, for one sample each) and each new piece of its text."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability in the model's own distribution (natural logarithm)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens at its place and their log-probabilities, best first."""


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    """The new text, without the prompt and without the stop string."""
    token_ids: tuple[int, ...]
    """The new tokens, without the token that ended them; a stop string's are among them."""
    finish_reason: str
    """"stop" at an end-of-sequence token, a stop token, a stop string or where a constraint is fulfilled, "length" at
    max_new_tokens, "position" where the model's positions end."""
    prompt: int = 0
    """Number of the prompt."""
    sample: int = 0
    """Number of the sample of that prompt."""
    stop: str | int | None = None
    """The stop string or token that ended it."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token of `token_ids`, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Of every token of the prompt, None for the first, where they were asked for."""

    @property
    def cumulative_logprob(self) -> float:
        """Sum of the tokens' log-probabilities.

        Raises:
            ValueError: they were not asked for.
        """
        if self.logprobs is None:
            raise ValueError("this completion has no log-probabilities; ask for them with Sampling(logprobs=0)")
        return sum(token.logprob for token in self.logprobs)


@dataclass(frozen=True)
class Limits:
    """What ends a row besides its text."""

    stop_ids: frozenset[int]
    """Tokens that end it and are not part of it."""
    new_tokens: int
    """Most new tokens."""
    positions: int | None
    """New tokens that the model has positions for; None for any number."""


class Row:
    """One continuation as it grows."""

    def __init__(
        self,
        number: int,
        text: GrowingText,
        limits: Limits,
        *,
        top: int | None,
        stream: TextStream | None,
        matcher: Matcher | None,
    ) -> None:
        """`top` is the number of alternatives to keep with each log-probability, None to keep none at all."""
        self.number, self.limits, self.matcher = number, limits, matcher
        self.tokens: list[int] = []
        self.reason = ""
        """Why it ended; empty while it has not."""
        self.stop: str | int | None = None
        self.logprobs: list[TokenLogprob] | None = None if top is None else []
        self._text, self._top, self._stream = text, top, stream

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._text.text

    def push(self, token: int, logprobs: Logprobs | None) -> None:
        """Take the next token, unless the row has ended; `logprobs` are its own, without leading dimensions."""
        if self.reason:
            return
        if self._note(token, logprobs):
            self._show(self._text.push(token))
            self._look()
        if self.reason:
            self._show(self._text.finish())

    def extend(self, tokens: Sequence[int], logprobs: Callable[[int], Logprobs | None]) -> int:
        """Take the next tokens, up to the one that ends the row; how many were taken, that one included.

        Where neither a stop string nor a constraint can end it, spelling them all costs what spelling one does.
        `logprobs` are those of a token, by its number.
        """
        taken, unseen = 0, []
        one_by_one = self._text.may_stop or self.matcher is not None
        while taken < len(tokens) and not self.reason:
            token = tokens[taken]
            if one_by_one:
                self.push(token, logprobs(taken))
            elif self._note(token, logprobs(taken)):
                unseen.append(token)
                self._look()
            taken += 1
        if not one_by_one:
            self._show(self._text.extend(unseen))
            if self.reason:
                self._show(self._text.finish())
        return taken

    def _note(self, token: int, logprobs: Logprobs | None) -> bool:
        """Whether a token belongs to the row; it is written down."""
        if token in self.limits.stop_ids:
            self.reason, self.stop = "stop", token
            return False
        self.tokens.append(token)
        if self.logprobs is not None and self._top is not None and logprobs is not None:
            self.logprobs.append(token_logprob(token, logprobs, self._top))
        if self.matcher is not None:
            self.matcher.accept(token)
        return True

    def _look(self) -> None:
        """Whether the row has ended with its last token."""
        if self._text.stopped is not None:
            self.reason, self.stop = "stop", self._text.stopped
        elif self.matcher is not None and self.matcher.ended:
            self.reason = "stop"
        elif len(self.tokens) == self.limits.new_tokens:
            self.reason = "length"
        elif len(self.tokens) == self.limits.positions:
            self.reason = "position"  # this token would be fed back at a position that the model does not have

    def _show(self, text: str) -> None:
        if text and self._stream is not None:
            self._stream(self.number, text)


def token_logprob(token: int, logprobs: Logprobs, top: int) -> TokenLogprob:
    """A token's log-probability with the first `top` alternatives."""
    best = zip(np.asarray(logprobs.top_id_BN)[:top].tolist(), np.asarray(logprobs.top_BN)[:top].tolist(), strict=True)
    return TokenLogprob(token, float(logprobs.chosen_B), tuple(best))


def push_all(rows: Sequence[Row], choice: Choice) -> None:
    """Gives every row its token; the choice is in host memory and may have more rows."""
    tokens = np.asarray(choice.token_B).tolist()
    for number, row in enumerate(rows):
        own = choice.logprobs
        if own is not None:
            own = Logprobs(own.chosen_B[number], own.top_id_BN[number], own.top_BN[number])
        row.push(tokens[number], own)
