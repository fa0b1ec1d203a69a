"""GLM-4 (Team GLM 2024, 2406.12793), the decoder that GLM (Du et al. 2021, 2103.10360) and ChatGLM grew into.

    x --+-- RMSNorm -- attention (half rotary) --(+)--+-- RMSNorm -- SwiGLU --(+)-- y
        +---------------------------------------|     +---------------------|

    a head's dimensions:   0 1   2 3   4 5 | 6 7 8 9 10 11      pairs of neighbours rotate in the first half of a head;
                           |_|   |_|   |_|                      the second half carries content whatever the distance

Llama's block with three differences: rotary positions on half of each head, in pairs of neighbours; biases on query,
key and value alone, which help beyond the training length; very few key/value heads (2 for 32).

The first GLM filled blanks: spans are cut out of a text and predicted after it, each from left to right and seeing the
whole corrupted text, with two positions a token (where the span was, and where the token is in it). `infilling` builds
that model, the objective is BlankInfilling on the corruption Blanks(). The decoders of this file predict plain next
tokens, with one position.

Cost per token and layer: 2 D^2 (2 + 2 K/N) + 6 D F FLOPs forward in parameter matmuls and 4 S D in attention.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.gpt2 import gpt2
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_rotary import rotary_from_hf, rotary_to_hf
from llmlab.models.transforms import Fused, Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block, Wiring
from llmlab.nn.feed_forward import Activation, GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Learned, Rotary
from llmlab.nn.wiring import PreNorm


def glm(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_kv_heads: int | None = 2,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    context_length: int | None = None,
    rotary: Rotary | None = None,
    activation: Activation = "silu",
    attention_bias: bool = True,
    attention_dropout: float = 0.0,
    epsilon: float = 1.5625e-7,
    embedding_std: float = 0.02,
    wiring: Wiring | None = None,
    head: Head | None = None,
) -> Transformer:
    """The GLM shape at any size; the head is untied by default. `wiring` is PreNorm unless given (see glm4.py)."""
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=rotary or Rotary(fraction=0.5, interleaved=True),
            bias=attention_bias,
            dropout=attention_dropout,
        ),
        ffn=GatedMLP(hidden_dim=hidden_dim, activation=activation),
        norm=RMSNorm(epsilon=epsilon),
        wiring=wiring or PreNorm(),
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


def infilling(*, max_length: int, embedding_std: float = 0.02, **sizes: Any) -> Transformer:
    """The first GLM (2103.10360, section 2.2): GPT-2's blocks, and a learned position for each of a token's two places.

    Args:
        max_length: rows of both tables: the longest text with its blanks, and so the longest blank.
        embedding_std: spread of the initial tables.
        sizes: as for `gpt2`.
    """
    plain = gpt2(max_length=max_length, embedding_std=embedding_std, **sizes)
    return dataclasses.replace(plain, block_position=Learned(max_length, std=embedding_std))


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "glm-nano": glm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, head=Tied()),
    "glm-4-9b": glm(
        embed_dim=4096,
        num_layers=40,
        num_heads=32,
        hidden_dim=13696,
        head_dim=128,
        vocab_size=151552,
        context_length=8192,
    ),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type glm; ValueError lists every attribute not implemented."""
    return read(config, "glm", "Glm", PreNorm())


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a glm config cannot express."""
    config = written(model, "glm", "Glm")
    check_same(model, from_hf(config), "glm")
    return config


def read(config: Mapping[str, Any], model_type: str, classes: str, wiring: Wiring) -> Transformer:
    """`from_hf` of GLM and of its successor, whose transformers classes begin with `classes`."""
    hf = Attributes(config, model_type)
    hf.common()
    hf.architecture({f"{classes}ForCausalLM": None, f"{classes}Model": None})
    build = partial(
        glm,
        embed_dim=hf.integer("hidden_size", 4096),
        num_layers=hf.integer("num_hidden_layers", 40),
        num_heads=hf.integer("num_attention_heads", 32),
        num_kv_heads=hf.integer("num_key_value_heads", 2),
        head_dim=hf.integer("head_dim", 128),
        hidden_dim=hf.integer("intermediate_size", 13696),
        vocab_size=hf.integer("vocab_size", 151552),
        rotary=rotary_from_hf(hf, length=131072, fraction=0.5, interleaved=True),
        context_length=hf.integer("max_position_embeddings", 131072),
        activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
        attention_bias=hf.flag("attention_bias", True),
        attention_dropout=hf.real("attention_dropout", 0.0),
        epsilon=hf.real("rms_norm_eps", 1.5625e-7),
        embedding_std=hf.real("initializer_range", 0.02),
        wiring=wiring,
        head=Tied() if hf.flag("tie_word_embeddings", False) else Untied(),
    )
    hf.finish()
    return build()


def written(model: Transformer, model_type: str, classes: str) -> dict[str, Any]:
    """The config of a GLM or of its successor, not yet checked."""
    block = block_of(model, model_type)
    mixer, ffn, rms = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, GatedMLP)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        raise ValueError(f"{model_type} is made of Attention with Rotary, GatedMLP and RMSNorm; this model of {parts}")
    return {
        "architectures": [f"{classes}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": ffn.hidden_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        "partial_rotary_factor": mixer.position.fraction,
        **rotary_to_hf(mixer.position, model.context_length),
        "rms_norm_eps": rms.epsilon,
        "attention_bias": mixer.bias,
        "attention_dropout": mixer.dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "pad_token_id": None,  # its default is a token that small vocabularies do not have
        "torch_dtype": "float32",
    }


_TENSORS, _PATH = "model.layers.{layer}", "stack.{layer}"


def weights(norms: Mapping[str, str]) -> WeightTable:
    """The table of GLM or its successor, given the places of the blocks' norms by their names in checkpoints."""
    return WeightTable(
        prefix="model.",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        ignored=("model.rotary_emb.inv_freq",),
        rows=(
            Row("model.embed_tokens.weight", "embedding.tokens.table"),
            *(row for name, place in norms.items() for row in norm(f"{_TENSORS}.{name}", f"{_PATH}.{place}")),
            *linear(f"{_TENSORS}.self_attn.q_proj", f"{_PATH}.mixer.query"),
            *linear(f"{_TENSORS}.self_attn.k_proj", f"{_PATH}.mixer.key"),
            *linear(f"{_TENSORS}.self_attn.v_proj", f"{_PATH}.mixer.value"),
            *linear(f"{_TENSORS}.self_attn.o_proj", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
            Row(
                f"{_TENSORS}.mlp.gate_up_proj.weight",
                (f"{_PATH}.ffn.gate.kernel", f"{_PATH}.ffn.up.kernel"),
                Fused(Linear(), axis=0),
            ),
            *linear(f"{_TENSORS}.mlp.down_proj", f"{_PATH}.ffn.down"),
            *norm("model.norm", "final_norm"),
            *linear("lm_head", "head"),
        ),
    )


WEIGHTS = weights({"input_layernorm": "mixer_branch.norm_input", "post_attention_layernorm": "ffn_branch.norm_input"})

FAMILY = Family(
    name="GLM",
    kind="decoder",
    paper="Team GLM 2024, 2406.12793",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM", "BlankInfilling"),
    reference="transformers GlmForCausalLM",
    hugging_face=HuggingFace(model_type="glm", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
