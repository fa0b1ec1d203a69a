"""The vision transformer: an image as a sequence of patches (Dosovitskiy et al. 2021, 2010.11929).

    pixels (H, W, C) -> patches (H W / P^2, P, P, C) -> one matrix -> [class token +] positions -> block x num_layers
                                                                                    -> norm -> pooling -> head

An image is cut into squares of P pixels, each is projected by one matrix (the convolution whose stride is its size),
and from there it is an encoder like any other: every patch sees every patch. What a convolution builds in, that near
pixels belong together, must be learnt from data: below some ten million images convolutions are better, above they
are not. N = H W / P^2 patches cost N (24 D^2 + 4 N D) FLOPs a layer forward, so halving P costs four times as much,
and more.

How the sequence becomes one vector differs:

    FirstToken          a learned class token collects what matters      ViT; CLIP normalises it on its own
    Pooler              the same, through a matrix and tanh              BERT's habit, kept in some checkpoints
    MeanTokens          the mean of all tokens                           equal quality with a retuned learning rate
    AttentionPooling    a learned query attends to all patches           SigLIP (Zhai et al. 2022, 2106.04560, MAP head)
"""

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.models.config import ModelConfig, Shapes, check_stack, layers_of, matmul_parameters
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import Hidden, VisionOutput
from llmlab.nn.attention import CrossAttention
from llmlab.nn.config import Block, Context, Norm
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.feed_forward import ACTIVATIONS, MLP, Activation
from llmlab.nn.masks import Full
from llmlab.nn.module import normal
from llmlab.nn.positions import Learned
from llmlab.nn.stack import Execution, Stack
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class Pooling(abc.ABC):
    """How the states of all tokens become one vector."""

    @abc.abstractmethod
    def build(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module `(x_BSD) -> (B, output_dim)`."""

    def output_dim(self, dim: int) -> int:
        """Width of the vector."""
        return dim

    def flops(self, dim: int, length: int) -> int:
        """Matmul FLOPs of an image, forward."""
        return 0


@dataclass(frozen=True, kw_only=True)
class FirstToken(Pooling):
    """The first token, the class token of models that have one."""

    norm: Norm | None = None
    """Norm of this token alone (CLIP)."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "FirstTokenLayer":
        return FirstTokenLayer(self, dim, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Pooler(Pooling):
    """The first token through a matrix and an activation (Devlin et al. 2019)."""

    dim: int | None = None
    """Width of the vector; None for the model's."""
    activation: Activation = "tanh"
    """Nonlinearity."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "PoolerLayer":
        return PoolerLayer(self, dim, rngs=rngs)

    def output_dim(self, dim: int) -> int:
        return self.dim or dim

    def flops(self, dim: int, length: int) -> int:
        return 2 * dim * self.output_dim(dim)


@dataclass(frozen=True, kw_only=True)
class MeanTokens(Pooling):
    """The mean of all tokens."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "MeanTokensLayer":
        return MeanTokensLayer()


@dataclass(frozen=True, kw_only=True)
class AttentionPooling(Pooling):
    """A learned query attends to all tokens, then an MLP with a residual: a decoder layer of one token."""

    num_heads: int
    """Heads of the attention."""
    ffn: MLP
    """Transforms what the query found."""
    norm: Norm
    """Norm before the MLP."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "AttentionPoolingLayer":
        return AttentionPoolingLayer(self, dim, rngs=rngs)

    def flops(self, dim: int, length: int) -> int:
        query_and_output, keys_and_values = 4 * dim * dim, 4 * length * dim * dim
        return query_and_output + keys_and_values + 4 * length * dim + 4 * dim * self.ffn.hidden_dim


@dataclass(frozen=True, kw_only=True)
class ImageClassification:
    """A linear classifier of the pooled image."""

    num_labels: int
    """Classes."""

    def __post_init__(self) -> None:
        if self.num_labels < 2:
            raise ValueError(f"num_labels={self.num_labels} leaves nothing to tell apart; use at least 2")

    def build(self, dim: int, *, rngs: nnx.Rngs) -> Dense:
        """The projection of a vector of this width."""
        return Dense((("embed", dim),), (("labels", self.num_labels),), bias=True, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class VisionTransformer(ModelConfig):
    """An encoder of images. It has no vocabulary: `vocab_size` stays None."""

    image_size: int
    """Height and width of an image in pixels."""
    patch_size: int
    """Height and width of a patch. Pixels beyond the last whole patch are not seen (SigLIP: 384 = 27 * 14 + 6)."""
    channels: int = 3
    """Numbers a pixel has: 3 for colour, 1 for grey."""
    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    class_token: bool = True
    """Whether a learned token stands before the patches."""
    patch_bias: bool = True
    """Whether the projection of the patches adds a bias."""
    position_std: float = 0.02
    """Standard deviation of the initial table of positions, one row a token."""
    embedding_norm: Norm | None = None
    """Norm before the first block (CLIP)."""
    embedding_dropout: float = 0.0
    """Dropout on the embeddings."""
    final_norm: Norm | None = None
    """Norm after the last block."""
    pooling: Pooling | None = None
    """How an image becomes one vector; None where only the tokens are asked for (PaliGemma)."""
    head: ImageClassification | None = None
    """Classifier of that vector."""
    execution: Execution = Execution()
    """How the layer stack is applied: scan or unroll, rematerialisation, LayerDrop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        check_rate("embedding_dropout", self.embedding_dropout)
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} is not between 1 and image_size={self.image_size}")
        if self.head is not None and self.pooling is None:
            raise ValueError("a head needs a pooling: FirstToken() takes the class token, MeanTokens() the mean")
        if self.vocab_size is not None:
            raise ValueError(f"vocab_size={self.vocab_size}: images have no vocabulary; leave it None")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """Tokens of an image: its patches, and the class token."""
        return self.num_patches + self.class_token

    @property
    def pipeline_repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def max_length(self) -> int | None:
        return None

    @property
    def objectives(self) -> tuple[str, ...]:
        return () if self.head is None else ("Classification",)

    @property
    def num_labels(self) -> int | None:
        return None if self.head is None else self.head.num_labels

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    def with_vocabulary(self, size: int) -> "VisionTransformer":
        """The config itself: there is no vocabulary to settle."""
        return self

    def build(self, rngs: nnx.Rngs) -> "VisionModel":
        return VisionModel(self, rngs=rngs)

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        return {"pixel_values": (batch_size, self.image_size, self.image_size, self.channels)}

    def num_tokens(self, shapes: Shapes) -> int:
        return math.prod(shapes["pixel_values"][:-3]) * self.length

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        return (3 if training else 1) * math.prod(shapes["pixel_values"][:-3]) * self.image_flops()

    def image_flops(self) -> int:
        """Matmul FLOPs of one image, forward."""
        params = self.abstract()[1]
        idle = sum(block.ffn.idle_parameters(self.embed_dim) for block in self.layers())
        context = sum(block.mixer.context_flops(self.embed_dim, self.length) for block in self.layers())
        flops = 2 * self.num_patches * matmul_parameters(params["patches"])
        flops += self.length * (2 * (matmul_parameters(params["stack"]) - idle) + context)
        if self.pooling is not None:
            flops += self.pooling.flops(self.embed_dim, self.length)
        return flops + 2 * matmul_parameters(params.get("head", {}))


class VisionModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: VisionTransformer, *, rngs: nnx.Rngs) -> None:
        dim, size = config.embed_dim, config.patch_size
        patch = (("patch_height", size), ("patch_width", size), ("channel", config.channels))
        self.config = config
        self.patches = Dense(patch, (("embed", dim),), bias=config.patch_bias, rngs=rngs)
        token = 0.02 * normal(rngs, (dim,))
        self.class_token = nnx.Param(token, axes=("embed",)) if config.class_token else None
        self.position = Learned(config.length, std=config.position_std).build(dim, rngs=rngs)
        self.embedding_norm = config.embedding_norm.build(dim, rngs=rngs) if config.embedding_norm else None
        self.stack = Stack(config.pattern, config.num_layers, dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(dim, rngs=rngs) if config.final_norm else None
        self.pooling: Any = config.pooling.build(dim, rngs=rngs) if config.pooling else None
        self.head = config.head.build(_pooled_dim(config), rngs=rngs) if config.head else None

    def __call__(
        self,
        pixel_values: Float[Array, "B height width C"],
        labels: Int[Array, "B"] | None = None,
        key: jax.Array | None = None,
    ) -> VisionOutput:
        """States of all tokens, the pooled image, and the classes' scores.

        Args:
            pixel_values: images, normalised as the model was trained to see them.
            labels: class of each image, -100 where it is not counted; gives `loss`.
            key: makes dropout active.

        Raises:
            ValueError: images of another size than the model's; labels without a head.
        """
        hidden = self.hidden_states(pixel_values, key)
        pooled = None if self.pooling is None else self.pooling(hidden.states)
        logits = None if self.head is None or pooled is None else self.head(pooled).astype(jnp.float32)
        loss = None
        if labels is not None:
            if logits is None:
                raise ValueError("labels were given, but the model has no head: set head=ImageClassification(...)")
            loss = mean_cross_entropy(logits, labels)
        return VisionOutput(last_hidden_state=hidden.states, pooled=pooled, logits=logits, loss=loss)

    def hidden_states(self, pixel_values: Float[Array, "B height width C"], key: jax.Array | None = None) -> Hidden:
        """States of all tokens after the last norm; arguments as for a call."""
        key_embedding, key_stack = split_key(key, 2)
        x_BSD = self.patches(patchify(pixel_values, self.config))
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...].astype(x_BSD.dtype), (len(x_BSD), 1, x_BSD.shape[-1]))
            x_BSD = jnp.concatenate([first, x_BSD], axis=1)
        place_BS = jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2])
        x_BSD = dropout(self.position(x_BSD, place_BS), self.config.embedding_dropout, key_embedding)
        if self.embedding_norm is not None:
            x_BSD = self.embedding_norm(x_BSD)
        x_BSD = shard(x_BSD, "batch", "residual", "embed")
        x_BSD, _, auxiliary = self.stack(x_BSD, Context(mask=Full(), position_ids=place_BS), key_stack)
        return Hidden(x_BSD if self.final_norm is None else self.final_norm(x_BSD), None, auxiliary)


