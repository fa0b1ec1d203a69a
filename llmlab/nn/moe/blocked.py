"""Experts in plain JAX: a loop over those that have rows, and in it loops over blocks of the rows that each really has.

A block goes through the whole expert while it is in the processor's caches: both products, what stands between them,
and in the backward pass all gradients. The trip counts depend on the data, so the work is that of the rows there are,
plus at most 31 rows per expert (63 where an expert has 512 rows or more on average), where `jax.lax.ragged_dot`
multiplies every row with every expert on CPU. What an expert costs by itself is memory traffic: its matrices are read
once, their gradients written once.

    rows of expert e   [ block | block | half | eighth ]      what is left of whole blocks is cut as its number is in
                                                              binary; of the last piece some rows are others', and stay

Results take the place of the rows that they come from, and gradients that of the results'. Kept for the backward pass
are the rows and what the first matrices make of them.

Shapes: R rows sorted by expert, E experts, D embed, F hidden, G hidden of all first matrices, P rows of a piece.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.moe.mlp import Draw, Hidden, Matrices

T = TypeVar("T")
Block = Callable[[jax.Array, int, "Bool[Array, 'P 1'] | None", T], T]
"""(first row, number of rows, which of them it is about or None for all, carry) -> carry."""


def pieces(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Rows of a block, and of the pieces of what is left: 256 run at full speed on one core, XLA gives 512 to
    several."""
    return (512, 256, 128, 64) if num_rows >= 512 * num_experts else (256, 128, 64, 32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_mlp(
    hidden: Hidden,
    x_RD: Float[Array, "R D"],
    first: tuple[Matrices, ...],
    last: Matrices,
    sizes_E: Int[Array, "E"],
    draw: Draw | None,
) -> Float[Array, "R D"]:
    """What its expert makes of every row; zeros for rows beyond the groups."""
    return blocked_mlp_forward(hidden, x_RD, first, last, sizes_E, draw)[0]


def _forward(hidden: Hidden, x_RD: Any, first: Any, last: Any, sizes_E: Any, draw: Any) -> tuple[jax.Array, Any]:
    y_RD, pre_RG = blocked_mlp_forward(hidden, x_RD, first, last, sizes_E, draw)
    return y_RD, (x_RD, pre_RG, first, last, sizes_E, draw)


def _backward(hidden: Hidden, residuals: Any, dy_RD: jax.Array) -> tuple[Any, ...]:
    return *blocked_mlp_backward(hidden, *residuals, dy_RD), None, None


blocked_mlp.defvjp(_forward, _backward)

# Both are jitted for their names, by which llmlab.plan.cost knows what they cost: trip counts that depend on data do
# not show in a program.


@partial(jax.jit, static_argnums=0)
def blocked_mlp_forward(
    hidden: Hidden,
    x_RD: Float[Array, "R D"],
    first: tuple[Matrices, ...],
    last: Matrices,
    sizes_E: Int[Array, "E"],
    draw: Draw | None,
) -> tuple[Float[Array, "R D"], Float[Array, "R G"]]:
    """The result, and what the first matrices make of the rows."""
    num_rows, num_experts = x_RD.shape[0], sizes_E.shape[0]
    sizes = pieces(num_rows, num_experts)
    y_RD, draw = _at_least(sizes[-1], x_RD), _drawn_for_at_least(sizes[-1], draw)
    ends_E = jnp.cumsum(sizes_E)
    busy_E = jnp.argsort(sizes_E == 0, stable=True)  # the matrices of the others are not read

    def expert(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        e = busy_E[i]
        into, out = _of_expert(first, e), _of_expert((last,), e)

        def block(at: jax.Array, size: int, mine_P: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            y_RD, pre_RG = carry
            pre_PG = _dense(_rows(y_RD, at, size), into)
            y_PD = _dense(hidden(pre_PG, _draw_of(draw, at, size)), out)
            return _put(y_RD, y_PD, at, mine_P), _put(pre_RG, pre_PG, at, mine_P)

        return _over(sizes, ends_E[e] - sizes_E[e], ends_E[e], carry[0].shape[0], block, carry)

    width = sum(matrices.kernel.shape[2] for matrices in first)
    pre_RG = jnp.zeros((y_RD.shape[0], width), x_RD.dtype)
    y_RD, pre_RG = jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), expert, (y_RD, pre_RG))
    return _without_rows_beyond(y_RD, ends_E[-1], sizes)[:num_rows], pre_RG[:num_rows]


@partial(jax.jit, static_argnums=0)
def blocked_mlp_backward(
    hidden: Hidden,
    x_RD: Float[Array, "R D"],
    pre_RG: Float[Array, "R G"],
    first: tuple[Matrices, ...],
    last: Matrices,
    sizes_E: Int[Array, "E"],
    draw: Draw | None,
    dy_RD: Float[Array, "R D"],
) -> tuple[Float[Array, "R D"], tuple[Matrices, ...], Matrices]:
    """Gradients of the rows and of the matrices, these added up in float32."""
    num_rows, num_experts = x_RD.shape[0], sizes_E.shape[0]
    sizes = pieces(num_rows, num_experts)
    x_RD, pre_RG, dy_RD = (_at_least(sizes[-1], rows) for rows in (x_RD, pre_RG, dy_RD))
    draw = _drawn_for_at_least(sizes[-1], draw)
    ends_E = jnp.cumsum(sizes_E)

    def expert(dx_RD: jax.Array, e: jax.Array) -> tuple[jax.Array, tuple[Matrices, Matrices]]:
        into, out = _of_expert(first, e), _of_expert((last,), e)

        def block(at: jax.Array, size: int, mine_P: Any, carry: Any) -> Any:
            dx_RD, dinto, dout = carry
            x_PD, pre_PG, dy_PD = (_rows(rows, at, size) for rows in (x_RD, pre_RG, dx_RD))
            if mine_P is not None:
                dy_PD = jnp.where(mine_P, dy_PD, 0)
            h_PF, backward = jax.vjp(lambda pre_PG: hidden(pre_PG, _draw_of(draw, at, size)), pre_PG)
            dh_PF, dout = _dense_backward(h_PF, out, dy_PD, dout)
            dx_PD, dinto = _dense_backward(x_PD, into, backward(dh_PF)[0], dinto)
            return _put(dx_RD, dx_PD, at, mine_P), dinto, dout

        carry = (dx_RD, _zeros(into), _zeros(out))
        dx_RD, *gradients = _over(sizes, ends_E[e] - sizes_E[e], ends_E[e], x_RD.shape[0], block, carry)
        dinto, dout = jax.tree.map(lambda gradient, of: gradient.astype(of.dtype), tuple(gradients), (into, out))
        return dx_RD, (dinto, dout)

    dx_RD, (dinto, dout) = jax.lax.scan(expert, dy_RD, jnp.arange(num_experts))
    dfirst = tuple(
        jax.tree.map(lambda of, i=i: jnp.split(of, len(first), axis=-1)[i], dinto) for i in range(len(first))
    )
    return _without_rows_beyond(dx_RD, ends_E[-1], sizes)[:num_rows], dfirst, dout


def _over(sizes: tuple[int, ...], start: jax.Array, end: jax.Array, num_rows: int, block: Block[T], carry: T) -> T:
    """The carry after the blocks of the rows from start to end, in order."""
    for size in (size for size in sizes if size <= num_rows):
        whole = size > sizes[-1]

        def one(i: jax.Array, carry: T, size: int = size, start: jax.Array = start, whole: bool = whole) -> T:
            at = start + i * size
            if whole:
                return block(at, size, None, carry)
            place = jnp.minimum(at, num_rows - size)
            row_P1 = (place + jnp.arange(size))[:, None]
            return block(place, size, (row_P1 >= at) & (row_P1 < end), carry)

        trips = (end - start) // size if whole else (end - start + size - 1) // size
        carry = jax.lax.fori_loop(0, trips, one, carry)
        start = start + trips * size
    return carry


def _without_rows_beyond(rows: Float[Array, "R D"], end: jax.Array, sizes: tuple[int, ...]) -> Float[Array, "R D"]:
    """Zeros from row `end` on."""

    def block(at: jax.Array, size: int, mine_P: Any, rows: jax.Array) -> jax.Array:
        return _put(rows, jnp.zeros((size, rows.shape[1]), rows.dtype), at, mine_P)

    return _over(sizes, end, jnp.asarray(rows.shape[0], end.dtype), rows.shape[0], block, rows)


def _of_expert(several: tuple[Matrices, ...], e: jax.Array) -> Matrices:
    """The matrices of one expert, side by side."""
    own = [jax.tree.map(lambda of: jax.lax.dynamic_index_in_dim(of, e, keepdims=False), one) for one in several]
    return own[0] if len(own) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *own)


