"""Normalisation: keep the scale of activations fixed so that depth and learning rate stay independent.

    LayerNorm   y = g (x - mean(x)) / sqrt(var(x) + eps) + b      Ba, Kiros and Hinton 2016 (1607.06450)
    RMSNorm     y = g x / sqrt(mean(x^2) + eps)                   Zhang and Sennrich 2019 (1910.07467)
    BatchNorm   as LayerNorm, mean and var over the tokens of the batch instead of the embedding
                                                                  Ioffe and Szegedy 2015 (1502.03167)
    NoNorm      y = g x + b                                       Sun et al. 2020 (2004.02984, MobileBERT)

LayerNorm and RMSNorm look at one token and cost O(D) a token, bound by memory traffic. RMSNorm drops the mean and
the bias, one pass less, at no measured loss of quality. BatchNorm makes a token's output depend on the other tokens
of the batch, future ones included; it is here for the classic comparison, not for language models that must be
causal. NoNorm has no statistics to wait for, for small devices; it trains only where a normalised teacher holds the
states in place. All statistics are computed in float32 whatever the input's dtype.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Norm
from llmlab.nn.platform import platform


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """LayerNorm (Ba et al. 2016): subtract the mean, divide by the standard deviation over the embedding."""

    epsilon: float = 1e-5
    """Added to the variance."""
    bias: bool = True
    """Whether to add a learned shift (PaLM has none)."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "LayerNormLayer":
        return LayerNormLayer(self, dim)


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """RMSNorm (Zhang and Sennrich 2019): divide by the root mean square over the embedding."""

    epsilon: float = 1e-6
    """Added to the mean square."""
    offset: float = 0.0
    """Added to the learned gain; 1 where gains are stored around zero, so that weight decay pulls them to 1 (Gemma)."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "RMSNormLayer":
        return RMSNormLayer(self, dim)


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Norm):
    """BatchNorm over tokens (Ioffe and Szegedy 2015): statistics over every token of the batch, per channel."""

    epsilon: float = 1e-5
    """Added to the variance."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "BatchNormLayer":
        return BatchNormLayer(self, dim)


@dataclass(frozen=True, kw_only=True)
class NoNorm(Norm):
    """A gain and a shift per channel in a norm's place (Sun et al. 2020, section 3.4)."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "NoNormLayer":
        return NoNormLayer(dim)


class NoNormLayer(nnx.Module):
    """See NoNorm."""

    def __init__(self, dim: int) -> None:
        self.scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return x * self.scale[...] + self.bias[...]


class LayerNormLayer(nnx.Module):
    """See LayerNorm."""

    def __init__(self, config: LayerNorm, dim: int) -> None:
        self.epsilon = config.epsilon
        self.scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",)) if config.bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        bias = None if self.bias is None else self.bias[...]
        return _normalise(x, self.scale[...], bias, self.epsilon, True)


class RMSNormLayer(nnx.Module):
    """See RMSNorm."""

    def __init__(self, config: RMSNorm, dim: int) -> None:
        self.epsilon = config.epsilon
        self.offset = config.offset
        self.scale = nnx.Param(jnp.full(dim, 1.0 - config.offset), axes=("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.scale[...]
        if self.offset:
            scale = scale.astype(jnp.float32) + self.offset  # bfloat16 would round 1.001 to 1
        return _normalise(x, scale, None, self.epsilon, False)


class BatchNormLayer(nnx.Module):
    """See BatchNorm. Statistics are always those of the batch at hand: modules hold no state."""

    def __init__(self, config: BatchNorm, dim: int) -> None:
        self.epsilon = config.epsilon
        self.scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(dim), axes=("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        tokens = tuple(range(x.ndim - 1))
        mean = jnp.mean(x32, axis=tokens, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), axis=tokens, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalise(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], bias: Float[Array, "D"] | None, epsilon: float, centre: bool
) -> Float[Array, "*B D"]:
    """LayerNorm with `centre`, RMSNorm without. Its backward pass is written out: see `_backward`."""
    return _forward(x, scale, bias, epsilon, centre)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float, centre: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    normed, _ = _statistics(x, epsilon, centre)
    y = normed * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, scale, bias)


def _backward(
    epsilon: float, centre: bool, residuals: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """dx = (d - mean(d) - n mean(d n)) / sigma with d = g dy and n the normalised x; no mean(d) for RMSNorm.

    Only x is kept from the forward pass. On CPU a barrier stops XLA from fusing this arithmetic into the strided
    copies of the matmuls that consume dx (a tenth of a training step).
    """
    x, scale, bias = residuals
    normed, inverse = _statistics(x, epsilon, centre)
    dy32 = dy.astype(jnp.float32)
    tokens = tuple(range(x.ndim - 1))
    d = dy32 * scale
    dx = d - normed * jnp.mean(d * normed, axis=-1, keepdims=True)
    if centre:
        dx = dx - jnp.mean(d, axis=-1, keepdims=True)
    dx = (dx * inverse).astype(x.dtype)
    if platform() == "cpu":
        dx = jax.lax.optimization_barrier(dx)
    dscale = jnp.sum(dy32 * normed, axis=tokens).astype(scale.dtype)
    dbias = None if bias is None else jnp.sum(dy32, axis=tokens).astype(bias.dtype)
    return dx, dscale, dbias


_normalise.defvjp(_forward, _backward)


def _statistics(x: jax.Array, epsilon: float, centre: bool) -> tuple[jax.Array, jax.Array]:
    """x normalised, and the inverse of what it was divided by; float32."""
    x32 = x.astype(jnp.float32)
    if centre:
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return x32 * inverse, inverse
