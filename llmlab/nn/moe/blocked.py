"""Grouped matmul in plain JAX: a loop over the experts, and in it one over blocks of the rows that each really has.

The trip counts depend on the data, so the work is that of the rows there are, plus at most 31 rows per expert (63
where an expert has 512 rows or more on average), where `jax.lax.ragged_dot` multiplies every row with every expert on
CPU. What an expert costs by itself is memory traffic: its matrix is read once, its gradient written once.

    rows of expert e   [ block | block | rest ]      the rest is one product of an eighth, two eighths, ... of a block,
                                                     its end masked

Shapes: R rows sorted by expert, E experts, D and F the widths of inputs and outputs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block: 256 run at full speed on one core, XLA gives 512 to several; a step of the rest is an eighth."""
    return 512 if num_rows >= 512 * num_experts else 256


# The functions are jitted for their names, by which llmlab.plan.cost knows what they cost: trip counts that depend on
# data do not show in a program.


@jax.jit
def blocked_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Every row times its expert's matrix; zeros for rows beyond the groups."""
    return _rows(x_RD, w_EDF, sizes_E, ((1,), (0,)), w_EDF.shape[2])


@jax.jit
def blocked_matmul_transposed(
    dy_RF: Float[Array, "R F"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R D"]:
    """Every row times its expert's matrix transposed: the gradient of the rows."""
    return _rows(dy_RF, w_EDF, sizes_E, ((1,), (1,)), w_EDF.shape[1])


@jax.jit
def blocked_outer(
    x_RD: Float[Array, "R D"], dy_RF: Float[Array, "R F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """For every expert the sum over its rows of x^T dy, added in float32: the gradient of its matrix."""
    starts_E, ends_E = _spans(sizes_E)
    largest = block_rows(x_RD.shape[0], sizes_E.shape[0])
    (size, x_RD), (_, dy_RF) = _at_least_a_block(x_RD, largest), _at_least_a_block(dy_RF, largest)

    def expert(_: None, e: jax.Array) -> tuple[None, jax.Array]:
        start, end = starts_E[e], ends_E[e]
        rest = end - (end - start) % size

        def product(x: jax.Array, dy: jax.Array) -> jax.Array:
            return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        def block(i: jax.Array, total: jax.Array) -> jax.Array:
            x, dy = (jax.lax.dynamic_slice_in_dim(rows, start + i * size, size) for rows in (x_RD, dy_RF))
            return total + product(x, dy)

        def steps(num_rows: int) -> jax.Array:
            return product(_masked(x_RD, rest, end, num_rows)[0], _masked(dy_RF, rest, end, num_rows)[0])

        total = jax.lax.fori_loop(0, (rest - start) // size, block, _by_steps(steps, size, largest // 8, end - rest))
        return None, total.astype(x_RD.dtype)

    return jax.lax.scan(expert, None, jnp.arange(sizes_E.shape[0]))[1]


def _rows(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, contract: tuple[tuple[int], tuple[int]], width: int
) -> jax.Array:
    num_rows = x_RD.shape[0]
    starts_E, ends_E = _spans(sizes_E)
    largest = block_rows(num_rows, w_EDF.shape[0])
    size, x_RD = _at_least_a_block(x_RD, largest)

    def expert(e: jax.Array, y_RF: jax.Array) -> jax.Array:
        start, end = starts_E[e], ends_E[e]
        rest = end - (end - start) % size
        w_DF = jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)

        def product(x: jax.Array) -> jax.Array:
            y = jax.lax.dot_general(x, w_DF, (contract, ((), ())), preferred_element_type=jnp.float32)
            return y.astype(x.dtype)

        def block(i: jax.Array, y_RF: jax.Array) -> jax.Array:
            x = jax.lax.dynamic_slice_in_dim(x_RD, start + i * size, size)
            return jax.lax.dynamic_update_slice_in_dim(y_RF, product(x), start + i * size, 0)

        def steps(num_rows: int) -> jax.Array:
            x, first = _masked(x_RD, rest, end, num_rows)
            zeros = jnp.zeros((size, width), x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(zeros, product(x), first - place, 0)

        y_RF = jax.lax.fori_loop(0, (rest - start) // size, block, y_RF)
        # The rest's products, zero at the rows of other groups, join what stands in the block they lie in.
        place = jnp.minimum(rest, x_RD.shape[0] - size)
        there = jax.lax.dynamic_slice_in_dim(y_RF, place, size) + _by_steps(steps, size, largest // 8, end - rest)
        return jax.lax.dynamic_update_slice_in_dim(y_RF, there, place, 0)

    y_RF = jnp.zeros((x_RD.shape[0], width), x_RD.dtype)
    return jax.lax.fori_loop(0, w_EDF.shape[0], expert, y_RF)[:num_rows]


def _by_steps(product: Callable[[int], jax.Array], block: int, step: int, num_rows: jax.Array) -> jax.Array:
    """`product(n)` of the least multiple n of `step` that is not below `num_rows`, up to a block; zeros for no rows."""
    some = [partial(product, n) for n in range(step, block + 1, step)]
    shape = jax.eval_shape(some[0])
    nothing = partial(jnp.zeros, shape.shape, shape.dtype)
    return jax.lax.switch((num_rows + step - 1) // step, [nothing, *some])


def _masked(
    rows: Float[Array, "R D"], start: jax.Array, end: jax.Array, num_rows: int
) -> tuple[Float[Array, "N D"], jax.Array]:
    """So many rows that hold those from start to end, the others zero; and the number of the first of them."""
    first = jnp.minimum(start, rows.shape[0] - num_rows)
    row = (first + jnp.arange(num_rows))[:, None]
    some = jax.lax.dynamic_slice_in_dim(rows, first, num_rows)
    return jnp.where((row >= start) & (row < end), some, 0), first


def _spans(sizes_E: Int[Array, "E"]) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """First row of every group, and the row after its last."""
    ends_E = jnp.cumsum(sizes_E)
    return ends_E - sizes_E, ends_E


def _at_least_a_block(rows: Float[Array, "R D"], largest: int) -> tuple[int, Float[Array, "P D"]]:
    """The block's size, less than `largest` where there are fewer rows, and the rows, which are at least so many."""
    step = largest // 8
    block = min(largest, step * -(-rows.shape[0] // step))
    missing = max(0, block - rows.shape[0])
    return block, jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
