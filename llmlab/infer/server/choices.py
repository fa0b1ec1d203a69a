"""One sample as the interface tells it, whole or piece by piece; and what completions and chats each fill in."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

from llmlab.infer.engine.request import Event, TokenLogprobs
from llmlab.infer.server.plans import Plan
from llmlab.infer.server.service import Service

_LEAST = -9999.0  # JSON has no minus infinity


class Choice(abc.ABC):
    """A sample as it grows."""

    def __init__(self, service: Service, plan: Plan, request: int, index: int) -> None:
        """
        Args:
            service: the model.
            plan: what was asked for.
            request: number of the prompt.
            index: number of the choice in the answer.
        """
        self.service, self.plan, self.request, self.index = service, plan, request, index
        self.num_tokens = 0
        """New tokens so far."""
        self.reason: str | None = None
        """Why it ended, as the interface says it."""
        self.stop: str | int | None = None
        """The stop string or token that ended it."""
        self._logprob = 0.0

    def take(self, event: Event, prompt: Sequence[TokenLogprobs | None] | None) -> dict[str, Any]:
        """Counts an event in, and returns what a stream tells of it; `prompt`, what is known of the prompt's tokens."""
        self.num_tokens += len(event.token_ids)
        self._logprob += sum(one.logprob for one in event.logprobs or ())
        self.reason, self.stop = told_reason(event), event.stop
        return self.delta(event, prompt)

    @property
    def quality(self) -> float:
        """Mean log-probability of its tokens, by which the best are chosen."""
        return self._logprob / max(self.num_tokens, 1)

    @abc.abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """What a stream begins this sample with."""

    @abc.abstractmethod
    def delta(self, event: Event, prompt: Sequence[TokenLogprobs | None] | None) -> dict[str, Any]:
        """What a stream tells of an event."""

    @abc.abstractmethod
    def whole(self) -> dict[str, Any]:
        """The sample at its end."""


class Dialect(abc.ABC):
    """How one endpoint reads its bodies and tells its answers."""

    prefix: ClassVar[str]
    """What its ids begin with."""
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    """What its answers, and the pieces of its streams, call themselves."""

    @abc.abstractmethod
    def plan(self, body: Any, service: Service) -> Plan:
        """What a body asks for; raises an ApiError for the first thing in it that cannot be."""

    @abc.abstractmethod
    def choice(self, service: Service, plan: Plan, request: int, index: int) -> Choice:
        """An empty sample."""


def told_reason(event: Event) -> str | None:
    """The finish reason as the interface has it: the end of the positions is a length as well."""
    return "length" if event.finish_reason == "position" else event.finish_reason


def finite(logprob: float) -> float:
    """A log-probability that JSON can express."""
    return max(logprob, _LEAST)
