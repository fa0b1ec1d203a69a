"""Who is inside: how many requests are being answered, and what ends them early.

A request's work is raced against three things that may come first: its client goes away, its time is over, the server
gives up waiting for it while shutting down. Whichever it is, the work is cancelled, and cleans up after itself.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from starlette.types import Receive

from llmlab.infer.server.errors import busy, out_of_time, shutting_down


class ClientGone(Exception):
    """The client has closed the connection: there is nobody to tell anything."""


class Gate:
    """Counts requests in and out; used from the event loop alone."""

    def __init__(self, limit: int) -> None:
        """`limit` is the number of requests inside at one time."""
        self._limit = limit
        self._closings: set[asyncio.Future[None]] = set()
        self.inside = 0
        """Requests that are being answered."""
        self.draining = False
        """Whether no more are let in."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """One request, from its body to the end of its answer.

        Raises:
            ApiError: there are too many, or the server is shutting down.
        """
        if self.draining:
            raise shutting_down()
        if self.inside >= self._limit:
            raise busy(f"the server answers {self._limit} requests at one time, and has that many; try again later")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def drain(self) -> None:
        """Lets nobody in any more; who is inside may finish."""
        self.draining = True

    def close(self) -> None:
        """Ends what is still inside: every request is told that the server is shutting down."""
        self.drain()
        for closing in self._closings:
            if not closing.done():
                closing.set_result(None)

    async def while_connected(self, receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
        """Does the work, unless the client goes away or the gate is closed first.

        Args:
            receive: the request's, whose body was read.
            work: to be cancelled in these cases.

        Raises:
            ClientGone: the client went away.
            ApiError: the gate was closed.
        """
        working = asyncio.ensure_future(work())
        gone = asyncio.ensure_future(_gone(receive))
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closings.add(closing)
        racing = (working, gone, closing)
        try:
            await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return await working
            if gone.done():
                raise ClientGone
            raise shutting_down()
        finally:
            self._closings.discard(closing)
            for one in racing:
                one.cancel()
            await asyncio.gather(*racing, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[None]:
    """Ends what is inside after that time, with the ApiError that says so."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise out_of_time(seconds) from None