def _pooled_dim(config: VisionTransformer) -> int:
    """Width of the pooled image."""
    return config.embed_dim if config.pooling is None else config.pooling.output_dim(config.embed_dim)


def patchify(pixel_values: Float[Array, "B height width C"], config: VisionTransformer) -> Float[Array, "B S P P C"]:
    """The patches of every image, row by row.

    Raises:
        ValueError: images of another size than the model's.
    """
    size, patch = config.image_size, config.patch_size
    if pixel_values.shape[1:] != (size, size, config.channels):
        height, width, channels = pixel_values.shape[1:]
        raise ValueError(
            f"pixel_values are {height} x {width} pixels of {channels} channels (height, width, channels) and the "
            f"model takes {size} x {size} of {config.channels}; resize them, or transpose images with channels first"
        )
    grid = size // patch
    whole = pixel_values[:, : grid * patch, : grid * patch]
    tiles = whole.reshape(-1, grid, patch, grid, patch, config.channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * grid, patch, patch, config.channels)


class FirstTokenLayer(nnx.Module):
    """See FirstToken."""

    def __init__(self, config: FirstToken, dim: int, *, rngs: nnx.Rngs) -> None:
        self.norm = config.norm.build(dim, rngs=rngs) if config.norm else None

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        return x_BSD[:, 0] if self.norm is None else self.norm(x_BSD[:, 0])


