"""What attention over lists of keys has in common, whichever list it is: see nn/longformer.py and nn/big_bird.py."""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.attention import Attention, AttentionLayer
from llmlab.nn.config import Cache, Context, LayerCache, Room
from llmlab.nn.kernels import Scoring, attention
from llmlab.nn.masks import Mask, Padding
from llmlab.nn.platform import platform
from llmlab.nn.positions import BiasPosition
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Attention):
    """Attention of which each query computes a list of keys; `kernel` serves those queries that see all keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        if self.window is not None:
            raise ValueError(f"{kind} has a pattern of its own, and window={self.window} would cut it; leave it None")
        if isinstance(self.position, BiasPosition):
            raise ValueError(f"{kind} adds no bias to its logits: {self.position} cannot be its position; use Rotary()")

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        raise ValueError(f"{type(self).__name__} looks both ways and has no cached decoding; Attention(window=...) has")


class SparseAttentionLayer(AttentionLayer, abc.ABC):
    """See SparseAttention."""

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        if cache is not None:
            raise ValueError(f"{type(self.config).__name__} looks both ways and has no cached decoding")
        if context.bias is not None:
            raise ValueError(f"{type(self.config).__name__} adds no bias to its logits; the model shares one (T5)")
        q_BSNH, k_BSKH, v_BSKH = self.project(x_BSD, x_BSD)
        if self.rotation is not None:
            q_BSNH = self.rotation(q_BSNH, context.position_ids)
            k_BSKH = self.rotation(k_BSKH, context.position_ids)
        o_BSNH = self.mix(x_BSD, q_BSNH, k_BSKH, v_BSKH, context, key)
        return self.output(shard(o_BSNH, "batch", "sequence", "heads", "head_dim")), None

    @abc.abstractmethod
    def mix(
        self,
        x_BSD: Float[Array, "B S D"],
        q_BSNH: Float[Array, "B S N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        context: Context,
        key: jax.Array | None,
    ) -> Float[Array, "B S N H"]:
        """Weighted values of every query, before the output projection."""

    def real(self, o_BSNH: Float[Array, "B S N H"], context: Context) -> Float[Array, "B S N H"]:
        """The same with zeros for padding, as sparse attention of transformers gives: some heads look at padding."""
        padding = context.mask.find(Padding)
        return o_BSNH if padding is None else jnp.where(padding.kv_BT[:, :, None, None], o_BSNH, 0)

    def scoring(self, mask: Mask, key: jax.Array | None) -> Scoring:
        """How logits become weights."""
        rate = self.config.dropout if key is not None else 0.0
        seed = jax.random.bits(key, (2,), jnp.uint32) if key is not None and rate > 0.0 else None
        return Scoring(mask=mask, scale=self.scale, softcap=self.config.softcap, dropout=rate, seed=seed)

    def see_all(
        self,
        q_BGNH: Float[Array, "B G N H"],
        k_BSKH: Float[Array, "B S K H"],
        v_BSKH: Float[Array, "B S K H"],
        mask: Mask,
        key: jax.Array | None,
        index_BG: Int[Array, "B G"] | None = None,
    ) -> Float[Array, "B G N H"]:
        """Plain attention of queries with these indices (None: one for each key) to all keys."""
        kernel = self.config.kernel
        if kernel == "auto" and platform() == "cpu" and index_BG is not None and index_BG.shape[1] >= 16:
            kernel = "blockwise"  # of 64 queries, 4,096 keys, 4 heads of 32: a third of the time of auto's choice
        return attention(
            q_BGNH,
            k_BSKH,
            v_BSKH,
            mask=mask,
            scale=self.scale,
            softcap=self.config.softcap,
            dropout=self.config.dropout if key is not None else 0.0,
            key=key,
            kernel=kernel,
            query_index=index_BG,
        )
