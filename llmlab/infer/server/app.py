"""The application: a service behind its endpoints, as ASGI servers run it."""

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llmlab.infer.server.chat import Chat
from llmlab.infer.server.completion import Completions
from llmlab.infer.server.config import ServerConfig
from llmlab.infer.server.embedder import Embedder
from llmlab.infer.server.embeddings import Embeddings
from llmlab.infer.server.errors import ApiError
from llmlab.infer.server.front import Front
from llmlab.infer.server.gate import Gate
from llmlab.infer.server.generation import Generation
from llmlab.infer.server.metrics import CONTENT_TYPE, Metrics
from llmlab.infer.server.page import chat_page
from llmlab.infer.server.plans import no_model
from llmlab.infer.server.service import Generator, Service
from llmlab.infer.server.spelling import Spelling
from llmlab.infer.server.templates import ChatTemplate
from llmlab.tokenizers import Tokenizer


def make_service(
    config: ServerConfig,
    tokenizer: Tokenizer,
    engine: Generator | None,
    *,
    embedder: Embedder | None = None,
    template: ChatTemplate | None = None,
) -> Service:
    """A model ready to be served.

    Args:
        config: name, address, limits.
        tokenizer: the model's.
        engine: started; None for a model that does not write text.
        embedder: None for no embeddings.
        template: for chats; the plain one by default.
    """
    gate = Gate(config.max_concurrent)
    return Service(
        config=config,
        tokenizer=tokenizer,
        engine=engine,
        embedder=embedder,
        template=template or ChatTemplate(tokenizer),
        spelling=Spelling(tokenizer),
        gate=gate,
        metrics=Metrics(engine, gate),
        created=int(time.time()),
    )


def make_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    page, policy = chat_page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }

    async def show_page(_: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    async def health(_: Request) -> Response:
        draining = service.gate.draining
        return JSONResponse(
            {"status": "draining" if draining else "ok"}, HTTPStatus.SERVICE_UNAVAILABLE if draining else 200
        )

    def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != service.config.name:
            raise no_model(name, service)
        return JSONResponse(model_card(service))

    endpoints: Mapping[str, Any] = {
        "/v1/completions": Generation(service, Completions()),
        "/v1/chat/completions": Generation(service, Chat()),
        "/v1/embeddings": Embeddings(service),
    }
    pages = {"/": show_page, "/health": health, "/metrics": metrics, "/v1/models": models}
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in pages.items()),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _no_route, ApiError: _api_error},
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body with some clients
    return Front(app, service.config, service.metrics, frozenset({*endpoints, *pages}))


def model_card(service: Service) -> dict[str, Any]:
    """What /v1/models says of the model; `max_model_len` is named as vLLM has it."""
    return {
        "id": service.config.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llmlab",
        "max_model_len": None if service.engine is None else service.engine.config.max_length,
        "chat_template": "plain" if service.template.is_plain else "model",
    }


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"there is no {request.method} {request.url.path}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} has no {request.method}"
    return ApiError(error.status_code, message, code="unknown_url", headers=error.headers).response()


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()
