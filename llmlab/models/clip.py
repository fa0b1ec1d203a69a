"""CLIP (Radford et al. 2021, 2103.00020): images and texts in one space, learnt from pairs of them alone.

    image -> ViT, class token -> norm -> matrix -> v / |v| --+
                                                             +-- exp(s) v . t  for every image and every text of a batch
    text -> causal transformer, last token -> matrix -> t / |t| --+

    loss = (CE(rows) + CE(columns)) / 2        the pair of an image is its own text, and the other way round (InfoNCE)

Nothing is labelled: a text that came with an image is the right one among the N of the batch, so classes are whatever
can be written down, and a new classifier is a list of captions ("a photo of a dog"). The temperature exp(-s) is learnt.
Large batches matter (32k in the paper): every other pair is a negative. The loss compares N^2 pairs of vectors, which
is little beside the towers; it sees no order of objects and counts badly, since one vector is all that is compared.

Details of the released models: quick_gelu instead of GELU, a norm before the first block of the vision tower and one
on its class token alone, no bias in the projection of patches; the text is pooled at its end token, which has the
highest id.

Costs: vision 24 D^2 N + 4 N^2 D a layer forward with N = (R / P)^2 + 1, text the same with its length.
"""

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.config import ModelConfig, Shapes, Tied, Transformer, matmul_parameters, named
from llmlab.models.decoder import DecoderModel
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import PairOutput
from llmlab.models.siglip import layer_rows
from llmlab.models.transforms import Conv2D
from llmlab.models.vision import FirstToken, VisionModel, VisionTransformer
from llmlab.models.weights import Row, WeightTable, linear, norm, part
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import split_key
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PreNorm


@dataclass(frozen=True, kw_only=True)
class TextPooling(abc.ABC):
    """Which token's state stands for a text; it must come last, since states know what is before them only."""

    @abc.abstractmethod
    def index(self, input_ids: Int[Array, "B S"]) -> Int[Array, "B"]:
        """Index of that token in every row."""


@dataclass(frozen=True, kw_only=True)
class HighestToken(TextPooling):
    """The first token of the highest id: the end token of vocabularies where that is last."""

    def index(self, input_ids: Int[Array, "B S"]) -> Int[Array, "B"]:
        return jnp.argmax(input_ids, axis=1)


@dataclass(frozen=True, kw_only=True)
class EndToken(TextPooling):
    """The first token of a given id; a text without one is pooled at its first token."""

    id: int
    """Id of the end token."""

    def index(self, input_ids: Int[Array, "B S"]) -> Int[Array, "B"]:
        return jnp.argmax(input_ids == self.id, axis=1)


@dataclass(frozen=True, kw_only=True)
class CLIP(ModelConfig):
    """Two towers and the matrices that bring them together. The vocabulary is the text tower's: `text.vocab_size`."""

    text: Transformer
    """Tower of texts; its head scores nothing and must be Tied, which has no parameters."""
    vision: VisionTransformer
    """Tower of images, with a pooling and no head."""
    projection_dim: int
    """Width of the common space."""
    pooling: TextPooling = HighestToken()
    """Which token stands for a text."""
    logit_scale: float = 2.6592
    """Logarithm of the initial inverse temperature: ln(1 / 0.07)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is not None:
            raise ValueError(f"vocab_size={self.vocab_size}: the vocabulary is the text tower's, set text.vocab_size")
        if not isinstance(self.text.head, Tied):
            raise ValueError("the text tower scores no tokens: give it head=Tied()")
        if self.vision.pooling is None or self.vision.head is not None:
            raise ValueError("the vision tower gives one vector and no classes: set its pooling, and head=None")

    @property
    def max_length(self) -> int | None:
        return self.text.max_length

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("ImageTextContrastive",)

    def with_vocabulary(self, size: int) -> "CLIP":
        """With the text tower's vocabulary settled."""
        return dataclasses.replace(self, text=self.text.with_vocabulary(size))

    def build(self, rngs: nnx.Rngs) -> "CLIPModel":
        return CLIPModel(self, rngs=rngs)

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        parts = (self.text.batch_shapes(batch_size, length), self.vision.batch_shapes(batch_size, length))
        return {name: shape for part in parts for name, shape in part.items()}

    def num_tokens(self, shapes: Shapes) -> int:
        return self.text.num_tokens(shapes) + self.vision.num_tokens(shapes)

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        texts, length = shapes["input_ids"]
        images = shapes["pixel_values"][0]
        params, text = self.abstract()[1], self.text
        context = sum(block.mixer.context_flops(text.embed_dim, length) for block in text.layers())
        forward = texts * length * (2 * matmul_parameters(params["text"]["stack"]) + context)
        forward += images * self.vision.image_flops()
        forward += 2 * texts * matmul_parameters(params["text_projection"])
        forward += 2 * images * matmul_parameters(params["vision_projection"])
        forward += 2 * texts * images * self.projection_dim
        return (3 if training else 1) * forward


class CLIPModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: CLIP, *, rngs: nnx.Rngs) -> None:
        assert config.vision.pooling is not None
        width = config.vision.pooling.output_dim(config.vision.embed_dim)
        joint = (("projection", config.projection_dim),)
        self.config = config
        self.text = DecoderModel(config.text, rngs=rngs)
        self.vision = VisionModel(config.vision, rngs=rngs)
        self.text_projection = Dense((("embed", config.text.embed_dim),), joint, bias=False, rngs=rngs)
        self.vision_projection = Dense((("embed", width),), joint, bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale), axes=())

    def __call__(
        self,
        input_ids: Int[Array, "T S"],
        pixel_values: Float[Array, "I height width C"],
        attention_mask: Bool[Array, "T S"] | Int[Array, "T S"] | None = None,
        position_ids: Int[Array, "T S"] | None = None,
        key: jax.Array | None = None,
    ) -> PairOutput:
        """Embeddings of length one and the scaled cosines of every image with every text.

        Args:
            input_ids: texts, as many as images where a loss is asked for: text i is image i's.
            pixel_values: images, normalised as the model was trained to see them.
            attention_mask: true or 1 where a token is real.
            position_ids: position of each token; 0, 1, 2... by default, whatever the padding.
            key: makes dropout active.
        """
        key_text, key_vision = split_key(key, 2)
        texts = self.embed_text(input_ids, attention_mask, position_ids, key_text)
        images = self.embed_image(pixel_values, key_vision)
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        logits = scale * jnp.einsum("ID,TD->IT", images, texts)
        loss = None
        if len(texts) == len(images):
            own = jnp.arange(len(texts))
            loss = (mean_cross_entropy(logits, own) + mean_cross_entropy(logits.T, own)) / 2
        return PairOutput(
            image_embeds=images,
            text_embeds=texts,
            logits_per_image=logits,
            logits_per_text=logits.T,
            logit_scale=scale,
            loss=loss,
        )

    def embed_text(
        self,
        input_ids: Int[Array, "T S"],
        attention_mask: Bool[Array, "T S"] | Int[Array, "T S"] | None = None,
        position_ids: Int[Array, "T S"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "T D"]:
        """Texts in the common space, float32, of length one; arguments as for a call."""
        states = self.text.hidden_states(input_ids, attention_mask, position_ids, key=key).states
        pooled = jnp.take_along_axis(states, self.config.pooling.index(input_ids)[:, None, None], axis=1)[:, 0]
        return normalised(self.text_projection(pooled))

    def embed_image(
        self, pixel_values: Float[Array, "I height width C"], key: jax.Array | None = None
    ) -> Float[Array, "I D"]:
        """Images in the common space, float32, of length one; arguments as for a call."""
        pooled = self.vision(pixel_values, key=key).pooled
        assert pooled is not None
        return normalised(self.vision_projection(pooled))


def normalised(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / |x| in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def tower_block(
    num_heads: int, hidden_dim: int, activation: Activation, epsilon: float, attention_dropout: float
) -> Block:
    """A block of either tower."""
    return Block(
        mixer=Attention(num_heads=num_heads, bias=True, output_bias=True, dropout=attention_dropout),
        ffn=MLP(hidden_dim=hidden_dim, activation=activation),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PreNorm(),
    )


def clip_vision(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    image_size: int = 224,
    patch_size: int = 32,
    channels: int = 3,
    activation: Activation = "quick_gelu",
    epsilon: float = 1e-5,
    attention_dropout: float = 0.0,
) -> VisionTransformer:
    """CLIP's tower of images at any size."""
    block = tower_block(num_heads, hidden_dim or 4 * embed_dim, activation, epsilon, attention_dropout)
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        patch_bias=False,
        embedding_norm=LayerNorm(epsilon=epsilon),
        pooling=FirstToken(norm=LayerNorm(epsilon=epsilon)),
    )


def clip_text(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    vocab_size: int | None = None,
    max_length: int = 77,
    activation: Activation = "quick_gelu",
    epsilon: float = 1e-5,
    attention_dropout: float = 0.0,
) -> Transformer:
    """CLIP's tower of texts at any size."""
    block = tower_block(num_heads, hidden_dim or 4 * embed_dim, activation, epsilon, attention_dropout)
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position=Learned(max_length),
        final_norm=LayerNorm(epsilon=epsilon),
    )


