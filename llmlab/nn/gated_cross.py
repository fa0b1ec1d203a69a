"""Gated cross-attention (Alayrac et al. 2022, 2204.14198, section 2.2): a trained language model learns to look.

    x --+-- norm -- cross-attention -- * tanh(a) --(+)--+-- norm -- FFN -- * tanh(b) --(+)--> the block as it was
        +---------------------------------------|      +----------------------------|

a and b start at zero: at first the model is exactly the language model that it was, which can stay frozen; what is
trained is in front of its blocks, not inside them. A token that is to see nothing of the memory gets nothing of the
attention (its row of weights is empty), only the feed-forward.

Cost: a layer's, with the memory's length in place of the text's; keys and values are projected from the memory.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import CrossAttention
from llmlab.nn.cache import MemoryCache
from llmlab.nn.config import Block, Context, DecoderLayerCache, FeedForward, LayerCache, Room
from llmlab.nn.dropout import dropout, split_key
from llmlab.nn.wiring import Output, SerialLayer


@dataclass(frozen=True, kw_only=True)
class GatedBlock(Block):
    """A pre-norm block with gated cross-attention in front."""

    look: CrossAttention
    """Attention over the memory."""
    look_ffn: FeedForward
    """Transforms what was seen."""
    gate: Literal["number", "vector"] = "number"
    """One number for each of the two branches, or one for each channel."""

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "GatedLayer":
        return GatedLayer(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> DecoderLayerCache:
        return DecoderLayerCache(super().new_cache(dim, room), self.look.new_cache(dim, room))

    @property
    def behind(self) -> Block:
        """The block without what is in front."""
        return Block(
            mixer=self.mixer,
            ffn=self.ffn,
            cross=self.cross,
            norm=self.norm,
            wiring=self.wiring,
            dropout=self.dropout,
        )


class GatedCrossAttention(nnx.Module):
    """What is in front of the block."""

    def __init__(self, block: GatedBlock, dim: int, *, rngs: nnx.Rngs, depth: int) -> None:
        assert block.norm is not None, "gated cross-attention normalises its inputs"
        shape = () if block.gate == "number" else (dim,)
        self.dropout = block.dropout
        self.norm_cross = block.norm.build(dim, rngs=rngs)
        self.cross = block.look.build(dim, rngs=rngs, depth=depth)
        self.gate_cross = nnx.Param(jnp.zeros(shape), axes=("embed",)[: len(shape)])
        self.norm_ffn = block.norm.build(dim, rngs=rngs)
        self.ffn = block.look_ffn.build(dim, rngs=rngs, depth=depth)
        self.gate_ffn = nnx.Param(jnp.zeros(shape), axes=("embed",)[: len(shape)])

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: MemoryCache | None = None,
    ) -> tuple[Float[Array, "B S D"], MemoryCache | None]:
        key_cross, key_ffn, drop_cross, drop_ffn = split_key(key, 4)
        seen_BSD, cache = self.cross(self.norm_cross(x_BSD), context, key_cross, cache)
        x_BSD = x_BSD + jnp.tanh(self.gate_cross[...]) * dropout(seen_BSD, self.dropout, drop_cross)
        fed_BSD, _ = self.ffn(self.norm_ffn(x_BSD), context, key_ffn)
        return x_BSD + jnp.tanh(self.gate_ffn[...]) * dropout(fed_BSD, self.dropout, drop_ffn), cache


class GatedLayer(SerialLayer):
    """See GatedBlock."""

    def __init__(self, block: GatedBlock, dim: int, *, rngs: nnx.Rngs, depth: int) -> None:
        super().__init__(block, dim, rngs=rngs, depth=depth, norm_input=True)
        self.gated = GatedCrossAttention(block, dim, rngs=rngs, depth=depth)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> Output:
        key_gated, key = split_key(key, 2)
        if cache is None:
            return super().__call__(self.gated(x_BSD, context, key_gated)[0], context, key)
        x_BSD, looked = self.gated(x_BSD, context, key_gated, cache.cross)
        x_BSD, own, auxiliary = super().__call__(x_BSD, context, key, cache.mixer)
        assert own is not None
        return x_BSD, DecoderLayerCache(own, looked), auxiliary
