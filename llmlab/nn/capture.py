"""What goes on inside a stack of layers, as return values: states, attention, queries, keys and values of every layer.

    with capturing("state", "attention"):
        hidden = model.hidden_states(input_ids)
    hidden.auxiliary["capture/state"]           (L, B, S, D), first layer to last

A layer reports what was asked for in its auxiliary output, and the stack gathers reports whatever it is applied by,
scan or unrolled, with remat or without: nothing is kept in a module. Models need no argument for it; in an
encoder-decoder names begin with the side, "decoder/capture/state".

    input        the stack's input (1, B, S, D), the embedding
    state        output of each layer (L, B, S, D)
    scores       scaled products of queries and keys before the softmax, 0 where a key is not seen (L, B, N, S, T)
    attention    their log-softmax over the keys that are seen, -inf elsewhere (L, B, N, S, T)
    query, key, value   heads, as attention multiplies them (L, B, S, heads, head_dim)
    allowed      which keys a query sees (L, B or 1, 1, S, T)

Queries and keys are projected once more for that; where a layer is not looped over, the compiler sees that they are
the same. Attention's own kernel is not asked, and forms no matrix of weights it would not form.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.nn.attention import AttentionLayer
from llmlab.nn.bottleneck import BottleneckLayer
from llmlab.nn.config import Auxiliary, Context
from llmlab.nn.kernels.reference import attention_logits
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.wiring import ParallelLayer, SerialLayer

What = Literal["input", "state", "scores", "attention", "query", "key", "value", "allowed"]
PREFIX = "capture/"
_OF_ATTENTION = frozenset({"scores", "attention", "query", "key", "value", "allowed"})

_wanted: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("captured", default=frozenset())


@contextlib.contextmanager
def capturing(*what: What) -> Iterator[None]:
    """While tracing inside, stacks report this of their layers."""
    token = _wanted.set(frozenset(what))
    try:
        yield
    finally:
        _wanted.reset(token)


def captured_input(x_BSD: Float[Array, "B S D"]) -> Auxiliary:
    """What is reported of a stack's input."""
    return {f"{PREFIX}input": x_BSD[None]} if "input" in _wanted.get() else {}


def captured(layer: Any, x_BSD: Float[Array, "B S D"], y_BSD: Float[Array, "B S D"], context: Context) -> Auxiliary:
    """What is reported of a layer.

    Args:
        layer: it.
        x_BSD: its input.
        y_BSD: its output.
        context: what else it was given.

    Raises:
        ValueError: attention was asked for, and it has none that could be looked into.
    """
    wanted = _wanted.get()
    found: dict[str, jax.Array] = {"state": y_BSD} if "state" in wanted else {}
    if wanted & _OF_ATTENTION:
        found |= _of_attention(layer, x_BSD, context, wanted)
    return {f"{PREFIX}{name}": array for name, array in found.items()}


def _of_attention(layer: Any, x_BSD: jax.Array, context: Context, wanted: frozenset[str]) -> dict[str, jax.Array]:
    mixer, (q_BSNH, k_BTKH, v_BTKH) = _projected(layer, x_BSD, context)
    found = {"query": q_BSNH, "key": k_BTKH, "value": v_BTKH}
    mask, bias = mixer.restrictions(context)
    scoring = Scoring(mask=mask, bias=bias, scale=mixer.scale, softcap=mixer.config.softcap)
    if wanted & {"scores", "attention"}:
        logits, allowed = attention_logits(q_BSNH, k_BTKH, scoring)
        found["scores"] = jnp.where(allowed, logits, 0.0)
        found["attention"] = jnp.where(allowed, jax.nn.log_softmax(logits, axis=-1), -jnp.inf)
    if "allowed" in wanted:
        index = np.arange(x_BSD.shape[1], dtype=np.int32)
        found["allowed"] = scoring.allowed(index, index)
    return {name: array for name, array in found.items() if name in wanted}


def _projected(layer: Any, x_BSD: jax.Array, context: Context) -> tuple[AttentionLayer, tuple[jax.Array, ...]]:
    """A layer's attention, and its queries, keys and values."""
    match layer:
        case BottleneckLayer():
            return layer.mixer, layer.placed(x_BSD)
        case SerialLayer(mixer=AttentionLayer() as mixer):
            return mixer, mixer.placed(layer.mixer_branch.normed(x_BSD), context)
        case ParallelLayer(mixer=AttentionLayer() as mixer):
            return mixer, mixer.placed(x_BSD if layer.norm_mixer is None else layer.norm_mixer(x_BSD), context)
    kind = type(getattr(layer, "mixer", layer)).__name__
    raise ValueError(
        f"attention of a layer with {kind} cannot be captured: it has no matrix of weights over all keys, or one of "
        "its own kind; ask for states, or use layers with Attention"
    )
