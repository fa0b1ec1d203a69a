"""BART (Lewis et al. 2020, 1910.13461): a denoising autoencoder over the original Transformer.

    encoder   x -- attention --(+)-- LayerNorm -- MLP --(+)-- LayerNorm -- y             (+): the part's own input
    decoder   x -- causal attention --(+)-- LayerNorm -- cross-attention --(+)-- LayerNorm -- MLP --(+)-- LayerNorm -- y

    embedding   LayerNorm(token + position)     tokens of source, target and head share one table, positions do not

The encoder reads a corrupted document (spans replaced by one mask token each, sentences in another order), the
decoder writes the original from left to right: BERT's encoder and GPT's decoder trained as one. Norms come after each
residual addition, which needs warm-up but leaves no unnormalised stream; learned positions end at 1,024. The whole
target is predicted, so a step costs twice that of T5's span corruption, and the model generates well without a change
of objective.

Cost per layer, forward: an encoder token 2 (4 D^2 + 2 D F) FLOPs plus 4 T D in attention; a decoder token
2 (6 D^2 + 2 D F) plus 4 (S + T) D; each source token 4 D^2 for the keys and values of each decoder layer; the head
2 V D a target token. Checkpoints hold a vector added to the logits (`final_logits_bias`, zero in all published ones);
it is loaded and exported as it is, and training leaves it alone.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Tied, Untied, named
from llmlab.models.encoder_decoder import EncoderDecoder, Side
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.transforms import Leading, Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PostNorm, PreNorm


def bart(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    num_decoder_layers: int | None = None,
    num_decoder_heads: int | None = None,
    decoder_hidden_dim: int | None = None,
    max_length: int = 1024,
    vocab_size: int | None = None,
    activation: Activation = "gelu",
    pre_norm: bool = False,
    scale_embedding: bool = False,
    tied: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    activation_dropout: float = 0.0,
    embedding_std: float = 0.02,
    decoder_start_id: int | None = 2,
    pad_id: int = 1,
) -> EncoderDecoder:
    """The BART shape at any size; `pre_norm` is mBART's wiring. Not `tied`: a table each for source, target, head."""
    hidden_dim = hidden_dim or 4 * embed_dim

    def side(layers: int, heads: int, width: int, decoder: bool) -> Side:
        attention: dict[str, Any] = {"num_heads": heads, "bias": True, "output_bias": True}
        attention["dropout"] = attention_dropout
        block = Block(
            mixer=Attention(**attention),
            cross=CrossAttention(**attention) if decoder else None,
            ffn=MLP(hidden_dim=width, activation=activation, dropout=activation_dropout),
            norm=LayerNorm(),
            wiring=PreNorm() if pre_norm else PostNorm(),
            dropout=dropout,
        )
        return Side(
            num_layers=layers,
            pattern=(block,),
            position=Learned(max_length, offset=2, std=embedding_std),
            embedding_norm=LayerNorm(),
            final_norm=LayerNorm() if pre_norm else None,
        )

    return EncoderDecoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        encoder=side(num_layers, num_heads, hidden_dim, False),
        decoder=side(
            num_decoder_layers or num_layers, num_decoder_heads or num_heads, decoder_hidden_dim or hidden_dim, True
        ),
        shared_embedding=tied,
        embedding_scale=math.sqrt(embed_dim) if scale_embedding else 1.0,
        embedding_std=embedding_std,
        embedding_dropout=dropout,
        head=Tied() if tied else Untied(),
        logits_constant=True,
        decoder_start_id=decoder_start_id,
        pad_id=pad_id,
    )


PRESETS: dict[str, EncoderDecoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "bart-nano": bart(
        embed_dim=192, num_layers=3, num_heads=6, max_length=512, dropout=0.0, decoder_start_id=1, pad_id=0
    ),
    "bart-base": bart(embed_dim=768, num_layers=6, num_heads=12, vocab_size=50265, dropout=0.1),
    "bart-large": bart(embed_dim=1024, num_layers=12, num_heads=16, vocab_size=50265, dropout=0.1),
}


def preset(name: str) -> EncoderDecoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any], model_type: str = "bart") -> EncoderDecoder:
    """Model of a Hugging Face config with model_type bart (or mbart); ValueError lists every attribute that is not
    implemented."""
    pre_norm = model_type == "mbart"
    hf = Attributes(config, model_type)
    hf.common(is_encoder_decoder=True)
    hf.architecture(dict.fromkeys(_CLASSES[model_type]))
    hf.fixed("tie_encoder_decoder", False)
    # what fairseq's configs say of the wiring, and early ones of transformers
    for name, value in {
        "normalize_before": pre_norm,
        "add_final_layer_norm": pre_norm,
        "add_bias_logits": False,
    }.items():
        hf.fixed(name, value)
    for name, value in {
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "extra_pos_embeddings": 2,
    }.items():
        hf.fixed(name, value)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        hf.fixed(name, 0.0)
    build = partial(
        bart,
        embed_dim=hf.integer("d_model", 1024),
        num_layers=hf.integer("encoder_layers", 12),
        num_heads=hf.integer("encoder_attention_heads", 16),
        hidden_dim=hf.integer("encoder_ffn_dim", 4096),
        num_decoder_layers=hf.integer("decoder_layers", 12),
        num_decoder_heads=hf.integer("decoder_attention_heads", 16),
        decoder_hidden_dim=hf.integer("decoder_ffn_dim", 4096),
        max_length=hf.integer("max_position_embeddings", 1024),
        vocab_size=hf.integer("vocab_size", 50265),
        activation=hf.choice("activation_function", ACTIVATIONS, "gelu"),
        pre_norm=pre_norm,
        scale_embedding=hf.flag("scale_embedding", False),
        tied=hf.flag("tie_word_embeddings", True),
        dropout=hf.real("dropout", 0.1),
        attention_dropout=hf.real("attention_dropout", 0.0),
        activation_dropout=hf.real("activation_dropout", 0.0),
        embedding_std=hf.real("init_std", 0.02),
        # mBART's targets name their language last, and start with it
        decoder_start_id=None if pre_norm else hf.optional("decoder_start_token_id", int, 2),
        pad_id=hf.integer("pad_token_id", 1) if config.get("pad_token_id") != 0 else 0,
    )
    hf.finish("classif_dropout", "classifier_dropout", "force_bos_token_to_be_generated", "num_hidden_layers")
    return build()


