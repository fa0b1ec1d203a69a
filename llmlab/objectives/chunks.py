"""A loss over logits without the logits of the whole batch: computed a chunk of positions at a time.

The logits are the largest array of a training step. Here those of a chunk are made, scored, and their gradient is
pulled back through the head while they are there; what is kept for the backward pass is the gradient of the hidden
states and of the head (llmlab.objectives.cross_entropy explains, and does the same by a closed form). The score is any
function of a chunk's logits, differentiated as it stands.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmlab.objectives.cross_entropy import Project, default_chunk, pull_back_units

Sums = dict[str, jax.Array]
Score = Callable[[jax.Array, Any, Any], Sums]
"""(logits (b, s, V), a chunk of the arrays, what all chunks share) -> scalar sums by name, among them "total"."""


def chunked_sums(
    score: Score,
    hidden: Float[Array, "B S D"],
    project: Project,
    arrays: Any,
    shared: Any = (),
    *,
    chunk: int | None = None,
) -> Sums:
    """The sums of `score` over all positions.

    Args:
        score: of a chunk; it must add up over positions, and give 0 where all its arrays are 0.
        hidden: input of the head.
        project: the head, (b, s, D) to logits (b, s, V). Gradients flow to the arrays it closes over.
        arrays: tree of arrays (B, S, ...) that go with the positions; without gradient.
        shared: tree of arrays that every chunk needs whole (a teacher's head); without gradient.
        chunk: positions of each row scored at once; None for what suits the platform.

    Returns:
        Only "total" has a gradient.
    """
    chunks = _in_chunks(hidden, arrays, chunk_length(hidden, project, chunk))
    # The head's parameters become arguments, so that a custom gradient can be given for them.
    pure_project, params = jax.closure_convert(project, chunks[0][0])
    shared = jax.lax.stop_gradient(shared)
    return _summed(pure_project, score, chunks, tuple(params), shared)


def chunk_length(hidden: Float[Array, "B S D"], project: Project, chunk: int | None) -> int:
    """Positions of each row in every chunk, at most as many as are asked for: chunks are equal, but for padding."""
    batch_size, length = hidden.shape[:2]
    if chunk is None:
        vocab_size = jax.eval_shape(project, hidden[:, :1]).shape[-1]
        chunk = default_chunk(batch_size, vocab_size, jax.default_backend())
    return math.ceil(length / math.ceil(length / chunk))


def _in_chunks(hidden: jax.Array, arrays: Any, chunk: int) -> tuple[jax.Array, Any]:
    """All arrays with a leading dimension of chunks; chunk n holds the positions n, n + num, n + 2 num, ..., so that a
    sequence that is split over devices gives every device an equal share of every chunk."""
    batch_size, length = hidden.shape[:2]
    num = math.ceil(length / chunk)
    padding = -length % num

    def one(x: jax.Array) -> jax.Array:
        if num == 1:
            return x[None]
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch_size, -1, num, *x.shape[2:]), 2, 0)

    return one(hidden), jax.tree.map(lambda x: one(jax.lax.stop_gradient(x)), arrays)


def _sum(
    project: Callable[..., jax.Array], score: Score, chunks: tuple[jax.Array, Any], params: Any, shared: Any
) -> Sums:
    def of_chunk(chunk: tuple[jax.Array, Any]) -> Sums:
        return score(project(chunk[0], *params).astype(jnp.float32), chunk[1], shared)

    def one(sums: Sums, chunk: tuple[jax.Array, Any]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, of_chunk(chunk)), None

    return _scan(one, _zeros(of_chunk, chunks), chunks)[0]


def _sum_forward(
    project: Callable[..., jax.Array], score: Score, chunks: tuple[jax.Array, Any], params: Any, shared: Any
) -> tuple[Sums, Any]:
    """The sums, and the gradient of "total" with respect to hidden states and params."""
    unit, unit_params = pull_back_units(chunks[0])

    def of_chunk(chunk: tuple[jax.Array, Any]) -> Sums:
        return score(project(chunk[0], *params).astype(jnp.float32), chunk[1], shared)

    def one(carry: tuple[Sums, Any], chunk: tuple[jax.Array, Any]) -> tuple[tuple[Sums, Any], jax.Array]:
        sums, d_params = carry
        logits, pull_back = jax.vjp(lambda h, p: project(h, *p).astype(jnp.float32), chunk[0], params)

        def total(logits: jax.Array) -> tuple[jax.Array, Sums]:
            found = score(logits, chunk[1], shared)
            return found["total"], found

        d_logits, found = jax.grad(total, has_aux=True)(logits)
        d_hidden, d_chunk = pull_back(unit * d_logits)
        if unit_params != unit:  # neither call's other half is computed
            _, d_chunk = pull_back(unit_params * d_logits)
        # float32: in bfloat16 every addition would round the running sum to 8 bits
        d_params = jax.tree.map(lambda whole, part: whole + part, d_params, d_chunk)
        return (jax.tree.map(jnp.add, sums, found), d_params), d_hidden

    zeros = tuple(jnp.zeros(p.shape, jnp.float32) for p in params)
    (sums, d_params), d_hidden = _scan(one, (_zeros(of_chunk, chunks), zeros), chunks)
    dtypes = tuple(jnp.zeros(0, p.dtype) for p in params)
    return sums, (d_hidden, d_params, dtypes)


def _sum_backward(
    project: Callable[..., jax.Array], score: Score, residuals: Any, d_sums: Sums
) -> tuple[Any, Any, None]:
    d_hidden, d_params, dtypes = residuals
    unit, unit_params = pull_back_units(d_hidden)
    scale = d_sums["total"]  # the other sums have no gradient
    d_params = tuple((scale / unit_params * d).astype(like.dtype) for d, like in zip(d_params, dtypes, strict=True))
    return ((scale / unit * d_hidden).astype(d_hidden.dtype), None), d_params, None


_summed = jax.custom_vjp(_sum, nondiff_argnums=(0, 1))
_summed.defvjp(_sum_forward, _sum_backward)


def _zeros(of_chunk: Callable[[Any], Sums], chunks: Any) -> Sums:
    shapes = jax.eval_shape(of_chunk, jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _scan(function: Callable[[Any, Any], tuple[Any, Any]], init: Any, chunks: tuple[jax.Array, Any]) -> tuple[Any, Any]:
    """jax.lax.scan, without its loop where there is one chunk only."""
    if chunks[0].shape[0] > 1:
        return jax.lax.scan(function, init, chunks)
    carry, y = function(init, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], y)
