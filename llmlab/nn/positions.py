"""Where a token stands: attention by itself is blind to order, so positions must come in somewhere.

    added to the embeddings    Learned      a table row per position    (Gehring et al. 2017, 1705.03122)
                               Sinusoidal   waves of geometric wavelengths    (Vaswani et al. 2017, 1706.03762)
    a rotation of q and k      Rotary       q_m . k_n depends on m - n alone    (Su et al. 2021, 2104.09864)
    a bias on the logits       ALiBi        -slope * distance    (Press et al. 2021, 2108.12409)
                               T5Relative   a learned number per bucket of distances    (Raffel et al. 2020, 1910.10683)

A learned table ends at its last row. The others are defined at every position, but only ALiBi and T5's buckets are
known to hold up far beyond the training length; rotary models are stretched by a change of their frequencies (see
llmlab.nn.rotary_scaling). Added and rotary positions cost O(S D) per forward or layer; biases cost O(S T) per layer,
inside the attention kernel.
"""

import abc
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.masks import Index
from llmlab.nn.module import normal
from llmlab.nn.platform import platform
from llmlab.nn.rotary_scaling import NTK, DynamicNTK, Linear, Llama3, RotaryScaling, YaRN, rotary_frequencies
from llmlab.sharding import shard

__all__ = [
    "NTK",
    "ALiBi",
    "AddedPosition",
    "BiasPosition",
    "DynamicNTK",
    "Learned",
    "Linear",
    "Llama3",
    "Position",
    "QueryKeyPosition",
    "Rotary",
    "RotaryScaling",
    "Sinusoidal",
    "T5Relative",
    "YaRN",
]


@dataclass(frozen=True)
class Position:
    """A way to tell a model where its tokens stand."""


@dataclass(frozen=True)
class AddedPosition(Position):
    """Positions that are added to the token embeddings."""

    max_length: int | None
    """Longest sequence; None for no limit."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module `(x_BSD, position_ids_BS) -> x_BSD`; ValueError for a sequence longer than max_length."""


