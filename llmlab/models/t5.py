"""T5 (Raffel et al. 2020, 1910.10683) and T5 v1.1: every task is text in, text out.

    encoder   x --+-- RMSNorm -- attention --(+)--+-- RMSNorm -- FFN --(+)-- y
                  +--------------------------|     +-------------------|
    decoder   the same with causal attention, and between both parts  --+-- RMSNorm -- cross-attention --(+)--
                                                                        +--------------------------------|

    logits of attention    q k^T + bias[bucket(key - query)]        no 1/sqrt(H): initial queries are smaller instead

One table of 32 buckets per head and stack biases the self-attention of all its layers and is the only position there
is; cross-attention has none. Norms have a gain only, nothing has a bias. v1.0 has a ReLU feed-forward and a tied head
that scores states times 1/sqrt(D); v1.1 a GELU-gated feed-forward and an untied head, and pre-trains without dropout.
Trained by span corruption: contiguous spans of the source are replaced by sentinels and the target spells them out,
so that targets are short and a step costs about half of a denoiser's that predicts everything.

Cost per layer, forward: an encoder token 2 (4 N H D + 2 D F) FLOPs (3 D F when gated) plus 4 T N H in attention; a
decoder token 2 (6 N H D + 2 D F) plus 4 (S + T) N H; and each source token 4 N H D for keys and values that the
decoder layer looks at. The bias is a lookup per head, query and key: O(S T N) memory traffic a layer, except where a
kernel lays its S + T - 1 numbers a head along the diagonals itself (llmlab.nn.kernels.relative, on TPUs). cuDNN's and
splash attention cannot take it; ALiBi and rotary positions avoid it.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Head, Tied, Untied, named
from llmlab.models.encoder_decoder import EncoderDecoder, Side
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, block_of, check_same
from llmlab.models.transforms import Linear
from llmlab.models.weights import Row, WeightTable, linear
from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation, GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import T5Relative
from llmlab.nn.wiring import PreNorm


def t5(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_decoder_layers: int | None = None,
    head_dim: int = 64,
    vocab_size: int | None = None,
    activation: Activation = "relu",
    gated: bool = False,
    num_buckets: int = 32,
    max_distance: int = 128,
    dropout: float = 0.0,
    epsilon: float = 1e-6,
    embedding_std: float = 1.0,
    head: Head | None = None,
    scaled: bool | None = None,
    decoder_start_id: int | None = 0,
    pad_id: int = 0,
) -> EncoderDecoder:
    """The T5 shape at any size; `scaled` (states times 1/sqrt(embed_dim) before the head) goes with a tied head."""
    head = head or Tied()
    scaled = isinstance(head, Tied) if scaled is None else scaled
    sizes: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim, "scale": 1.0, "dropout": dropout}
    ffn: dict[str, Any] = {"hidden_dim": hidden_dim, "activation": activation, "bias": False, "dropout": dropout}

    def side(layers: int, cross: CrossAttention | None) -> Side:
        block = Block(
            mixer=Attention(**sizes),
            cross=cross,
            ffn=GatedMLP(**ffn) if gated else MLP(**ffn),
            norm=RMSNorm(epsilon=epsilon),
            wiring=PreNorm(),
            dropout=dropout,
        )
        relative = T5Relative(num_buckets, max_distance, bidirectional=cross is None)
        return Side(num_layers=layers, pattern=(block,), relative=relative, final_norm=RMSNorm(epsilon=epsilon))

    return EncoderDecoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        encoder=side(num_layers, None),
        decoder=side(num_decoder_layers or num_layers, CrossAttention(**sizes)),
        embedding_std=embedding_std,
        embedding_dropout=dropout,
        final_dropout=dropout,
        head=head,
        logits_scale=embed_dim**-0.5 if scaled else 1.0,
        decoder_start_id=decoder_start_id,
        pad_id=pad_id,
    )


def t5_1_1(embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int, vocab_size: int = 32128) -> EncoderDecoder:
    """The v1.1 shape: GELU-gated feed-forward, untied head."""
    sizes: dict[str, Any] = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads}
    gated: dict[str, Any] = {"hidden_dim": hidden_dim, "activation": "gelu_tanh", "gated": True}
    return t5(vocab_size=vocab_size, head=Untied(), **sizes, **gated)


_v1_0 = partial(t5, vocab_size=32128)

PRESETS: dict[str, EncoderDecoder] = {
    # a laptop's model with v1.1's feed-forward and v1.0's tied head; its vocabulary follows the tokenizer
    "t5-nano": t5(
        embed_dim=192,
        num_layers=3,
        num_heads=6,
        head_dim=32,
        hidden_dim=512,
        activation="gelu_tanh",
        gated=True,
        embedding_std=0.1,  # at T5's own 1.0 a fresh tied head repeats the decoder's last token
    ),
    "t5-small": _v1_0(embed_dim=512, num_layers=6, num_heads=8, hidden_dim=2048),
    "t5-base": _v1_0(embed_dim=768, num_layers=12, num_heads=12, hidden_dim=3072),
    "t5-large": _v1_0(embed_dim=1024, num_layers=24, num_heads=16, hidden_dim=4096),
    "t5-3b": _v1_0(embed_dim=1024, num_layers=24, num_heads=32, head_dim=128, hidden_dim=16384),
    "t5-11b": _v1_0(embed_dim=1024, num_layers=24, num_heads=128, head_dim=128, hidden_dim=65536),
    "t5-1.1-small": t5_1_1(512, 8, 6, 1024),
    "t5-1.1-base": t5_1_1(768, 12, 12, 2048),
    "t5-1.1-large": t5_1_1(1024, 24, 16, 2816),
    "t5-1.1-xl": t5_1_1(2048, 24, 32, 5120),
    "t5-1.1-xxl": t5_1_1(4096, 24, 64, 10240),
}


def preset(name: str) -> EncoderDecoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


# Hugging Face's "gated-gelu" is the tanh approximation, whatever "gelu" is elsewhere.
_PROJECTIONS: dict[str, tuple[bool, Activation]] = {
    "gated-gelu": (True, "gelu_tanh"),
    "gated-gelu_python": (True, "gelu"),
    **{name: (False, ours) for name, ours in ACTIVATIONS.items()},
    **{f"gated-{name}": (True, ours) for name, ours in ACTIVATIONS.items() if name != "gelu"},
}


def from_hf(config: Mapping[str, Any], model_type: str = "t5") -> EncoderDecoder:
    """Model of a Hugging Face config with model_type t5 (or mt5); ValueError lists every attribute that is not
    implemented."""
    hf = Attributes(config, model_type)
    hf.common(is_encoder_decoder=True)
    hf.architecture(dict.fromkeys(_CLASSES[model_type]))
    hf.fixed("tie_encoder_decoder", False)
    default = "relu" if model_type == "t5" else "gated-gelu"
    gated, activation = hf.choice("feed_forward_proj", _PROJECTIONS, default)
    hf.fixed("is_gated_act", gated)
    dense = hf.optional("dense_act_fn", str)  # what transformers made of the projection
    if dense is not None and ACTIVATIONS.get(dense) != activation:
        hf.problem(f"dense_act_fn={dense!r} contradicts feed_forward_proj, which says {activation!r}")
    tied = hf.flag("tie_word_embeddings", True)
    scaled = model_type == "t5" and hf.flag("scale_decoder_outputs", tied)
    if model_type == "mt5":
        hf.fixed("scale_decoder_outputs", False)
    layers = hf.integer("num_layers", 6)
    build = partial(
        t5,
        embed_dim=hf.integer("d_model", 512),
        num_layers=layers,
        num_decoder_layers=hf.integer("num_decoder_layers", layers),
        num_heads=hf.integer("num_heads", 8),
        head_dim=hf.integer("d_kv", 64),
        hidden_dim=hf.integer("d_ff", 2048),
        vocab_size=hf.integer("vocab_size", 32128),
        activation=activation,
        gated=gated,
        num_buckets=hf.integer("relative_attention_num_buckets", 32),
        max_distance=hf.integer("relative_attention_max_distance", 128),
        dropout=hf.real("dropout_rate", 0.1),
        epsilon=hf.real("layer_norm_epsilon", 1e-6),
        embedding_std=hf.real("initializer_factor", 1.0),
        head=Tied() if tied else Untied(),
        scaled=scaled,
        decoder_start_id=hf.optional("decoder_start_token_id", int, 0),
        pad_id=hf.optional("pad_token_id", int, 0) or 0,
    )
    hf.finish("classifier_dropout", "n_positions", "num_hidden_layers")
    return build()


def to_hf(model: EncoderDecoder, model_type: str = "t5") -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a t5 (or mt5) config cannot express."""
    block, relative = block_of(model.encoder, model_type, model.embed_dim), model.encoder.relative
    mixer, ffn, norm = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(ffn, MLP | GatedMLP)
        and isinstance(norm, RMSNorm)
        and isinstance(relative, T5Relative)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, norm, relative))
        raise ValueError(f"{model_type} is made of Attention, MLP, RMSNorm and T5Relative; this model of {parts}")
    kind = (isinstance(ffn, GatedMLP), ffn.activation)
    config = {
        "architectures": [_CLASSES[model_type][0]],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "d_model": model.embed_dim,
        "d_kv": mixer.head_dim,
        "d_ff": ffn.hidden_dim,
        "num_layers": model.encoder.num_layers,
        "num_decoder_layers": model.decoder.num_layers,
        "num_heads": mixer.num_heads,
        "relative_attention_num_buckets": relative.num_buckets,
        "relative_attention_max_distance": relative.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": norm.epsilon,
        "initializer_factor": model.embedding_std,
        "feed_forward_proj": next(name for name, ours in _PROJECTIONS.items() if ours == kind),
        "is_encoder_decoder": True,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "decoder_start_token_id": model.decoder_start_id,
        "pad_token_id": model.pad_id,
        "torch_dtype": "float32",
    }
    if model_type == "t5":
        config["scale_decoder_outputs"] = model.logits_scale != 1.0
    check_same(model, from_hf(config, model_type), model_type)
    return config


