"""Tiny models that write something, and what they compute when they are run whole."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.models import bart, gpt2, llama, mbart, mistral, t5
from llmlab.models.config import Untied
from llmlab.nn.module import merge, split
from tests.drawing import built

VOCAB = 17


def tiny(family: str, vocab_size: int = VOCAB, embed_dim: int = 16) -> Any:
    """The config of a model of two layers with a head of its own."""
    sizes: dict[str, Any] = {"embed_dim": embed_dim, "num_layers": 2, "num_heads": 2, "vocab_size": vocab_size}
    if family == "llama":
        return llama.llama(**sizes, num_kv_heads=1, hidden_dim=24)
    if family == "mistral":
        return mistral.mistral(**sizes, num_kv_heads=1, hidden_dim=24, window=4)
    if family == "gpt2":
        return gpt2.gpt2(**sizes, max_length=24, head=Untied())
    if family == "t5":
        return t5.t5(**sizes, head_dim=5, hidden_dim=24, num_buckets=8, max_distance=7, head=Untied())
    return {"bart": bart.bart, "mbart": mbart.mbart}[family](**sizes, max_length=24, tied=False)


def randomised(config: Any, seed: int = 2, scale: float = 1.5) -> Any:
    """All matrices large: a fresh model would write one token again and again."""
    graphdef, params = split(built(config, std=0))
    rng = np.random.default_rng(seed)

    def drawn(path: Any, leaf: jax.Array) -> jax.Array:
        matrix = str(path[-1].key) in ("kernel", "table")
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32) if matrix else leaf

    return merge(graphdef, jax.tree_util.tree_map_with_path(drawn, params))


def whole(model: Any, source: Sequence[int] | None = None) -> Callable[[np.ndarray], Any]:
    """Runs the model on whole rows (N, S), each with this source where there is one: logits and states (N, S, ...)."""
    graphdef, params = split(model)

    @jax.jit
    def forward(params: Any, ids: jax.Array, source_ids: jax.Array) -> Any:
        model = merge(graphdef, params)
        if source is None:
            return model(ids)
        return model(jnp.broadcast_to(source_ids, (len(ids), len(source_ids))), decoder_input_ids=ids)

    return lambda ids: jax.tree.map(
        np.asarray, forward(params, jnp.asarray(ids), jnp.asarray(source or [0], jnp.int32))
    )


def next_log_probabilities(
    model: Any, length: int, source: Sequence[int] | None = None
) -> Callable[[Sequence[int]], np.ndarray]:
    """Log-probabilities (V,) after a prefix of at most `length` tokens, float64, from whole forward passes."""
    run, known = whole(model, source), {}

    def after(prefix: Sequence[int]) -> np.ndarray:
        if tuple(prefix) not in known:
            padded = np.array([[*prefix, *[0] * (length - len(prefix))]])
            known[tuple(prefix)] = log_softmax(run(padded).logits[0, len(prefix) - 1])
        return known[tuple(prefix)]

    return after


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension, float64."""
    logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def programs(function: Any) -> int:
    """How many programs a jitted function has compiled."""
    return function._cache_size()
