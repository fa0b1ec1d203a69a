"""The decoder-only language model: embedding, a causal stack of blocks, a head.

    input_ids -> embedding (+ positions) -> block x num_layers -> final norm -> head -> logits

Every position predicts the token after it from itself and what came before (Radford et al. 2018). One forward pass
costs `config.flops_per_token(S, training=False)` FLOPs a token.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.config import Tied, Transformer
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import CausalOutput, Hidden
from llmlab.nn.config import Auxiliary, Block, Context, LayerCache
from llmlab.nn.dropout import dropout
from llmlab.nn.embedding import Embedding
from llmlab.nn.masks import Causal, Mask, Padding, Prefix, Segments
from llmlab.nn.stack import Stack
from llmlab.sharding import shard

# fold_in constant that separates the embedding's dropout from the layers', which fold in their index.
_EMBEDDING_KEY = 0xE4B


class InputEmbedding(nnx.Module):
    """Token table, positions added to it, norm, scale and dropout."""

    def __init__(self, config: Transformer, *, rngs: nnx.Rngs) -> None:
        assert config.vocab_size is not None
        self.scale = config.embedding_scale
        self.dropout = config.embedding_dropout
        self.tokens = Embedding(config.vocab_size, config.embed_dim, rngs=rngs, std=config.embedding_std)
        self.position = config.position.build(config.embed_dim, rngs=rngs) if config.position else None
        block = config.block_position
        self.block_position = block.build(config.embed_dim, rngs=rngs) if block else None
        self.norm = config.embedding_norm.build(config.embed_dim, rngs=rngs) if config.embedding_norm else None

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        position_ids: Int[Array, "B S"],
        block_position_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B S D"]:
        x_BSD = self.tokens(input_ids)
        if self.scale != 1.0:
            x_BSD = x_BSD * jnp.asarray(self.scale, x_BSD.dtype)
        if self.position is not None:
            x_BSD = self.position(x_BSD, position_ids)
        if self.block_position is not None:
            in_text = jnp.zeros_like(position_ids) if block_position_ids is None else block_position_ids
            x_BSD = self.block_position(x_BSD, in_text)
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
        self.stack = Stack(config.blocks(), config.num_layers, config.embed_dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(config.embed_dim, rngs=rngs) if config.final_norm else None
        # muP: the head's weights start as the base model's do, and its input is divided by the growth of the width.
        ratio = 1.0 if config.mup is None else config.mup.width_ratio(config.embed_dim)
        self.output_factor = 1 / ratio
        gain = math.sqrt(ratio)
        self.head = config.head.build(config.embed_dim, config.vocab_size, rngs=rngs, gain=gain)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        prefix_length: Int[Array, "B"] | None = None,
        labels: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
        block_position_ids: Int[Array, "B S"] | None = None,
    ) -> CausalOutput:
        """Logits of every position.

        Args:
            input_ids: tokens.
            attention_mask: true or 1 where a token is real; in cached decoding, over the cache's slots.
            position_ids: position of each token in its document; 0, 1, 2... by default, whatever the padding. With a
                cache, -1 is padding.
            segment_ids: number of the document a token belongs to in a packed row; attention stays inside it.
            prefix_length: tokens at the start of each row that all see each other (a prefix language model).
            labels: the target of each position (already shifted), -100 where it is not counted; gives `loss`.
            key: makes dropout active.
            cache: one per layer; the call's positions are stored in it and all stored positions attended to.
            block_position_ids: place of each token in the blank that it fills, 0 by default and for the text around
                blanks; for models that have such positions.
        """
        hidden = self.hidden_states(
            input_ids, attention_mask, position_ids, segment_ids, prefix_length, key, cache, block_position_ids
        )
        logits_BSV = self.project(hidden.states)
        loss = None
        if labels is not None:
            loss = sum(self.auxiliary_losses(hidden.auxiliary).values(), mean_cross_entropy(logits_BSV, labels))
        return CausalOutput(
            logits=logits_BSV,
            last_hidden_state=hidden.states,
            loss=loss,
            cache=hidden.cache,
            auxiliary=hidden.auxiliary,
        )

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        prefix_length: Int[Array, "B"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
        block_position_ids: Int[Array, "B S"] | None = None,
    ) -> Hidden:
        """Input of the head, and what else the stack gives; arguments as for a call."""
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask: Mask = Causal() if prefix_length is None else Prefix(prefix_length)
        if attention_mask is not None:
            mask = mask & Padding(attention_mask.astype(bool))
        if segment_ids is not None:
            mask = mask & Segments(segment_ids, segment_ids)
        embedding_key = None if key is None else jax.random.fold_in(key, _EMBEDDING_KEY)
        x_BSD = self.embedding(input_ids, position_ids, block_position_ids, embedding_key)
        x_BSD = shard(x_BSD, "batch", "residual", "embed")
        valid = valid_tokens(input_ids, attention_mask, segment_ids) if cache is None else position_ids >= 0
        context = Context(mask=mask, position_ids=position_ids, valid=valid)
        x_BSD, caches, auxiliary = self.stack(x_BSD, context, key, cache)
        states_BSD = x_BSD if self.final_norm is None else self.final_norm(x_BSD)
        states_BSD = shard(states_BSD, "batch", "sequence", "embed")  # the head splits the vocabulary over tensor
        return Hidden(states=states_BSD, cache=caches, auxiliary=auxiliary)

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by name; none for most models."""
        return auxiliary_losses(self.config.pattern, auxiliary)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        if self.output_factor != 1.0:
            hidden = hidden * jnp.asarray(self.output_factor, hidden.dtype)
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        logits, head = self.embedding.tokens.attend(hidden).astype(jnp.float32), self.config.head
        return logits * head.scale if isinstance(head, Tied) and head.scale != 1.0 else logits


def valid_tokens(
    input_ids: Int[Array, "B S"],
    attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Bool[Array, "B S"] | None:
    """Which tokens are real, as mask and segments (0 is padding) tell; None where neither was given.

    Not for cached decoding: there the mask is over the cache's slots, and padding has position -1.
    """
    valid = None
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        valid = attention_mask.astype(bool)
    if segment_ids is not None:
        valid = segment_ids != 0 if valid is None else valid & (segment_ids != 0)
    return valid


def auxiliary_losses(pattern: Sequence[Block], auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
    """The losses of a stack's feed-forwards; blocks of one pattern report and weigh alike."""
    losses: dict[str, Float[Array, ""]] = {}
    for block in pattern:
        losses |= block.ffn.losses(auxiliary)
    return losses
