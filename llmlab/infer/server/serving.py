"""Running the application: the socket, signals, and an orderly end.

SIGTERM (what orchestrators send) and Ctrl-C stop the listening at once. Requests under way have `grace_seconds` to
finish; who has not finished then is told so, cancelled at the engine, and the process ends. A second Ctrl-C ends it
without waiting.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from llmlab.infer.server.app import make_app
from llmlab.infer.server.config import ServerConfig
from llmlab.infer.server.service import Service

_AFTERWARDS = 5.0  # seconds for requests that were told of the end to write it to their clients


class Server(uvicorn.Server):
    """One service on one socket."""

    def __init__(self, service: Service, *, on_drain: Callable[[int], None] | None = None) -> None:
        """`on_drain` is told, once, how many requests are being waited for."""
        config = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(config.grace_seconds + _AFTERWARDS) + 1,
            )
        )
        self._service, self._on_drain = service, on_drain
        self.stopped_by: signal.Signals | None = None
        """The signal that ended it."""

    def serve_on(self, listening: socket.socket) -> None:
        """Answers requests until a signal, or `should_exit`, ends it."""
        self.run(sockets=[listening])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handlers of SIGTERM and SIGINT while the server runs, in the main thread only; they are not raised again."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # another thread than the main one gets no signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; Ctrl-C after it ends at once."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.stopped_by = self.stopped_by or signal.Signals(sig)
        self.should_exit = True
        self._service.gate.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the requests under way, tells those that are left, and closes."""
        gate = self._service.gate
        gate.drain()
        if gate.inside and self._on_drain is not None:
            self._on_drain(gate.inside)
        closing = asyncio.ensure_future(self._close_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    async def _close_in_time(self) -> None:
        gate, loop = self._service.gate, asyncio.get_running_loop()
        end = loop.time() + self._service.config.grace_seconds
        while gate.inside and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        gate.close()


def listen(config: ServerConfig) -> socket.socket:
    """A socket on the server's address.

    Raises:
        ValueError: the address is not to be had; the message says what may be.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"--host {config.host} is no address of this machine: {error.strerror}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        way_out = "choose another --port, or 0 for any free one" if config.port else "choose another --host"
        raise ValueError(f"{config.host}:{config.port} cannot be listened on: {error.strerror}; {way_out}") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