class PoolerLayer(nnx.Module):
    """See Pooler."""

    def __init__(self, config: Pooler, dim: int, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.dense = Dense((("embed", dim),), (("pooled", config.output_dim(dim)),), bias=True, rngs=rngs)

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B P"]:
        return ACTIVATIONS[self.activation](self.dense(x_BSD[:, 0]))


class MeanTokensLayer(nnx.Module):
    """See MeanTokens."""

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        return jnp.mean(x_BSD.astype(jnp.float32), axis=1).astype(x_BSD.dtype)


class AttentionPoolingLayer(nnx.Module):
    """See AttentionPooling."""

    def __init__(self, config: AttentionPooling, dim: int, *, rngs: nnx.Rngs) -> None:
        mixer = CrossAttention(num_heads=config.num_heads, bias=True, output_bias=True)
        self.query = nnx.Param(normal(rngs, (dim,)) / math.sqrt(dim), axes=("embed",))
        self.attention = mixer.build(dim, rngs=rngs)
        self.norm = config.norm.build(dim, rngs=rngs)
        self.ffn = config.ffn.build(dim, rngs=rngs)

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B D"]:
        query_B1D = jnp.broadcast_to(self.query[...].astype(x_BSD.dtype), (len(x_BSD), 1, x_BSD.shape[-1]))
        context = Context(mask=Full(), position_ids=jnp.zeros(query_B1D.shape[:2], jnp.int32), memory=x_BSD)
        found_B1D, _ = self.attention(query_B1D, context)
        return (found_B1D + self.ffn(self.norm(found_B1D))[0])[:, 0]
