"""Grouped matmul: rows sorted by expert, each times its own expert's matrix.

    y_r = x_r W_e(r)      dx_r = dy_r W_e(r)^T      dW_e = sum over the rows r of expert e of x_r^T dy_r

2 R D F FLOPs each, whatever the number of experts: that is why experts are cheap. The platform decides how:

    implementation   for       computed besides the rows there are
    dense            tests     every row with every expert: E times as much
    blocked          CPU       at most 31 rows per expert, 63 where each has 512 or more
    blocked          GPU       the same; a loop of large matmuls, whose cost is certain: `jax.lax.ragged_dot` is at the
                               compiler's mercy there, which may expand it to the dense product
    megablox         TPU       at most one tile of 128 or 512 rows per expert

Shapes: R rows sorted by expert, E experts, D and F the widths of inputs and outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmlab.nn.moe import blocked, megablox
from llmlab.nn.platform import platform

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Name = Literal["auto", "dense", "blocked", "megablox"]


class Implementation(NamedTuple):
    """A grouped matmul and its gradients. Rows beyond the groups count nowhere and give zeros."""

    matmul: Product
    """(x_RD, w_EDF, sizes_E) -> y_RF."""
    matmul_transposed: Product
    """(dy_RF, w_EDF, sizes_E) -> dx_RD."""
    outer: Product
    """(x_RD, dy_RF, sizes_E) -> dw_EDF."""


def _members(num_rows: int, sizes_E: Int[Array, "E"]) -> Float[Array, "E R"]:
    """1 where a row is the expert's, 0 elsewhere."""
    row, ends_E = jnp.arange(num_rows), jnp.cumsum(sizes_E)
    return ((row < ends_E[:, None]) & (row >= (ends_E - sizes_E)[:, None])).astype(jnp.float32)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": Implementation(
        lambda x, w, sizes: jnp.einsum("rd,edf,er->rf", x, w, _members(x.shape[0], sizes)).astype(x.dtype),
        lambda dy, w, sizes: jnp.einsum("rf,edf,er->rd", dy, w, _members(dy.shape[0], sizes)).astype(dy.dtype),
        lambda x, dy, sizes: jnp.einsum("rd,rf,er->edf", x, dy, _members(x.shape[0], sizes)).astype(x.dtype),
    ),
    "blocked": Implementation(blocked.blocked_matmul, blocked.blocked_matmul_transposed, blocked.blocked_outer),
    "megablox": Implementation(megablox.megablox_matmul, megablox.megablox_matmul_transposed, megablox.megablox_outer),
}


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"], name: Name = "auto"
) -> Float[Array, "R F"]:
    """Every row times the matrix of its expert.

    Args:
        x_RD: rows, those of expert 0 first.
        w_EDF: a matrix for every expert.
        sizes_E: how many rows each expert has; rows beyond their sum give zeros and have no gradient.
        name: implementation; auto takes the platform's.
    """
    if name == "auto":
        name = "megablox" if platform() == "tpu" else "blocked"
    return _grouped_matmul(IMPLEMENTATIONS[name], x_RD, w_EDF, sizes_E.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(implementation: Implementation, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return implementation.matmul(x, w, sizes)


def _forward(implementation: Implementation, x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return implementation.matmul(x, w, sizes), (x, w, sizes)


def _backward(implementation: Implementation, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    x, w, sizes = residuals
    dx = implementation.matmul_transposed(dy, w, sizes)
    dw = implementation.outer(x, dy, sizes).astype(w.dtype)
    return dx, dw, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)
