"""Grouped matmul on TPUs: megablox (Gale et al. 2022, 2211.15841), whose Pallas kernels come with jax.

The grid visits the tiles of rows that hold something, each with the matrix of the expert whose rows it has; a tile that
several experts share is visited once for each. So the work is that of the rows, plus one tile per expert at most.

Shapes: R rows sorted by expert, E experts, D and F the widths of inputs and outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

# Tiles have 512 rows where an expert has that many on average, else 128 (the TPU's lanes). Their widths are what fits
# its scratch memory, 16 MB, twice (one tile is fetched while another is computed): compiled for a v5p at widths 1,024
# and 3,072 in both types.
_ROWS, _FEW_ROWS = 512, 128
_WIDTH, _WIDTH_FLOAT32 = 1024, 512


@jax.custom_vjp
def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Every row times the matrix of its expert; rows beyond the groups give zeros and have no gradient."""
    return megablox_matmul(x_RD, w_EDF, sizes_E)


def _forward(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, Any]:
    return megablox_matmul(x, w, sizes), (x, w, sizes)


def _backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    dw = megablox_outer(x, dy, sizes).astype(w.dtype)
    return megablox_matmul_transposed(dy, w, sizes), dw, None


grouped_matmul.defvjp(_forward, _backward)

# Jitted for their names, as in blocked.py.


@partial(jax.jit, static_argnames="interpret")
def megablox_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "R F"]:
    """Every row times its expert's matrix; zeros for rows beyond the groups."""
    return _rows(x_RD, w_EDF, sizes_E, w_EDF.shape[2], transpose=False, interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def megablox_matmul_transposed(
    dy_RF: Float[Array, "R F"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "R D"]:
    """Every row times its expert's matrix transposed: the gradient of the rows."""
    return _rows(dy_RF, w_EDF, sizes_E, w_EDF.shape[1], transpose=True, interpret=interpret)


@partial(jax.jit, static_argnames="interpret")
def megablox_outer(
    x_RD: Float[Array, "R D"], dy_RF: Float[Array, "R F"], sizes_E: Int[Array, "E"], *, interpret: bool = False
) -> Float[Array, "E D F"]:
    """For every expert the sum over its rows of x^T dy, added in float32: the gradient of its matrix."""
    tiles = _tiles(x_RD, sizes_E, x_RD.shape[1], dy_RF.shape[1])
    x_RD, dy_RF = _padded(x_RD, tiles[0]), _padded(dy_RF, tiles[0])
    return tgmm(x_RD.swapaxes(0, 1), dy_RF, sizes_E, x_RD.dtype, tiles, interpret=interpret)


def _rows(
    x_RD: jax.Array, w: jax.Array, sizes_E: jax.Array, width: int, *, transpose: bool, interpret: bool
) -> jax.Array:
    num_rows = x_RD.shape[0]
    tiles = _tiles(x_RD, sizes_E, x_RD.shape[1], width)
    x_RD = _padded(x_RD, tiles[0])
    y_RF = gmm(x_RD, w, sizes_E, x_RD.dtype, tiles, transpose_rhs=transpose, interpret=interpret)[:num_rows]
    # The kernel leaves the memory of rows that no group owns as it was.
    return jnp.where((jnp.arange(num_rows) < jnp.sum(sizes_E))[:, None], y_RF, 0)


def _tiles(x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"], inner: int, outer: int) -> tuple[int, int, int]:
    """Rows, contracted width and resulting width of a tile."""
    width = _WIDTH if x_RD.dtype == jnp.bfloat16 else _WIDTH_FLOAT32
    rows = _ROWS if x_RD.shape[0] >= _ROWS * sizes_E.shape[0] else _FEW_ROWS
    return rows, min(inner, width), min(outer, width)


def _padded(rows: Float[Array, "R D"], tile: int) -> Float[Array, "P D"]:
    """Lengthened to whole tiles."""
    missing = -rows.shape[0] % tile
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows
