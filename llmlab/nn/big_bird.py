"""BigBird's attention: neighbouring, global and random blocks (Zaheer et al. 2020, 2007.14062).

    query block        meets key blocks
    first and last     all
    i between          first, last | i-1, i, i+1 | R random ones, drawn for each head and block

    # # # # # # # #    8 blocks, R = 1: a row for each block of queries,
    # # # . . r . #    # near or global, r random
    # # # # r . . #
    # r # # # . . #
    # . r # # # . #
    # r . . # # # #
    # . . r . # # #
    # # # # # # # #

A random graph has short paths between all its nodes, so R random blocks for each query let information cross the
sequence in few layers, and with the global blocks sparse attention stays a universal approximator and Turing complete
(paper, sections 3.1 and 3.3). Blocks rather than tokens, because hardware multiplies blocks.

    time    4 N H (5 + R) b FLOPs per token and layer for blocks of b tokens, and as much for two blocks that see all
    memory  O(S): the backward pass recomputes weights
    trades  which distant tokens a token sees directly is left to chance; Longformer lets the task choose them

A sequence of at most (5 + 2R) b tokens is no place for such lists, and its attention is full, as in transformers. In
a packed row the pattern belongs to the row: documents stay apart, but none sees the blocks that it would see alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.config import Context
from llmlab.nn.dropout import split_key
from llmlab.nn.kernels.sparse import Grid, Shared, sparse
from llmlab.nn.masks import Padding
from llmlab.nn.sparse_attention import SparseAttention, SparseAttentionLayer


@dataclass(frozen=True, kw_only=True)
class BigBirdAttention(SparseAttention):
    """Attention to near, global and random blocks."""

    block_size: int = 64
    """Tokens per block."""
    num_random_blocks: int = 3
    """Random blocks for each head and block of queries."""
    seed: int | None = 0
    """Of the random blocks; None takes the first block for all of them, as transformers does when it evaluates."""
    layer: int = 0
    """Number of this layer: layers draw different blocks, and read their own row of the blocks that a caller gives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} is not positive; 64 is the paper's")
        if self.num_random_blocks < 0:
            raise ValueError(f"num_random_blocks={self.num_random_blocks} is negative; 3 is the paper's, 0 is none")
        if self.layer < 0:
            raise ValueError(f"layer={self.layer} is negative; number the layers from 0")

    def full(self, length: int) -> bool:
        """Whether attention over a sequence of this length is full."""
        return length <= (5 + 2 * self.num_random_blocks) * self.block_size

    def random_blocks(self, num_blocks: int) -> Int[np.ndarray, "K C R"]:
        """R blocks of keys for each head and block of queries but the first and last; distinct, not near, not global.

        Floyd's sampling (Bentley 1987) of numbers among those allowed, which then step over the near blocks.
        """
        query, num = np.arange(1, num_blocks - 1), self.num_random_blocks
        shape = (self.num_kv_heads or self.num_heads, num_blocks - 2)
        if self.seed is None:
            return np.zeros((*shape, num), np.int32)
        rng = np.random.default_rng((self.seed, self.layer))
        low, high = np.maximum(query - 1, 1), np.minimum(query + 1, num_blocks - 2)
        allowed = num_blocks - 2 - (high - low + 1)
        chosen = np.zeros((*shape, 0), np.int64)
        for last in range(num):
            last = allowed - num + last
            number = np.floor(rng.random(shape) * (last + 1)).astype(np.int64)
            taken = (chosen == number[..., None]).any(-1)
            chosen = np.concatenate([chosen, np.where(taken, last, number)[..., None]], axis=-1)
        block = 1 + chosen
        return np.where(block < low[:, None], block, block + (high - low + 1)[:, None]).astype(np.int32)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "BigBirdAttentionLayer":
        return BigBirdAttentionLayer(self, dim, rngs=rngs, depth=depth)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        if self.full(sequence_length):
            return super().context_flops(dim, sequence_length)
        block, length = self.block_size, sequence_length
        before = (-(-length // block) - 1) * block  # tokens before the last block
        ends = block + length - before
        products = ends * length + (before - block) * (ends + (3 + self.num_random_blocks) * block)
        return -(-4 * self.num_heads * self.resolved_head_dim(dim) * products // length)


class BigBirdAttentionLayer(SparseAttentionLayer):
    """See BigBirdAttention."""

    config: BigBirdAttention

    def mix(
        self,
        x_BSD: Float[Array, "B S D"],
        q_BSNH: Float[Array, "B S N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        context: Context,
        key: jax.Array | None,
    ) -> Float[Array, "B S N H"]:
        key_ends, key_between = split_key(key, 2)
        config, (batch, length) = self.config, x_BSD.shape[:2]
        if config.full(length):
            return self.see_all(q_BSNH, k_BSKH, v_BSKH, context.mask, key_ends)
        num_blocks = -(-length // config.block_size)
        first, last = config.block_size, (num_blocks - 1) * config.block_size
        index_S = np.arange(length, dtype=np.int32)
        is_end_S = (index_S < first) | (index_S >= last)
        index_BG = jnp.broadcast_to(index_S[is_end_S], (batch, int(is_end_S.sum())))

        def ends(x: jax.Array) -> jax.Array:
            return jnp.concatenate([x[:, :first], x[:, last:]], axis=1)

        shared = Shared(k_BGKH=ends(k_BSKH), v_BGKH=ends(v_BSKH), index_BG=index_BG, real_BG=index_BG >= 0)
        between_BSNH = sparse(
            q_BSNH[:, first:last],
            k_BSKH,
            v_BSKH,
            self.scoring(context.mask, key_between),
            cut=Grid(length, config.block_size, side=1),
            near=Padding(jnp.asarray(~is_end_S[None])),  # the ends are among the shared keys
            shared=shared,
            scattered_CKR=self.scattered(context, num_blocks),
            first=1,
        )
        ends_BGNH = self.see_all(ends(q_BSNH), k_BSKH, v_BSKH, context.mask, key_ends, index_BG)
        o_BSNH = jnp.concatenate([ends_BGNH[:, :first], between_BSNH, ends_BGNH[:, first:]], axis=1)
        return self.real(o_BSNH, context)

    def scattered(self, context: Context, num_blocks: int) -> Int[Array, "C K R"]:
        """The random blocks: the caller's (`context.draws["random_blocks"]`, (layers, heads, C, R)) or the config's."""
        draws = None if context.draws is None else context.draws.get("random_blocks")
        if draws is None:
            return jnp.asarray(self.config.random_blocks(num_blocks).swapaxes(0, 1))
        heads, num = self.config.num_kv_heads or self.config.num_heads, self.config.num_random_blocks
        expected = (heads, num_blocks - 2, num)
        if draws.shape[1:] != expected or self.config.layer >= draws.shape[0]:
            raise ValueError(
                f"random_blocks has shape {draws.shape}, and layer {self.config.layer} needs a row of its own of shape "
                f"{expected}: heads, blocks of queries but the first and last, random blocks"
            )
        return draws[self.config.layer].swapaxes(0, 1)
