"""Which keys a query may see: masks as an algebra.

A mask is a rule that is evaluated where it is needed, one block of queries and keys at a time; the S x T matrix never
has to exist. Masks are conjunctions: `Causal() & SlidingWindow(left=127) & Segments(ids, ids)` allows what all of its
terms allow.

    Full                 everything
    Causal               keys up to the query's own index
    SlidingWindow        keys within a distance on each side             (Beltagy et al. 2020, 2004.05150)
    Prefix               Causal, but everyone sees the first `length`    (Raffel et al. 2020, 1910.10683, figure 4)
    Marked               Causal, but marked tokens see each other       (the same, wherever the prefix stands)
    Padding              keys that are real tokens
    Segments             keys of the query's own document                (packing several documents in one row)
    Groups               keys of the groups that a query is told to see   (text that looks at images)

Rules speak of indices into the sequence (slots), not of positions in a document: in a packed row the second
document's first token has index 57, say, and position 0. Causal by index and same segment together are causal by
position.

A mask is a pytree: its arrays, the rows of the batch in front, may be traced; its numbers are static. Static
structure (`kv_range`) lets a kernel skip blocks that no query of a block can see: causal attention does half the work,
a window of W does W/T of it.
"""

import abc
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Index = Int[Array, "..."] | Int[np.ndarray, "..."]
"""Indices into the sequence, shape (S,) for all rows or (B, S); NumPy where they are known when tracing."""

MaskType = TypeVar("MaskType", bound="Mask")


