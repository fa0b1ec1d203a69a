"""A decoder that looks at images through cross-attention (Flamingo: Alayrac et al. 2022, 2204.14198).

    images -> vision tower -> [resampler] -> memory --------------------------------------+ keys and values
                                                                                          |
    text -> embedding --> gated cross-attention -> block -> ... -> block --> gated cross-attention -> ... -> head

Images are no tokens of the sequence: every `interval` blocks the text may look at them. Which token sees which images
is said by `image_attention_mask`; in the paper, those of the last image before it. Text costs what it costs without
images, plus a gated layer every so many blocks; any number of images fit, since nothing of them is in the sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.config import Head, ModelConfig, Shapes, Untied, check_stack, layers_of, matmul_parameters
from llmlab.models.decoder import auxiliary_losses
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import Hidden, VisionLanguageOutput
from llmlab.models.vision import VisionModel, VisionTransformer
from llmlab.nn.config import Auxiliary, Block, Context, LayerCache, Norm
from llmlab.nn.dropout import split_key
from llmlab.nn.embedding import Embedding
from llmlab.nn.gated_cross import GatedBlock
from llmlab.nn.masks import Causal, Groups, Mask, Padding
from llmlab.nn.perceiver import Resampler
from llmlab.nn.stack import Execution, Stack
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class VisualDecoder(ModelConfig):
    """A language model of which some blocks look at images."""

    additional_tokens: int = 0
    """Tokens beyond vocab_size, with a table (and head) of their own: what was added to a trained vocabulary."""
    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth, GatedBlocks among them: with one of four, every fourth looks."""
    vision: VisionTransformer
    """Tower of images; the states of its tokens are looked at, whatever its pooling."""
    resampler: Resampler | None = None
    """Makes a fixed number of states of each image; None to look at all of them."""
    final_norm: Norm | None = None
    """Norm before the head."""
    head: Head = Untied()
    """Tied() or Untied()."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding tables."""
    execution: Execution = Execution()
    """How the layer stack is applied: scan or unroll, rematerialisation, LayerDrop."""
    context_length: int | None = None
    """Longest sequence the model is meant for; recorded in exports, not enforced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        if self.additional_tokens < 0:
            raise ValueError(f"additional_tokens={self.additional_tokens} is negative; 0 is none")
        for block in self.pattern:
            if isinstance(block, GatedBlock) and block.look.source_dim(self.embed_dim) != self.vision.embed_dim:
                raise ValueError(
                    f"a block looks at states of width {block.look.source_dim(self.embed_dim)} and the vision tower "
                    f"gives {self.vision.embed_dim}; set look.memory_dim={self.vision.embed_dim}"
                )

    @property
    def pipeline_repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def max_length(self) -> int | None:
        return None

    @property
    def tokens_per_image(self) -> int:
        """States of an image that can be looked at."""
        return self.vision.length if self.resampler is None else self.resampler.num_latents

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("NextToken",)

    def with_vocabulary(self, size: int) -> "VisualDecoder":
        """With the vocabulary settled; the additional tokens are the tokenizer's last."""
        settled = super().with_vocabulary(max(size - self.additional_tokens, 1))
        assert isinstance(settled, VisualDecoder)
        return settled

    def build(self, rngs: nnx.Rngs) -> "VisualDecoderModel":
        return VisualDecoderModel(self, rngs=rngs)

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        size = self.vision.image_size
        return {"input_ids": (batch_size, length), "pixel_values": (batch_size, 1, size, size, self.vision.channels)}

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        batch, length = shapes["input_ids"]
        images, memory = shapes["pixel_values"][1], shapes["pixel_values"][1] * self.tokens_per_image
        seeing = self.vision.image_flops()
        if self.resampler is not None:
            seeing += self.resampler.flops(self.vision.embed_dim, self.vision.length)
        per_token = 2 * matmul_parameters(self.abstract()[1]["stack"])
        per_token += 2 * self.embed_dim * ((self.vocab_size or 0) + self.additional_tokens)
        per_state = 0
        for block in self.layers():
            per_token += block.mixer.context_flops(self.embed_dim, length)
            per_token -= 2 * block.ffn.idle_parameters(self.embed_dim)
            if isinstance(block, GatedBlock):
                look = block.look
                heads = (look.num_kv_heads or look.num_heads) * look.resolved_head_dim(self.embed_dim)
                projections = 2 * 2 * self.vision.embed_dim * heads  # of the memory's states, not of tokens
                per_token += look.context_flops(self.embed_dim, memory) - projections
                per_token -= 2 * block.look_ffn.idle_parameters(self.embed_dim)
                per_state += projections
        forward = batch * (images * seeing + length * per_token + memory * per_state)
        return (3 if training else 1) * forward


