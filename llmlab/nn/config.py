"""What a residual block is made of, as open types.

A config is a frozen dataclass with a `build`; a new mechanism subclasses one of these and nobody edits a central
if-chain. The module that a config builds lives beside it in the same file.
"""

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.dropout import check_rate
from llmlab.nn.kernels.bias import Bias
from llmlab.nn.masks import Mask
from llmlab.nn.mup import MuP

Auxiliary = dict[str, Array]
"""What a layer reports besides its output, by name (a router's statistics); empty for most layers."""


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the positions seen so far, for one attention layer (see nn.cache).

    A kind in which slot t is position t inherits from this class and has only an `update`.
    """

    def update(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], position_ids: Int[Array, "B S"]
    ) -> "tuple[Cache, Float[Array, 'B T K H'], Float[Array, 'B T K H']]":
        """Store the new positions, consecutive in every row; returns the cache and all keys and values to attend to.

        A token at position -1 is padding and is stored nowhere.
        """
        ...

    def key_positions(self, position_ids: Int[Array, "B S"]) -> Int[Array, "B T"] | None:
        """Positions of the keys that `update` returns for these new ones, -1 for a slot with no key in it; None where
        key t has position t."""
        return None


@dataclass(frozen=True, kw_only=True)
class Room:
    """What caches are to have room for."""

    batch_size: int
    """Rows."""
    length: int
    """Positions of each."""
    dtype: Any
    """Storage of keys and values: float32, bfloat16 or int8."""
    memory_length: int = 0
    """Length of the memory that cross-attention looks at."""
    rewind: int = 0
    """How many positions may be taken back at a time (by speculative decoding, say)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Memory:
    """Hidden states of earlier segments that one layer may attend to besides its input (Transformer-XL)."""

    states: Float[Array, "B M D"]
    """Earliest first; the layer's input of that time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecoderLayerCache:
    """What a layer with cross-attention remembers."""

    mixer: Cache
    """Keys and values of its own sequence."""
    cross: Any
    """Keys and values of the encoder's states (nn.cache.MemoryCache)."""


LayerCache = Any
"""What one layer carries from one call to the next: a Cache, a Memory, whatever its mixer takes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What every layer of one forward pass may look at besides its input."""

    mask: Mask
    """Which keys a query may see, in the layer's own sequence."""
    position_ids: Int[Array, "B S"]
    """Position of every token in its own document."""
    valid: Bool[Array, "B S"] | None = None
    """Which tokens are real; None for all. Padding takes no expert's capacity and counts in no statistics."""
    bias: Bias | None = None
    """Bias on the logits of self-attention that all layers share (T5)."""
    global_tokens: Bool[Array, "B S"] | None = None
    """Tokens that see all tokens and are seen by all, in sparse attention that has such (Longformer)."""
    draws: Mapping[str, Array] | None = None
    """Random draws by name, where a caller fixes them: "lsh_rotations", "random_blocks", ... None: layers draw from
    the seed of their config."""
    memory: Any = None
    """Encoder states (B, T, D) for cross-attention."""
    memory_mask: Any = None
    """Mask of cross-attention over `memory`."""


@dataclass(frozen=True, kw_only=True)
class Norm(abc.ABC):
    """Normalisation over the embedding dimension."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module mapping (..., dim) to the same shape."""


@dataclass(frozen=True, kw_only=True)
class Mixer(abc.ABC):
    """Moves information between positions: attention and its relatives."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> nnx.Module:
        """Module `(x_BSD, context, key=None, cache=None) -> (y_BSD, cache)`.

        `depth` is the number of layers of the stack: weights that write into the residual stream start smaller by
        1/sqrt(2 depth) (GPT-2, Radford et al. 2019, section 2.3).
        """

    @abc.abstractmethod
    def context_flops(self, dim: int, sequence_length: int) -> int:
        """Forward FLOPs per token of what is no parameter matmul (scores and weighted sum, counted in full)."""

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        """What a layer of a model of width `dim` carries from one call to the next, nothing in it yet.

        Raises:
            ValueError: there is no such thing that would give the results of the whole forward pass.
        """
        raise ValueError(f"{type(self).__name__} has no cache; run the model on the whole sequence at every token")

    def under_mup(self, mup: MuP, dim: int) -> "Mixer":
        """The mixer with muP's factors for a model of width `dim`; itself where that is the base model's.

        Raises:
            ValueError: its muP is not known.
        """
        raise ValueError(f"muP of {type(self).__name__} is not known; use Attention(...), or mup=None")


@dataclass(frozen=True, kw_only=True)
class FeedForward(abc.ABC):
    """Transforms every position by itself."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> nnx.Module:
        """Module `(x_BSD, context, key=None) -> (y_BSD, auxiliary)`; `depth` as for a mixer."""

    def losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to its mean loss, from what the layers of a stack reported.

        Args:
            auxiliary: as a stack returns it, every array with a leading dimension of layers.
        """
        return {}

    def under_mup(self, mup: MuP, dim: int) -> "FeedForward":
        """The feed-forward with muP's factors for a model of width `dim`; hidden matrices need none."""
        return self

    def idle_parameters(self, dim: int) -> int:
        """Matmul parameters of one layer that a token does not meet (the experts it is not sent to)."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Wiring(abc.ABC):
    """How a block's parts, norms and residual additions are connected."""

    @abc.abstractmethod
    def build(self, block: "Block", dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> nnx.Module:
        """Module `(x_BSD, context, key=None, cache=None) -> (y_BSD, cache, auxiliary)`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One residual block: a mixer and a feed-forward, their norms, and how they are wired."""

    mixer: Mixer
    """Moves information between positions."""
    ffn: FeedForward
    """Transforms every position by itself."""
    cross: Mixer | None = None
    """Attention over encoder states, between mixer and feed-forward."""
    norm: Norm | None
    """Normalisation of each part's input or output; None for none."""
    wiring: Wiring
    """How parts, norms and residual additions are connected."""
    dropout: float = 0.0
    """Dropout on the output of each part, before it is added to the residual stream."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> nnx.Module:
        """Module `(x_BSD, context, key=None, cache=None) -> (y_BSD, cache, auxiliary)`."""
        return self.wiring.build(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        """What a layer carries from one call to the next, empty. Raises ValueError where its mixer has none."""
        own = self.mixer.new_cache(dim, room)
        return own if self.cross is None else DecoderLayerCache(own, self.cross.new_cache(dim, room))

    def under_mup(self, mup: MuP, dim: int) -> "Block":
        """The block with muP's factors for a model of width `dim`. Raises ValueError where they are not known."""
        cross = None if self.cross is None else self.cross.under_mup(mup, dim)
        return dataclasses.replace(
            self, mixer=self.mixer.under_mup(mup, dim), ffn=self.ffn.under_mup(mup, dim), cross=cross
        )
