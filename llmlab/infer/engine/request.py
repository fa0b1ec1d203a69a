"""What the engine is asked, what it answers, and how it is set up.

request = Request(prompt_ids, sampling=Sampling(temperature=0.7), max_new_tokens=64, stop=("\\n\\n",))
handle = engine.submit(request)
for event in handle.events():
    print(event.text, end="")
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from llmlab.infer.completion import TokenLogprob
from llmlab.infer.constraints import Constraint
from llmlab.infer.sampling import Sampling

FinishReason = Literal["stop", "length", "position", "cancelled", "error"]
"""stop: an end-of-sequence token, a stop id or a stop string; length: max_new_tokens; position: the positions of the
model or of the engine end; cancelled: by the caller, or because the engine closed; error: see the event's message."""


class RequestRefused(ValueError):
    """The engine does not take this request; the message says why, and what it would take."""


class EngineBusy(RequestRefused):
    """Not now: too many requests are waiting."""


class EngineClosed(RequestRefused):
    """The engine takes no requests any more."""


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, and how."""

    prompt_ids: tuple[int, ...]
    """Tokens that are continued, at least one."""
    _: KW_ONLY
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    max_new_tokens: int = 128
    """New tokens of each sample at most."""
    stop: tuple[str, ...] = ()
    """A sample ends before the first of these strings in its text."""
    stop_ids: tuple[int, ...] = ()
    """A sample ends before the first of these tokens, besides the tokenizer's end-of-sequence token."""
    stop_at_eos: bool = True
    """Whether the tokenizer's end-of-sequence token ends a sample."""
    n: int = 1
    """Samples to draw; they share the prompt's keys and values."""
    prompt_logprobs: bool = False
    """Whether to report log-probabilities of the prompt's tokens."""
    constraint: Constraint | None = None
    """The form that the text must have (a schema, an expression); None for any."""
    priority: int = 0
    """Requests of a higher priority are admitted before, and preempted after, those of a lower one."""
    user: str | None = None
    """On whose behalf: users share the engine fairly. Requests without one count as one user's."""
    cache_salt: str = ""
    """Requests share stored prefixes only with those of the same salt: without one per tenant, the time to the first
    token tells whether someone else has sent the same prompt."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(int(index) for index in self.prompt_ids))
        if not self.prompt_ids:
            raise RequestRefused("the prompt has no tokens; give one at least (a bos token, for instance)")
        if self.max_new_tokens < 1:
            raise RequestRefused(f"max_new_tokens={self.max_new_tokens} is not positive")
        if self.n < 1:
            raise RequestRefused(f"n={self.n} is not positive; 1 draws one sample")
        if "" in self.stop:
            raise RequestRefused("a stop string is empty, which every text has; leave it out")


TokenLogprobs = TokenLogprob
"""A token and what the model thought of it."""


@dataclass(frozen=True)
class Event:
    """News of one sample."""

    sample: int
    """Its number, 0 ... n - 1."""
    token_ids: tuple[int, ...] = ()
    """New tokens, without the token that ended the sample."""
    text: str = ""
    """New text that no later token can change, without the stop string."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of the new tokens; None where `sampling.logprobs` is None."""
    finish_reason: FinishReason | None = None
    """None while the sample goes on; no event of the sample follows one with a reason."""
    message: str = ""
    """What went wrong, where the reason is "error"."""
    stop: str | int | None = None
    """The stop string or token that ended the sample."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Of the prompt's tokens, None for the first; once, in the first event of sample 0, where asked for."""


@dataclass(frozen=True)
class Reply:
    """One finished sample, all events together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    message: str = ""
    stop: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class Handle:
    """A submitted request, to whoever submitted it; every method may be called from any thread."""

    def __init__(self, request: Request, cancel: Callable[[], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._events: list[Event] = []
        self._callbacks: list[Callable[[Event], None]] = []
        self._unfinished = set(range(request.n))
        self._changed = threading.Condition(threading.RLock())

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Every event, from the first; waits for those to come and ends when all samples have finished.

        Args:
            timeout: seconds to wait for an event at most; None for no limit.

        Raises:
            TimeoutError: no event came in that time.
        """
        seen = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda known=seen: self._news(known), timeout):
                    raise TimeoutError(f"no event within {timeout} s; is the engine started?")
                new = self._events[seen:]
            if not new:
                return
            seen += len(new)
            yield from new

    def _news(self, seen: int) -> bool:
        return len(self._events) > seen or not self._unfinished

    def on_event(self, callback: Callable[[Event], None]) -> None:
        """Call this with every event: with those that came already now, here, and with later ones in the engine's
        thread, in order. It must return soon, for the engine waits; what it raises ends the request as an error."""
        with self._changed:
            for event in self._events:
                callback(event)
            self._callbacks.append(callback)

    def cancel(self) -> None:
        """End all samples; their blocks are free at the engine's next step. Nothing happens to a finished request."""
        self._cancel()

    @property
    def unfinished(self) -> frozenset[int]:
        """Numbers of the samples that have not finished."""
        with self._changed:
            return frozenset(self._unfinished)

    @property
    def finished(self) -> bool:
        """Whether all samples have finished."""
        with self._changed:
            return not self._unfinished

    def replies(self, timeout: float | None = None) -> tuple[Reply, ...]:
        """All samples, by number; waits for them. `timeout` as for `events`."""
        of_sample: list[list[Event]] = [[] for _ in range(self.request.n)]
        for event in self.events(timeout):
            of_sample[event.sample].append(event)
        return tuple(_joined(events) for events in of_sample)

    def put(self, event: Event) -> None:
        """For the engine: deliver an event. Raises what a callback raises, after the event was delivered to all."""
        failure: Exception | None = None
        with self._changed:
            self._events.append(event)
            if event.finish_reason is not None:
                self._unfinished.discard(event.sample)
            self._changed.notify_all()
            for callback in list(self._callbacks):
                try:
                    callback(event)
                except Exception as error:  # anything: what a callback does must not end the engine
                    self._callbacks.remove(callback)
                    failure = error
        if failure is not None:
            raise failure


def _joined(events: list[Event]) -> Reply:
    last = events[-1]
    assert last.finish_reason is not None
    logprobs = None
    if any(event.logprobs is not None for event in events):
        logprobs = tuple(one for event in events for one in event.logprobs or ())
    return Reply(
        text="".join(event.text for event in events),
        token_ids=tuple(index for event in events for index in event.token_ids),
        finish_reason=last.finish_reason,
        logprobs=logprobs,
        message=last.message,
        stop=last.stop,
        prompt_logprobs=next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None),
    )