def _published(text_dim: int, vision_dim: int, layers: int, patch_size: int, image_size: int = 224) -> CLIP:
    """Heads are 64 wide; the common space is as wide as the text tower."""
    text = clip_text(embed_dim=text_dim, num_layers=12, num_heads=text_dim // 64, vocab_size=49408)
    vision = clip_vision(
        embed_dim=vision_dim,
        num_layers=layers,
        num_heads=vision_dim // 64,
        image_size=image_size,
        patch_size=patch_size,
    )
    return CLIP(text=text, vision=vision, projection_dim=text_dim, pooling=EndToken(id=49407))


PRESETS: dict[str, CLIP] = {
    # 8 x 8 grey pixels and short captions; its vocabulary follows the tokenizer
    "clip-nano": CLIP(
        text=clip_text(embed_dim=64, num_layers=2, num_heads=4, max_length=64),
        vision=clip_vision(embed_dim=64, num_layers=2, num_heads=4, image_size=8, patch_size=2, channels=1),
        projection_dim=32,
    ),
    # table 20 of the paper
    "clip-b32": _published(512, 768, 12, 32),
    "clip-b16": _published(512, 768, 12, 16),
    "clip-l14": _published(768, 1024, 24, 14),
    "clip-l14-336": _published(768, 1024, 24, 14, image_size=336),
}


def preset(name: str) -> CLIP:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> CLIP:
    """Model of a Hugging Face config with model_type clip; ValueError lists every attribute not implemented."""
    # early configs have a second copy of the towers' attributes, which goes before the first
    copies = {name: config[f"{name}_dict"] for name in ("text_config", "vision_config") if config.get(f"{name}_dict")}
    hf = Attributes({**config, **copies}, "clip")
    hf.common()
    hf.architecture({"CLIPModel": None})
    initial = ("projection_dim", "initializer_factor", "initializer_range")
    text, vision = hf.submodel("text_config", *initial), hf.submodel("vision_config", *initial)
    end = text.optional("eos_token_id", int, 49407)
    make_text, make_vision = text_from_hf(text), vision_from_hf(vision)
    projection_dim, logit_scale = hf.integer("projection_dim", 512), hf.real("logit_scale_init_value", 2.6592)
    hf.finish("initializer_factor", "text_config_dict", "vision_config_dict")
    return CLIP(
        text=make_text(),
        vision=make_vision(),
        projection_dim=projection_dim,
        # configs of the first release say 2 and mean the last token of the vocabulary
        pooling=HighestToken() if end is None or end == 2 else EndToken(id=end),
        logit_scale=logit_scale,
    )


def text_from_hf(hf: Attributes) -> "partial[Transformer]":
    """What makes the tower of these attributes, once it is known that they are all right."""
    return partial(
        clip_text,
        embed_dim=hf.integer("hidden_size", 512),
        num_layers=hf.integer("num_hidden_layers", 12),
        num_heads=hf.integer("num_attention_heads", 8),
        hidden_dim=hf.integer("intermediate_size", 2048),
        vocab_size=hf.integer("vocab_size", 49408),
        max_length=hf.integer("max_position_embeddings", 77),
        activation=hf.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
        epsilon=hf.real("layer_norm_eps", 1e-5),
        attention_dropout=hf.real("attention_dropout", 0.0),
    )


def vision_from_hf(hf: Attributes, width: str = "hidden_size") -> "partial[VisionTransformer]":
    """What makes the tower of these attributes, once it is known that they are all right."""
    return partial(
        clip_vision,
        embed_dim=hf.integer(width, 768),
        num_layers=hf.integer("num_hidden_layers", 12),
        num_heads=hf.integer("num_attention_heads", 12),
        hidden_dim=hf.integer("intermediate_size", 3072),
        image_size=hf.integer("image_size", 224),
        patch_size=hf.integer("patch_size", 32),
        channels=hf.integer("num_channels", 3),
        activation=hf.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
        epsilon=hf.real("layer_norm_eps", 1e-5),
        attention_dropout=hf.real("attention_dropout", 0.0),
    )


def to_hf(model: CLIP) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a clip config cannot express."""
    end = model.pooling.id if isinstance(model.pooling, EndToken) else 2
    position = model.text.position
    text = {
        "model_type": "clip_text_model",
        "vocab_size": model.text.vocab_size,
        "max_position_embeddings": position.max_length if isinstance(position, Learned) else None,
        "eos_token_id": end,
        **tower_to_hf(model.text, "clip"),
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **vision_to_hf(model.vision, "clip")},
        "projection_dim": model.projection_dim,
        "logit_scale_init_value": model.logit_scale,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "clip")
    return config


def tower_to_hf(tower: Transformer | VisionTransformer, family: str, width: str = "hidden_size") -> dict[str, Any]:
    """What the configs of both towers have in common."""
    block = block_of(tower, family)
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (isinstance(mixer, Attention) and isinstance(ffn, MLP) and isinstance(layer_norm, LayerNorm)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm))
        raise ValueError(f"a tower of {family} is made of Attention, MLP and LayerNorm; this one of {parts}")
    return {
        width: tower.embed_dim,
        "intermediate_size": ffn.hidden_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": mixer.num_heads,
        "hidden_act": activation_to_hf(ffn.activation),
        "layer_norm_eps": layer_norm.epsilon,
        "attention_dropout": mixer.dropout,
    }


def vision_to_hf(tower: VisionTransformer, family: str, width: str = "hidden_size") -> dict[str, Any]:
    """Config of a tower of images."""
    return {
        **tower_to_hf(tower, family, width),
        "num_channels": tower.channels,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
    }


VISION_ROWS = (
    Row("embeddings.class_embedding", "class_token"),
    *linear("embeddings.patch_embedding", "patches", Conv2D()),
    Row("embeddings.position_embedding.weight", "position.table"),
    *norm("pre_layrnorm", "embedding_norm"),
    *layer_rows("encoder.layers.{layer}", "stack.{layer}"),
    *norm("post_layernorm", "pooling.norm"),
)
TEXT_ROWS = (
    Row("embeddings.token_embedding.weight", "embedding.tokens.table"),
    Row("embeddings.position_embedding.weight", "embedding.position.table"),
    *layer_rows("encoder.layers.{layer}", "stack.{layer}"),
    *norm("final_layer_norm", "final_norm"),
)

WEIGHTS = WeightTable(
    ignored=("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    rows=(
        Row("logit_scale", "logit_scale"),
        *part(TEXT_ROWS, "text", new="text_model."),
        *part(VISION_ROWS, "vision", new="vision_model."),
        *linear("text_projection", "text_projection"),
        *linear("visual_projection", "vision_projection"),
    ),
)

FAMILY = Family(
    name="CLIP",
    kind="vision-language",
    paper="Radford et al. 2021, 2103.00020",
    presets=PRESETS,
    heads=(),
    objectives=("ImageTextContrastive",),
    reference="transformers CLIPModel",
    hugging_face=HuggingFace(model_type="clip", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=CLIP),
)
