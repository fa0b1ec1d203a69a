"""Longformer's attention: a sliding window for every token, and a few global tokens (Beltagy et al. 2020, 2004.05150).

    local token i     sees    i-w ... i ... i+w  and the global tokens      softmax(q k^T / sqrt(H)) v
    global token      sees    every token                                   softmax(q' k'^T / sqrt(H)) v'

    . . . . g . L L L .        one row of the matrix: token 7 with w = 1 sees its neighbours and the global token 4

Full attention costs O(S^2) in the length S; a stack of L layers of windows still passes information over L w tokens at
O(S w), and global tokens (the classifier's first token, a question) connect everything in two hops at O(S G). The
global tokens' own attention has projections q', k', v' of its own, a different task: gather all, not look around.

    time    4 N H (2w + 1 + G) FLOPs per token and layer, and twice that for the backward pass; see kernels/sparse.py
    memory  O(S): the backward pass recomputes weights
    trades  what is further than the window travels several layers or through a global token

Which tokens are global is data (`context.global_tokens`), how many at most is `max_global`: programs have static
shapes, so every row pays for that many. A row with more of them is an error where the values are known, and gives NaN
inside a compiled program, for silently dropping some would be worse. In a packed row global tokens belong to their
document: they see it and are seen by it alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.config import Context
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import split_key
from llmlab.nn.kernels.sparse import Grid, Shared, grid, sparse
from llmlab.nn.masks import Padding, SlidingWindow
from llmlab.nn.sparse_attention import SparseAttention, SparseAttentionLayer
from llmlab.sharding import shard

# Tokens per block: half of what one side reaches wastes a quarter at the window's ends, and 128 fill a matrix unit.
_SMALLEST, _LARGEST = 16, 128


@dataclass(frozen=True, kw_only=True)
class LongformerAttention(SparseAttention):
    """Sliding-window attention with global tokens."""

    reach: int
    """Keys seen on each side of a token: half the window of the paper, which counts both sides."""
    max_global: int = 0
    """Most global tokens in a row; 0 for a model that is called without any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach < 1:
            raise ValueError(f"reach={self.reach} is not positive; the paper's window of 512 is reach=256")
        if self.max_global < 0:
            raise ValueError(f"max_global={self.max_global} is negative; 0 is for a model without global tokens")

    def grid(self, length: int) -> Grid:
        """How a sequence of this length is cut into blocks."""
        half = 2 ** (self.reach.bit_length() - 2) if self.reach > 1 else 1
        return grid(length, min(max(half, _SMALLEST), _LARGEST), self.reach)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "LongformerAttentionLayer":
        return LongformerAttentionLayer(self, dim, rngs=rngs, depth=depth)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        """Scores and sums of all blocks that are near, of `max_global` global keys and of as many global queries.

        The global projections are parameters that few tokens meet (q') or, without global tokens, none; what counting
        all parameters for all tokens has too much is taken off here.
        """
        cut, head_dim, num_global = self.grid(sequence_length), self.resolved_head_dim(dim), self.max_global
        num_global = min(num_global, sequence_length)
        width, kv_width = self.num_heads * head_dim, (self.num_kv_heads or self.num_heads) * head_dim
        flops = 4 * width * cut.num_blocks * cut.block * (cut.near + num_global)
        flops += 4 * width * num_global * sequence_length
        flops -= 2 * dim * width * (sequence_length - num_global)
        flops -= 0 if num_global else 4 * dim * kv_width * sequence_length
        return -(-flops // sequence_length)


class LongformerAttentionLayer(SparseAttentionLayer):
    """See LongformerAttention."""

    config: LongformerAttention

    def __init__(self, config: LongformerAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        super().__init__(config, dim, rngs=rngs, depth=depth)
        embed = (("embed", dim),)
        heads = (("heads", config.num_heads), ("head_dim", config.resolved_head_dim(dim)))
        kv_heads = (("kv_heads", config.num_kv_heads or config.num_heads), heads[1])
        self.query_global = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.key_global = Dense(embed, kv_heads, bias=config.bias, rngs=rngs)
        self.value_global = Dense(embed, kv_heads, bias=config.bias, rngs=rngs)

    def mix(
        self,
        x_BSD: Float[Array, "B S D"],
        q_BSNH: Float[Array, "B S N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        context: Context,
        key: jax.Array | None,
    ) -> Float[Array, "B S N H"]:
        key_local, key_global = split_key(key, 2)
        length, reach = x_BSD.shape[1], self.config.reach
        scoring, cut = self.scoring(context.mask, key_local), self.config.grid(length)
        window = SlidingWindow(left=reach, right=reach)
        if context.global_tokens is None:
            return self.real(sparse(q_BSNH, k_BSKH, v_BSKH, scoring, cut=cut, near=window), context)
        global_BS, padding = context.global_tokens, context.mask.find(Padding)
        self.check_room(global_BS, None if padding is None else padding.kv_BT)
        if padding is not None:
            global_BS = global_BS & padding.kv_BT
        index_BG, real_BG = first_true(global_BS, min(self.config.max_global, length))
        shared = Shared(
            k_BGKH=_take(k_BSKH, index_BG), v_BGKH=_take(v_BSKH, index_BG), index_BG=index_BG, real_BG=real_BG
        )
        near = window & Padding(~global_BS)  # they are among the shared keys
        o_BSNH = sparse(q_BSNH, k_BSKH, v_BSKH, scoring, cut=cut, near=near, shared=shared)
        too_many = jnp.sum(global_BS, axis=-1) > self.config.max_global
        o_BGNH = self.mix_global(x_BSD, index_BG, context, key_global)
        row = jnp.arange(x_BSD.shape[0])[:, None]
        o_BSNH = o_BSNH.at[row, jnp.where(real_BG, index_BG, length)].set(o_BGNH, mode="drop")
        return jnp.where(too_many[:, None, None, None], jnp.nan, self.real(o_BSNH, context))

    def mix_global(
        self, x_BSD: Float[Array, "B S D"], index_BG: Int[Array, "B G"], context: Context, key: jax.Array | None
    ) -> Float[Array, "B G N H"]:
        """Attention of the tokens with these indices to all tokens, with the projections for that."""
        q_BGNH = self.query_global(_take(x_BSD, index_BG))
        k_BSKH = shard(self.key_global(x_BSD), "batch", "sequence", "kv_heads", "head_dim")
        v_BSKH = shard(self.value_global(x_BSD), "batch", "sequence", "kv_heads", "head_dim")
        return self.see_all(q_BGNH, k_BSKH, v_BSKH, context.mask, key, index_BG)

    def check_room(self, global_BS: Bool[Array, "B S"], real_BS: Bool[Array, "B S"] | None) -> None:
        """Raise ValueError if a row has more global tokens than there is room for, as far as that is known."""
        room = self.config.max_global
        if room == 0:
            raise ValueError("global tokens are given and max_global=0; set it to the most that a row has")
        if isinstance(global_BS, Tracer) or isinstance(real_BS, Tracer):
            return  # a compiled program answers with NaN
        found = np.asarray(global_BS) if real_BS is None else np.asarray(global_BS) & np.asarray(real_BS)
        most = int(found.sum(-1).max(initial=0))
        if most > room:
            raise ValueError(f"a row has {most} global tokens and max_global={room}; set max_global={most}")


def first_true(chosen_BS: Bool[Array, "B S"], num: int) -> tuple[Int[Array, "B G"], Bool[Array, "B G"]]:
    """Indices of the first `num` true elements of each row, and which of them there are."""
    length = chosen_BS.shape[1]
    rank_BG, _ = jax.lax.top_k(jnp.where(chosen_BS, length - jnp.arange(length), 0), num)
    return jnp.minimum(length - rank_BG, length - 1), rank_BG > 0


def _take(x_BS: Float[Array, "B S ..."], index_BG: Int[Array, "B G"]) -> Float[Array, "B G ..."]:
    return jnp.take_along_axis(x_BS, index_BG.reshape(*index_BG.shape, *(1 for _ in x_BS.shape[2:])), axis=1)
