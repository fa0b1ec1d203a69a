"""One request from its first byte to its last: body, limits, errors, and the client that may leave at any time."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from llmlab.infer.server.errors import ApiError
from llmlab.infer.server.fields import parse_json
from llmlab.infer.server.gate import ClientGone
from llmlab.infer.server.service import Service

_LOG = logging.getLogger("llmlab.serve")
CLIENT_GONE = 499
"""What metrics and logs have where the client left before the answer."""


class Sender:
    """What is sent to one client: an answer in one piece, or a stream of events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.streaming = False
        """Whether a stream has begun."""

    async def whole(self, answer: Mapping[str, Any]) -> None:
        """A JSON answer."""
        body = json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self) -> None:
        """Begins a stream of server-sent events."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # proxies would keep events until there are many
        ]
        self.streaming = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, data: Mapping[str, Any] | str) -> None:
        """One event: JSON, or a word."""
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
        await self._piece(f"data: {text}\n\n")

    async def waiting(self) -> None:
        """A comment, which clients ignore: shows proxies that the connection is alive."""
        await self._piece(": waiting\n\n")

    async def end(self) -> None:
        """Ends the stream."""
        await self.event("[DONE]")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Tells of an error: as the answer or, in a stream that has begun, as its last event."""
        if not self.streaming:
            return await error.response()(scope, receive, self._send)
        await self._piece(f"data: {json.dumps(error.body())}\n\n")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _piece(self, text: str) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})


Work = Callable[[Any, Sender], Awaitable[None]]
"""Answers a body."""


async def conduct(service: Service, scope: Scope, receive: Receive, send: Send, work: Work) -> None:
    """Reads a body and does the work for it, within the server's limits; whatever happens, the client is told.

    Raises:
        ClientGone: there is no client any more.
    """
    sender = Sender(send)
    try:
        with service.gate.entered():
            body = await read_json(Request(scope, receive), service)
            await service.gate.while_connected(receive, lambda: work(body, sender))
    except ApiError as error:
        await sender.fail(error, scope, receive)
    except ClientDisconnect:
        raise ClientGone from None
    except ClientGone:
        raise
    except Exception:  # a bug of ours: the log has it, the client is told no more than that
        _LOG.exception("a request failed")
        await sender.fail(ApiError(500, "the server failed; its log says how"), scope, receive)


async def read_json(request: Request, service: Service) -> Any:
    """The body of a request as JSON.

    Raises:
        ApiError: it is too large, too slow, not declared as JSON, or not JSON.
        ClientDisconnect: the client left in the middle of it.
    """
    config = service.config
    # Only a declared JSON body makes browsers ask for permission first (CORS): without this check any page on the web
    # could use a server on the machine of its reader.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")
    too_large = ApiError(413, f"the body has more than {config.max_body_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > config.max_body_bytes:
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(config.body_seconds):
            async for piece in request.stream():
                pieces.append(piece)
                size += len(piece)
                if size > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        headers = {"x-should-retry": "false"}
        raise ApiError(408, f"the body did not arrive within {config.body_seconds:g} s", headers=headers) from None
    return parse_json(b"".join(pieces))