class ExtendedEmbedding(nnx.Module):
    """A token table, and one for the tokens beyond it."""

    def __init__(self, config: VisualDecoder, *, rngs: nnx.Rngs) -> None:
        assert config.vocab_size is not None
        dim, std = config.embed_dim, config.embedding_std
        self.num_rows = config.vocab_size
        self.tokens = Embedding(config.vocab_size, dim, rngs=rngs, std=std)
        self.extra = Embedding(config.additional_tokens, dim, rngs=rngs, std=std) if config.additional_tokens else None

    def __call__(self, input_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        x_BSD = self.tokens(jnp.minimum(input_ids, self.num_rows - 1))
        if self.extra is None:
            return x_BSD
        beyond_BS = input_ids - self.num_rows
        return jnp.where(beyond_BS[..., None] < 0, x_BSD, self.extra(jnp.maximum(beyond_BS, 0)))


class VisualDecoderModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: VisualDecoder, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")
        dim, extra = config.embed_dim, config.additional_tokens
        self.config = config
        self.vision = VisionModel(config.vision, rngs=rngs)
        self.resampler = config.resampler.build(config.vision.embed_dim, rngs=rngs) if config.resampler else None
        self.embedding = ExtendedEmbedding(config, rngs=rngs)
        self.stack = Stack(config.pattern, config.num_layers, dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(dim, rngs=rngs) if config.final_norm else None
        self.head = config.head.build(dim, config.vocab_size, rngs=rngs)
        self.extra_head = config.head.build(dim, extra, rngs=rngs) if extra else None

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "B I height width C"],
        image_attention_mask: Bool[Array, "B S I"] | Int[Array, "B S I"] | None = None,
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        labels: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> VisionLanguageOutput:
        """Logits of every position.

        Args:
            input_ids: tokens.
            pixel_values: images of every row.
            image_attention_mask: true or 1 where a token sees an image; None: every token sees all.
            attention_mask: true or 1 where a token is real.
            position_ids: position of each token; 0, 1, 2... by default, whatever the padding.
            labels: the target of each position (already shifted), -100 where it is not counted; gives `loss`.
            key: makes dropout active.
        """
        key_vision, key_text = split_key(key, 2)
        images = self.embed_images(pixel_values, key_vision)
        hidden = self._decode(input_ids, images, image_attention_mask, attention_mask, position_ids, key_text)
        logits_BSV = self.project(hidden.states)
        loss = None
        if labels is not None:
            loss = sum(self.auxiliary_losses(hidden.auxiliary).values(), mean_cross_entropy(logits_BSV, labels))
        return VisionLanguageOutput(
            logits=logits_BSV,
            last_hidden_state=hidden.states,
            image_hidden_states=images,
            loss=loss,
            auxiliary=hidden.auxiliary,
        )

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "B I height width C"] | None,
        image_attention_mask: Bool[Array, "B S I"] | Int[Array, "B S I"] | None = None,
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        """Input of the head; arguments as for a call, and a cache of every layer.

        With a cache, position -1 is padding, and a call with images stores their keys and values: later ones are given
        None.
        """
        key_vision, key_text = split_key(key, 2)
        images = None if pixel_values is None else self.embed_images(pixel_values, key_vision)
        return self._decode(input_ids, images, image_attention_mask, attention_mask, position_ids, key_text, cache)

    def embed_images(
        self, pixel_values: Float[Array, "B I height width C"], key: jax.Array | None = None
    ) -> Float[Array, "BI N E"]:
        """The states of every image that text can look at, row by row."""
        key_tower, key_resampler = split_key(key, 2)
        pixels = pixel_values.reshape(-1, *pixel_values.shape[2:])
        states = self.vision.hidden_states(pixels, key_tower).states
        return states if self.resampler is None else self.resampler(states, key_resampler)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary and the additional tokens, float32."""
        scores = [
            table.attend(hidden) if head is None else head(hidden)
            for head, table in ((self.head, self.embedding.tokens), (self.extra_head, self.embedding.extra))
            if table is not None
        ]
        return jnp.concatenate(scores, axis=-1).astype(jnp.float32)

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by name."""
        return auxiliary_losses(self.config.pattern, auxiliary)

    def _decode(
        self,
        input_ids: Int[Array, "B S"],
        images: Float[Array, "BI N E"] | None,
        image_attention_mask: Bool[Array, "B S I"] | Int[Array, "B S I"] | None,
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None,
        position_ids: Int[Array, "B S"] | None,
        key: jax.Array | None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        mask: Mask = Causal()
        valid = None if cache is None else position_ids >= 0
        if attention_mask is not None:
            valid = attention_mask.astype(bool)
            mask = mask & Padding(valid)
        looking: Any = None
        if image_attention_mask is not None:
            looking = Groups(image_attention_mask.astype(bool), self.config.tokens_per_image)
        memory = None if images is None else images.reshape(len(input_ids), -1, images.shape[-1])
        context = Context(mask=mask, position_ids=position_ids, valid=valid, memory=memory, memory_mask=looking)
        x_BSD = shard(self.embedding(input_ids), "batch", "residual", "embed")
        x_BSD, caches, auxiliary = self.stack(x_BSD, context, key, cache)
        return Hidden(x_BSD if self.final_norm is None else self.final_norm(x_BSD), caches, auxiliary)
