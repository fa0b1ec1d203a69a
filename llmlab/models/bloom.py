"""BLOOM (Scao et al. 2022, 2211.05100): GPT-2's block without positions, biased by distance.

    ids -- table -- LayerNorm -- x

    x --+-- LayerNorm -- attention (ALiBi) --(+)--+-- LayerNorm -- MLP --(+)-- y
        +-----------------------------------|     +--------------------|

    logits of head h: q.k / sqrt(H) - slope_h (query - key)                        (ALiBi, Press et al. 2021)

Nothing is added to embeddings: heads look near or far by their slope, which holds up beyond the training length. The
norm on the embeddings steadies the training of large models in half precision, at some cost in zero-shot quality
(section 3.2). Biases everywhere, GELU (tanh approximation), 4 D wide, the head tied. A vocabulary of 250 thousand
for 46 languages: nearly half of the parameters of the 560M.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 S D in attention; 12 D^2 parameters.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import Attributes, block_of, check_same
from llmlab.models.transforms import FusedByHead, Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import ALiBi
from llmlab.nn.wiring import PreNorm


def bloom(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    vocab_size: int | None = None,
    epsilon: float = 1e-5,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The BLOOM shape at any size; `dropout` is on what joins the residual stream."""
    block = Block(
        mixer=Attention(num_heads=num_heads, position=ALiBi(), bias=True, output_bias=True, dropout=attention_dropout),
        ffn=MLP(hidden_dim=4 * embed_dim, activation="gelu_tanh"),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PreNorm(),
        dropout=dropout,
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        embedding_norm=LayerNorm(epsilon=epsilon),
        embedding_std=embedding_std,
        final_norm=LayerNorm(epsilon=epsilon),
        head=head or Tied(),
    )


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "bloom-nano": bloom(embed_dim=192, num_layers=4, num_heads=6),
    # the paper's table 3, padded vocabulary included
    "bloom-560m": bloom(embed_dim=1024, num_layers=24, num_heads=16, vocab_size=250880),
    "bloom-1b1": bloom(embed_dim=1536, num_layers=24, num_heads=16, vocab_size=250880),
    "bloom-1b7": bloom(embed_dim=2048, num_layers=24, num_heads=16, vocab_size=250880),
    "bloom-3b": bloom(embed_dim=2560, num_layers=30, num_heads=32, vocab_size=250880),
    "bloom-7b1": bloom(embed_dim=4096, num_layers=30, num_heads=32, vocab_size=250880),
    "bloom-176b": bloom(embed_dim=14336, num_layers=70, num_heads=112, vocab_size=250880),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type bloom; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "bloom")
    hf.common()
    hf.architecture({"BloomForCausalLM": None, "BloomModel": None})
    hf.fixed("n_inner", None)
    hf.fixed("apply_residual_connection_post_layernorm", False)
    old, both = hf.optional("n_embed", int), hf.optional("hidden_size", int)
    if old is not None and both is not None and old != both:
        hf.problem(f"n_embed={old} and hidden_size={both} are the same attribute")
    layers, heads = hf.optional("num_hidden_layers", int), hf.optional("num_attention_heads", int)
    build = partial(
        bloom,
        embed_dim=old or both or 64,
        num_layers=hf.integer("n_layer", layers or 2),
        num_heads=hf.integer("n_head", heads or 8),
        vocab_size=hf.integer("vocab_size", 250880),
        epsilon=hf.real("layer_norm_epsilon", 1e-5),
        dropout=hf.real("hidden_dropout", 0.0),
        attention_dropout=hf.real("attention_dropout", 0.0),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", True) else Untied(),
    )
    # slow_but_exact adds the parts of a matmul in the training cluster's order; the rest is of that cluster or of
    # Megatron's kernels and ALiBi has no length
    hf.finish(
        "slow_but_exact",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "seq_length",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "unk_token_id",
    )
    return build()


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a bloom config cannot express."""
    block = block_of(model, "bloom")
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (isinstance(mixer, Attention) and isinstance(ffn, MLP) and isinstance(layer_norm, LayerNorm)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm))
        raise ValueError(f"bloom is made of Attention with ALiBi, MLP and LayerNorm; this model of {parts}")
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": mixer.num_heads,
        "layer_norm_epsilon": layer_norm.epsilon,
        "hidden_dropout": block.dropout,
        "attention_dropout": mixer.dropout,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": isinstance(model.head, Tied),
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "bloom")
    return config


_TENSORS, _PATH = "transformer.h.{layer}", "stack.{layer}"
_KERNELS = tuple(f"{_PATH}.mixer.{name}.kernel" for name in ("query", "key", "value"))
_BIASES = tuple(f"{_PATH}.mixer.{name}.bias" for name in ("query", "key", "value"))

WEIGHTS = WeightTable(
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.word_embeddings.weight"},
    rows=(
        Row("transformer.word_embeddings.weight", "embedding.tokens.table"),
        *norm("transformer.word_embeddings_layernorm", "embedding.norm"),
        *norm(f"{_TENSORS}.input_layernorm", f"{_PATH}.mixer_branch.norm_input"),
        Row(f"{_TENSORS}.self_attention.query_key_value.weight", _KERNELS, FusedByHead()),
        Row(f"{_TENSORS}.self_attention.query_key_value.bias", _BIASES, FusedByHead()),
        *linear(f"{_TENSORS}.self_attention.dense", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.post_attention_layernorm", f"{_PATH}.ffn_branch.norm_input"),
        *linear(f"{_TENSORS}.mlp.dense_h_to_4h", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.mlp.dense_4h_to_h", f"{_PATH}.ffn.down"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head"),
    ),
)

FAMILY = Family(
    name="BLOOM",
    kind="decoder",
    paper="Scao et al. 2022, 2211.05100",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers BloomForCausalLM",
    hugging_face=HuggingFace(model_type="bloom", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
