"""Which blocks of queries meet which blocks of keys on which device, in each step of a ring.

In step t device i has the keys of device i - t. What it computes with them is a list of pairs of blocks: those that
the mask's static structure leaves. All devices wait for the slowest before keys move on, so a step takes as long as
the longest list of any device, and that length is known when tracing: the loop over pairs has a static trip count,
no branches, and shorter lists are filled up with pairs that are masked out. Nobody waits longer for that.

Which shares give the shorter lists, zig-zag or contiguous, is decided by adding up. Of S^2 products, n devices, a
device and all steps together:

    everything                     S^2 / n            either
    causal, contiguous             S^2 / n            the last device has every block to do
    causal, zig-zag                S^2 / 2n           1/2 chunk + 1 + 1/2 in step 0, 2 chunks of 4 in every other
    a window of W, contiguous      W S / n            and the ring ends when no device needs what is left to come

The lists themselves are not stored. The first and last key of every block of queries are (S / block numbers), and
each device counts its pairs from them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from llmlab.nn.masks import Mask
from llmlab.sharding import sequence

# Zig-zag shares must save this much of the time to be worth the exchange.
_WORTH = 0.9


class Ring(NamedTuple):
    """Sizes known when tracing."""

    axes: tuple[str, ...]
    """Mesh axes that split the sequence."""
    size: int
    """Devices along them."""
    zigzag: bool
    """Whether a device's share is an early and a late chunk."""
    num_queries: int
    """Length of the whole sequence of queries; every chunk has the same."""
    num_keys: int
    """Length of the whole sequence of keys."""
    block: int
    """Queries and keys per block, at most."""

    @property
    def num_chunks(self) -> int:
        """Chunks per device."""
        return 2 if self.zigzag else 1

    @property
    def query(self) -> "Cut":
        """A chunk of queries in blocks."""
        return cut(self.num_queries // (self.size * self.num_chunks), self.block)

    @property
    def kv(self) -> "Cut":
        """A chunk of keys in blocks."""
        return cut(self.num_keys // (self.size * self.num_chunks), self.block)


class Cut(NamedTuple):
    """A chunk in blocks."""

    chunk: int
    """Tokens per chunk."""
    num_blocks: int
    """Blocks per chunk."""
    block: int
    """Tokens per block; the last block of a chunk may be partly empty."""


def cut(chunk: int, limit: int) -> Cut:
    """The fewest blocks of at most `limit` tokens, all of one size, and that as small as it can be."""
    count = -(-chunk // limit)
    return Cut(chunk, count, -(-chunk // count))


def best(ring: Ring, mask: Mask) -> Ring:
    """The ring with the shares that take less time under this mask; zig-zag where both lengths divide and it pays."""
    contiguous, zigzag = ring._replace(zigzag=False), ring._replace(zigzag=True)
    if ring.num_queries != ring.num_keys or ring.num_queries % (2 * ring.size):
        return contiguous
    return zigzag if Schedule(zigzag, mask).work < _WORTH * Schedule(contiguous, mask).work else contiguous


@dataclass(frozen=True)
class Schedule:
    """The pairs of a ring under a mask."""

    ring: Ring
    mask: Mask

    @cached_property
    def chunks(self) -> Int[np.ndarray, "n C"]:
        """Which chunks each device holds."""
        return sequence.chunks(self.ring.size, self.ring.zigzag)

    @cached_property
    def ranges(self) -> Int[np.ndarray, "n M 2"]:
        """First key and one past the last of each of a device's blocks of queries."""
        cut, keys = self.ring.query, self.ring.num_keys

        def seen(chunk: int, block: int) -> tuple[int, int]:
            start = chunk * cut.chunk + block * cut.block
            stop = min(start + cut.block, (chunk + 1) * cut.chunk)
            return self.mask.kv_range(start, stop, keys) if start < stop else (0, 0)

        devices = [[seen(int(c), b) for c in held for b in range(cut.num_blocks)] for held in self.chunks]
        return np.array(devices, np.int32)

    @cached_property
    def counts(self) -> Int[np.ndarray, "n T"]:
        """Pairs of each device in each step; the steps at the end in which nobody has any are left out."""
        size = self.ring.size
        source = (np.arange(size)[:, None] - np.arange(size)) % size
        counts = np.stack([self._blocks(self.ranges, self.chunks[source[:, t]])[1].sum((1, 2)) for t in range(size)], 1)
        return counts[:, : max(np.flatnonzero(counts.any(0)), default=0) + 1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Pairs that every device goes through in each step: those of the device that has most."""
        return tuple(int(count) for count in self.counts.max(0))

    @property
    def work(self) -> int:
        """Products of a query and a key, for each head, that a device computes or waits for."""
        return sum(self.lengths) * self.ring.query.block * self.ring.kv.block

    def _blocks(self, ranges: Any, chunks: Any) -> tuple[Any, Any]:
        """First block and number of blocks that each block of queries needs of each of these chunks of keys.

        Args:
            ranges: (n, M, 2) as in `ranges`, of NumPy or JAX.
            chunks: (n, C), of the devices whose keys are here.
        """
        cut = self.ring.kv
        inside = (ranges[:, :, None] - chunks[:, None, :, None] * cut.chunk).clip(0, cut.chunk)
        start, stop = inside[..., 0], inside[..., 1]
        first = start // cut.block
        return first, (-(-stop // cut.block) - first) * (stop > start)

    def pairs(
        self, step: jax.Array | int, length: int
    ) -> tuple[Int[Array, "P"], Int[Array, "P"], Bool[Array, "P"], Int[Array, "C"]]:
        """This device's block of queries, block of keys and whether it is real, of P pairs; and the keys' chunks."""
        device = sequence.number(self.ring.axes)
        chunks_C = jnp.asarray(self.chunks)[(device - step) % self.ring.size]
        first, counts = self._blocks(jnp.asarray(self.ranges)[device][None], chunks_C[None])
        first_X, counts_X = first.reshape(-1), counts.reshape(-1)  # by block of queries, then by chunk
        item_P = jnp.repeat(jnp.arange(len(counts_X)), counts_X, total_repeat_length=length)
        place_P = jnp.arange(length)
        before_X = jnp.cumsum(counts_X) - counts_X
        queries_P, chunk_P = item_P // len(chunks_C), item_P % len(chunks_C)
        real_P = place_P < counts_X.sum()
        block_P = jnp.where(real_P, first_X[item_P] + place_P - before_X[item_P], 0)
        return queries_P, chunk_P * self.ring.kv.num_blocks + block_P, real_P, chunks_C
