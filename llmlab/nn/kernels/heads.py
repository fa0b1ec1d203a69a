"""Layout of heads for kernels that work on blocks: every batched matmul then has its batch dimensions in front.

Query heads that read the same key/value head (a group of G = N / K) stand together and share one matmul, so that
grouped-query attention never repeats keys. Batch and head dimensions are kept apart, not merged into one: they may be
sharded over different mesh axes, which a merged dimension could not express.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split_heads(q_BSNH: Float[Array, "B S N H"], num_kv_heads: int) -> Float[Array, "B K G S H"]:
    """Queries by group."""
    batch, length, heads, dim = q_BSNH.shape
    return q_BSNH.reshape(batch, length, num_kv_heads, heads // num_kv_heads, dim).transpose(0, 2, 3, 1, 4)


def join_heads(o_BKGSH: Float[Array, "B K G S H"]) -> Float[Array, "B S N H"]:
    """The inverse of `split_heads`."""
    batch, kv_heads, group, length, dim = o_BKGSH.shape
    return o_BKGSH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, dim)


def products(q_BKGSH: Float[Array, "B K G S H"], k_BKTH: Float[Array, "B K T H"]) -> Float[Array, "B N S T"]:
    """q k^T in float32."""
    batch, kv_heads, group, length, _ = q_BKGSH.shape
    out = _matmul(_rows(q_BKGSH), k_BKTH, (3, 3))
    return out.reshape(batch, kv_heads * group, length, -1)


def weighted(w_BNST: Float[Array, "B N S T"], v_BKTH: Float[Array, "B K T H"]) -> Float[Array, "B K G S H"]:
    """Sum over keys of weight times value in float32; the weights are rounded to the values' dtype."""
    batch, heads, length, _ = w_BNST.shape
    kv_heads = v_BKTH.shape[1]
    out = _matmul(_group(w_BNST.astype(v_BKTH.dtype), kv_heads), v_BKTH, (3, 2))
    return out.reshape(batch, kv_heads, heads // kv_heads, length, -1)


def gathered(w_BNST: Float[Array, "B N S T"], x_BKGSH: Float[Array, "B K G S H"]) -> Float[Array, "B K T H"]:
    """Sum over the group's queries of weight times x in float32: what the keys and values receive backward."""
    return _matmul(_group(w_BNST.astype(x_BKGSH.dtype), x_BKGSH.shape[1]), _rows(x_BKGSH), (2, 2))


def _matmul(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    dims = (((contracted[0],), (contracted[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _rows(x_BKGSH: jax.Array) -> jax.Array:
    """All queries of a group as rows of one matrix."""
    batch, kv_heads, group, length, dim = x_BKGSH.shape
    return x_BKGSH.reshape(batch, kv_heads, group * length, dim)


def _group(w_BNST: jax.Array, kv_heads: int) -> jax.Array:
    batch, heads, length, num_keys = w_BNST.shape
    return w_BNST.reshape(batch, kv_heads, heads // kv_heads * length, num_keys)
