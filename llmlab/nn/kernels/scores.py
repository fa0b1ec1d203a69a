"""What every kernel written in jax shares: the logits of a block of queries against a block of keys."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.masks import Mask

# Finite, so that the difference of two masked logits is 0 and not NaN; far below any real float32 logit.
MASKED = -1e30


class Bias(Protocol):
    """A term added to the logits by position: ALiBi, T5. A pytree: gradients flow to the arrays it holds."""

    def block(self, query_index: Int[Array, "*B S"], kv_index: Int[Array, "*B T"]) -> Float[Array, "B N S T"]:
        """Bias of these queries against these keys, float32; B is 1 where rows do not differ."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scores:
    """Everything besides q, k and v that decides the logits and the weights."""

    mask: Mask
    bias: Any
    """A Bias, or None."""
    dropout_key: Any
    """Random key of dropout on the weights, or None."""
    query_index: Any
    """Index of each query, (S,) or (B, S), or None for 0, 1, 2..."""
    scale: float = field(metadata={"static": True})
    softcap: float | None = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})

    def logits(
        self,
        q_BKGSH: Float[Array, "B K G S H"],
        k_BKTH: Float[Array, "B K T H"],
        query_index: Int[Array, "*B S"],
        kv_index: Int[Array, "*B T"],
    ) -> tuple[Float[Array, "B K G S T"], Array]:
        """Float32 logits, MASKED where the mask forbids, and the mask as (B or 1, 1, 1, S, T)."""
        s = jnp.einsum("BKGSH,BKTH->BKGST", q_BKGSH, k_BKTH, preferred_element_type=jnp.float32) * self.scale
        if self.softcap is not None:
            s = self.softcap * jnp.tanh(s / self.softcap)
        if self.bias is not None:
            bias_BNST = self.bias.block(query_index, kv_index)
            s = s + bias_BNST.reshape(bias_BNST.shape[0], *s.shape[1:3], *bias_BNST.shape[2:])
        allowed = self.mask.allowed(query_index, kv_index)[:, None, None]
        return jnp.where(allowed, s, MASKED), allowed

    def queries(self, length: int) -> Int[Array, "*B S"]:
        """Indices of the queries."""
        return jnp.arange(length) if self.query_index is None else self.query_index

    def keep(self, block: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Dropout's factor on the weights of one block: 0 or 1/(1 - rate), the same whenever it is asked for."""
        kept = jax.random.bernoulli(jax.random.fold_in(self.dropout_key, block), 1.0 - self.dropout, shape)
        return kept / (1.0 - self.dropout)


def grouped(q_BSNH: Float[Array, "B S N H"], num_kv_heads: int) -> Float[Array, "B K G S H"]:
    """Queries with the heads that share a key/value head side by side."""
    batch, length, heads, dim = q_BSNH.shape
    return q_BSNH.reshape(batch, length, num_kv_heads, heads // num_kv_heads, dim).transpose(0, 2, 3, 1, 4)


def ungrouped(o_BKGSH: Float[Array, "B K G S H"]) -> Float[Array, "B S N H"]:
    """The inverse of `grouped`."""
    batch, kv_heads, groups, length, dim = o_BKGSH.shape
    return o_BKGSH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, dim)
