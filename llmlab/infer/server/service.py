"""What all endpoints share: one served model and its limits."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llmlab.infer.engine.config import EngineConfig, Stats
from llmlab.infer.engine.request import Handle, Request
from llmlab.infer.server.config import ServerConfig
from llmlab.infer.server.embedder import Embedder
from llmlab.infer.server.gate import Gate
from llmlab.infer.server.metrics import Metrics
from llmlab.infer.server.spelling import Spelling
from llmlab.infer.server.templates import ChatTemplate
from llmlab.tokenizers import Tokenizer


@runtime_checkable  # for the checks of types in tests
class Generator(Protocol):
    """What the server needs of an engine."""

    @property
    def config(self) -> EngineConfig:
        """How it was set up; `max_length` is chosen."""
        ...

    def submit(self, request: Request) -> Handle:
        """Takes a request, from any thread; raises RequestRefused."""
        ...

    def stats(self) -> Stats:
        """The engine at this moment."""
        ...


@dataclass(frozen=True)
class Service:
    """One served model."""

    config: ServerConfig
    tokenizer: Tokenizer
    engine: Generator | None
    """None for a model that does not write text (an encoder)."""
    embedder: Embedder | None
    """None for a model whose states are not averaged."""
    template: ChatTemplate
    spelling: Spelling
    gate: Gate
    metrics: Metrics
    created: int
    """Unix time of the start, in seconds."""
