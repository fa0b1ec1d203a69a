"""The decoder-only language model: embedding, a causal stack of blocks, a head.

    input_ids -> embedding (+ positions) -> block x num_layers -> final norm -> head -> logits

Every position predicts the token after it from itself and what came before (Radford et al. 2018). One forward pass
costs `config.flops_per_token(S, training=False)` FLOPs a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.config import Transformer
from llmlab.nn.config import Cache, Context
from llmlab.nn.dropout import dropout
from llmlab.nn.embedding import Embedding
from llmlab.nn.masks import Causal, Mask, Padding, Segments
from llmlab.nn.stack import Stack
from llmlab.sharding import shard

# fold_in constant that separates the embedding's dropout from the layers', which fold in their index.
_EMBEDDING_KEY = 0xE4B


@dataclass(frozen=True)
class CausalOutput:
    """What a causal language model returns."""

    logits: Float[Array, "B S V"]
    """Scores of the next token, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels, when labels were given."""
    cache: tuple[Cache, ...] | None = None
    """Keys and values with this call's positions stored, when a cache was given."""


jax.tree_util.register_dataclass(CausalOutput)


class InputEmbedding(nnx.Module):
    """Token table, positions added to it, norm, scale and dropout."""

    def __init__(self, config: Transformer, *, rngs: nnx.Rngs) -> None:
        assert config.vocab_size is not None
        self.scale = config.embedding_scale
        self.dropout = config.embedding_dropout
        self.tokens = Embedding(config.vocab_size, config.embed_dim, rngs=rngs, std=config.embedding_std)
        self.position = config.position.build(config.embed_dim, rngs=rngs) if config.position else None
        self.norm = config.embedding_norm.build(config.embed_dim, rngs=rngs) if config.embedding_norm else None

    def __call__(
        self, input_ids: Int[Array, "B S"], position_ids: Int[Array, "B S"], key: jax.Array | None = None
    ) -> Float[Array, "B S D"]:
        x_BSD = self.tokens(input_ids)
        if self.scale != 1.0:
            x_BSD = x_BSD * jnp.asarray(self.scale, x_BSD.dtype)
        if self.position is not None:
            x_BSD = self.position(x_BSD, position_ids)
        if self.norm is not None:
            x_BSD = self.norm(x_BSD)
        return dropout(x_BSD, self.dropout, key)


class DecoderModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: Transformer, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")
        self.config = config
        self.embedding = InputEmbedding(config, rngs=rngs)
        self.stack = Stack(config.pattern, config.num_layers, config.embed_dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(config.embed_dim, rngs=rngs) if config.final_norm else None
        self.head = config.head.build(config.embed_dim, config.vocab_size, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        labels: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[Cache] | None = None,
    ) -> CausalOutput:
        """Logits of every position.

        Args:
            input_ids: tokens.
            attention_mask: true or 1 where a token is real; in cached decoding, over the cache's slots.
            position_ids: position of each token in its document; 0, 1, 2... by default, whatever the padding.
            segment_ids: number of the document a token belongs to in a packed row; attention stays inside it.
            labels: the target of each position (already shifted), -100 where it is not counted; gives `loss`.
            key: makes dropout active.
            cache: one per layer; the call's positions are stored in it and all stored positions attended to.
        """
        hidden_BSD, caches = self.hidden_states(input_ids, attention_mask, position_ids, segment_ids, key, cache)
        logits_BSV = self.project(hidden_BSD)
        loss = None if labels is None else _mean_cross_entropy(logits_BSV, labels)
        return CausalOutput(logits=logits_BSV, last_hidden_state=hidden_BSD, loss=loss, cache=caches)

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[Cache] | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[Cache, ...] | None]:
        """Input of the head, and the caches; arguments as for a call."""
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask: Mask = Causal()
        if attention_mask is not None:
            mask = mask & Padding(attention_mask.astype(bool))
        if segment_ids is not None:
            mask = mask & Segments(segment_ids, segment_ids)
        embedding_key = None if key is None else jax.random.fold_in(key, _EMBEDDING_KEY)
        x_BSD = self.embedding(input_ids, position_ids, embedding_key)
        x_BSD = shard(x_BSD, "batch", "sequence", "embed")
        x_BSD, caches = self.stack(x_BSD, Context(mask=mask, position_ids=position_ids), key, cache)
        return (x_BSD if self.final_norm is None else self.final_norm(x_BSD)), caches

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        logits = self.embedding.tokens.attend(hidden) if self.head is None else self.head(hidden)
        return logits.astype(jnp.float32)


def _mean_cross_entropy(logits_BSV: jax.Array, labels_BS: jax.Array) -> jax.Array:
    counted = labels_BS != -100
    log_probs = jax.nn.log_softmax(logits_BSV)
    nll = -jnp.take_along_axis(log_probs, jnp.where(counted, labels_BS, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)
