"""The bottleneck block (Sun et al. 2020, 2004.02984): as deep and as wide outside as a large model, narrow inside.

    x (D) --+-- W_q,k -> norm (d) --> queries, keys --+
            +----------------------> values ----------+-- attention (d) --(+)-- norm
            +-- W_in  -> norm (d) -----------------------------------------+     |
            |            +---------------------------- (d) ----------------------+
            |            +-- [ MLP --(+)-- norm ] x num_ffns  (d)
            |                +--------+     |
            +-------------------------------+-- W_out (D) --(+)-- norm -- y
            +------------------------------------------------+

    h = norm(W_in x)      s = norm(W_qk x)      a = norm(Attention(s, s, x) + h)
    a <- norm(MLP(a) + a)  num_ffns times       y = norm(W_out a + x)

The residual stream keeps the width D that a teacher's states can be copied into, and layers work in d < D, a quarter of
it. Attention reads the wide x for its values, so it keeps more of its parameters than one feed-forward would; several
of them restore the balance (attention to feed-forwards is 1:2 in BERT; 0.4 to 0.6 is best, section 3.3).

Cost per token: 2 (3 D d + 3 d^2 + D d) FLOPs forward for projections and attention's matrices and 4 d F num_ffns for
the feed-forwards, against 24 D^2 for BERT's layer at F = 4 D.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import Attention
from llmlab.nn.config import Auxiliary, Block, Cache, Context, Wiring
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import dropout, split_key
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Wiring):
    """Narrow inside, wide outside. Mixer, feed-forward and norm are the block's, at the narrow width."""

    width: int
    """Width inside."""
    num_ffns: int = 4
    """Feed-forwards one after the other, each a residual branch."""
    narrow_values: bool = False
    """Whether queries, keys and values are all read from W_in's output, and there is no W_qk (MobileBERT-tiny)."""

    def __post_init__(self) -> None:
        for name in ("width", "num_ffns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "BottleneckLayer":
        return BottleneckLayer(self, block, dim, rngs=rngs, depth=depth)


class BottleneckLayer(nnx.Module):
    """See Bottleneck. Dropout is where the width is D again; inside there is only attention's."""

    def __init__(self, config: Bottleneck, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int) -> None:
        mixer = block.mixer
        if not isinstance(mixer, Attention) or block.cross is not None or _extras(mixer):
            raise ValueError("Bottleneck wires plain Attention: no positions, norms or window inside, nothing across")
        if not isinstance(block.ffn, MLP | GatedMLP):
            raise ValueError(f"Bottleneck chains feed-forwards that report nothing, no {type(block.ffn).__name__}")
        wide, narrow = (("embed", dim),), (("bottleneck", config.width),)
        width, norm = config.width, block.norm

        def built(size: int) -> Any:
            return norm.build(size, rngs=rngs) if norm is not None else None

        self.dropout = block.dropout
        self.enter = Narrowing(wide, narrow, built(width), rngs=rngs)
        self.share = None if config.narrow_values else Narrowing(wide, narrow, built(width), rngs=rngs)
        self.mixer: Any = mixer.build(width, rngs=rngs, depth=depth)
        if not config.narrow_values:
            heads = (("kv_heads", mixer.num_kv_heads or mixer.num_heads), ("head_dim", mixer.resolved_head_dim(width)))
            self.mixer.value = Dense(wide, heads, bias=mixer.bias, rngs=rngs)
        self.mixer_norm = built(width)
        earlier = range(config.num_ffns - 1)
        self.ffns = nnx.List([block.ffn.build(width, rngs=rngs, depth=depth) for _ in earlier])
        self.ffn_norms = nnx.List([built(width) for _ in earlier])
        self.ffn = block.ffn.build(width, rngs=rngs, depth=depth)
        self.ffn_norm = built(width)
        self.leave = Dense(narrow, wide, bias=True, rngs=rngs)
        self.leave_norm = built(dim)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context, key: jax.Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None, Auxiliary]:
        assert cache is None, "a bottleneck block keeps no cache: it is an encoder's"
        ffns, norms = (*self.ffns, self.ffn), (*self.ffn_norms, self.ffn_norm)
        key_mixer, key_leave, *key_ffns = split_key(key, 2 + len(ffns))
        h_BSE = self.enter(x_BSD)
        q_BSNH, k_BTKH, v_BTKH = self.placed(x_BSD, h_BSE)
        a_BSE = h_BSE + self.mixer.attend(q_BSNH, k_BTKH, v_BTKH, context.mask, key_mixer)
        a_BSE = _normed(self.mixer_norm, a_BSE)
        for ffn, norm, key_ffn in zip(ffns, norms, key_ffns, strict=True):
            fed_BSE, _ = ffn(a_BSE, context, key_ffn)
            a_BSE = _normed(norm, a_BSE + fed_BSE)
        y_BSD = _normed(self.leave_norm, x_BSD + dropout(self.leave(a_BSE), self.dropout, key_leave))
        return shard(y_BSD, "batch", "residual", "embed"), None, {}

    def placed(
        self, x_BSD: Float[Array, "B S D"], h_BSE: Float[Array, "B S E"] | None = None
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values of x; `h_BSE` is W_in's output where it is there already."""
        if self.share is None:
            source_BSE = self.enter(x_BSD) if h_BSE is None else h_BSE
            return self.mixer.query(source_BSE), self.mixer.key(source_BSE), self.mixer.value(source_BSE)
        s_BSE = self.share(x_BSD)
        return self.mixer.query(s_BSE), self.mixer.key(s_BSE), self.mixer.value(x_BSD)


class Narrowing(nnx.Module):
    """norm(W x + b) into the bottleneck."""

    def __init__(
        self,
        wide: tuple[tuple[str, int], ...],
        narrow: tuple[tuple[str, int], ...],
        norm: Any,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.dense = Dense(wide, narrow, bias=True, rngs=rngs)
        self.norm = norm

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S E"]:
        return _normed(self.norm, self.dense(x_BSD))


def _extras(mixer: Attention) -> bool:
    """Whether it has parts beyond projections and scores."""
    return any(part is not None for part in (mixer.position, mixer.qk_norm, mixer.window))


def _normed(norm: Any, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return x if norm is None else norm(x)
