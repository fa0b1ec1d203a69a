"""Gemma (Gemma Team 2024, 2403.08295): Llama with a GELU gate, wide heads and gains around zero.

    x --+-- RMSNorm -- attention (rotary) --(+)--+-- RMSNorm -- GEGLU --(+)-- y          x_0 = sqrt(D) E[token]
        +----------------------------------|     +--------------------|

What differs from Llama: the embedding is scaled by sqrt(D), so that a table that also scores the next token (tied, 256k
rows) gives states of size one; the gate is a GELU (tanh approximation); heads are 256 wide whatever D / N is; the 2B
model has one key/value head (multi-query), the 7B as many as queries; norms multiply by 1 + g with g around zero, so
that weight decay pulls the gain to one.

Cost per token and layer: 2 D H (2 N + 2 K) + 6 D F FLOPs forward in parameter matmuls and 4 S N H in attention. The
table's 256k rows are a fifth of the 2B model's parameters and of its FLOPs.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models import llama
from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_rotary import rotary_from_hf, rotary_to_hf
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import Activation, GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm


def gemma(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int = 256,
    vocab_size: int | None = None,
    context_length: int | None = 8192,
    rotary: Rotary | None = None,
    activation: Activation = "gelu_tanh",
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    epsilon: float = 1e-6,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The Gemma shape at any size; the head is tied by default."""
    rms = RMSNorm(epsilon=epsilon, offset=1.0)
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=rotary or Rotary(),
            bias=attention_bias,
            output_bias=attention_bias,
            dropout=attention_dropout,
        ),
        ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation),
        norm=rms,
        wiring=PreNorm(),
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        embedding_scale=math.sqrt(embed_dim),
        embedding_std=embedding_std,
        final_norm=rms,
        head=head or Tied(),
        context_length=context_length,
    )


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "gemma-nano": gemma(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, num_kv_heads=1, head_dim=32),
    # table 1 of the paper
    "gemma-2b": gemma(embed_dim=2048, num_layers=18, num_heads=8, hidden_dim=16384, num_kv_heads=1, vocab_size=256000),
    "gemma-7b": gemma(embed_dim=3072, num_layers=28, num_heads=16, hidden_dim=24576, vocab_size=256000),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type gemma; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "gemma")
    hf.common()
    hf.architecture({"GemmaForCausalLM": None, "GemmaModel": None})
    hf.fixed("use_bidirectional_attention", None, False)
    model = decoder_from_hf(hf)
    hf.finish()
    return model()


def decoder_from_hf(hf: Attributes) -> "partial[Transformer]":
    """What makes the model of these attributes, once it is known that they are all right."""
    hf.fixed("hidden_activation", None, "gelu_pytorch_tanh")  # the activation's second name in early configs
    # early configs wrote gelu and meant its approximation
    activations: dict[str, Activation] = {**ACTIVATIONS, "gelu": "gelu_tanh"}
    return partial(
        gemma,
        embed_dim=hf.integer("hidden_size", 3072),
        num_layers=hf.integer("num_hidden_layers", 28),
        num_heads=hf.integer("num_attention_heads", 16),
        num_kv_heads=hf.integer("num_key_value_heads", 16),
        head_dim=hf.integer("head_dim", 256),
        hidden_dim=hf.integer("intermediate_size", 24576),
        vocab_size=hf.integer("vocab_size", 256000),
        context_length=hf.integer("max_position_embeddings", 8192),
        rotary=rotary_from_hf(hf),
        activation=hf.choice("hidden_act", activations, "gelu_pytorch_tanh"),
        attention_bias=hf.flag("attention_bias", False),
        attention_dropout=hf.real("attention_dropout", 0.0),
        epsilon=hf.real("rms_norm_eps", 1e-6),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", True) else Untied(),
    )


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a gemma config cannot express."""
    block = block_of(model, "gemma")
    mixer, ffn, rms = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, GatedMLP)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        raise ValueError(f"gemma is made of Attention with Rotary, GatedMLP and RMSNorm; this model of {parts}")
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": ffn.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        **rotary_to_hf(mixer.position, model.context_length),
        "rms_norm_eps": rms.epsilon,
        "attention_bias": mixer.bias,
        "attention_dropout": mixer.dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "pad_token_id": None,  # the class's default, 0, would keep that token's row from being trained
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "gemma")
    return config


WEIGHTS = llama.WEIGHTS

FAMILY = Family(
    name="Gemma",
    kind="decoder",
    paper="Gemma Team 2024, 2403.08295",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers GemmaForCausalLM",
    hugging_face=HuggingFace(model_type="gemma", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
