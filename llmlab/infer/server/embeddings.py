"""/v1/embeddings: texts, or tokens, as vectors."""

import asyncio
import base64
import time
from typing import Any

import numpy as np
from starlette.types import Receive, Scope, Send

from llmlab.infer.server.conduct import Sender, conduct
from llmlab.infer.server.embedder import Embedder
from llmlab.infer.server.errors import invalid, too_long
from llmlab.infer.server.fields import Fields, shown
from llmlab.infer.server.gate import limited
from llmlab.infer.server.plans import check_model, seconds_of
from llmlab.infer.server.sampling_fields import is_token
from llmlab.infer.server.service import Service

_MAX_INPUTS = 2048  # as OpenAI has it


class Embeddings:
    """The endpoint, as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await conduct(self._service, scope, receive, send, self._answer)

    async def _answer(self, body: Any, sender: Sender) -> None:
        service, start = self._service, time.perf_counter()
        embedder = service.embedder
        if embedder is None:
            raise invalid(f"the model {shown(service.config.name)} has no embeddings", "model")
        fields = Fields(body)
        check_model(fields, service)
        given = fields.take("input")
        format_ = fields.text("encoding_format", max_length=16, choices=("float", "base64")) or "float"
        dimensions = fields.integer("dimensions", None, 1, 2**31 - 1)
        fields.text("user", max_length=512)
        seconds = seconds_of(fields, service)
        fields.done()
        async with limited(seconds):
            rows = await asyncio.to_thread(_rows, given, embedder, service)
            vectors_BD = await asyncio.to_thread(embedder.embed, rows)
        if dimensions is not None and dimensions != vectors_BD.shape[1]:
            message = f"the vectors have {vectors_BD.shape[1]} dimensions, and mean something only with all of them"
            raise invalid(message, "dimensions")
        tokens = sum(map(len, rows))
        service.metrics.request_done(time.perf_counter() - start, [])
        await sender.whole(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": index, "embedding": _written(vector_D, format_)}
                    for index, vector_D in enumerate(vectors_BD)
                ],
                "model": service.config.name,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


def _written(vector_D: np.ndarray, format_: str) -> str | list[float]:
    """A vector as numbers, or as base64 of its little-endian float32."""
    if format_ == "float":
        return vector_D.astype(float).tolist()
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()


def _rows(given: Any, embedder: Embedder, service: Service) -> list[list[int]]:
    """Tokens of each input: a text, several texts, the tokens of one text, or those of several."""
    vocab_size = service.tokenizer.vocab_size
    if given is None:
        raise invalid("input is missing", "input", "missing_required_parameter")
    if isinstance(given, str) or (isinstance(given, list) and given and isinstance(given[0], int)):
        given = [given]
    if not isinstance(given, list) or not 0 < len(given) <= _MAX_INPUTS:
        raise invalid(f"input must be 1 to {_MAX_INPUTS} strings or lists of token ids", "input")
    longest = min(embedder.max_length, service.config.max_prompt_tokens or embedder.max_length)
    rows = [
        one if isinstance(one, list) else embedder.encode([one])[0] if isinstance(one, str) else None for one in given
    ]
    for number, row in enumerate(rows):
        if row is None or not all(is_token(index, vocab_size) for index in row):
            raise invalid(
                f"input[{number}] is neither a string nor a list of token ids (0 to {vocab_size - 1})", "input"
            )
        if not row:
            raise invalid(f"input[{number}] is empty", "input")
        if len(row) > longest:
            raise too_long(f"input[{number}] has {len(row)} tokens; at most {longest} are taken", "input")
    return [row for row in rows if row is not None]
