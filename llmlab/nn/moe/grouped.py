"""Experts on rows sorted by expert: each row meets the matrices of its own expert and no others.

    y_r = hidden(x_r W1_e(r)) W2_e(r)

2 R D F FLOPs for each matrix, whatever the number of experts: that is why experts are cheap. The platform decides how:

    implementation   for       computed besides the rows there are
    dense            tests     every row with every expert: E times as much
    blocked          CPU       at most 31 rows per expert, 63 where each has 512 or more
    blocked          GPU       the same; a loop of large matmuls, whose cost is certain: `jax.lax.ragged_dot` is at the
                               compiler's mercy there, which may expand it to the dense product
    megablox         TPU       at most one tile of 128 or 512 rows per expert

Shapes: R rows sorted by expert, E experts, D embed, F and G hidden.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.moe.blocked import blocked_mlp
from llmlab.nn.moe.megablox import grouped_matmul
from llmlab.nn.moe.mlp import Draw, Hidden, Matrices
from llmlab.nn.platform import platform

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Name = Literal["auto", "dense", "blocked", "megablox"]


def grouped_mlp(
    hidden: Hidden,
    x_RD: Float[Array, "R D"],
    first: tuple[Matrices, ...],
    last: Matrices,
    sizes_E: Int[Array, "E"],
    draw: Draw | None = None,
    name: Name = "auto",
) -> Float[Array, "R D"]:
    """What its expert makes of every row.

    Args:
        hidden: what stands between the matrices.
        x_RD: rows, those of expert 0 first.
        first: the matrices that read the rows: the gate and the other, or one.
        last: those that write the results.
        sizes_E: how many rows each expert has; rows beyond their sum give zeros and have no gradient.
        draw: dropout of hidden units, by row.
        name: implementation; auto takes the platform's.
    """
    if name == "auto":
        name = "megablox" if platform() == "tpu" else "blocked"
    sizes_E = sizes_E.astype(jnp.int32)
    if name == "blocked":
        return blocked_mlp(hidden, x_RD, first, last, sizes_E, draw)
    product = grouped_matmul if name == "megablox" else _dense_matmul
    pre_RG = jnp.concatenate([_dense(product, x_RD, matrices, sizes_E) for matrices in first], axis=-1)
    return _dense(product, hidden(pre_RG, draw), last, sizes_E)


def _dense(product: Product, x_RD: Float[Array, "R D"], matrices: Matrices, sizes_E: jax.Array) -> jax.Array:
    y_RF = product(x_RD, matrices.kernel, sizes_E)
    if matrices.bias is None:
        return y_RF
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_RD.shape[0]), side="right")
    return y_RF + jnp.take(matrices.bias, expert_R, axis=0, mode="fill", fill_value=0)


def _dense_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    row, ends_E = jnp.arange(x_RD.shape[0]), jnp.cumsum(sizes_E)
    is_its_ER = (row < ends_E[:, None]) & (row >= (ends_E - sizes_E)[:, None])
    return jnp.einsum("rd,edf,er->rf", x_RD, w_EDF, is_its_ER.astype(jnp.float32)).astype(x_RD.dtype)
