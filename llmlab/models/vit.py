"""ViT (Dosovitskiy et al. 2021, 2010.11929): an image is worth 16 x 16 words.

    x --+-- LayerNorm -- attention (all patches) --(+)--+-- LayerNorm -- MLP (GELU) --(+)-- y
        +--------------------------------------------|  +---------------------------|

    image -> patches of 16 x 16 -> matrix -> [class token] + positions -> block x L -> LayerNorm -> class token -> label

The encoder of "Attention is all you need" with the norms in front (pre-norm) and nothing changed for images: the only
knowledge of two dimensions is that a patch holds pixels that lie together; positions are learnt, one row a patch.
Against convolutions it needs more data (ImageNet-21k or more) and then less compute for the same accuracy; smaller
data takes strong augmentation (DeiT, Touvron et al. 2021, 2012.12877).

An image of side R in patches of side P has N = (R/P)^2 + 1 tokens: N (24 D^2 + 4 N D) FLOPs a layer forward. ViT-B/16
at 224 pixels: 86 million parameters, 197 tokens, 35 GFLOPs.
"""

from collections.abc import Mapping
from typing import Any

from llmlab.models.config import named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.transforms import Conv2D, Leading, Linear
from llmlab.models.vision import FirstToken, ImageClassification, Pooler, Pooling, VisionTransformer
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.wiring import PreNorm


def vit(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    image_size: int = 224,
    patch_size: int = 16,
    channels: int = 3,
    hidden_dim: int | None = None,
    activation: Activation = "gelu",
    attention_bias: bool = True,
    epsilon: float = 1e-12,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    position_std: float = 0.02,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
) -> VisionTransformer:
    """The ViT shape at any size, with a classifier of the class token if `num_labels` is given."""
    block = Block(
        mixer=Attention(num_heads=num_heads, bias=attention_bias, output_bias=True, dropout=attention_dropout),
        ffn=MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation=activation),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PreNorm(),
        dropout=dropout,
    )
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position_std=position_std,
        embedding_dropout=dropout,
        final_norm=LayerNorm(epsilon=epsilon),
        pooling=pooling or FirstToken(),
        head=None if num_labels is None else ImageClassification(num_labels=num_labels),
    )


PRESETS: dict[str, VisionTransformer] = {
    # scikit-learn's digits: 8 x 8 grey pixels, ten classes
    "vit-nano": vit(
        embed_dim=64, num_layers=4, num_heads=4, image_size=8, patch_size=2, channels=1, num_labels=10, epsilon=1e-6
    ),
    # table 1 of the paper, with ImageNet's classes; S and Ti are DeiT's
    "vit-ti16": vit(embed_dim=192, num_layers=12, num_heads=3, num_labels=1000),
    "vit-s16": vit(embed_dim=384, num_layers=12, num_heads=6, num_labels=1000),
    "vit-b32": vit(embed_dim=768, num_layers=12, num_heads=12, patch_size=32, num_labels=1000),
    "vit-b16": vit(embed_dim=768, num_layers=12, num_heads=12, num_labels=1000),
    "vit-l16": vit(embed_dim=1024, num_layers=24, num_heads=16, num_labels=1000),
    "vit-h14": vit(embed_dim=1280, num_layers=32, num_heads=16, patch_size=14, num_labels=1000),
}


def preset(name: str) -> VisionTransformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> VisionTransformer:
    """Model of a Hugging Face config with model_type vit; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "vit")
    hf.common()
    classifies = hf.architecture({"ViTForImageClassification": True, "ViTModel": False})
    dim = hf.integer("hidden_size", 768)
    pooler = Pooler(dim=hf.optional("pooler_output_size", int), activation=hf.choice("pooler_act", ACTIVATIONS, "tanh"))
    model = vit(
        embed_dim=dim,
        num_layers=hf.integer("num_hidden_layers", 12),
        num_heads=hf.integer("num_attention_heads", 12),
        image_size=hf.integer("image_size", 224),
        patch_size=hf.integer("patch_size", 16),
        channels=hf.integer("num_channels", 3),
        hidden_dim=hf.integer("intermediate_size", 3072),
        activation=hf.choice("hidden_act", ACTIVATIONS, "gelu"),
        attention_bias=hf.flag("qkv_bias", True),
        epsilon=hf.real("layer_norm_eps", 1e-12),
        dropout=hf.real("hidden_dropout_prob", 0.0),
        attention_dropout=hf.real("attention_probs_dropout_prob", 0.0),
        position_std=hf.real("initializer_range", 0.02),
        num_labels=num_labels(config) if classifies else None,
        pooling=FirstToken() if classifies else pooler,
    )
    hf.finish("encoder_stride")  # of the head for masked images
    return model


def num_labels(config: Mapping[str, Any]) -> int:
    """How many classes a Hugging Face config has: as many as it names, two where it says nothing."""
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def to_hf(model: VisionTransformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a vit config cannot express."""
    block = block_of(model, "vit")
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (isinstance(mixer, Attention) and isinstance(ffn, MLP) and isinstance(layer_norm, LayerNorm)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm))
        raise ValueError(f"vit is made of Attention, MLP and LayerNorm; this model of {parts}")
    pooler = model.pooling if isinstance(model.pooling, Pooler) else Pooler(dim=model.embed_dim)
    labels = range(model.head.num_labels) if model.head is not None else ()
    config = {
        "architectures": ["ViTModel" if model.head is None else "ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "intermediate_size": ffn.hidden_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "initializer_range": model.position_std,
        "layer_norm_eps": layer_norm.epsilon,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "qkv_bias": mixer.bias,
        "pooler_output_size": pooler.dim,
        "pooler_act": activation_to_hf(pooler.activation),
        "torch_dtype": "float32",
    }
    if model.head is not None:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in labels}
        config["label2id"] = {f"LABEL_{i}": i for i in labels}
    check_same(model, from_hf(config), "vit")
    return config


_TENSORS, _PATH = "vit.encoder.layer.{layer}", "stack.{layer}"

WEIGHTS = WeightTable(
    prefix="vit.",
    head="head",
    rows=(
        Row("vit.embeddings.cls_token", "class_token", Leading(2)),
        Row("vit.embeddings.position_embeddings", "position.table", Leading(1)),
        *linear("vit.embeddings.patch_embeddings.projection", "patches", Conv2D()),
        *norm(f"{_TENSORS}.layernorm_before", f"{_PATH}.mixer_branch.norm_input"),
        *linear(f"{_TENSORS}.attention.attention.query", f"{_PATH}.mixer.query"),
        *linear(f"{_TENSORS}.attention.attention.key", f"{_PATH}.mixer.key"),
        *linear(f"{_TENSORS}.attention.attention.value", f"{_PATH}.mixer.value"),
        *linear(f"{_TENSORS}.attention.output.dense", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.layernorm_after", f"{_PATH}.ffn_branch.norm_input"),
        *linear(f"{_TENSORS}.intermediate.dense", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.output.dense", f"{_PATH}.ffn.down"),
        *norm("vit.layernorm", "final_norm"),
        *linear("vit.pooler.dense", "pooling.dense"),
        *linear("classifier", "head"),
    ),
)

FAMILY = Family(
    name="ViT",
    kind="vision",
    paper="Dosovitskiy et al. 2021, 2010.11929",
    presets=PRESETS,
    heads=("ImageClassification",),
    objectives=("Classification",),
    reference="transformers ViTForImageClassification, ViTModel",
    hugging_face=HuggingFace(model_type="vit", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=VisionTransformer),
)
