"""Which blocks of memory belong to whom: allocation, sharing, and finding again what was computed before.

The keys and values of a row's positions are kept in blocks of a few positions each, in any order in memory; a table
lists a row's blocks (PagedAttention: Kwon et al. 2023, 2309.06180). So a row takes memory as it grows and not for the
longest text that it might become, what is lost is less than a block a row, and rows can have blocks in common:

    samples of one prompt    all tables list the prompt's blocks; whoever writes into a block that others list copies it
                             first, which only ever happens to the last one: those before are full
    equal beginnings         a full block is found again by its key, as long as nobody needed its memory

The key of a block is the SHA-256 of the block's tokens and of the key before it, the first with a salt: equal keys are
equal texts from the first token on, for all that is known of SHA-256. Whatever else keys and values depend on (weights,
positions, storage) is the same for all rows of an engine.

Blocks that have a key and that nobody lists any more are free, but forgotten last, the ones unused for longest first;
of a text its end goes before its beginning, for without what precedes it a block cannot be found. Every operation is
O(1) a block. No device is touched here.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


class OutOfBlocks(Exception):
    """There are fewer free blocks than asked for; nothing was changed."""


@dataclass(frozen=True)
class Copy:
    """A block that must be copied on the device before its copy is written to."""

    source: int
    target: int


class Blocks:
    """`num_blocks` blocks of `block_size` positions, numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._lists = [0] * num_blocks  # how many tables list each block
        self._blank = deque(range(num_blocks))  # free, nothing worth keeping in them
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, with a key; least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Free blocks that can be found by their key."""
        return len(self._idle)

    def count(self, block: int) -> int:
        """How many tables list the block."""
        return self._lists[block]

    def take(self, count: int) -> list[int]:
        """Free blocks, listed once each from now on; blank ones first, then those unused for longest.

        Raises:
            OutOfBlocks: there are not so many.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks are needed and {self.num_free} are free")
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            assert self._lists[block] == 0
            self._lists[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """List blocks once more; they are in use, or were found by their keys."""
        for block in blocks:
            if self._lists[block] == 0:
                del self._idle[block]
            self._lists[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """List blocks once less, the last of a row first: so it is forgotten before the ones that lead to it."""
        for block in reversed(blocks):
            assert self._lists[block] > 0, f"block {block} is released more often than it was taken"
            self._lists[block] -= 1
            if self._lists[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def keep(self, block: int, key: bytes) -> None:
        """Let a block that is full, and in use, be found. Where another block has the key this one stays unknown."""
        assert self._lists[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of these keys that there is."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def forget(self) -> None:
        """Lose all keys: what the blocks held is gone."""
        self._blank.extend(self._idle)
        for lost in (self._idle, self._key_of, self._block_of):
            lost.clear()


def first_key(salt: str) -> bytes:
    """The key before the first block."""
    return hashlib.sha256(b"llmlab block " + salt.encode()).digest()


def next_key(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a block with these tokens after the block with that key."""
    return hashlib.sha256(before + np.asarray(ids, np.int64).tobytes()).digest()


def keys_of(ids: Sequence[int], block_size: int, salt: str = "") -> list[bytes]:
    """The keys of the full blocks of a text."""
    keys, key = [], first_key(salt)
    for start in range(0, len(ids) - block_size + 1, block_size):
        key = next_key(key, ids[start : start + block_size])
        keys.append(key)
    return keys


@dataclass(eq=False)
class Table:
    """The blocks of one row: position p is in blocks[p // block_size], at p % block_size."""

    pool: Blocks
    salt: str = ""
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    """Positions that are stored: 0 ... length - 1."""
    keys: list[bytes] = field(default_factory=list)
    """Of the first blocks, as far as they were computed."""

    def adopt(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Begin with blocks that were found by their keys."""
        assert not self.blocks
        self.pool.share(blocks)
        self.blocks, self.keys = list(blocks), list(keys)
        self.length = len(blocks) * self.pool.block_size

    def needs(self, length: int) -> int:
        """Free blocks that `grow` to this length takes."""
        return max(self._missing(length), 0) + self._writes_into_shared(length)

    def grow(self, length: int) -> list[Copy]:
        """Have blocks of its own for the positions from the stored ones up to `length`; what to copy for that.

        Raises:
            OutOfBlocks: there are not enough; nothing was changed.
        """
        shared, missing = self._writes_into_shared(length), self._missing(length)
        new = self.pool.take(self.needs(length))
        copies = []
        if shared:
            last, own = self.length // self.pool.block_size, new.pop()
            copies.append(Copy(self.blocks[last], own))
            self.pool.release([self.blocks[last]])
            self.blocks[last] = own
        assert len(new) == max(missing, 0)
        self.blocks += new
        return copies

    def fork(self) -> "Table":
        """Another row with the same positions stored. It lists no block beyond them."""
        used = self.blocks[: -(-self.length // self.pool.block_size)]
        self.pool.share(used)
        return Table(self.pool, self.salt, used, self.length, list(self.keys))

    def keep(self, ids: Sequence[int], stop: int) -> None:
        """Let full blocks before position `stop` be found; `ids` is the row's text from its first token."""
        size = self.pool.block_size
        for index in range(len(self.keys), min(stop, self.length) // size):
            before = self.keys[-1] if self.keys else first_key(self.salt)
            self.keys.append(next_key(before, ids[index * size : (index + 1) * size]))
            self.pool.keep(self.blocks[index], self.keys[-1])

    def free(self) -> None:
        """Give all blocks back."""
        self.pool.release(self.blocks)
        self.blocks, self.keys, self.length = [], [], 0

    def _missing(self, length: int) -> int:
        return -(-length // self.pool.block_size) - len(self.blocks)

    def _writes_into_shared(self, length: int) -> bool:
        """Whether the first position to be written is in a block that others list too."""
        index = self.length // self.pool.block_size
        return length > self.length and index < len(self.blocks) and self.pool.count(self.blocks[index]) > 1