def _dense(x_PD: Float[Array, "P D"], matrices: Matrices) -> Float[Array, "P F"]:
    y_PF = _product(x_PD, matrices.kernel, 1, 0).astype(x_PD.dtype)
    return y_PF if matrices.bias is None else y_PF + matrices.bias


def _dense_backward(
    x_PD: Float[Array, "P D"], matrices: Matrices, dy_PF: Float[Array, "P F"], sums: Matrices
) -> tuple[Float[Array, "P D"], Matrices]:
    """The rows' gradient, and the sums with those of the matrices added."""
    kernel = sums.kernel + _product(x_PD, dy_PF, 0, 0)
    bias = None if sums.bias is None else sums.bias + jnp.sum(dy_PF, axis=0, dtype=jnp.float32)
    return _product(dy_PF, matrices.kernel, 1, 1).astype(x_PD.dtype), Matrices(kernel, bias)


def _product(left: jax.Array, right: jax.Array, left_dim: int, right_dim: int) -> jax.Array:
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)


def _zeros(matrices: Matrices) -> Matrices:
    return jax.tree.map(lambda of: jnp.zeros(of.shape, jnp.float32), matrices)


def _rows(rows: Float[Array, "R D"], at: jax.Array, size: int) -> Float[Array, "P D"]:
    return jax.lax.dynamic_slice_in_dim(rows, at, size)


def _put(rows: Float[Array, "R D"], piece: Float[Array, "P D"], at: jax.Array, mine_P: Any) -> Float[Array, "R D"]:
    """The rows with a piece of them replaced, where it is about them."""
    piece = piece if mine_P is None else jnp.where(mine_P, piece, _rows(rows, at, piece.shape[0]))
    return jax.lax.dynamic_update_slice_in_dim(rows, piece, at, 0)


def _draw_of(draw: Draw | None, at: jax.Array, size: int) -> Draw | None:
    return None if draw is None else draw._replace(choice=jax.lax.dynamic_slice_in_dim(draw.choice, at, size))


def _at_least(num_rows: int, rows: Array) -> Array:
    missing = max(0, num_rows - rows.shape[0])
    return jnp.pad(rows, ((0, missing), *((0, 0) for _ in rows.shape[1:]))) if missing else rows


def _drawn_for_at_least(num_rows: int, draw: Draw | None) -> Draw | None:
    return None if draw is None else draw._replace(choice=_at_least(num_rows, draw.choice))