@dataclass(frozen=True)
class QueryKeyPosition(Position):
    """Positions that act on queries and keys."""

    @abc.abstractmethod
    def build(self, head_dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module `(x_BSNH, position_ids_BS) -> x_BSNH` for queries and keys alike."""


@dataclass(frozen=True)
class BiasPosition(Position):
    """Positions that bias the attention logits."""

    @abc.abstractmethod
    def build(self, num_heads: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module with `bias() -> Bias`."""


def check_length(length: int, max_length: int | None) -> None:
    """Raise ValueError for a sequence that is longer than the positions reach."""
    if max_length is not None and length > max_length:
        raise ValueError(
            f"the sequence has {length} positions and the model {max_length}; "
            f"shorten the sequence or give the model max_length={length}"
        )


@dataclass(frozen=True)
class Learned(AddedPosition):
    """A learned table with one row per position (Gehring et al. 2017, 1705.03122); GPT-2, BERT."""

    max_length: int
    """Longest sequence: the number of positions in the table."""
    offset: int = 0
    """Rows before position 0; OPT and RoBERTa have 2, for padding."""
    std: float = 0.02
    """Standard deviation of the initial table."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} is not positive; give the longest sequence to be seen")
        if self.offset < 0:
            raise ValueError(f"offset={self.offset} is negative; 0 puts position 0 in the first row")

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "LearnedPositions":
        return LearnedPositions(self, dim, rngs=rngs)


class LearnedPositions(nnx.Module):
    """See Learned."""

    def __init__(self, config: Learned, dim: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        rows = config.max_length + config.offset
        self.table = nnx.Param(config.std * normal(rngs, (rows, dim)), axes=("position", "embed"))

    def __call__(self, x_BSD: Float[Array, "B S D"], position_ids_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        check_length(x_BSD.shape[1], self.config.max_length)
        return x_BSD + jnp.take(self.table[...], position_ids_BS + self.config.offset, axis=0, mode="clip")


@dataclass(frozen=True)
class Sinusoidal(AddedPosition):
    """Fixed waves (Vaswani et al. 2017, section 3.5): PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos(same)."""

    max_length: int | None = None
    """Longest sequence; None for no limit."""
    base: float = 10000.0
    """Ratio of the longest wavelength to the shortest."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "SinusoidalPositions":
        if dim % 2:
            raise ValueError(f"embed_dim={dim} is odd; sinusoidal positions need pairs: use {dim + 1}")
        return SinusoidalPositions(self)


class SinusoidalPositions(nnx.Module):
    """See Sinusoidal."""

    def __init__(self, config: Sinusoidal) -> None:
        self.config = config

    def __call__(self, x_BSD: Float[Array, "B S D"], position_ids_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        check_length(x_BSD.shape[1], self.config.max_length)
        dim = x_BSD.shape[-1]
        frequencies = self.config.base ** -(np.arange(0, dim, 2) / dim)
        angles = position_ids_BS[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
        waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(x_BSD.shape)
        return x_BSD + waves.astype(x_BSD.dtype)


@dataclass(frozen=True)
class Rotary(QueryKeyPosition):
    """Rotary positions (Su et al. 2021, 2104.09864): pairs of dimensions turn by position * theta^(-2i/D).

    The product of a query at m and a key at n then depends on m - n alone.
    """

    theta: float = 10000.0
    """Base of the frequencies."""
    fraction: float = 1.0
    """Share of a head's dimensions that is rotated, its first ones (GPT-NeoX 0.25, Phi 0.5)."""
    interleaved: bool = False
    """Pairs are dimensions (2i, 2i + 1) (the paper, GPT-J) instead of (i, i + D/2) (GPT-NeoX, Llama)."""
    scaling: RotaryScaling | None = None
    """Linear, NTK, DynamicNTK, YaRN or Llama3: how frequencies change for sequences beyond the training length."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction={self.fraction} is not in (0, 1]; 1 rotates all of a head's dimensions")
        if self.theta <= 1.0:
            raise ValueError(f"theta={self.theta} is not above 1; 10000 is usual, 500000 for long contexts")

    def rotated(self, head_dim: int) -> int:
        """How many of a head's dimensions are rotated."""
        dim = int(head_dim * self.fraction)
        if dim % 2 or dim < 2:
            raise ValueError(
                f"head_dim={head_dim} with fraction={self.fraction} gives {dim} rotated dimensions; "
                "rotation works on pairs: choose them so that the product is even and at least 2"
            )
        return dim

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of every pair, float64; those at the original length for a dynamic scaling."""
        dim = self.rotated(head_dim)
        if self.scaling is None:
            return rotary_frequencies(self.theta, dim)
        return self.scaling.frequencies(self.theta, dim)

    def frequencies_at(self, head_dim: int, position_ids_BS: Int[Array, "B S"]) -> Float[Array, "#B 1 P"]:
        """Radians per position of every pair, float32, for a batch of these positions; B is 1 for all rows alike."""
        if self.scaling is None:
            return jnp.asarray(self.frequencies(head_dim)[None, None], jnp.float32)
        return self.scaling.frequencies_at(self.theta, self.rotated(head_dim), position_ids_BS)

    def build(self, head_dim: int, *, rngs: nnx.Rngs) -> "RotaryPositions":
        self.frequencies(head_dim)  # a head that cannot be rotated is an error now, not in the first step
        return RotaryPositions(self)


class RotaryPositions(nnx.Module):
    """See Rotary.

    Every layer computes its table of cosines and sines from the position ids; XLA sees that unrolled layers compute
    the same and keeps one. So layers share the work without sharing state.
    """

    def __init__(self, config: Rotary) -> None:
        self.config = config

    def __call__(self, x_BSNH: Float[Array, "B S N H"], position_ids_BS: Int[Array, "B S"]) -> Float[Array, "B S N H"]:
        cos_BSP, sin_BSP = self.table(x_BSNH.shape[-1], position_ids_BS)
        dim = 2 * cos_BSP.shape[-1]
        rotated = _rotate(x_BSNH[..., :dim].astype(jnp.float32), cos_BSP, sin_BSP, self.config.interleaved)
        rotated = rotated.astype(x_BSNH.dtype)
        return rotated if dim == x_BSNH.shape[-1] else jnp.concatenate([rotated, x_BSNH[..., dim:]], axis=-1)

    def table(
        self, head_dim: int, position_ids_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S P"], Float[Array, "B S P"]]:
        """Cosine and sine of every position and pair."""
        scaling = self.config.scaling
        amplitude = np.float32(1.0 if scaling is None else scaling.amplitude)
        # float32: bfloat16 rounds position 257 to 256
        angles = position_ids_BS[..., None].astype(jnp.float32) * self.config.frequencies_at(head_dim, position_ids_BS)
        cos, sin = jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude
        if platform() == "cpu":
            # XLA on CPU fuses the cosines into every reader and computes them there again for every head, which takes
            # ten times as long as the rotation (2.4 ms against 0.2 ms at 8 x 256 x 6 x 64); it ignores barriers. What
            # a matmul has read is computed once, and the product with the identity is exact.
            identity = jnp.eye(angles.shape[-1], dtype=jnp.float32)
            cos, sin = (jnp.matmul(x, identity, precision=jax.lax.Precision.HIGHEST) for x in (cos, sin))
        return cos, sin


def _rotate(
    x_BSNH: Float[Array, "B S N H"], cos_BSP: Float[Array, "B S P"], sin_BSP: Float[Array, "B S P"], interleaved: bool
) -> Float[Array, "B S N H"]:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair."""
    cos, sin = cos_BSP[:, :, None], sin_BSP[:, :, None]
    if interleaved:
        a, b = x_BSNH[..., 0::2], x_BSNH[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x_BSNH.shape)
    a, b = jnp.split(x_BSNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@dataclass(frozen=True)
class ALiBi(BiasPosition):
    """Attention with linear biases (Press et al. 2021, 2108.12409): head h adds -slope_h |query - key|.

    The slopes of N heads, N a power of two, are 2^(-8/N), 2^(-16/N), ... 2^-8. For other N (the paper's code): those
    of the power of two below, then every second one of the power of two above. BLOOM adds slope * key instead, which
    softmax cannot tell apart in a causal row.
    """

    def build(self, num_heads: int, *, rngs: nnx.Rngs) -> "ALiBiPositions":
        return ALiBiPositions(num_heads)


class ALiBiPositions(nnx.Module):
    """See ALiBi."""

    def __init__(self, num_heads: int) -> None:
        self.slopes = alibi_slopes(num_heads)

    def bias(self) -> "ALiBiBias":
        """The bias of every head."""
        return ALiBiBias(self.slopes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ALiBiBias(Bias):
    """-slope |query - key|."""

    of_heads: tuple[float, ...] = field(metadata={"static": True})
    """Their slopes."""

    def block(self, query_index: Index, kv_index: Index) -> Float[Array, "B N S T"]:
        return SlopeBias(self.slopes()).block(query_index, kv_index)

    def heads(self, first: Int[Array, ""], count: int) -> "SlopeBias":
        return SlopeBias(self.slopes()).heads(first, count)

    def slopes(self) -> Float[Array, "N"]:
        return jnp.asarray(self.of_heads, jnp.float32)

    def by_distance(self, num_queries: int, num_keys: int) -> Float[Array, "N R"]:
        return SlopeBias(self.slopes()).by_distance(num_queries, num_keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlopeBias(Bias):
    """-slope |query - key| with slopes that are not known when tracing: those of a device's own heads."""

    slopes_N: Float[Array, "N"]

    def block(self, query_index: Index, kv_index: Index) -> Float[Array, "B N S T"]:
        distance = jnp.abs(_distance(query_index, kv_index)).astype(jnp.float32)
        return -self.slopes_N[:, None, None] * distance[:, None]

    def heads(self, first: Int[Array, ""], count: int) -> "SlopeBias":
        return SlopeBias(jax.lax.dynamic_slice_in_dim(self.slopes_N, first, count))

    def slopes(self) -> Float[Array, "N"]:
        return self.slopes_N

    def by_distance(self, num_queries: int, num_keys: int) -> Float[Array, "N R"]:
        return -self.slopes_N[:, None] * np.abs(np.arange(1 - num_queries, num_keys, dtype=np.float32))


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slope of every head; see ALiBi."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return (*slopes, *between[: num_heads - power])


@dataclass(frozen=True)
class T5Relative(BiasPosition):
    """T5's relative positions (Raffel et al. 2020, section 2.1): one learned number per head and bucket of distances.

    Small distances have a bucket each; larger ones share buckets that grow logarithmically up to max_distance, beyond
    which all share the last.
    """

    num_buckets: int = 32
    """Buckets; in a bidirectional layer half of them serve each direction."""
    max_distance: int = 128
    """Distance from which on all share one bucket."""
    bidirectional: bool = False
    """Whether keys after the query have buckets of their own (encoders); else they share distance 0's (decoders)."""

    def __post_init__(self) -> None:
        one_sided = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        if one_sided < 2 or self.num_buckets % 2:
            raise ValueError(f"num_buckets={self.num_buckets} must be even and hold 2 per direction; 32 is usual")
        if self.max_distance <= one_sided // 2:
            raise ValueError(
                f"max_distance={self.max_distance} must exceed the {one_sided // 2} distances with a bucket each"
            )

    def build(self, num_heads: int, *, rngs: nnx.Rngs) -> "T5RelativePositions":
        return T5RelativePositions(self, num_heads, rngs=rngs)

    def bucket(self, distance: np.ndarray) -> np.ndarray:
        """Bucket of each distance, key index minus query index."""
        side = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        behind = np.abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        exact = side // 2
        # float64, in NumPy, once per distance: float32 logarithms can fall on the wrong side of a bucket's edge.
        growth = np.log(np.maximum(behind, exact) / exact) / math.log(self.max_distance / exact)
        far = np.minimum(exact + (growth * (side - exact) + 1e-9).astype(np.int64), side - 1)
        ahead = (distance > 0) * side if self.bidirectional else 0
        return np.where(behind < exact, behind, far) + ahead


class T5RelativePositions(nnx.Module):
    """See T5Relative."""

    def __init__(self, config: T5Relative, num_heads: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = normal(rngs, (config.num_buckets, num_heads))
        self.table = nnx.Param(0.02 * init, axes=("position", "heads"))

    def bias(self) -> "T5Bias":
        """The bias of every head; gradients flow to the table."""
        reach = self.config.max_distance
        buckets = self.config.bucket(np.arange(-reach, reach + 1))
        return T5Bias(self.table[...][buckets].T.astype(jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class T5Bias(Bias):
    """A number per head and distance (key index minus query index), the farthest standing for all beyond."""

    distance_NR: Float[Array, "N R"]
    """Columns -reach ... reach."""

    def block(self, query_index: Index, kv_index: Index) -> Float[Array, "B N S T"]:
        reach = self.distance_NR.shape[1] // 2
        column_BST = jnp.clip(_distance(query_index, kv_index), -reach, reach) + reach
        table_NR = self.distance_NR
        if query_index.ndim == 2:
            # Cached decoding: every device has the whole table, which is small. Of one that is split by heads, at
            # columns that are split by rows, XLA's partitioner (jax 0.10.2) makes a program that its verifier rejects.
            table_NR = shard(table_NR, None, None)
        return jnp.moveaxis(table_NR[:, column_BST], 0, 1)

    def heads(self, first: Int[Array, ""], count: int) -> "T5Bias":
        return T5Bias(jax.lax.dynamic_slice_in_dim(self.distance_NR, first, count))

    def by_distance(self, num_queries: int, num_keys: int) -> Float[Array, "N R"]:
        reach = self.distance_NR.shape[1] // 2
        return self.distance_NR[:, np.clip(np.arange(1 - num_queries, num_keys), -reach, reach) + reach]


def _distance(query_index: Index, kv_index: Index) -> Int[Array, "B S T"]:
    """Key index minus query index."""
    query = query_index if query_index.ndim == 2 else query_index[None]
    kv = kv_index if kv_index.ndim == 2 else kv_index[None]
    return jnp.asarray(kv)[:, None, :] - jnp.asarray(query)[:, :, None]