def amended(config: dict[str, Any], tensors: Collection[str], model_type: str = "t5") -> dict[str, Any]:
    """The config with its head tied or not as the checkpoint has it.

    transformers 5 writes tie_word_embeddings=true whatever the head is, and unties it if the file has lm_head.weight;
    only T5 v1.0, which scales its states, is always tied.
    """
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    if model_type == "t5" and scaled:
        return config
    scale = {"scale_decoder_outputs": False} if model_type == "t5" else {}
    return config | scale | {"tie_word_embeddings": "lm_head.weight" not in tensors}


_CLASSES = {"t5": ("T5ForConditionalGeneration", "T5Model"), "mt5": ("MT5ForConditionalGeneration", "MT5Model")}


def _side(name: str, ffn_index: int) -> tuple[Row, ...]:
    """Rows of one stack; its layers count self-attention, cross-attention and feed-forward as layers of their own."""
    tensors, path = f"{name}.block.{{layer}}.layer", f"{name}.stack.{{layer}}"

    def attention(index: int, tensor: str, part: str) -> tuple[Row, ...]:
        return (
            Row(f"{tensors}.{index}.layer_norm.weight", f"{path}.{part}_branch.norm_input.scale"),
            Row(f"{tensors}.{index}.{tensor}.q.weight", f"{path}.{part}.query.kernel", Linear()),
            Row(f"{tensors}.{index}.{tensor}.k.weight", f"{path}.{part}.key.kernel", Linear()),
            Row(f"{tensors}.{index}.{tensor}.v.weight", f"{path}.{part}.value.kernel", Linear()),
            Row(f"{tensors}.{index}.{tensor}.o.weight", f"{path}.{part}.output.kernel", Linear(num_inputs=2)),
        )

    dense, gate = f"{tensors}.{ffn_index}.DenseReluDense", f"{path}.ffn.gate.kernel"
    return (
        Row(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{name}.relative.table"),
        *attention(0, "SelfAttention", "mixer"),
        *(attention(1, "EncDecAttention", "cross") if ffn_index == 2 else ()),
        Row(f"{tensors}.{ffn_index}.layer_norm.weight", f"{path}.ffn_branch.norm_input.scale"),
        Row(f"{dense}.wi.weight", f"{path}.ffn.up.kernel", Linear(), excludes=gate),
        Row(f"{dense}.wi_0.weight", gate, Linear()),
        Row(f"{dense}.wi_1.weight", f"{path}.ffn.up.kernel", Linear(), requires=gate),
        Row(f"{dense}.wo.weight", f"{path}.ffn.down.kernel", Linear()),
        Row(f"{name}.final_layer_norm.weight", f"{name}.final_norm.scale"),
    )


WEIGHTS = WeightTable(
    tied={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    # early checkpoints have it and nothing read it
    ignored=("decoder.block.{layer}.layer.1.EncDecAttention.relative_attention_bias.weight",),
    rows=(
        Row("shared.weight", "embedding.table"),
        *_side("encoder", ffn_index=1),
        *_side("decoder", ffn_index=2),
        *linear("lm_head", "head"),
    ),
)

FAMILY = Family(
    name="T5",
    kind="encoder-decoder",
    paper="Raffel et al. 2020, 1910.10683",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("SequenceToSequence",),
    reference="transformers T5ForConditionalGeneration",
    hugging_face=HuggingFace(
        model_type="t5",
        config=EncoderDecoder,
        from_hf=from_hf,
        to_hf=to_hf,
        weights=WEIGHTS,
        amended=amended,
    ),
)
