"""Small models and engines that the tests of the engine share."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from flax import nnx

from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.engine import Engine
from llmlab.infer.engine.request import Handle, Reply, Request
from llmlab.models.gpt2 import gpt2
from llmlab.models.llama import llama
from llmlab.tokenizers import Bytes, Tokenizer

VOCAB = 259
CONFIG = EngineConfig(
    block_size=4, num_blocks=64, max_rows=4, max_length=64, prefill_chunk=16, steps_per_call=4, max_logprobs=4
)
LLAMA = replace(
    # embeddings of unit size, so that attention is far from uniform and an error in it shows
    llama(embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24, vocab_size=VOCAB),
    embedding_std=1.0,
)
WINDOWED = replace(
    LLAMA,
    pattern=(replace(LLAMA.pattern[0], mixer=replace(LLAMA.pattern[0].mixer, window=5)), LLAMA.pattern[0]),
)
GPT2 = replace(gpt2(embed_dim=16, num_layers=2, num_heads=2, max_length=64, vocab_size=VOCAB), embedding_std=1.0)
CONFIGS = {"llama": LLAMA, "windowed": WINDOWED, "gpt2": GPT2}


@cache
def model(name: str = "llama") -> Any:
    return CONFIGS[name].build(nnx.Rngs(params=1))


@cache
def tokenizer() -> Tokenizer:
    return Bytes().build(None)


def engine(config: EngineConfig = CONFIG, name: str = "llama") -> Engine:
    return Engine(model(name), tokenizer(), config)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, 256, length).tolist())


def run(engine: Engine, limit: int = 1000) -> None:
    for _ in range(limit):
        if not engine.step():
            return
    raise AssertionError("the engine is never idle")


def serve(engine: Engine, requests: Sequence[Request]) -> list[tuple[Reply, ...]]:
    """The samples of every request, all submitted at once; checks that everything is given back."""
    handles = [engine.submit(request) for request in requests]
    run(engine)
    assert_all_free(engine)
    return [handle.replies(timeout=0) for handle in handles]


def assert_all_free(engine: Engine) -> None:
    blocks, stats = engine._scheduler.blocks, engine.stats()
    assert stats.blocks_free == stats.blocks_total
    assert all(blocks.count(block) == 0 for block in range(blocks.num_blocks))
    assert (stats.running, stats.waiting, engine._works, engine._device.host) == (0, 0, {}, {})


def ids(handle: Handle) -> tuple[int, ...]:
    (reply,) = handle.replies(timeout=0)
    return reply.token_ids
