"""A server for tests: in process for most, on a free loopback port where real sockets matter."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.testclient import TestClient

from llmlab.infer.server.app import make_app, make_service
from llmlab.infer.server.config import ServerConfig
from llmlab.infer.server.embedder import Embedder
from llmlab.infer.server.service import Generator, Service
from llmlab.infer.server.serving import Server, listen, url_of
from llmlab.infer.server.templates import ChatTemplate
from llmlab.tokenizers import Tokenizer
from tests.infer.server.fake import TOKENIZER, FakeEngine


def service_of(
    engine: Generator | None,
    *,
    tokenizer: Tokenizer = TOKENIZER,
    embedder: Embedder | None = None,
    template: str | None = None,
    **limits: Any,
) -> Service:
    """A service named "tiny"."""
    config = ServerConfig(**{"name": "tiny", "port": 0, **limits})
    return make_service(config, tokenizer, engine, embedder=embedder, template=ChatTemplate(tokenizer, template))


def client_of(service: Service) -> TestClient:
    """A client that calls the application without sockets."""
    return TestClient(make_app(service), base_url="http://127.0.0.1:8000")


def fake_client(**limits: Any) -> tuple[TestClient, FakeEngine]:
    """A client of a server in front of the fake engine."""
    engine = FakeEngine()
    return client_of(service_of(engine, **limits)), engine


@contextlib.contextmanager
def running(service: Service) -> Iterator[tuple[str, Server, threading.Thread]]:
    """The service on a free port of loopback: its address, the server and its thread."""
    with listen(service.config) as listening:
        server = Server(service)
        thread = threading.Thread(target=server.serve_on, args=(listening,), daemon=True)
        thread.start()
        try:
            until(lambda: server.started)
            yield url_of(listening), server, thread
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
