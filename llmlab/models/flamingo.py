"""Flamingo (Alayrac et al. 2022, 2204.14198), in its open reproduction Idefics (Laurencon et al. 2023, 2306.16527).

    images -> CLIP-like ViT -> perceiver resampler (64 latents) -------------+
                                                                             | keys, values
    x --+-- RMSNorm -- cross-attention -- * tanh(a) --(+)--+-- RMSNorm -- SwiGLU -- * tanh(b) --(+)-- Llama block x n --
        +------------------------------------------|       +---------------------------------|

A trained image encoder and a trained Llama, both as they were, and between them what is learnt: a resampler and a gated
cross-attention layer in front of every n-th block (4 in the 9B and 80B models). Gates start closed, so training starts
from the language model's quality; text and images may alternate in any number, and a few examples in the prompt teach
a task. To train only what is between, freeze everything but `*.gated`, `resampler`, `embedding.extra` and
`extra_head`, the rows of tokens that were added (an end of an image, an end of a turn).

Against PaliGemma: images cost the decoder nothing in length and it can stay frozen; the price is a fifth more
parameters, and a model that fuses late and in few places.

Cost per text token: Llama's, and every n blocks 4 D^2 + 6 D F FLOPs and 4 M D of cross-attention over M = 64 states an
image; per image: the tower, 6 resampler layers, and 4 E D for each state and gated layer.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from llmlab.models import clip, llama
from llmlab.models.config import Head, Tied, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, canonical_block, check_same
from llmlab.models.hf_rotary import rotary_from_hf, rotary_to_hf
from llmlab.models.transforms import Linear, One, Shape
from llmlab.models.vision import VisionTransformer
from llmlab.models.visual_decoder import VisualDecoder
from llmlab.models.weights import Row, WeightTable, linear, norm, part
from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.feed_forward import Activation, GatedMLP
from llmlab.nn.gated_cross import GatedBlock
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.nn.perceiver import Resampler
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm

Gate = Literal["number", "vector"]


def flamingo(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    vision: VisionTransformer,
    interval: int = 4,
    resampler: Resampler | None = None,
    vocab_size: int | None = None,
    additional_tokens: int = 0,
    gate: Gate = "number",
    qk_norm: bool = True,
    activation: Activation = "silu",
    rotary: Rotary | None = None,
    dropout: float = 0.0,
    epsilon: float = 1e-6,
    embedding_std: float = 0.02,
    head: Head | None = None,
    context_length: int | None = None,
) -> VisualDecoder:
    """The Flamingo shape at any size, over a Llama; every `interval`-th block looks at the images."""
    rms = RMSNorm(epsilon=epsilon)
    look = CrossAttention(
        num_heads=num_heads, memory_dim=vision.embed_dim, qk_norm=rms if qk_norm else None, dropout=dropout
    )
    gated = GatedBlock(
        mixer=Attention(num_heads=num_heads, position=rotary or Rotary(), dropout=dropout),
        ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation),
        norm=rms,
        wiring=PreNorm(),
        dropout=dropout,
        look=look,
        look_ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation),
        gate=gate,
    )
    return VisualDecoder(
        vocab_size=vocab_size,
        additional_tokens=additional_tokens,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(gated, *[gated.behind] * (interval - 1)),
        vision=vision,
        resampler=resampler,
        final_norm=rms,
        head=head or Untied(),
        embedding_std=embedding_std,
        context_length=context_length,
    )


def _idefics(embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> VisualDecoder:
    """Over Llama, with OpenCLIP's ViT-H/14 and two tokens more."""
    vision = clip.clip_vision(
        embed_dim=1280, num_layers=32, num_heads=16, hidden_dim=5120, patch_size=14, activation="gelu"
    )
    return flamingo(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        vision=vision,
        resampler=Resampler(num_heads=16, head_dim=96, qk_norm=LayerNorm()),
        vocab_size=32000,
        additional_tokens=2,
        context_length=2048,
    )


PRESETS: dict[str, VisualDecoder] = {
    # 8 x 8 grey pixels; its vocabulary follows the tokenizer
    "flamingo-nano": flamingo(
        embed_dim=64,
        num_layers=4,
        num_heads=4,
        hidden_dim=160,
        interval=2,
        vision=clip.clip_vision(embed_dim=48, num_layers=2, num_heads=4, image_size=8, patch_size=2, channels=1),
        resampler=Resampler(num_latents=8, num_layers=2, num_heads=4, head_dim=12),
    ),
    "flamingo-idefics-9b": _idefics(4096, 32, 32, 11008),
    "flamingo-idefics-80b": _idefics(8192, 80, 64, 22016),
}


def preset(name: str) -> VisualDecoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