def to_hf(model: EncoderDecoder, model_type: str = "bart") -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a bart (or mbart) config cannot express."""
    sides = (model.encoder, model.decoder)
    encoder, decoder = (block_of(side, model_type, model.embed_dim) for side in sides)
    mixer, decoder_mixer, ffn, decoder_ffn = encoder.mixer, decoder.mixer, encoder.ffn, decoder.ffn
    position = model.encoder.position
    if not (
        isinstance(mixer, Attention)
        and isinstance(decoder_mixer, Attention)
        and isinstance(ffn, MLP)
        and isinstance(decoder_ffn, MLP)
        and isinstance(position, Learned)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, decoder_mixer, ffn, decoder_ffn, position))
        raise ValueError(f"{model_type} is made of Attention, MLP and Learned positions; this model of {parts}")
    config = {
        "architectures": [_CLASSES[model_type][0]],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "d_model": model.embed_dim,
        "encoder_layers": model.encoder.num_layers,
        "encoder_attention_heads": mixer.num_heads,
        "encoder_ffn_dim": ffn.hidden_dim,
        "decoder_layers": model.decoder.num_layers,
        "decoder_attention_heads": decoder_mixer.num_heads,
        "decoder_ffn_dim": decoder_ffn.hidden_dim,
        "max_position_embeddings": position.max_length,
        "activation_function": activation_to_hf(ffn.activation),
        "scale_embedding": model.embedding_scale != 1.0,
        "dropout": encoder.dropout,
        "attention_dropout": mixer.dropout,
        "activation_dropout": ffn.dropout,
        "init_std": model.embedding_std,
        "is_encoder_decoder": True,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "decoder_start_token_id": model.decoder_start_id,
        "pad_token_id": model.pad_id,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config, model_type), model_type)
    return config


_CLASSES = {
    "bart": ("BartForConditionalGeneration", "BartModel"),
    "mbart": ("MBartForConditionalGeneration", "MBartModel"),
}


def weight_table(norm_place: str) -> WeightTable:
    """Rows of BART (norms of sums, "norm_sum") and mBART ("norm_input")."""

    def side(name: str) -> tuple[Row, ...]:
        tensors, path = f"model.{name}.layers.{{layer}}", f"{name}.stack.{{layer}}"

        def attention(tensor: str, part: str) -> tuple[Row, ...]:
            return (
                *linear(f"{tensors}.{tensor}.q_proj", f"{path}.{part}.query"),
                *linear(f"{tensors}.{tensor}.k_proj", f"{path}.{part}.key"),
                *linear(f"{tensors}.{tensor}.v_proj", f"{path}.{part}.value"),
                *linear(f"{tensors}.{tensor}.out_proj", f"{path}.{part}.output", Linear(num_inputs=2)),
                *norm(f"{tensors}.{tensor}_layer_norm", f"{path}.{part}_branch.{norm_place}"),
            )

        return (
            Row(f"model.{name}.embed_positions.weight", f"{name}.position.table"),
            *norm(f"model.{name}.layernorm_embedding", f"{name}.embedding_norm"),
            *attention("self_attn", "mixer"),
            *(attention("encoder_attn", "cross") if name == "decoder" else ()),
            *linear(f"{tensors}.fc1", f"{path}.ffn.up"),
            *linear(f"{tensors}.fc2", f"{path}.ffn.down"),
            *norm(f"{tensors}.final_layer_norm", f"{path}.ffn_branch.{norm_place}"),
            *norm(f"model.{name}.layer_norm", f"{name}.final_norm"),
        )

    shared, encoder, decoder = (
        f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    )
    own = "decoder_embedding.table"
    return WeightTable(
        prefix="model.",
        tied={"lm_head.weight": shared, encoder: shared, decoder: shared},
        unread={shared: encoder},  # an untied model of transformers has a third table that it does not use
        zeros=("final_logits_bias",),
        ignored=("model.encoder.version", "model.decoder.version"),
        rows=(
            Row("final_logits_bias", "logits_bias", Leading(1)),
            Row(shared, "embedding.table", excludes=own),
            Row(encoder, "embedding.table", requires=own),
            Row(decoder, own),
            *side("encoder"),
            *side("decoder"),
            *linear("lm_head", "head"),
        ),
    )


WEIGHTS = weight_table("norm_sum")

FAMILY = Family(
    name="BART",
    kind="encoder-decoder",
    paper="Lewis et al. 2020, 1910.13461",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("SequenceToSequence",),
    reference="transformers BartForConditionalGeneration",
    hugging_face=HuggingFace(model_type="bart", config=EncoderDecoder, from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
