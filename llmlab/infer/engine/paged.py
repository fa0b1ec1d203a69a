"""Keys and values in blocks: what attention remembers of many rows, in one pool of memory per layer.

    pool     (blocks, kv_heads, block_size, head_dim), keys and values alike; a block is whoever's table lists it
    table    the blocks of each row, in the order of positions: position p is in block table[p // size], at p % size
    window   a row's blocks side by side: a contiguous cache, in which slot t is position t

A pool is a contiguous cache whose rows are blocks, so it stores numbers as that does, in whatever dtype.

Attention reads windows. `PagedCache.update` stores the new positions and makes the window of every row anew, as a
prompt's chunk wants it: one copy for hundreds of tokens. Decoding steps on windows for several tokens, as on any
contiguous cache, and only then puts what it wrote into the blocks (`scatter`). Its windows stay from call to call: a
row is copied from its blocks (`refill`) when it comes in, and not once a token.

Only as many blocks as the table is wide are read, those of the longest row of the call. What a row has not written
itself reads as zeros: a free block still holds what its last owner left there, and a weight of zero does not make an
infinity or a NaN harmless.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.cache import KVCache, Stored
from llmlab.nn.config import Block, Cache
from llmlab.nn.moe import MixtureOfExperts
from llmlab.nn.moe.routing import TopK
from llmlab.sharding import shard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache(Cache):
    """Keys and values of one attention layer for the rows of one call."""

    pool: KVCache
    """Of all rows: blocks where a contiguous cache has rows."""
    table_BW: Int[Array, "B W"]
    """Blocks of each row; beyond its last one, any number that is no block."""

    def update(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], position_ids: Int[Array, "B S"]
    ) -> "tuple[PagedCache, Float[Array, 'B T K H'], Float[Array, 'B T K H']]":
        """Store the new positions; keys and values of all positions up to them. Position -1 is stored nowhere."""
        storage = self.pool.key.dtype
        new = KVCache(Stored.of(key, storage), Stored.of(value, storage))
        pool = scatter(self.pool, new, self.table_BW, position_ids)
        window = gather(pool, self.table_BW, jnp.max(position_ids, axis=1) + 1)
        return PagedCache(pool, self.table_BW), window.key.read(key.dtype), window.value.read(value.dtype)


def new_pools(config: Transformer, num_blocks: int, block_size: int, dtype: Any) -> tuple[KVCache, ...]:
    """Empty pools, one per layer.

    Raises:
        ValueError: a layer keeps something else than keys and values of positions.
    """
    check_layers(config)
    return _caches(config, num_blocks, block_size, dtype, None)


def new_windows(config: Transformer, num_rows: int, length: int, dtype: Any) -> tuple[KVCache, ...]:
    """Empty windows, one per layer."""
    return _caches(config, num_rows, length, dtype, "batch")


def _caches(config: Transformer, size: int, length: int, dtype: Any, rows: str | None) -> tuple[KVCache, ...]:
    caches = []
    for block in config.layers():
        assert isinstance(block.mixer, Attention)
        shape = block.mixer.cache_shape(config.embed_dim, size, length)
        caches.append(_placed(KVCache.empty(shape, dtype), rows))
    return tuple(caches)


def check_layers(config: Transformer) -> None:
    """Raises ValueError where a layer's state does not go into blocks."""
    for number, block in enumerate(config.layers()):
        if reason := _reason(block):
            raise ValueError(f"layer {number} cannot be served from blocks: {reason}; use llmlab.generate")


def _reason(block: Block) -> str | None:
    if type(block.mixer) is not Attention:
        return (
            f"{type(block.mixer).__name__} keeps no keys and values by position, which is what a block holds and "
            "requests share"
        )
    if block.cross is not None:
        return "it looks at the states of an encoder or of images, which are another for every request"
    if isinstance(block.ffn, MixtureOfExperts):
        router = block.ffn.router
        if not isinstance(router, TopK) or router.capacity is not None:
            return (
                "its experts take a limited number of a call's tokens, so that what a token gets depends on how its "
                "prompt is cut into calls"
            )
    return None


def gather(pool: KVCache, table_BW: Int[Array, "B W"], length_B: Int[Array, "B"]) -> KVCache:
    """The windows of rows that have stored so many positions: W * block_size slots, zeros from there on."""
    num_blocks, _, size = jax.tree.leaves(pool)[0].shape[:3]
    block_BW = jnp.clip(table_BW, 0, num_blocks - 1)
    real_BT = jnp.arange(table_BW.shape[1] * size) < length_B[:, None]

    def one(leaf: jax.Array) -> jax.Array:
        window = jnp.moveaxis(leaf[block_BW], 2, 1)  # heads before a row's blocks
        window = window.reshape(*window.shape[:2], -1, *leaf.shape[3:])
        real = real_BT.reshape(real_BT.shape[0], 1, -1, *[1] * (leaf.ndim - 3))
        return jnp.where(real, window, jnp.zeros_like(window))

    return _placed(jax.tree.map(one, pool), "batch")


def refill(
    pools: tuple[KVCache, ...],
    windows: tuple[KVCache, ...],
    table_BW: Int[Array, "B W"],
    length_B: Int[Array, "B"],
    row_R: Int[Array, "R"],
    num_rows: Int[Array, ""],
) -> tuple[KVCache, ...]:
    """The windows of all layers, the first `num_rows` of the rows `row_R` copied from their blocks."""

    def body(number: jax.Array, windows: tuple[KVCache, ...]) -> tuple[KVCache, ...]:
        row = row_R[number]
        own = tuple(gather(pool, table_BW[row][None], length_B[row][None]) for pool in pools)
        return jax.tree.map(
            lambda window, new: jax.lax.dynamic_update_slice_in_dim(window, new, row, axis=0), windows, own
        )

    windows = jax.lax.fori_loop(0, num_rows, body, windows)
    return tuple(_placed(window, "batch") for window in windows)


def scatter(pool: KVCache, new: KVCache, table_BW: Int[Array, "B W"], position_BS: Int[Array, "B S"]) -> KVCache:
    """The pool with new positions of rows stored; `new` has S slots, a position of -1 is stored nowhere."""
    num_blocks, _, size = jax.tree.leaves(pool)[0].shape[:3]
    at_BS = jnp.clip(position_BS // size, 0, table_BW.shape[1] - 1)
    block_BS = jnp.where(position_BS < 0, num_blocks, jnp.take_along_axis(table_BW, at_BS, axis=1))

    def one(leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        return leaf.at[block_BS, :, position_BS % size].set(new_leaf.swapaxes(1, 2), mode="drop")

    return _placed(jax.tree.map(one, pool, new), None)


def slots(window: KVCache, position_BS: Int[Array, "B S"]) -> KVCache:
    """What windows hold at these positions: caches of S slots."""
    row_B1 = jnp.arange(position_BS.shape[0])[:, None]
    slot_BS = jnp.clip(position_BS, 0, window.key.num_slots - 1)
    return jax.tree.map(lambda leaf: leaf[row_B1, :, slot_BS].swapaxes(1, 2), window)


def _placed(cache: KVCache, rows: str | None) -> KVCache:
    """On a mesh: heads are split as they are in attention; blocks are not split, for any row may list any of them."""
    names = (rows, "kv_heads", None, "head_dim")
    return jax.tree.map(lambda leaf: shard(leaf, *names[: leaf.ndim]), cache)
