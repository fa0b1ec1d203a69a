"""Linformer: attention over a fixed number of mixtures of the keys (Wang et al. 2020, 2006.04768).

    o = softmax(Q (E K)^T / sqrt(H)) (F V)        E, F: k x S, learned

E K are k rows, each a learned mixture of all keys, and F V the same of the values; a query attends to k mixtures
instead of S tokens. The paper's argument: a softmax attention matrix is close to one of low rank (theorem 1), and a
random projection to k = O(H / error^2) dimensions keeps what a query reads, whatever S (theorem 2).

    sharing      headwise     E and F of each layer, for all heads
                 key-value    one matrix for keys and values and all heads: E = F
                 none         E and F of each head

    time      8 k H FLOPs a head and token in place of 4 S H
    memory    O(S k) weights, or O(S + k) in a blockwise kernel; 2 k max_length parameters
    trades    order and length: E's columns belong to places in the row, so the length is bounded when the model is
              built, nothing is causal (every mixture holds the future) and the documents of a packed row would mix

Padding: the keys and values of padding are zeroed before the projection, so they add nothing to any mixture, and a row
gives the same outputs with and without padding after it. There is no mask beyond that: all k mixtures are always
attended to, those to which no token contributes with logit 0 and value 0. Padding before a row moves its tokens to
other columns of E and F: they are then mixed by weights learned for later places.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from llmlab.nn.attention import head_width
from llmlab.nn.config import Cache, Context, Mixer
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate
from llmlab.nn.kernels import Kernel, attention
from llmlab.nn.masks import Full, Mask, Visibility
from llmlab.nn.module import normal
from llmlab.sharding import shard

Sharing = Literal["none", "headwise", "key-value"]


@dataclass(frozen=True, kw_only=True)
class LinformerAttention(Mixer):
    """Bidirectional self-attention over `projected` mixtures of the sequence."""

    num_heads: int
    """Heads."""
    max_length: int
    """Longest sequence: columns of the projections."""
    projected: int = 256
    """Mixtures of keys and values, k."""
    sharing: Sharing = "headwise"
    """Which projections are one: those of all heads, of all heads, keys and values, or none."""
    head_dim: int | None = None
    """Width of a head; None for embed_dim / num_heads."""
    bias: bool = False
    """Whether the query, key and value projections add a bias."""
    output_bias: bool = False
    """Whether the output projection adds a bias."""
    dropout: float = 0.0
    """Dropout on the attention weights."""
    kernel: Kernel = "auto"
    """Implementation of the attention to the mixtures."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "max_length", "projected"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        check_rate("dropout", self.dropout)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "LinformerLayer":
        return LinformerLayer(self, dim, rngs=rngs, depth=depth)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        return 8 * self.num_heads * self.projected * head_width(dim, self.num_heads, self.head_dim)


class LinformerLayer(nnx.Module):
    """See LinformerAttention."""

    def __init__(self, config: LinformerAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = head_width(dim, config.num_heads, config.head_dim)
        embed = (("embed", dim),)
        heads = (("heads", config.num_heads), ("head_dim", head_dim))
        self.config = config
        self.scale = 1 / math.sqrt(head_dim)
        self.query = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.key = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.value = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.output = Dense(heads, embed, bias=config.output_bias, rngs=rngs, gain=1 / math.sqrt(2 * depth))
        self.mix_keys = self._projection(rngs)
        self.mix_values = None if config.sharing == "key-value" else self._projection(rngs)

    def _projection(self, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
        """(k, max_length), or one for each head; elements N(0, 1/k) as in the paper's proof."""
        config = self.config
        heads = (config.num_heads,) if config.sharing == "none" else ()
        drawn = normal(rngs, (*heads, config.projected, config.max_length))
        names = ("heads", "mixtures", "position")[-drawn.ndim :]
        return nnx.Param(drawn / math.sqrt(config.projected), axes=names)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        real_BS = self._real(context.mask, x_BSD.shape[1])
        if cache is not None:
            raise ValueError("LinformerAttention mixes a whole sequence and cannot decode token by token: no cache")
        q_BSNH = shard(self.query(x_BSD), "batch", "sequence", "heads", "head_dim")
        k_BSNH = shard(self.key(x_BSD), "batch", "sequence", "heads", "head_dim")
        v_BSNH = shard(self.value(x_BSD), "batch", "sequence", "heads", "head_dim")
        if real_BS is not None:
            k_BSNH, v_BSNH = (jnp.where(real_BS[..., None, None], z, 0) for z in (k_BSNH, v_BSNH))
        o_BSNH = attention(
            q_BSNH,
            _mixed(k_BSNH, self.mix_keys[...]),
            _mixed(v_BSNH, (self.mix_keys if self.mix_values is None else self.mix_values)[...]),
            mask=Full(),
            scale=self.scale,
            dropout=self.config.dropout if key is not None else 0.0,
            key=key,
            kernel=self.config.kernel,
        )
        return self.output(shard(o_BSNH, "batch", "sequence", "heads", "head_dim")), cache

    def _real(self, mask: Mask, length: int) -> Bool[Array, "B S"] | None:
        """Which tokens are no padding; ValueError for what a Linformer cannot do."""
        seen = Visibility.of(mask, "LinformerAttention")
        if seen.causal:
            raise ValueError(
                "LinformerAttention mixes the whole sequence before attending, so it cannot hide the future; "
                "use it in an encoder, or FavorAttention(causal=True) in a decoder"
            )
        if seen.segments_BT is not None:
            raise ValueError(
                "LinformerAttention would mix the documents of a packed row; give each a row of its own, or do not "
                "tell them apart (no segment_ids; isolate=False in packed data)"
            )
        if length > self.config.max_length:
            raise ValueError(
                f"the sequence has {length} positions and LinformerAttention {self.config.max_length}; "
                f"shorten the sequence or build it with max_length={length}"
            )
        return seen.real_BT


def _mixed(x_BSNH: Float[Array, "B S N H"], mix: Float[Array, "*N K L"]) -> Float[Array, "B K N H"]:
    """k mixtures of the sequence for each head, by the columns of its places."""
    batch, length, heads, width = x_BSNH.shape
    mix = mix[..., :length]
    if mix.ndim == 3:
        return jnp.einsum("NKS,BSNH->BKNH", mix, x_BSNH)
    mixed_BKC = jnp.einsum("KS,BSC->BKC", mix, x_BSNH.reshape(batch, length, heads * width))
    return mixed_BKC.reshape(batch, -1, heads, width)
