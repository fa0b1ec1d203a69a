"""Requests at the engine, and their events in the event loop.

The engine computes in a thread of its own and calls back from it; each event is handed to the loop and waits there for
whoever writes it to the client. What waits is bounded by what was asked for, so a slow client costs memory for its own
text and holds up nobody.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType

from llmlab.infer.engine.request import EngineBusy, EngineClosed, Event, Handle, Request, RequestRefused, TokenLogprobs
from llmlab.infer.server.errors import ApiError, busy, invalid, shutting_down
from llmlab.infer.server.service import Generator

PromptLogprobs = Sequence[TokenLogprobs | None] | None


class Submission:
    """The requests of one body, submitted together and cancelled together.

    async with Submission(engine, requests) as submission:
        async for news in submission.events(idle=15):
            ...
    """

    def __init__(self, engine: Generator, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._handles: list[Handle] = []
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def __aenter__(self) -> "Submission":
        """Submits.

        Raises:
            ApiError: the engine refuses a request.
        """
        submitting = asyncio.ensure_future(asyncio.to_thread(self._submit, asyncio.get_running_loop()))
        try:
            await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the thread goes on: what it submits must be cancelled too
            submitting.add_done_callback(lambda _: self._cancel())
            raise
        except Exception as error:
            self._cancel()  # those before the one that was refused
            raise _refused(error) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what has not finished."""
        self._cancel()

    async def events(self, idle: float) -> AsyncGenerator[tuple[int, Event, PromptLogprobs] | None, None]:
        """The number of each event's request, the event, and the log-probabilities of its prompt where asked for.

        Events of a sample come in order. Those of samples that need the prompt's log-probabilities wait for them.

        Args:
            idle: seconds without an event after which None is given instead.

        Raises:
            ApiError: the engine gave up a request.
        """
        left = sum(request.n for request in self._requests)
        prompts: dict[int, PromptLogprobs] = {
            number: None for number, request in enumerate(self._requests) if not request.prompt_logprobs
        }
        early: dict[int, list[Event]] = {}
        while left:
            try:
                async with asyncio.timeout(idle):
                    number, event = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if event.finish_reason in ("error", "cancelled"):
                raise _given_up(event)
            if number not in prompts:
                if event.prompt_logprobs is None:
                    early.setdefault(number, []).append(event)
                    continue
                prompts[number] = event.prompt_logprobs
            for one in (event, *early.pop(number, ())):
                left -= one.finish_reason is not None
                yield number, one, prompts[number]

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, request in enumerate(self._requests):
            handle = self._engine.submit(request)
            self._handles.append(handle)

            def deliver(event: Event, number: int = number) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody to tell
                    loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

            handle.on_event(deliver)

    def _cancel(self) -> None:
        for handle in self._handles:
            if not handle.finished:
                handle.cancel()


def _refused(error: Exception) -> Exception:
    """What a client is told of a request that could not be submitted."""
    if isinstance(error, EngineBusy):
        return busy(str(error))
    if isinstance(error, EngineClosed):
        return shutting_down()
    return invalid(str(error)) if isinstance(error, RequestRefused) else error


def _given_up(event: Event) -> ApiError:
    if event.finish_reason == "cancelled":  # not by us: the engine has closed
        return shutting_down()
    return ApiError(500, f"the engine gave up this request: {event.message or 'no reason is known'}")
