"""PaliGemma (Beyer et al. 2024, 2407.07726), the open line of PaLI (Chen et al. 2022, 2209.06794).

    image -> SigLIP -> patch states -> one matrix --+
                                                    +-- [image tokens | prefix | suffix] -> Gemma -> next token
    text  -> embedding * sqrt(D) -------------------+

Everything is text to text with an image in front: captions, questions, boxes written as tokens. An image of R pixels
is (R / 14)^2 tokens of the language model (256 at 224 pixels); one linear layer is all that lies between the two
pretrained models. Attention is a prefix language model's: image and prefix, which are given, see each other in both
directions; the suffix, which is predicted, sees everything before it.

            image  prefix  suffix        keys
    image     x      x
    prefix    x      x
    suffix    x      x     causal

`token_type_ids` says which tokens are given (0) and which are the suffix (1); without it all attention is causal. The
states of the patches take the places of the image tokens in the sequence; unlike embeddings they are not scaled.

Cost: the vision tower's (R / 14)^2 patches once, and the decoder's for image and text tokens alike. Against cross
attention (Flamingo) the image's tokens run through all layers of the decoder: dearer, and simpler.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from llmlab.models import gemma, llama, siglip
from llmlab.models.config import ModelConfig, Shapes, Tied, Transformer, Untied, named
from llmlab.models.decoder import DecoderModel
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import Attributes, check_same
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import Hidden, VisionLanguageOutput
from llmlab.models.vision import VisionModel, VisionTransformer
from llmlab.models.weights import WeightTable, linear, part
from llmlab.nn.config import Auxiliary, Context, LayerCache
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import split_key
from llmlab.nn.masks import Causal, Marked, Mask, Padding, Prefix
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class PaliGemma(ModelConfig):
    """A decoder that reads images. The vocabulary is the decoder's: `text.vocab_size`."""

    vision: VisionTransformer
    """Tower of images; the states of its tokens are used, whatever its pooling."""
    text: Transformer
    """The decoder, with positions inside attention."""
    image_token_id: int
    """The token whose places the image takes; it may lie beyond the vocabulary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is not None:
            raise ValueError(f"vocab_size={self.vocab_size}: the vocabulary is the decoder's, set text.vocab_size")
        if self.vision.head is not None:
            raise ValueError("the vision tower classifies nothing here: set its head=None")
        if self.text.mup is not None:
            raise ValueError("muP of a decoder that reads images is not known: set text.mup=None")

    @property
    def pipeline_repeats(self) -> int:
        return self.text.pipeline_repeats

    @property
    def max_length(self) -> int | None:
        return self.text.max_length

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("NextToken",)

    def with_vocabulary(self, size: int) -> "PaliGemma":
        """With the decoder's vocabulary settled."""
        return dataclasses.replace(self, text=self.text.with_vocabulary(size))

    def build(self, rngs: nnx.Rngs) -> "PaliGemmaModel":
        return PaliGemmaModel(self, rngs=rngs)

    def num_tokens(self, shapes: Shapes) -> int:
        return self.text.num_tokens(shapes)

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        size = self.vision.image_size
        return {"input_ids": (batch_size, length), "pixel_values": (batch_size, size, size, self.vision.channels)}

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        images = math.prod(shapes["pixel_values"][:-3])
        projector = 2 * self.vision.length * self.vision.embed_dim * self.text.embed_dim
        forward = images * (self.vision.image_flops() + projector)
        return (3 if training else 1) * forward + self.text.flops(shapes, training=training)


class PaliGemmaModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: PaliGemma, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision = VisionModel(config.vision, rngs=rngs)
        # no logical name for the vision tower's width: "embed" is the decoder's, and a mesh axis serves one dimension
        widths = (("vision_embed", config.vision.embed_dim),), (("embed", config.text.embed_dim),)
        self.projector = Dense(*widths, bias=True, rngs=rngs)
        self.text = DecoderModel(config.text, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "*images height width C"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        labels: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> VisionLanguageOutput:
        """Logits of every position.

        Args:
            input_ids: tokens, with as many image tokens as the images have patches.
            pixel_values: images (I, H, W, C) or (B, n, H, W, C), in the order of their tokens, row by row.
            attention_mask: true or 1 where a token is real.
            token_type_ids: 0 where a token is given (image, prefix), 1 where it is predicted (suffix); None: causal.
            position_ids: position of each token; 1, 2, 3... by default, whatever the padding.
            labels: the target of each position (already shifted), -100 where it is not counted; gives `loss`.
            key: makes dropout active.

        Raises:
            ValueError: there are more or fewer image tokens than patches (known outside of jit only).
        """
        key_vision, key_text = split_key(key, 2)
        images_IND = self.embed_images(pixel_values, key_vision)
        hidden = self._decode(input_ids, images_IND, attention_mask, token_type_ids, position_ids, key_text)
        logits_BSV = self.project(hidden.states)
        loss = None
        if labels is not None:
            loss = sum(self.auxiliary_losses(hidden.auxiliary).values(), mean_cross_entropy(logits_BSV, labels))
        return VisionLanguageOutput(
            logits=logits_BSV,
            last_hidden_state=hidden.states,
            image_hidden_states=images_IND,
            loss=loss,
            auxiliary=hidden.auxiliary,
        )

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "*images height width C"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        """Input of the head; arguments as for a call."""
        key_vision, key_text = split_key(key, 2)
        images_IND = self.embed_images(pixel_values, key_vision)
        return self._decode(input_ids, images_IND, attention_mask, token_type_ids, position_ids, key_text)

    def prefill(
        self,
        input_ids: Int[Array, "B S"],
        pixel_values: Float[Array, "*images height width C"],
        position_ids: Int[Array, "B S"],
        cache: Sequence[LayerCache],
        token_type_ids: Int[Array, "B S"] | None = None,
    ) -> Hidden:
        """`hidden_states` of rows' first tokens, which a cache of every decoder layer then holds; what follows them is
        text like any other, for `text.hidden_states`.

        Args:
            input_ids: tokens; all that are given see each other, so none of them may come later.
            pixel_values: as for a call.
            position_ids: 0, 1, 2...; -1 for padding. (Counted from 0 or from 1, distances are the same.)
            cache: of `text`.
            token_type_ids: as for a call; None: all are given.
        """
        given_BS = position_ids >= 0
        if token_type_ids is not None:
            given_BS = given_BS & (token_type_ids == 0)
        is_image = (input_ids == self.config.image_token_id) & (position_ids >= 0)
        x_BSD = self._embed(input_ids, self.embed_images(pixel_values), is_image, position_ids)
        mask = Prefix(jnp.sum(given_BS, axis=1))
        context = Context(mask=mask, position_ids=position_ids, valid=position_ids >= 0)
        return self._states(x_BSD, context, None, cache)

    def embed_images(
        self, pixel_values: Float[Array, "*images height width C"], key: jax.Array | None = None
    ) -> Float[Array, "I N D"]:
        """Every image as a sequence of the decoder's embeddings."""
        pixels = pixel_values.reshape(-1, *pixel_values.shape[-3:])
        return self.projector(self.vision.hidden_states(pixels, key).states)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        return self.text.project(hidden)

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by name."""
        return self.text.auxiliary_losses(auxiliary)

    def _decode(
        self,
        input_ids: Int[Array, "B S"],
        images_IND: Float[Array, "I N D"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None,
        token_type_ids: Int[Array, "B S"] | None,
        position_ids: Int[Array, "B S"] | None,
        key: jax.Array | None,
    ) -> Hidden:
        if position_ids is None:
            position_ids = jnp.broadcast_to(1 + jnp.arange(input_ids.shape[1]), input_ids.shape)
        key_embedding, key_stack = split_key(key, 2)
        is_image = input_ids == self.config.image_token_id
        x_BSD = self._embed(input_ids, images_IND, is_image, position_ids, key_embedding)
        mask: Mask = Causal() if token_type_ids is None else Marked(token_type_ids == 0)
        valid = None
        if attention_mask is not None:
            valid = attention_mask.astype(bool)
            mask = mask & Padding(valid)
        return self._states(x_BSD, Context(mask=mask, position_ids=position_ids, valid=valid), key_stack)

    def _embed(
        self,
        input_ids: Int[Array, "B S"],
        images_IND: Float[Array, "I N D"],
        is_image: Bool[Array, "B S"],
        position_ids: Int[Array, "B S"],
        key: jax.Array | None = None,
    ) -> Float[Array, "B S D"]:
        x_BSD = self.text.embedding(jnp.where(is_image, 0, input_ids), position_ids, key=key)
        return shard(placed(x_BSD, is_image, images_IND), "batch", "residual", "embed")

    def _states(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        x_BSD, caches, auxiliary = self.text.stack(x_BSD, context, key, cache)
        return Hidden(x_BSD if self.text.final_norm is None else self.text.final_norm(x_BSD), caches, auxiliary)


def placed(
    x_BSD: Float[Array, "B S D"], is_image: Bool[Array, "B S"], images_IND: Float[Array, "I N D"]
) -> Float[Array, "B S D"]:
    """x with the states of all images, one after the other, at the places of the image tokens, row by row.

    Raises:
        ValueError: there are more or fewer places than states, where the tokens' values are known.
    """
    states = images_IND.reshape(-1, images_IND.shape[-1])
    if not isinstance(is_image, Tracer) and (count := int(jnp.sum(is_image))) != len(states):
        raise ValueError(
            f"input_ids have {count} image tokens and the images {len(states)} patches; "
            f"put {images_IND.shape[1]} image tokens where each of the {len(images_IND)} images belongs"
        )
    number = jnp.cumsum(is_image.reshape(-1)) - 1
    chosen = jnp.take(states, jnp.maximum(number, 0), axis=0, mode="clip").reshape(x_BSD.shape)
    return jnp.where(is_image[..., None], chosen.astype(x_BSD.dtype), x_BSD)


def _published(image_size: int) -> PaliGemma:
    text = gemma.gemma(embed_dim=2048, num_layers=18, num_heads=8, num_kv_heads=1, hidden_dim=16384, vocab_size=257216)
    vision = siglip.siglip(
        embed_dim=1152,
        num_layers=27,
        num_heads=16,
        hidden_dim=4304,
        image_size=image_size,
        patch_size=14,
        pooled=False,
    )
    return PaliGemma(vision=vision, text=text, image_token_id=257152)


PRESETS: dict[str, PaliGemma] = {
    # 8 x 8 grey pixels; the image token is the first beyond bytes and their special tokens
    "paligemma-nano": PaliGemma(
        vision=siglip.siglip(
            embed_dim=64, num_layers=2, num_heads=4, image_size=8, patch_size=2, channels=1, pooled=False
        ),
        text=gemma.gemma(embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=1, hidden_dim=192, head_dim=16),
        image_token_id=300,
    ),
    "paligemma-3b-224": _published(224),
    "paligemma-3b-448": _published(448),
    "paligemma-3b-896": _published(896),
}


def preset(name: str) -> PaliGemma:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> PaliGemma:
    """Model of a Hugging Face config with model_type paligemma; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "paligemma")
    hf.common()
    hf.architecture({"PaliGemmaForConditionalGeneration": None})
    text = hf.submodel("text_config", "num_image_tokens")
    vision = hf.submodel("vision_config", "projection_dim", "num_image_tokens", "num_positions", "vocab_size")
    text.fixed("model_type", "gemma")  # Gemma 2 (PaliGemma 2) is another decoder
    text.fixed("use_bidirectional_attention", True, None)  # prefixes are, by token_type_ids
    vision.fixed("model_type", "siglip_vision_model")
    make_text, make_vision = gemma.decoder_from_hf(text), siglip.tower_from_hf(vision)
    width = make_text.keywords["embed_dim"]
    for name in ("projection_dim", "hidden_size"):
        hf.fixed(name, width)
    head = Tied() if hf.flag("tie_word_embeddings", True) else Untied()
    image_token_id = hf.integer("image_token_index", 256000)
    hf.finish("vocab_size", "ignore_index")  # the vocabulary is the decoder's
    return PaliGemma(vision=make_vision(), text=make_text(head=head), image_token_id=image_token_id)


def to_hf(model: PaliGemma) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a paligemma config cannot express."""
    text, vision = gemma.to_hf(model.text), siglip.to_hf(model.vision)
    del text["architectures"], vision["architectures"]
    config = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": {**vision, "projection_dim": model.text.embed_dim},
        "image_token_index": model.image_token_id,
        "projection_dim": model.text.embed_dim,
        "hidden_size": model.text.embed_dim,
        "tie_word_embeddings": isinstance(model.text.head, Tied),
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "paligemma")
    return config


WEIGHTS = WeightTable(
    renamed=(("vision_tower.vision_model.", "vision_tower."),),
    tied={"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
    rows=(
        *part(siglip.WEIGHTS.rows, "vision", new="vision_tower."),
        *linear("multi_modal_projector.linear", "projector"),
        *part(llama.WEIGHTS.rows, "text", new="language_model."),
    ),
)

FAMILY = Family(
    name="PaliGemma",
    kind="vision-language",
    paper="Beyer et al. 2024, 2407.07726; PaLI: Chen et al. 2022, 2209.06794",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken",),
    reference="transformers PaliGemmaForConditionalGeneration",
    hugging_face=HuggingFace(model_type="paligemma", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=PaliGemma),
)
