"""The caches of a whole model: what its layers remember while text is written. The kinds are in nn/cache.py.

Every layer's mixer says what it remembers (`Mixer.new_cache`): keys and values of all positions or of a sliding window,
sums (nn/favor.py), or why it has nothing that would do.
"""

import jax.numpy as jnp

from llmlab.models.config import Transformer
from llmlab.models.encoder_decoder import EncoderDecoder, Side
from llmlab.models.permutation import PermutationTransformer
from llmlab.models.reversible import ReversibleTransformer
from llmlab.models.visual_decoder import VisualDecoder
from llmlab.nn.cache import KVCache
from llmlab.nn.config import LayerCache, Room

__all__ = ["KVCache", "new_cache", "new_decoder_cache", "of_layers"]

Storage = jnp.dtype | type
"""How keys and values are stored: float32, bfloat16 or int8."""


def new_cache(
    config: Transformer | ReversibleTransformer | PermutationTransformer,
    batch_size: int,
    length: int,
    dtype: Storage = jnp.float32,
    rewind: int = 0,
) -> tuple[LayerCache, ...]:
    """Empty caches, one per layer, for `length` positions of `batch_size` rows.

    Raises:
        ValueError: a layer has none; the message says which and why.
    """
    return of_layers(config, config.embed_dim, Room(batch_size=batch_size, length=length, dtype=dtype, rewind=rewind))


def new_decoder_cache(
    config: EncoderDecoder,
    batch_size: int,
    length: int,
    memory_length: int,
    dtype: Storage = jnp.float32,
    rewind: int = 0,
) -> tuple[LayerCache, ...]:
    """Empty caches of a decoder that looks at `memory_length` encoder states, one per layer.

    Raises:
        ValueError: a layer has none; the message says which and why.
    """
    room = Room(batch_size=batch_size, length=length, dtype=dtype, memory_length=memory_length, rewind=rewind)
    return of_layers(config.decoder, config.embed_dim, room)


def of_layers(
    layered: Transformer | ReversibleTransformer | PermutationTransformer | VisualDecoder | Side, dim: int, room: Room
) -> tuple[LayerCache, ...]:
    """An empty cache of every layer of a stack of width `dim`, first to last. Raises as `new_cache`."""
    caches = []
    for number, block in enumerate(layered.layers()):
        try:
            caches.append(block.new_cache(dim, room))
        except ValueError as error:
            raise ValueError(f"layer {number}: {error}") from error
    return tuple(caches)
