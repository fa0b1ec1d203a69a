"""Key/value caches: what attention remembers, so that a new token costs one position's work and not all of them.

Without a cache, generating n tokens after a prompt of p recomputes every position every time, O(n (n + p)) positions;
with one it is O(n + p). The price is memory: 2 * layers * kv_heads * head_dim numbers a token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.models.config import Transformer
from llmlab.models.encoder_decoder import EncoderDecoder
from llmlab.nn.attention import Attention, MemoryCache
from llmlab.nn.config import DecoderLayerCache, Mixer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer; slot t holds position t of its row.

    Slots at and beyond a row's length hold anything: a causal query never looks past its own position, and each new
    position overwrites its slot before it is attended to.
    """

    key_BTKH: Float[Array, "B T K H"]
    value_BTKH: Float[Array, "B T K H"]

    def update(
        self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], position_ids: Int[Array, "B S"]
    ) -> "tuple[KVCache, Float[Array, 'B T K H'], Float[Array, 'B T K H']]":
        """Store consecutive positions of every row, which may differ between rows; positions must fit the cache."""
        start_B = position_ids[:, 0]

        def write(slots_TKH: jax.Array, new_SKH: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(slots_TKH, new_SKH.astype(slots_TKH.dtype), (start, 0, 0))

        keys = jax.vmap(write)(self.key_BTKH, key, start_B)
        values = jax.vmap(write)(self.value_BTKH, value, start_B)
        return KVCache(keys, values), keys.astype(key.dtype), values.astype(value.dtype)

    def grown(self, length: int) -> "KVCache":
        """The same cache with room for `length` positions."""
        pad = ((0, 0), (0, length - self.key_BTKH.shape[1]), (0, 0), (0, 0))
        return KVCache(jnp.pad(self.key_BTKH, pad), jnp.pad(self.value_BTKH, pad))


def new_cache(
    config: Transformer, batch_size: int, length: int, dtype: jnp.dtype | type = jnp.float32
) -> tuple[KVCache, ...]:
    """Empty caches, one per layer, for `length` positions of `batch_size` rows.

    Raises:
        ValueError: a layer's mixer is not attention.
    """
    return tuple(
        KVCache(*_slots(block.mixer, config.embed_dim, batch_size, length, dtype, number))
        for number, block in enumerate(config.layers())
    )


def new_decoder_cache(
    config: EncoderDecoder,
    batch_size: int,
    length: int,
    memory_length: int,
    dtype: jnp.dtype | type = jnp.float32,
) -> tuple[DecoderLayerCache, ...]:
    """Empty caches of a decoder that looks at `memory_length` encoder states, one per layer.

    Raises:
        ValueError: a layer's mixer is not attention.
    """
    caches = []
    for number, block in enumerate(config.decoder.layers()):
        own = _slots(block.mixer, config.embed_dim, batch_size, length, dtype, number)
        of_memory = _slots(block.cross, config.embed_dim, batch_size, memory_length, dtype, number)
        caches.append(DecoderLayerCache(KVCache(*own), MemoryCache(*of_memory)))
    return tuple(caches)


def _slots(
    mixer: Mixer | None, dim: int, batch_size: int, length: int, dtype: jnp.dtype | type, number: int
) -> tuple[jax.Array, jax.Array]:
    if not isinstance(mixer, Attention):
        raise ValueError(f"layer {number} mixes with {type(mixer).__name__}, which has no key/value cache")
    shape = (batch_size, length, mixer.num_kv_heads or mixer.num_heads, mixer.resolved_head_dim(dim))
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