class Mask(abc.ABC):
    """A rule that allows or forbids a query to see a key."""

    @abc.abstractmethod
    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        """Whether each query may see each key; B is 1 where all rows agree.

        Args:
            query_index: indices of the queries, (S,) or (B, S).
            kv_index: indices of the keys, (T,) or (B, T).
        """

    def kv_range(self, query_start: int, query_stop: int, kv_length: int) -> tuple[int, int]:
        """First key and one past the last key that any query in [query_start, query_stop) may see, as known statically.

        Keys outside are forbidden to all of these queries; keys inside may still be. An empty range has start = stop.
        """
        return 0, kv_length

    @property
    def terms(self) -> "tuple[Mask, ...]":
        """The terms of the conjunction, those that allow everything left out."""
        return (self,)

    def find(self, kind: type[MaskType]) -> MaskType | None:
        """The first term of this class, or None."""
        return next((term for term in self.terms if isinstance(term, kind)), None)

    def __and__(self, other: "Mask") -> "Mask":
        terms = (*self.terms, *other.terms)
        if len(terms) < 2:
            return terms[0] if terms else self
        return All(terms)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        return jnp.ones(jnp.broadcast_shapes(query.shape, kv.shape), bool)

    @property
    def terms(self) -> tuple[Mask, ...]:
        return ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """A query sees the keys up to its own index: the future is hidden (Vaswani et al. 2017, 1706.03762)."""

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        return jnp.asarray(kv <= query)

    def kv_range(self, query_start: int, query_stop: int, kv_length: int) -> tuple[int, int]:
        return 0, min(query_stop, kv_length)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query sees the `left` keys before its own index, itself, and the `right` keys after; None is no limit."""

    left: int | None = field(default=None, metadata={"static": True})
    right: int | None = field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            reach = getattr(self, side)
            if reach is not None and reach < 0:
                raise ValueError(f"{side}={reach} is negative; 0 sees nothing on that side, None sees everything")

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        seen = jnp.ones(jnp.broadcast_shapes(query.shape, kv.shape), bool)
        if self.left is not None:
            seen &= kv >= query - self.left
        if self.right is not None:
            seen &= kv <= query + self.right
        return seen

    def kv_range(self, query_start: int, query_stop: int, kv_length: int) -> tuple[int, int]:
        start = 0 if self.left is None else min(max(query_start - self.left, 0), kv_length)
        stop = kv_length if self.right is None else min(query_stop + self.right, kv_length)
        return start, max(start, stop)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Mask):
    """The prefix language model: the first `length` keys are seen by every query, later ones causally."""

    length_B: Int[Array, "B"]

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        return jnp.asarray(kv <= query) | (kv < self.length_B[:, None, None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Marked(Mask):
    """Causal, but the marked tokens of a row all see each other, wherever they stand: a prefix after padding."""

    marked_BS: Bool[Array, "B S"]

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        both = _take(self.marked_BS, query_index)[:, :, None] & _take(self.marked_BS, kv_index)[:, None, :]
        return jnp.asarray(kv <= query) | both


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Padding(Mask):
    """Only the keys marked true are seen, whatever the query."""

    kv_BT: Bool[Array, "B T"]

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        seen_BT = _take(self.kv_BT, kv_index)
        shape = jnp.broadcast_shapes(query.shape, kv.shape, (seen_BT.shape[0], 1, 1))
        return jnp.broadcast_to(seen_BT[:, None, :], shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments(Mask):
    """A query sees the keys of its own segment: two tokens see each other where their ids are equal."""

    query_BS: Int[Array, "B S"]
    kv_BT: Int[Array, "B T"]

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        return _take(self.query_BS, query_index)[:, :, None] == _take(self.kv_BT, kv_index)[:, None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups(Mask):
    """Keys come in groups of one size (the tokens of an image); a query sees the groups that it is told to."""

    seen_BSG: Bool[Array, "B S G"]
    """Whether each query sees each group."""
    size: int = field(metadata={"static": True})
    """Keys in a group."""

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = _pair(query_index, kv_index)
        rows = jnp.arange(self.seen_BSG.shape[0])[:, None, None]
        return self.seen_BSG.at[rows, query, kv // self.size].get(mode="clip")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class All(Mask):
    """The conjunction of at least two masks; written `a & b`."""

    masks: tuple[Mask, ...]

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        seen = self.masks[0].allowed(query_index, kv_index)
        for mask in self.masks[1:]:
            seen = seen & mask.allowed(query_index, kv_index)
        return seen

    def kv_range(self, query_start: int, query_stop: int, kv_length: int) -> tuple[int, int]:
        ranges = [mask.kv_range(query_start, query_stop, kv_length) for mask in self.masks]
        start = max(start for start, _ in ranges)
        return start, max(start, min(stop for _, stop in ranges))

    @property
    def terms(self) -> tuple[Mask, ...]:
        return self.masks


@dataclass(frozen=True)
class Visibility:
    """What a mask says to a layer that has no matrix of queries and keys to apply it to."""

    causal: bool
    """Whether keys after the query are hidden."""
    real_BT: Bool[Array, "B T"] | None
    """Keys that are no padding; None where all are real."""
    segments_BT: Int[Array, "B T"] | None
    """The keys' documents; None where a row is one document."""

    @classmethod
    def of(cls, mask: Mask, layer: str) -> "Visibility":
        """The mask, taken apart.

        Raises:
            ValueError: it has a term that is not causal, padding or segments; `layer` is who says so.
        """
        causal, real, segments = False, None, None
        for term in mask.terms:
            if isinstance(term, Causal):
                causal = True
            elif isinstance(term, Padding):
                real = term.kv_BT if real is None else real & term.kv_BT
            elif isinstance(term, Segments) and segments is None:
                segments = term.kv_BT
            else:
                raise ValueError(
                    f"{layer} never forms the matrix of queries and keys, so it cannot apply {type(term).__name__}; "
                    "it knows Causal, Padding and Segments, and Attention applies every mask"
                )
        return cls(causal, real, segments)


def _pair(query_index: Index, kv_index: Index) -> tuple[Index, Index]:
    """Both as arrays that broadcast to (B, S, T)."""
    query = query_index if query_index.ndim == 2 else query_index[None]
    kv = kv_index if kv_index.ndim == 2 else kv_index[None]
    return query[:, :, None], kv[:, None, :]


def _take(values_BT: jax.Array, index: Index) -> jax.Array:
    """values_BT at the indices, (B, len); indices beyond the row give anything (kernels pad their last block)."""
    if index.ndim == 2:
        return jnp.take_along_axis(values_BT, jnp.asarray(index), axis=1, mode="clip")
    if isinstance(index, np.ndarray) and len(index) and index[-1] < values_BT.shape[1]:
        start = int(index[0])
        if np.array_equal(index, np.arange(start, start + len(index))):  # a slice is free, a gather is not
            return values_BT[:, start : start + len(index)]
    return jnp.take(values_BT, jnp.asarray(index), axis=1, mode="clip")
