"""Llama 1, 2 and 3 (Touvron et al. 2023, 2302.13971 and 2307.09288; Grattafiori et al. 2024, 2407.21783).

    x --+-- RMSNorm -- attention (rotary) --(+)--+-- RMSNorm -- SwiGLU --(+)-- y
        +----------------------------------|     +---------------------|

Rotary positions inside attention, RMSNorm before each part, a SwiGLU feed-forward, no biases, an untied head (the
small Llama 3.2 models tie it). The 70B of Llama 2 and all of Llama 3 have fewer key/value heads than query heads.
Llama 3.1 stretches the rotary frequencies to 128k positions (Llama3 scaling).

Cost per token and layer: 2 D^2 (2 + 2 K/N) + 6 D F FLOPs forward in parameter matmuls and 4 S D in attention.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_rotary import rotary_from_hf, rotary_to_hf
from llmlab.models.transforms import Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import Activation, GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.rotary_scaling import Llama3
from llmlab.nn.wiring import PreNorm


def llama(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    context_length: int | None = None,
    rotary: Rotary | None = None,
    activation: Activation = "silu",
    attention_bias: bool = False,
    mlp_bias: bool = False,
    attention_dropout: float = 0.0,
    epsilon: float = 1e-5,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The Llama shape at any size; the head is untied by default."""
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
        ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation, bias=mlp_bias),
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


def _llama1(embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> Transformer:
    sizes = partial(llama, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim)
    return sizes(vocab_size=32000, context_length=2048, epsilon=1e-6)


def _llama2(
    embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int, kv_heads: int | None = None
) -> Transformer:
    sizes = partial(llama, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim)
    return sizes(num_kv_heads=kv_heads, vocab_size=32000, context_length=4096)


def _llama3(
    embed_dim: int, num_layers: int, num_heads: int, hidden_dim: int, factor: float | None, head: Head | None = None
) -> Transformer:
    sizes = partial(llama, embed_dim=embed_dim, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim)
    scaling = None
    if factor is not None:  # 3.1 and 3.2
        scaling = Llama3(factor=factor, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192)
    return sizes(
        num_kv_heads=8,
        vocab_size=128256,
        context_length=8192 if factor is None else 131072,
        rotary=Rotary(theta=500_000.0, scaling=scaling),
        head=head,
    )


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "llama-nano": llama(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, num_kv_heads=2, head=Tied()),
    "llama-1b": _llama3(2048, 16, 32, 8192, factor=32.0, head=Tied()),  # Llama 3.2
    "llama-7b": _llama1(4096, 32, 32, 11008),
    "llama2-7b": _llama2(4096, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 28672, kv_heads=8),
    "llama3-8b": _llama3(4096, 32, 32, 14336, factor=None),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, factor=8.0),
    "llama3-70b": _llama3(8192, 80, 64, 28672, factor=None),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, factor=8.0),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type llama; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "llama")
    hf.common()
    hf.architecture({"LlamaForCausalLM": None, "LlamaModel": None})
    build = partial(
        llama,
        embed_dim=hf.integer("hidden_size", 4096),
        num_layers=hf.integer("num_hidden_layers", 32),
        num_heads=hf.integer("num_attention_heads", 32),
        num_kv_heads=hf.optional("num_key_value_heads", int),
        head_dim=hf.optional("head_dim", int),
        hidden_dim=hf.integer("intermediate_size", 11008),
        vocab_size=hf.integer("vocab_size", 32000),
        context_length=hf.integer("max_position_embeddings", 2048),
        rotary=rotary_from_hf(hf),
        activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
        attention_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        attention_dropout=hf.real("attention_dropout", 0.0),
        epsilon=hf.real("rms_norm_eps", 1e-6),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", False) else Untied(),
    )
    hf.finish()
    return build()


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a llama config cannot express."""
    block = block_of(model, "llama")
    mixer, ffn, rms = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, GatedMLP)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        raise ValueError(f"llama is made of Attention with Rotary, GatedMLP and RMSNorm; this model of {parts}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "mlp_bias": ffn.bias,
        "attention_dropout": mixer.dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "llama")
    return config


_TENSORS, _PATH = "model.layers.{layer}", "stack.{layer}"

WEIGHTS = WeightTable(
    prefix="model.",
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(f"{_TENSORS}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    rows=(
        Row("model.embed_tokens.weight", "embedding.tokens.table"),
        *norm(f"{_TENSORS}.input_layernorm", f"{_PATH}.mixer_branch.norm_input"),
        *linear(f"{_TENSORS}.self_attn.q_proj", f"{_PATH}.mixer.query"),
        *linear(f"{_TENSORS}.self_attn.k_proj", f"{_PATH}.mixer.key"),
        *linear(f"{_TENSORS}.self_attn.v_proj", f"{_PATH}.mixer.value"),
        *linear(f"{_TENSORS}.self_attn.o_proj", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.post_attention_layernorm", f"{_PATH}.ffn_branch.norm_input"),
        *linear(f"{_TENSORS}.mlp.gate_proj", f"{_PATH}.ffn.gate"),
        *linear(f"{_TENSORS}.mlp.up_proj", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.mlp.down_proj", f"{_PATH}.ffn.down"),
        *norm("model.norm", "final_norm"),
        *linear("lm_head", "head"),
    ),
)

FAMILY = Family(
    name="Llama",
    kind="decoder",
    paper="Touvron et al. 2023, 2302.13971",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers LlamaForCausalLM",
    hugging_face=HuggingFace(model_type="llama", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
