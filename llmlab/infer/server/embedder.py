"""Texts as vectors of length one, by the model's last states; see `llmlab.models.sentences`.

An encoder that was trained for it (MiniLM, CLIP's text side) gives vectors whose inner product is likeness. A decoder's
are the mean of states that each look only to the left: good enough to cluster by topic, not to search with.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from llmlab.models.decoder import DecoderModel
from llmlab.models.encoder import EncoderModel
from llmlab.models.encoder_decoder import EncoderDecoderModel
from llmlab.models.sentences import mean_pooled, sentence_embeddings
from llmlab.nn.module import Params, merge, split
from llmlab.tokenizers import Tokenizer

_ROWS = 16  # texts of one pass; fewer are padded to a power of two
_SMALLEST = 32
_UNLIMITED = 8192  # tokens, for models whose positions have no end


class Embedder:
    """A model that turns tokens into vectors; its methods may be called from any thread."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        """
        Args:
            model: an encoder, a decoder or an encoder-decoder, whose encoder is used.
            tokenizer: the one it was trained with.

        Raises:
            ValueError: the model is none of these.
        """
        if not isinstance(model, EncoderModel | DecoderModel | EncoderDecoderModel):
            raise ValueError(f"no embeddings: a {type(model).__name__} is no encoder and no decoder of texts")
        self._graphdef, self._params = split(model)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # one pass at a time: two would share the device and take twice the memory
        self.max_length: int = model.config.max_length or _UNLIMITED
        """Tokens of the longest text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts in the frame that the model was trained with."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=True)

    def embed(self, rows: Sequence[Sequence[int]]) -> Float[np.ndarray, "B D"]:
        """One vector per row of tokens, in float32. No row may be empty or longer than `max_length`."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))  # neighbours have little padding
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(rows), _ROWS):
            group = order[start : start + _ROWS]
            ids_BS, mask_BS = self._padded([rows[row] for row in group])
            with self._lock:
                vectors_BD = np.asarray(_embed(self._graphdef, self._params, ids_BS, mask_BS))
            found |= dict(zip(group, vectors_BD, strict=False))
        return np.stack([found[row] for row in range(len(rows))])

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask, both sides powers of two, so that few programs are compiled."""
        longest = max(len(row) for row in rows)
        length = min(max(_SMALLEST, _power_of_two(longest)), self.max_length)
        shape = (_power_of_two(len(rows)), length)
        ids_BS, mask_BS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for place, row in enumerate(rows):
            ids_BS[place, : len(row)] = row
            mask_BS[place, : len(row)] = 1
        return ids_BS, mask_BS


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, params: Params, ids_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    model = merge(graphdef, params)
    if isinstance(model, EncoderDecoderModel):
        mean_BD = mean_pooled(model.encode(ids_BS, mask_BS).states, mask_BS)
        return mean_BD / jax.numpy.maximum(jax.numpy.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)
    return sentence_embeddings(model, ids_BS, mask_BS)