# What transformers fills in where a config is silent; CLIP's own defaults are others.
_VISION = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
}
_GATES: dict[str, Gate] = {"float": "number", "vector": "vector"}
# How parameters start, and which of them are trained: nothing that the model computes.
_TRAINING = (
    "alpha_initializer",
    "alphas_initializer_range",
    "freeze_lm_head",
    "freeze_text_layers",
    "freeze_text_module_exceptions",
    "freeze_vision_layers",
    "freeze_vision_module_exceptions",
)
# Leftovers in released configs that transformers does not read.
_UNREAD = ("ffn_dim", "max_new_tokens", "word_embed_proj_dim")


def from_hf(config: Mapping[str, Any]) -> VisualDecoder:
    """Model of a Hugging Face config with model_type idefics; ValueError lists every attribute not implemented."""
    hf = Attributes({**config, "vision_config": {**_VISION, **(config.get("vision_config") or {})}}, "idefics")
    hf.common()
    hf.architecture({"IdeficsForVisionText2Text": None, "IdeficsModel": None})
    vision = hf.submodel("vision_config", "initializer_factor", "initializer_range", "vision_model_name")
    perceiver = hf.submodel("perceiver_config", "use_resampler")
    make_vision = clip.vision_from_hf(vision, "embed_dim")
    resampler = Resampler(
        num_latents=perceiver.integer("resampler_n_latents", 64),
        num_layers=perceiver.integer("resampler_depth", 6),
        num_heads=perceiver.integer("resampler_n_heads", 16),
        head_dim=perceiver.integer("resampler_head_dim", 96),
        qk_norm=LayerNorm() if perceiver.flag("qk_layer_norms_perceiver", False) else None,
    )
    sizes = {
        "embed_dim": hf.integer("hidden_size", 4096),
        "num_layers": hf.integer("num_hidden_layers", 32),
        "num_heads": hf.integer("num_attention_heads", 32),
        "hidden_dim": hf.integer("intermediate_size", 11008),
        "interval": hf.integer("cross_layer_interval", 1),
        "resampler": resampler if hf.flag("use_resampler", False) else None,
        "vocab_size": hf.integer("vocab_size", 32000),
        "additional_tokens": hf.optional("additional_vocab_size", int, 0),
        "gate": hf.choice("alpha_type", _GATES, "float"),
        "qk_norm": hf.flag("qk_layer_norms", False),
        "activation": hf.choice("hidden_act", ACTIVATIONS, "silu"),
        "context_length": hf.integer("max_position_embeddings", 2048),
        "rotary": rotary_from_hf(hf),
        "dropout": hf.real("dropout", 0.0),
        "epsilon": hf.real("rms_norm_eps", 1e-6),
        "embedding_std": hf.real("initializer_range", 0.02),
        "head": Tied() if hf.flag("tie_word_embeddings", False) else Untied(),
    }
    hf.fixed("cross_layer_activation_function", "swiglu")
    hf.finish(*_TRAINING, *_UNREAD)
    return flamingo(vision=make_vision(), **sizes)


