"""GPT-2 (Radford et al. 2019): the decoder that later ones are measured against.

    x --+-- LayerNorm -- attention --(+)--+-- LayerNorm -- MLP --(+)-- y
        +------------------------------|   +------------------------|

Learned absolute positions added to the embeddings, pre-norm blocks with LayerNorm, biases everywhere, a GELU (tanh
approximation) MLP four times as wide as the model, the head tied to the embedding. Against Llama: positions end at
the table's length, one matrix more in Llama's gated MLP, norms with mean and bias.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 S D in attention; 12 D^2 parameters.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.transforms import Conv1D, Fused, Vector
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PreNorm


def gpt2(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    max_length: int = 1024,
    vocab_size: int | None = None,
    hidden_dim: int | None = None,
    activation: Activation = "gelu_tanh",
    epsilon: float = 1e-5,
    scale: float | None = None,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    embedding_dropout: float | None = None,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The GPT-2 shape at any size; `dropout` holds for embeddings and attention weights too unless theirs is given."""
    if attention_dropout is None:
        attention_dropout = dropout
    if embedding_dropout is None:
        embedding_dropout = dropout
    block = Block(
        mixer=Attention(num_heads=num_heads, bias=True, output_bias=True, scale=scale, dropout=attention_dropout),
        ffn=MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation=activation),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PreNorm(),
        dropout=dropout,
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position=Learned(max_length, std=embedding_std),
        embedding_dropout=embedding_dropout,
        embedding_std=embedding_std,
        final_norm=LayerNorm(epsilon=epsilon),
        head=head or Tied(),
    )


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "gpt2-nano": gpt2(embed_dim=192, num_layers=4, num_heads=6, max_length=512),
    # the four of the paper's table 2 (sizes as later corrected by the authors)
    "gpt2-124m": gpt2(embed_dim=768, num_layers=12, num_heads=12, vocab_size=50257),
    "gpt2-355m": gpt2(embed_dim=1024, num_layers=24, num_heads=16, vocab_size=50257),
    "gpt2-774m": gpt2(embed_dim=1280, num_layers=36, num_heads=20, vocab_size=50257),
    "gpt2-1.5b": gpt2(embed_dim=1600, num_layers=48, num_heads=25, vocab_size=50257),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type gpt2; ValueError lists every attribute that is not implemented."""
    hf = Attributes(config, "gpt2")
    hf.common()
    hf.architecture({"GPT2LMHeadModel": None, "GPT2Model": None})
    hf.fixed("scale_attn_by_inverse_layer_idx", False)
    hf.fixed("n_ctx", config.get("n_positions", 1024))  # the length's second name in early configs
    build = partial(
        gpt2,
        embed_dim=hf.integer("n_embd", 768),
        num_layers=hf.integer("n_layer", 12),
        num_heads=hf.integer("n_head", 12),
        max_length=hf.integer("n_positions", 1024),
        vocab_size=hf.integer("vocab_size", 50257),
        hidden_dim=hf.optional("n_inner", int),
        activation=hf.choice("activation_function", ACTIVATIONS, "gelu_new"),
        epsilon=hf.real("layer_norm_epsilon", 1e-5),
        scale=None if hf.flag("scale_attn_weights", True) else 1.0,
        dropout=hf.real("resid_pdrop", 0.1),
        attention_dropout=hf.real("attn_pdrop", 0.1),
        embedding_dropout=hf.real("embd_pdrop", 0.1),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", True) else Untied(),
    )
    # reorder_and_upcast_attn: softmax is float32 here in any case; summary_*: of a classification head
    hf.finish("reorder_and_upcast_attn", *(name for name in config if name.startswith("summary_")))
    return build()


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a gpt2 config cannot express."""
    block = block_of(model, "gpt2")
    mixer, ffn, layer_norm, position = block.mixer, block.ffn, block.norm, model.position
    if not (
        isinstance(mixer, Attention)
        and isinstance(ffn, MLP)
        and isinstance(layer_norm, LayerNorm)
        and isinstance(position, Learned)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm, position))
        raise ValueError(f"gpt2 is made of Attention, MLP, LayerNorm and Learned positions; this model of {parts}")
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": position.max_length,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": mixer.num_heads,
        "n_inner": ffn.hidden_dim,
        "activation_function": activation_to_hf(ffn.activation),
        "layer_norm_epsilon": layer_norm.epsilon,
        "scale_attn_weights": mixer.scale != 1.0,
        "resid_pdrop": block.dropout,
        "attn_pdrop": mixer.dropout,
        "embd_pdrop": model.embedding_dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "gpt2")
    return config


_TENSORS, _PATH = "transformer.h.{layer}", "stack.{layer}"
_KERNELS = tuple(f"{_PATH}.mixer.{name}.kernel" for name in ("query", "key", "value"))
_BIASES = tuple(f"{_PATH}.mixer.{name}.bias" for name in ("query", "key", "value"))

WEIGHTS = WeightTable(
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=(f"{_TENSORS}.attn.bias", f"{_TENSORS}.attn.masked_bias"),
    rows=(
        Row("transformer.wte.weight", "embedding.tokens.table"),
        Row("transformer.wpe.weight", "embedding.position.table"),
        *norm(f"{_TENSORS}.ln_1", f"{_PATH}.mixer_branch.norm_input"),
        Row(f"{_TENSORS}.attn.c_attn.weight", _KERNELS, Fused(Conv1D(), axis=1)),
        Row(f"{_TENSORS}.attn.c_attn.bias", _BIASES, Fused(Vector(), axis=0)),
        *linear(f"{_TENSORS}.attn.c_proj", f"{_PATH}.mixer.output", Conv1D(num_inputs=2)),
        *norm(f"{_TENSORS}.ln_2", f"{_PATH}.ffn_branch.norm_input"),
        *linear(f"{_TENSORS}.mlp.c_fc", f"{_PATH}.ffn.up", Conv1D()),
        *linear(f"{_TENSORS}.mlp.c_proj", f"{_PATH}.ffn.down", Conv1D()),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
)

FAMILY = Family(
    name="GPT-2",
    kind="decoder",
    paper="Radford et al. 2019",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers GPT2LMHeadModel",
    hugging_face=HuggingFace(model_type="gpt2", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
