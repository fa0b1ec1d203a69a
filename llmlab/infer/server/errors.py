"""Errors as the OpenAI interface has them: a status, and {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            message: what is wrong, and the way out.
            param: the field of the body that it is about.
            code: what programs tell it by.
            kind: the error's type; by default what the interface says for such a status.
            headers: to be sent with it.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as an answer. Its JSON is ASCII, since a message may quote what is no Unicode."""
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake in a field."""
    return ApiError(400, message, param=param, code=code)


def too_long(message: str, param: str | None) -> ApiError:
    """More tokens than the model, or the server, takes."""
    return invalid(message, param, "context_length_exceeded")


def busy(message: str) -> ApiError:
    """Too much at one time."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def shutting_down() -> ApiError:
    """The server takes no more requests, or gave up one that it could not finish in time."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def out_of_time(seconds: float) -> ApiError:
    """A request took longer than it may; clients should not send it again as it is."""
    message = f"the request took longer than {seconds:g} s; ask for fewer tokens, or less at one time"
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})
