"""SigLIP's vision tower (Zhai et al. 2023, 2303.15343): CLIP without the softmax, ViT without the class token.

    image -> patches -> matrix -> + positions -> pre-norm block x L -> LayerNorm -> attention pooling (a learned query)

CLIP's loss compares every image with every text of the batch and normalises over both, so all devices must exchange
all embeddings. SigLIP asks of every pair by itself whether it belongs together,

    -log sigmoid(z (t u . v + b)),    z = 1 for the pairs, -1 for all others,

which needs no normaliser, works from small batches on and saturates at 32k. This is the tower that PaliGemma and most
open vision-language models see with. The states of all patches are its output; one vector comes from attention
pooling: a decoder layer whose only query is learned.

Cost: a ViT's, of N = (R / P)^2 tokens; the pooling adds about half of one layer.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.transforms import Conv2D, Fused, Leading, Linear, Vector
from llmlab.models.vision import AttentionPooling, VisionTransformer
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.wiring import PreNorm


def siglip(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    image_size: int = 224,
    patch_size: int = 16,
    channels: int = 3,
    activation: Activation = "gelu_tanh",
    epsilon: float = 1e-6,
    attention_dropout: float = 0.0,
    pooled: bool = True,
) -> VisionTransformer:
    """The SigLIP shape at any size; without pooling it gives the states of the patches alone."""
    ffn, layer_norm = MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation=activation), LayerNorm(epsilon=epsilon)
    block = Block(
        mixer=Attention(num_heads=num_heads, bias=True, output_bias=True, dropout=attention_dropout),
        ffn=ffn,
        norm=layer_norm,
        wiring=PreNorm(),
    )
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        class_token=False,
        position_std=embed_dim**-0.5,
        final_norm=layer_norm,
        pooling=AttentionPooling(num_heads=num_heads, ffn=ffn, norm=layer_norm) if pooled else None,
    )


def _so400m(image_size: int) -> VisionTransformer:
    return siglip(embed_dim=1152, num_layers=27, num_heads=16, hidden_dim=4304, patch_size=14, image_size=image_size)


PRESETS: dict[str, VisionTransformer] = {
    "siglip-nano": siglip(embed_dim=64, num_layers=4, num_heads=4, image_size=8, patch_size=2, channels=1),
    "siglip-b16-224": siglip(embed_dim=768, num_layers=12, num_heads=12),
    "siglip-l16-256": siglip(embed_dim=1024, num_layers=24, num_heads=16, image_size=256),
    "siglip-so400m-384": _so400m(384),
    "siglip-so400m-224": _so400m(224),
}


def preset(name: str) -> VisionTransformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> VisionTransformer:
    """Model of a Hugging Face config with model_type siglip_vision_model; ValueError lists what is not implemented."""
    hf = Attributes(config, "siglip_vision_model")
    hf.common()
    hf.architecture({"SiglipVisionModel": None})
    model = tower_from_hf(hf)
    hf.finish()
    return model()


def tower_from_hf(hf: Attributes) -> "partial[VisionTransformer]":
    """What makes the model of these attributes, once it is known that they are all right."""
    return partial(
        siglip,
        embed_dim=hf.integer("hidden_size", 768),
        num_layers=hf.integer("num_hidden_layers", 12),
        num_heads=hf.integer("num_attention_heads", 12),
        hidden_dim=hf.integer("intermediate_size", 3072),
        image_size=hf.integer("image_size", 224),
        patch_size=hf.integer("patch_size", 16),
        channels=hf.integer("num_channels", 3),
        activation=hf.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        epsilon=hf.real("layer_norm_eps", 1e-6),
        attention_dropout=hf.real("attention_dropout", 0.0),
        pooled=hf.flag("vision_use_head", True),
    )


def to_hf(model: VisionTransformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a siglip_vision_model config cannot express."""
    block = block_of(model, "siglip_vision_model")
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (isinstance(mixer, Attention) and isinstance(ffn, MLP) and isinstance(layer_norm, LayerNorm)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm))
        raise ValueError(f"siglip_vision_model is made of Attention, MLP and LayerNorm; this model of {parts}")
    config = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": model.embed_dim,
        "intermediate_size": ffn.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_channels": model.channels,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "hidden_act": activation_to_hf(ffn.activation),
        "layer_norm_eps": layer_norm.epsilon,
        "attention_dropout": mixer.dropout,
        "vision_use_head": model.pooling is not None,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "siglip_vision_model")
    return config


def layer_rows(tensors: str, path: str) -> tuple[Row, ...]:
    """A layer of CLIP and of its kin: `tensors` and `path` are what stands before the names of its parts."""
    return (
        *norm(f"{tensors}.layer_norm1", f"{path}.mixer_branch.norm_input"),
        *linear(f"{tensors}.self_attn.q_proj", f"{path}.mixer.query"),
        *linear(f"{tensors}.self_attn.k_proj", f"{path}.mixer.key"),
        *linear(f"{tensors}.self_attn.v_proj", f"{path}.mixer.value"),
        *linear(f"{tensors}.self_attn.out_proj", f"{path}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{tensors}.layer_norm2", f"{path}.ffn_branch.norm_input"),
        *linear(f"{tensors}.mlp.fc1", f"{path}.ffn.up"),
        *linear(f"{tensors}.mlp.fc2", f"{path}.ffn.down"),
    )


_KERNELS = tuple(f"pooling.attention.{name}.kernel" for name in ("query", "key", "value"))
_BIASES = tuple(f"pooling.attention.{name}.bias" for name in ("query", "key", "value"))

WEIGHTS = WeightTable(
    renamed=(("vision_model.", ""),),
    ignored=("embeddings.position_ids", "vision_model.embeddings.position_ids"),
    rows=(
        *linear("embeddings.patch_embedding", "patches", Conv2D()),
        Row("embeddings.position_embedding.weight", "position.table"),
        *layer_rows("encoder.layers.{layer}", "stack.{layer}"),
        *norm("post_layernorm", "final_norm"),
        Row("head.probe", "pooling.query", Leading(2)),
        Row("head.attention.in_proj_weight", _KERNELS, Fused(Linear(), axis=0)),
        Row("head.attention.in_proj_bias", _BIASES, Fused(Vector(), axis=0)),
        *linear("head.attention.out_proj", "pooling.attention.output", Linear(num_inputs=2)),
        *norm("head.layernorm", "pooling.norm"),
        *linear("head.mlp.fc1", "pooling.ffn.up"),
        *linear("head.mlp.fc2", "pooling.ffn.down"),
    ),
)

FAMILY = Family(
    name="SigLIP",
    kind="vision",
    paper="Zhai et al. 2023, 2303.15343",
    presets=PRESETS,
    heads=("ImageClassification",),
    objectives=("Classification",),
    reference="transformers SiglipVisionModel",
    hugging_face=HuggingFace(
        model_type="siglip_vision_model", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=VisionTransformer
    ),
)
