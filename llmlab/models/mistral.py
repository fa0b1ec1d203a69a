"""Mistral 7B (Jiang et al. 2023, 2310.06825): Llama with a window.

    x --+-- RMSNorm -- attention (rotary, window) --(+)--+-- RMSNorm -- SwiGLU --(+)-- y
        +------------------------------------------|     +---------------------|

    layer 3    . . . . . * * *       a token sees its last W keys; through L layers it can know of L W tokens
    layer 2    . . . * * * * *
    layer 1    . * * * * * * *       (W = 3)

Sliding-window attention (Beltagy et al. 2020) makes time linear in the sequence and bounds the cache at W positions;
grouped queries (8 key/value heads for 32) make it four times smaller still. What is further back than W comes through
the layers between only, blurred: later versions (v0.2 on) went back to full attention for that reason.

Cost per token and layer: that of Llama, with 4 min(S, W) D FLOPs in attention instead of 4 S D.
"""

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


def mistral(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = 4096,
    vocab_size: int | None = None,
    context_length: int | None = None,
    rotary: Rotary | None = None,
    activation: Activation = "silu",
    attention_dropout: float = 0.0,
    epsilon: float = 1e-5,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The Mistral shape at any size; `window=None` sees everything."""
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=rotary or Rotary(),
            window=window,
            dropout=attention_dropout,
        ),
        ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation),
        norm=RMSNorm(epsilon=epsilon),
        wiring=PreNorm(),
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        embedding_std=embedding_std,
        final_norm=RMSNorm(epsilon=epsilon),
        head=head or Untied(),
        context_length=context_length,
    )


_7B = partial(mistral, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, hidden_dim=14336, head_dim=128)

PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "mistral-nano": mistral(
        embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=512, window=64, head=Tied()
    ),
    "mistral-7b": _7B(vocab_size=32000, context_length=32768),
    "mistral-7b-v0.3": _7B(vocab_size=32768, context_length=32768, window=None, rotary=Rotary(theta=1_000_000.0)),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type mistral; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "mistral")
    hf.common()
    hf.architecture({"MistralForCausalLM": None, "MistralModel": None})
    width, heads = hf.integer("hidden_size", 4096), hf.integer("num_attention_heads", 32)
    build = partial(
        mistral,
        embed_dim=width,
        num_layers=hf.integer("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=hf.integer("num_key_value_heads", 8),
        head_dim=hf.optional("head_dim", int, width // heads),
        hidden_dim=hf.integer("intermediate_size", 14336),
        window=window_from_hf(hf, config, 4096),
        vocab_size=hf.integer("vocab_size", 32000),
        rotary=rotary_from_hf(hf, length=131072),
        context_length=hf.integer("max_position_embeddings", 131072),
        activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
        attention_dropout=hf.real("attention_dropout", 0.0),
        epsilon=hf.real("rms_norm_eps", 1e-6),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", False) else Untied(),
    )
    hf.finish()
    return build()


def window_from_hf(hf: Attributes, config: Mapping[str, Any], default: int | None) -> int | None:
    """The window of a config; an explicit null is none, whatever the default."""
    window = hf.optional("sliding_window", int)
    return window if "sliding_window" in config else default


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a mistral config cannot express."""
    block = block_of(model, "mistral")
    mixer, ffn, rms = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, GatedMLP)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        raise ValueError(f"mistral is made of Attention with Rotary, GatedMLP and RMSNorm; this model of {parts}")
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "intermediate_size": ffn.hidden_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        **decoder_to_hf(model, mixer, rms),
    }
    check_same(model, from_hf(config), "mistral")
    return config


def decoder_to_hf(model: Transformer, mixer: Attention, rms: RMSNorm) -> dict[str, Any]:
    """What the configs of mistral and mixtral have in common."""
    assert isinstance(mixer.position, Rotary)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "sliding_window": mixer.window,
        **rotary_to_hf(mixer.position, model.context_length),
        "rms_norm_eps": rms.epsilon,
        "attention_dropout": mixer.dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "torch_dtype": "float32",
    }


# The same tensors as Llama's, by the same names.
WEIGHTS = llama.WEIGHTS

FAMILY = Family(
    name="Mistral",
    kind="decoder",
    paper="Jiang et al. 2023, 2310.06825",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers MistralForCausalLM",
    hugging_face=HuggingFace(model_type="mistral", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
