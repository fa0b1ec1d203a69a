"""What attention remembers, so that a new token costs one position's work and not all of them.

Without a cache, generating n tokens after a prompt of p recomputes every position every time, O(n (n + p)) positions;
with one it is O(n + p). The price is memory: 2 * layers * kv_heads * head_dim numbers a token.

    KVCache        a slot for every position: slot t holds position t
    RollingCache   a slot for every position of a sliding window: slot = position mod slots, the oldest is overwritten
    MemoryCache    keys and values of an encoder's states, computed once

Whatever its kind, a cache stores its numbers in float32, in bfloat16 (half the memory) or in int8 (a quarter):

    bfloat16   8 significant bits: a number is off by at most 2^-8 of itself
    int8       x = s q with |q| <= 127, and s = max |x| / 127 of each token and head (Dettmers et al. 2022, 2208.07339,
               section 2.1): a number is off by at most s / 2, the 254th part of the largest beside it

They are rounded when they are stored and what is attended to is what was stored, the call's own tokens included: so the
result does not depend on how a prompt is cut into calls.

A token at position -1 is padding: it is stored nowhere and, in a causal model, attends to nothing. So rows of
different lengths can be padded on either side. The positions of a call replace all stored ones from the first of them
on: to take tokens back, go on from an earlier position.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from llmlab.nn.config import Cache
from llmlab.nn.platform import platform
from llmlab.sharding import shard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stored:
    """A vector for every slot and head, in some storage; see the module's docstring.

    Heads stand before slots, so that a head's keys are one matrix in memory and attention multiplies with it as it
    lies. With slots first, every token would copy the whole cache into that order: on CPU, for 16 rows of 256
    positions, a token took 13 ms instead of 4.
    """

    data_BKTH: Shaped[Array, "B K T H"]
    """The numbers, or with a scale what is multiplied with it."""
    scale_BKT: Float[Array, "B K T"] | None = None
    """Scale of each head and slot, float32; None where the numbers are themselves."""

    @classmethod
    def empty(cls, shape_BTKH: tuple[int, int, int, int], dtype: Any) -> "Stored":
        """Zeros; `dtype` is the storage.

        Raises:
            ValueError: a storage that there is not.
        """
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype) == jnp.int8):
            raise ValueError(f"a cache cannot store {jnp.dtype(dtype).name}; use float32, bfloat16 or int8")
        rows, slots, heads, dim = shape_BTKH
        scale = jnp.zeros((rows, heads, slots), jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
        return cls(jnp.zeros((rows, heads, slots, dim), dtype), scale)._placed()

    @classmethod
    def of(cls, x_BTKH: Float[Array, "B T K H"], dtype: Any) -> "Stored":
        """These numbers, rounded."""
        x_BKTH = x_BTKH.swapaxes(1, 2)
        if jnp.dtype(dtype) != jnp.int8:
            return cls(x_BKTH.astype(dtype))._placed()
        x_BKTH = x_BKTH.astype(jnp.float32)
        scale_BKT = jnp.max(jnp.abs(x_BKTH), axis=-1) / 127
        units = x_BKTH / jnp.where(scale_BKT == 0.0, 1.0, scale_BKT)[..., None]
        return cls(jnp.round(units).astype(jnp.int8), scale_BKT)._placed()

    @property
    def num_slots(self) -> int:
        """T."""
        return self.data_BKTH.shape[2]

    @property
    def dtype(self) -> Any:
        """The storage."""
        return self.data_BKTH.dtype

    def read(self, dtype: Any) -> Float[Array, "B T K H"]:
        """The numbers that were stored."""
        x_BKTH = self.data_BKTH
        if self.scale_BKT is not None:
            x_BKTH = x_BKTH.astype(jnp.float32) * self.scale_BKT[..., None]
        return x_BKTH.astype(dtype).swapaxes(1, 2)

    def put(self, slot_BS: Int[Array, "B S"], new: "Stored") -> "Stored":
        """With these slots of every row replaced; a slot beyond the last is none."""
        rows, heads = self.data_BKTH.shape[:2]
        # Every head by its own index: of a single update XLA on CPU makes one that is not done in place.
        at = jnp.arange(rows)[:, None, None], jnp.arange(heads)[:, None], slot_BS[:, None]

        def one(old: jax.Array, fresh: jax.Array) -> jax.Array:
            if old.dtype == jnp.bfloat16 and platform() == "cpu":
                # As integers: XLA on CPU would make the whole cache float32, put the new ones in, and round it back.
                bits, fresh_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old, fresh))
                return jax.lax.bitcast_convert_type(bits.at[at].set(fresh_bits, mode="drop"), jnp.bfloat16)
            return old.at[at].set(fresh, mode="drop")

        return jax.tree.map(one, self, new)._placed()

    def then(self, other: "Stored") -> "Stored":
        """These slots, and after them the other's."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), self, other)

    def _placed(self) -> "Stored":
        """On a mesh: rows and heads are split as they are in attention."""
        scale = self.scale_BKT
        return Stored(
            shard(self.data_BKTH, "batch", "kv_heads", None, "head_dim"),
            None if scale is None else shard(scale, "batch", "kv_heads", None),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values of one attention layer; slot t holds position t of its row.

    Slots at and beyond a row's length hold anything: a causal query never looks past its own position, and each new
    position overwrites its slot before it is attended to.
    """

    key: Stored
    value: Stored

    @classmethod
    def empty(cls, shape_BTKH: tuple[int, int, int, int], dtype: Any) -> "KVCache":
        """Room for T positions."""
        return cls(Stored.empty(shape_BTKH, dtype), Stored.empty(shape_BTKH, dtype))

    def update(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], position_ids: Int[Array, "B S"]
    ) -> "tuple[KVCache, Float[Array, 'B T K H'], Float[Array, 'B T K H']]":
        """See Cache. Positions beyond the last slot are not stored."""
        storage, length = self.key.dtype, self.key.num_slots
        slot_BS = jnp.where(position_ids < 0, length, position_ids)
        keys = self.key.put(slot_BS, Stored.of(key, storage))
        values = self.value.put(slot_BS, Stored.of(value, storage))
        return KVCache(keys, values), keys.read(key.dtype), values.read(value.dtype)

    def grown(self, length: int) -> "KVCache":
        """The same cache with room for `length` positions."""

        def longer(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, length - leaf.shape[2] if axis == 2 else 0) for axis in range(leaf.ndim)])

        return jax.tree.map(longer, self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RollingCache(Cache):
    """Keys and values of a layer with a sliding window of W: position p is in slot p mod T, where T is at least W.

    One new token overwrites position p - T, which no window from p on reaches. Several at a time would overwrite what
    the first of them still sees: they are attended to beside the old slots, and only their last T are stored.

    T - W positions can be taken back without losing what the windows before them see.
    """

    key: Stored
    value: Stored
    position_BT: Int[Array, "B T"]
    """Position in each slot; -1 for none."""

    @classmethod
    def empty(cls, shape_BTKH: tuple[int, int, int, int], dtype: Any) -> "RollingCache":
        """Room for the last T positions."""
        position_BT = shard(jnp.full(shape_BTKH[:2], -1, jnp.int32), "batch", None)
        return cls(Stored.empty(shape_BTKH, dtype), Stored.empty(shape_BTKH, dtype), position_BT)

    def update(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], position_ids: Int[Array, "B S"]
    ) -> "tuple[RollingCache, Float[Array, 'B T K H'], Float[Array, 'B T K H']]":
        """See Cache."""
        storage, slot_BS = self.key.dtype, self._slots(position_ids)
        new_key, new_value = Stored.of(key, storage), Stored.of(value, storage)
        stored_key, stored_value = self.key.put(slot_BS, new_key), self.value.put(slot_BS, new_value)
        cache = RollingCache(stored_key, stored_value, self._positions(position_ids))
        if position_ids.shape[1] == 1:
            return cache, stored_key.read(key.dtype), stored_value.read(value.dtype)
        return cache, self.key.then(new_key).read(key.dtype), self.value.then(new_value).read(value.dtype)

    def key_positions(self, position_ids: Int[Array, "B S"]) -> Int[Array, "B T"]:
        """Those of the slots after the call, or of several tokens, of the slots before it and the tokens."""
        if position_ids.shape[1] == 1:
            return self._positions(position_ids)
        return jnp.concatenate([self._kept(position_ids), position_ids], axis=1)

    def _slots(self, position_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """Slot of each new token; one beyond the last for those that are not stored."""
        length = self.position_BT.shape[1]
        last_B1 = jnp.max(position_ids, axis=1, keepdims=True)
        stays = (position_ids >= 0) & (position_ids > last_B1 - length)
        return jnp.where(stays, position_ids % length, length)

    def _kept(self, position_ids: Int[Array, "B S"]) -> Int[Array, "B T"]:
        """Positions in the slots before the call; those that the call replaces are none."""
        none = jnp.iinfo(position_ids.dtype).max
        first_B1 = jnp.min(jnp.where(position_ids < 0, none, position_ids), axis=1, keepdims=True)
        return jnp.where(self.position_BT < first_B1, self.position_BT, -1)

    def _positions(self, position_ids: Int[Array, "B S"]) -> Int[Array, "B T"]:
        """Positions in the slots after the call."""
        row_B1 = jnp.arange(position_ids.shape[0])[:, None]
        positions = self._kept(position_ids).at[row_B1, self._slots(position_ids)].set(position_ids, mode="drop")
        return shard(positions, "batch", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryCache:
    """Keys and values that one cross-attention layer computed of the memory."""

    key: Stored
    value: Stored

    @classmethod
    def empty(cls, shape_BTKH: tuple[int, int, int, int], dtype: Any) -> "MemoryCache":
        """Room for a memory of length T."""
        return cls(Stored.empty(shape_BTKH, dtype), Stored.empty(shape_BTKH, dtype))

    def filled(self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]) -> "MemoryCache":
        """With these keys and values, in the same storage."""
        storage = self.key.dtype
        return MemoryCache(Stored.of(key, storage), Stored.of(value, storage))

    def read(self, dtype: Any) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Keys and values."""
        return self.key.read(dtype), self.value.read(dtype)