def to_hf(model: VisualDecoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that an idefics config cannot express."""
    gated, interval = model.pattern[0], len(model.pattern)
    if not isinstance(gated, GatedBlock) or model.num_layers % interval:
        raise ValueError("idefics begins with a block that looks at images, in a whole number of repeats")
    plain = canonical_block(gated.behind, model.embed_dim)
    if any(canonical_block(block, model.embed_dim) != plain for block in model.pattern[1:]):
        raise ValueError("the blocks of idefics differ in nothing but whether they look at images")
    mixer, ffn, rms, resampler = gated.mixer, gated.ffn, gated.norm, model.resampler
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, GatedMLP)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        raise ValueError(f"idefics is made of Attention with Rotary, GatedMLP and RMSNorm; this model of {parts}")
    shown = resampler or Resampler(num_heads=16, head_dim=96)
    config = {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "vocab_size": model.vocab_size,
        "additional_vocab_size": model.additional_tokens,
        "hidden_size": model.embed_dim,
        "intermediate_size": ffn.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "dropout": gated.dropout,
        "hidden_act": activation_to_hf(ffn.activation),
        "initializer_range": model.embedding_std,
        "alpha_type": next(name for name, gate in _GATES.items() if gate == gated.gate),
        **rotary_to_hf(mixer.position, model.context_length),
        "rms_norm_eps": rms.epsilon,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "cross_layer_interval": interval,
        "qk_layer_norms": gated.look.qk_norm is not None,
        "use_resampler": resampler is not None,
        "perceiver_config": {
            "model_type": "idefics_perciever",
            "use_resampler": resampler is not None,
            "resampler_n_latents": shown.num_latents,
            "resampler_depth": shown.num_layers,
            "resampler_n_heads": shown.num_heads,
            "resampler_head_dim": shown.head_dim,
            "qk_layer_norms_perceiver": shown.qk_norm is not None,
        },
        "vision_config": {"model_type": "idefics_vision", **clip.vision_to_hf(model.vision, "idefics", "embed_dim")},
        # the class's defaults freeze both trained parts, and never train a padding token's row
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "idefics")
    return config


class Gates(One):
    """(1,) to a number, (1, 1, n) to a vector of n."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return (1, 1, *shape) if shape else (1,)

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(self.tensor_shape(leaf.shape))


_GATED, _PATH = "model.gated_cross_attn_layers.{repeat}", "stack.{layer}.gated"
_RESAMPLED, _LATENTS = "model.perceiver_resampler.blocks.{layer}", "resampler.stack.{layer}"

WEIGHTS = WeightTable(
    prefix="model.",
    tied={
        "lm_head.weight": "model.embed_tokens.weight",
        "lm_head.additional_fc.weight": "model.embed_tokens.additional_embedding.weight",
    },
    ignored=(
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq",
        "model.gated_cross_attn_layers.{layer}.cross_attn.rotary_emb.inv_freq",
        "model.vision_model.embeddings.position_ids",
    ),
    rows=(
        *llama.WEIGHTS.rows,
        Row("model.embed_tokens.additional_embedding.weight", "embedding.extra.table"),
        *linear("lm_head.additional_fc", "extra_head"),
        *norm(f"{_GATED}.input_layernorm", f"{_PATH}.norm_cross"),
        *linear(f"{_GATED}.cross_attn.q_proj", f"{_PATH}.cross.query"),
        *linear(f"{_GATED}.cross_attn.k_proj", f"{_PATH}.cross.key"),
        *linear(f"{_GATED}.cross_attn.v_proj", f"{_PATH}.cross.value"),
        *linear(f"{_GATED}.cross_attn.o_proj", f"{_PATH}.cross.output", Linear(num_inputs=2)),
        *norm(f"{_GATED}.cross_attn.q_layer_norm", f"{_PATH}.cross.norm_query"),
        *norm(f"{_GATED}.cross_attn.k_layer_norm", f"{_PATH}.cross.norm_key"),
        Row(f"{_GATED}.alpha_cross_attn", f"{_PATH}.gate_cross", Gates()),
        *norm(f"{_GATED}.post_attention_layernorm", f"{_PATH}.norm_ffn"),
        *linear(f"{_GATED}.mlp.gate_proj", f"{_PATH}.ffn.gate"),
        *linear(f"{_GATED}.mlp.up_proj", f"{_PATH}.ffn.up"),
        *linear(f"{_GATED}.mlp.down_proj", f"{_PATH}.ffn.down"),
        Row(f"{_GATED}.alpha_dense", f"{_PATH}.gate_ffn", Gates()),
        Row("model.perceiver_resampler.latents", "resampler.latents"),
        *norm(f"{_RESAMPLED}.0.context_layer_norm", f"{_LATENTS}.mixer.norm_memory"),
        *norm(f"{_RESAMPLED}.0.latents_layer_norm", f"{_LATENTS}.mixer_branch.norm_input"),
        *linear(f"{_RESAMPLED}.0.q_proj", f"{_LATENTS}.mixer.query"),
        *linear(f"{_RESAMPLED}.0.k_proj", f"{_LATENTS}.mixer.key"),
        *linear(f"{_RESAMPLED}.0.v_proj", f"{_LATENTS}.mixer.value"),
        *linear(f"{_RESAMPLED}.0.output_proj", f"{_LATENTS}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_RESAMPLED}.0.q_layer_norm", f"{_LATENTS}.mixer.norm_query"),
        *norm(f"{_RESAMPLED}.0.k_layer_norm", f"{_LATENTS}.mixer.norm_key"),
        *norm(f"{_RESAMPLED}.1.ln", f"{_LATENTS}.ffn_branch.norm_input"),
        *linear(f"{_RESAMPLED}.1.fc", f"{_LATENTS}.ffn.up"),
        *linear(f"{_RESAMPLED}.1.c_proj", f"{_LATENTS}.ffn.down"),
        *norm("model.perceiver_resampler.layer_norm", "resampler.norm"),
        *part(clip.VISION_ROWS, "vision", new="model.vision_model."),
    ),
)

FAMILY = Family(
    name="Flamingo",
    kind="vision-language",
    paper="Alayrac et al. 2022, 2204.14198; Idefics: Laurencon et al. 2023, 2306.16527",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken",),
    reference="transformers IdeficsForVisionText2Text",
    hugging_face=HuggingFace(model_type="idefics", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=VisualDecoder),
)
