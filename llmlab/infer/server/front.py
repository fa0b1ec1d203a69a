"""The door: what is decided about a request before its endpoint sees it.

name         every request gets an id, which its answer and the log carry
host         a server on loopback answers to loopback's names only: a page on the web that has its own name point
             to 127.0.0.1 (DNS rebinding) gets nothing
key          compared in constant time, so that its bytes cannot be found one by one
origin       pages of other origins may not read answers, unless they are listed (CORS)
"""

import hmac
import logging
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlab.infer.server.conduct import CLIENT_GONE
from llmlab.infer.server.config import LOOPBACK, ServerConfig
from llmlab.infer.server.errors import ApiError
from llmlab.infer.server.gate import ClientGone
from llmlab.infer.server.metrics import Metrics

_LOG = logging.getLogger("llmlab.serve.access")
_OPEN = ("/", "/health")
"""What needs no key: the page, which asks for one, and the sign of life."""


class Front:
    """An ASGI application around the endpoints'."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, endpoints: frozenset[str]) -> None:
        """`endpoints` are the paths that metrics tell apart."""
        self._app, self._config, self._metrics, self._endpoints = app, config, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or not."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), CLIENT_GONE
        headers = Headers(scope=scope)
        added = {
            "x-request-id": f"req-{secrets.token_hex(8)}",
            "x-content-type-options": "nosniff",
            **self._cors(headers),
        }

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(name.encode(), value.encode()) for name, value in added.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _permission(sent)
            else:
                await self._app(scope, receive, sent)
        except ApiError as error:
            await error.response()(scope, receive, sent)
        except ClientGone:
            status = CLIENT_GONE
        finally:
            path = scope["path"] if scope["path"] in self._endpoints else "other"
            self._metrics.answered(path, status)
            _LOG.info(
                "%s %s %s %d %.3fs", added["x-request-id"], scope["method"], path, status, time.perf_counter() - start
            )

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises an ApiError for a request that may not come in."""
        config = self._config
        if config.local:
            name = _host_name(headers.get("host", ""))
            if name not in (*LOOPBACK, *config.allowed_hosts):
                raise ApiError(403, "this server answers to loopback's names only; allow others with --allow-host")
        asks_permission = scope["method"] == "OPTIONS"  # browsers send no key with that question
        if config.api_key is None or scope["path"] in _OPEN or asks_permission:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # latin-1 is what headers are in, and what they can always be written back in.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("latin-1"), config.api_key.encode()
        ):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _cors(self, headers: Headers) -> Mapping[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._config.cors_origins:
            return {}
        allowed = {"vary": "Origin"}
        if origin in self._config.cors_origins:
            allowed |= {
                "access-control-allow-origin": origin,
                "access-control-allow-methods": "GET, POST",
                "access-control-allow-headers": "authorization, content-type",
                "access-control-max-age": "600",
            }
        return allowed


async def _permission(send: Send) -> None:
    """The answer to a browser's question; what is allowed is in the headers that every answer has."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _host_name(host: str) -> str:
    """A Host header without its port; the brackets of an IPv6 address go as well."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
