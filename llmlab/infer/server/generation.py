"""The endpoints that write text: a plan is submitted, and its events are told whole or as they come."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from llmlab.infer.engine.request import Event
from llmlab.infer.server.choices import Choice, Dialect
from llmlab.infer.server.conduct import Sender, conduct
from llmlab.infer.server.gate import limited
from llmlab.infer.server.plans import Plan, engine_of
from llmlab.infer.server.service import Service
from llmlab.infer.server.submission import PromptLogprobs, Submission

_ALIVE_SECONDS = 15.0  # proxies commonly give up connections that are silent for a minute


class Generation:
    """An endpoint, as an ASGI application."""

    def __init__(self, service: Service, dialect: Dialect) -> None:
        self._service, self._dialect = service, dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await conduct(self._service, scope, receive, send, self._answer)

    async def _answer(self, body: Any, sender: Sender) -> None:
        service, arrived = self._service, time.perf_counter()
        engine = engine_of(service)
        plan = await asyncio.to_thread(self._dialect.plan, body, service)  # templates and tokenizers take their time
        async with limited(plan.seconds), Submission(engine, plan.requests) as submission:
            answer = _Answer(service, self._dialect, plan, arrived)
            async with aclosing(submission.events(_ALIVE_SECONDS)) as events:
                if plan.stream:
                    await answer.stream(events, sender)
                else:
                    await answer.whole(events, sender)
        service.metrics.request_done(time.perf_counter() - arrived, answer.reasons())


Events = AsyncIterator[tuple[int, Event, PromptLogprobs] | None]


class _Answer:
    """The samples of one plan on their way to the client."""

    def __init__(self, service: Service, dialect: Dialect, plan: Plan, arrived: float) -> None:
        self._service, self._dialect, self._plan = service, dialect, plan
        self._id = f"{dialect.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._clock = service.metrics.clock(arrived)
        self._choices: list[list[Choice]] = []
        for number, request in enumerate(plan.requests):
            first = number * request.n
            self._choices.append([dialect.choice(service, plan, number, first + sample) for sample in range(request.n)])

    def reasons(self) -> list[str]:
        """Why each sample ended."""
        return [choice.reason or "" for samples in self._choices for choice in samples]

    async def whole(self, events: Events, sender: Sender) -> None:
        """Tells all at the end."""
        async for news in events:
            if news is not None:
                self._take(*news)
        best = [choice for samples in self._choices for choice in self._best(samples)]
        for index, choice in enumerate(best):
            choice.index = index
        answer = self._envelope(self._dialect.whole_object, [choice.whole() for choice in best])
        await sender.whole({**answer, "usage": self._usage()})

    async def stream(self, events: Events, sender: Sender) -> None:
        """Tells every event as it comes."""
        await sender.begin()
        for samples in self._choices:
            for choice in samples:
                if (opening := choice.opening()) is not None:
                    await sender.event(self._chunk(opening))
        async for news in events:
            if news is None:
                await sender.waiting()
            else:
                await sender.event(self._chunk(self._take(*news)))
        if self._plan.include_usage:
            await sender.event({**self._envelope(self._dialect.chunk_object, []), "usage": self._usage()})
        await sender.end()

    def _take(self, number: int, event: Event, prompt: PromptLogprobs) -> dict[str, Any]:
        self._clock.tokens(len(event.token_ids))
        return self._choices[number][event.sample].take(event, prompt)

    def _best(self, samples: list[Choice]) -> list[Choice]:
        """The samples that are told: all, or the best of more than were asked for."""
        if len(samples) == self._plan.n:
            return samples
        return sorted(samples, key=lambda choice: -choice.quality)[: self._plan.n]

    def _chunk(self, told: dict[str, Any]) -> dict[str, Any]:
        chunk = self._envelope(self._dialect.chunk_object, [told])
        return {**chunk, "usage": None} if self._plan.include_usage else chunk

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.config.name,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(request.prompt_ids) for request in self._plan.requests)
        new = 0 if self._plan.only_prompt else sum(choice.num_tokens for row in self._choices for choice in row)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
