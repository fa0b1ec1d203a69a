"""Cross-entropy over a vocabulary, the loss of every objective that predicts tokens (Shannon 1951; Bengio et al. 2003).

For a position with logits z over a vocabulary of V tokens and target t:

    nll        lse(z) - z_t                                    lse(z) = log sum_v exp z_v
    minimised  lse(z) - (1 - e) z_t - e mean_v z_v + c lse(z)^2

e is label smoothing (Szegedy et al. 2016, 1512.00567, section 7: the target distribution becomes (1 - e) one-hot +
e/V), c the z-loss, which keeps logits from drifting (Chowdhery et al. 2022, 2204.02311, section 5; they use 1e-4).
Everything here is float32 whatever the model computes in.

The logits of a batch are the largest array of a training step: 8 x 1024 tokens by 50,257 entries are 1.6 GB, and
autodiff keeps two or three of them. Here they exist one chunk at a time, and since the gradient with respect to the
logits is known in closed form,

    d minimised / d z = (1 + 2 c lse) softmax(z) - (1 - e) onehot(t) - e/V,

it is pulled back through the head as soon as a chunk's logits are there. What is kept for the backward pass is the
gradient of the hidden states and of the head, no logits, and the head's matmul is not repeated as it would be under
rematerialisation: 6 V D FLOPs a token instead of 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.objectives.base import LossParts

IGNORED = -100
"""Label of a position that is not counted."""

# Logits in a chunk, and the fewest tokens in one (each chunk adds the head's whole gradient to the running sum). CPU:
# 8 MB stay in the cache; forward and backward of 2,048 tokens x 384 x 8,192 took 119 ms on 2 cores, 134 ms in one
# chunk, 158 ms as autodiff of log_softmax. Accelerators want many rows: 512 MB.
_CHUNK = {"cpu": (2**21, 256)}
_CHUNK_ACCELERATOR = (2**27, 1024)

# Pulled back in place of 1 in float16, whose smallest normal number is 6e-5: most probabilities are below it. To the
# head less where a chunk has more than so many tokens: its gradient is a sum over them, which must stay below float16's
# largest number, 65,504, whatever the loss is scaled by later (here: all of one label, and states of size 16).
_FLOAT16_UNIT, _FLOAT16_TOKENS = 1024.0, 4

Project = Callable[[jax.Array], jax.Array]


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """(what is minimised, plain nll) of every position, in float32; positions labelled -100 are 0 in both."""
    terms = _Terms.of(logits.astype(jnp.float32), labels)
    counted = labels != IGNORED
    objective = terms.objective(label_smoothing, z_loss)
    return jnp.where(counted, objective, 0.0), jnp.where(counted, terms.nll, 0.0)


def chunked_cross_entropy(
    hidden: Float[Array, "B S D"],
    project: Project,
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"] | Int[Array, "B S"] | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> LossParts:
    """Cross-entropy of `project(hidden)` against the labels, with never more than a chunk of logits in memory.

    Args:
        hidden: input of the head.
        project: the head, (b, s, D) to logits (b, s, V). Gradients flow to the arrays it closes over.
        labels: the target of each position, -100 where it is not counted.
        weights: factor on each position's loss and on its share of the count.
        label_smoothing: probability spread evenly over the vocabulary.
        z_loss: factor on the squared log-normaliser.
        chunk: positions of each row scored at once.

    Returns:
        Sums in float32. Only `total` has a gradient.
    """
    weights = weights_of(labels, weights)
    chunks = _in_chunks(hidden, project, labels, weights, chunk)
    # The head's parameters become arguments, so that a custom gradient can be given for them.
    pure_project, params = jax.closure_convert(project, chunks[0][0])
    total, nll, correct = _summed(pure_project, label_smoothing, z_loss, chunks, tuple(params))
    metrics = {"loss": nll, "accuracy": correct}
    if label_smoothing or z_loss:
        metrics["objective"] = total
    metrics = jax.lax.stop_gradient(metrics)
    return LossParts(total=total, count=jnp.sum(weights), metrics=metrics)


@dataclass(frozen=True)
class _Terms:
    """What cross-entropy, its variants and its gradient are made of, for every position."""

    logits: jax.Array
    is_target: jax.Array  # (..., V): a comparison fuses into the reductions, where a gather's gradient is a scatter
    top: jax.Array
    lse: jax.Array
    target: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, labels: jax.Array) -> "_Terms":
        is_target = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        lse = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
        target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return cls(logits, is_target, top, lse, target)

    @property
    def nll(self) -> jax.Array:
        return self.lse - self.target

    @property
    def correct(self) -> jax.Array:
        return self.target >= self.top

    def objective(self, label_smoothing: float, z_loss: float) -> jax.Array:
        smooth = self.nll
        if label_smoothing:
            smooth = self.lse - (1 - label_smoothing) * self.target - label_smoothing * jnp.mean(self.logits, axis=-1)
        return smooth + z_loss * jnp.square(self.lse) if z_loss else smooth

    def add_to(self, sums: "Sums", weights: jax.Array, label_smoothing: float, z_loss: float) -> "Sums":
        """The sums with these positions, weighted, added."""
        each = (self.objective(label_smoothing, z_loss), self.nll, self.correct)
        added = [jnp.sum(weights * x) for x in each]
        return sums[0] + added[0], sums[1] + added[1], sums[2] + added[2]

    def gradient(self, label_smoothing: float, z_loss: float) -> jax.Array:
        """d objective / d logits."""
        softmax = jnp.exp(self.logits - self.lse[..., None])
        if z_loss:
            softmax = (1 + 2 * z_loss * self.lse[..., None]) * softmax
        target = jnp.where(self.is_target, 1.0 - label_smoothing, 0.0)
        return softmax - target - label_smoothing / self.logits.shape[-1]


def weights_of(
    labels: Int[Array, "*B"], weights: Float[Array, "*B"] | Int[Array, "*B"] | None = None
) -> Float[Array, "*B"]:
    """1 where a label is counted, times its weight; 0 elsewhere."""
    counted = (labels != IGNORED).astype(jnp.float32)
    return counted if weights is None else counted * weights.astype(jnp.float32)


def default_chunk(batch_size: int, vocab_size: int, platform: str, *, sharers: int = 1) -> int:
    """Positions of every row that are scored at once where nothing else is asked for.

    Args:
        batch_size: rows, over all devices.
        vocab_size: entries that a device scores.
        platform: "cpu", or any other for an accelerator.
        sharers: devices that share the positions of a batch. A chunk fills the memory of each: smaller ones would be
            more, and every chunk's gradient of the head is summed over the devices.
    """
    elements, tokens = _CHUNK.get(platform, _CHUNK_ACCELERATOR)
    return math.ceil(sharers * max(elements // vocab_size, tokens) / batch_size)


def _in_chunks(
    hidden: jax.Array, project: Project, labels: jax.Array, weights: jax.Array, chunk: int | None
) -> "Chunk":
    """The three arrays with a leading dimension of chunks; chunk n holds the positions n, n + num, n + 2 num, ...

    Chunks cut the sequence, not the batch, and take every num-th position: a batch or a sequence that is split over
    devices then gives every device an equal share of every chunk, without moving anything.
    """
    batch_size, length = labels.shape
    if chunk is None:
        vocab_size = jax.eval_shape(project, hidden[:, :1]).shape[-1]
        chunk = default_chunk(batch_size, vocab_size, jax.default_backend())
    num = math.ceil(length / chunk)
    if num == 1:
        return hidden[None], labels[None], weights[None]
    padding = -length % num

    def one(x: jax.Array, fill: float) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch_size, -1, num, *x.shape[2:]), 2, 0)

    return one(hidden, 0.0), one(labels, IGNORED), one(weights, 0.0)


Sums = tuple[jax.Array, jax.Array, jax.Array]
"""Of what is minimised, of the plain nll, of how often the target scored highest."""
Chunk = tuple[jax.Array, jax.Array, jax.Array]
"""hidden, labels, weights."""


def _sum(
    project: Callable[..., jax.Array],
    label_smoothing: float,
    z_loss: float,
    chunks: Chunk,
    params: tuple[jax.Array, ...],
) -> Sums:
    def one(sums: Sums, chunk: Chunk) -> tuple[Sums, None]:
        hidden, labels, weights = chunk
        terms = _Terms.of(project(hidden, *params).astype(jnp.float32), labels)
        return terms.add_to(sums, weights, label_smoothing, z_loss), None

    return _scan(one, _zero_sums(), chunks)[0]


def _sum_forward(
    project: Callable[..., jax.Array],
    label_smoothing: float,
    z_loss: float,
    chunks: Chunk,
    params: tuple[jax.Array, ...],
) -> tuple[Sums, Any]:
    """The sums, and the gradient of the first of them with respect to hidden states and params."""
    unit, unit_params = pull_back_units(chunks[0])

    def one(carry: tuple[Sums, Any], chunk: Chunk) -> tuple[tuple[Sums, Any], jax.Array]:
        sums, d_params = carry
        hidden, labels, weights = chunk
        logits, pull_back = jax.vjp(lambda h, p: project(h, *p).astype(jnp.float32), hidden, params)
        terms = _Terms.of(logits, labels)
        d_logits = weights[..., None] * terms.gradient(label_smoothing, z_loss)
        d_hidden, d_chunk = pull_back(unit * d_logits)
        if unit_params != unit:  # neither call's other half is computed
            _, d_chunk = pull_back(unit_params * d_logits)
        # float32: in bfloat16 every addition would round the running sum to 8 bits
        d_params = jax.tree.map(lambda total, part: total + part, d_params, d_chunk)
        return (terms.add_to(sums, weights, label_smoothing, z_loss), d_params), d_hidden

    zeros = tuple(jnp.zeros(p.shape, jnp.float32) for p in params)
    (sums, d_params), d_hidden = _scan(one, (_zero_sums(), zeros), chunks)
    dtypes = tuple(jnp.zeros(0, p.dtype) for p in params)
    return sums, (d_hidden, d_params, dtypes)


def _sum_backward(
    project: Callable[..., jax.Array], label_smoothing: float, z_loss: float, residuals: Any, d_sums: Sums
) -> tuple[Any, Any]:
    d_hidden, d_params, dtypes = residuals
    unit, unit_params = pull_back_units(d_hidden)
    scale = d_sums[0]  # the other sums have no gradient
    d_params = tuple((scale / unit_params * d).astype(like.dtype) for d, like in zip(d_params, dtypes, strict=True))
    return ((scale / unit * d_hidden).astype(d_hidden.dtype), None, None), d_params


def pull_back_units(hidden: Float[Array, "N B S D"]) -> tuple[float, float]:
    """What is pulled back in place of 1 to the hidden states of a chunk, and to the head."""
    if hidden.dtype != jnp.float16:
        return 1.0, 1.0
    tokens = math.prod(hidden.shape[1:3])
    # A power of two, so that nothing is rounded.
    return _FLOAT16_UNIT, min(_FLOAT16_UNIT, 2.0 ** math.floor(math.log2(_FLOAT16_UNIT * _FLOAT16_TOKENS / tokens)))


_summed = jax.custom_vjp(_sum, nondiff_argnums=(0, 1, 2))
_summed.defvjp(_sum_forward, _sum_backward)


def _zero_sums() -> Sums:
    zero = jnp.zeros((), jnp.float32)
    return zero, zero, zero


def _scan(function: Callable[[Any, Chunk], tuple[Any, Any]], init: Any, chunks: Chunk) -> tuple[Any, Any]:
    """jax.lax.scan, without its loop where there is one chunk only."""
    if chunks[1].shape[0] > 1:
        return jax.lax.scan(function, init, chunks)
    carry, y = function(init, (chunks[0][0], chunks[1][0], chunks[2][0]))
    return carry, jax.tree.map(lambda x: x[None], y)
