"""Mixtral (Jiang et al. 2024, 2401.04088): Mistral whose feed-forward is a mixture of eight.

    x --+-- RMSNorm -- attention (rotary) --(+)--+-- RMSNorm -- router -- 2 of 8 SwiGLU --(+)-- y
        +----------------------------------|     +--------------------------------------|

    y = sum over the two experts e of highest logit    softmax(the two logits)_e SwiGLU_e(x)

47 billion parameters, of which a token meets 13: the quality of a model three to five times as dear per token, for the
memory of the whole. A batch of tokens goes to all experts, so that serving one user costs the memory traffic of two
experts a layer and serving many that of eight. Training adds the load-balance loss, E sum f P, once over all layers'
tokens (weight 0.02).

Cost per token and layer: 2 D^2 (2 + 2 K/N) + 2 x 6 D F + 16 D FLOPs forward in parameter matmuls, 4 S D in attention.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models import llama
from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_rotary import rotary_from_hf
from llmlab.models.mistral import decoder_to_hf, window_from_hf
from llmlab.models.transforms import Linear, Stacked
from llmlab.models.weights import Row, WeightTable
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import Activation, GatedMLP
from llmlab.nn.moe import LoadBalance, MixtureOfExperts, TopK
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm


def mixtral(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_experts: int = 8,
    experts_per_token: int = 2,
    balance: float | None = 0.02,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    vocab_size: int | None = None,
    context_length: int | None = None,
    rotary: Rotary | None = None,
    activation: Activation = "silu",
    attention_dropout: float = 0.0,
    epsilon: float = 1e-5,
    embedding_std: float = 0.02,
    head: Head | None = None,
) -> Transformer:
    """The Mixtral shape at any size; `balance` is the weight of the load-balance loss, None for none."""
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            position=rotary or Rotary(theta=1_000_000.0),
            window=window,
            dropout=attention_dropout,
        ),
        ffn=MixtureOfExperts(
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            expert=GatedMLP(hidden_dim=hidden_dim, activation=activation),
            router=TopK(balance=None if balance is None else LoadBalance(weight=balance, over="model")),
        ),
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


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "mixtral-nano": mixtral(embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=256, head=Tied()),
    "mixtral-8x7b": mixtral(
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        vocab_size=32000,
        context_length=32768,
    ),
    "mixtral-8x22b": mixtral(
        embed_dim=6144,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        hidden_dim=16384,
        vocab_size=32000,
        context_length=65536,
    ),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type mixtral; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "mixtral")
    hf.common()
    hf.architecture({"MixtralForCausalLM": None, "MixtralModel": None})
    hf.fixed("router_jitter_noise", 0.0, 0)  # there it perturbs what the experts see, here what the router sees
    balance = hf.real("router_aux_loss_coef", 0.001)
    width, heads = hf.integer("hidden_size", 4096), hf.integer("num_attention_heads", 32)
    build = partial(
        mixtral,
        embed_dim=width,
        num_layers=hf.integer("num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=hf.integer("num_key_value_heads", 8),
        head_dim=hf.optional("head_dim", int, width // heads),
        hidden_dim=hf.integer("intermediate_size", 14336),
        num_experts=hf.integer("num_local_experts", 8),
        experts_per_token=hf.integer("num_experts_per_tok", 2),
        # transformers adds the loss only where it returns the router's logits
        balance=balance if hf.flag("output_router_logits", False) else None,
        window=window_from_hf(hf, config, None),
        vocab_size=hf.integer("vocab_size", 32000),
        rotary=rotary_from_hf(hf, theta=1_000_000.0, length=131072),
        context_length=hf.integer("max_position_embeddings", 131072),
        activation=hf.choice("hidden_act", ACTIVATIONS, "silu"),
        attention_dropout=hf.real("attention_dropout", 0.0),
        epsilon=hf.real("rms_norm_eps", 1e-5),
        embedding_std=hf.real("initializer_range", 0.02),
        head=Tied() if hf.flag("tie_word_embeddings", False) else Untied(),
    )
    hf.finish()
    return build()


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a mixtral config cannot express."""
    block = block_of(model, "mixtral")
    mixer, ffn, rms = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(mixer.position, Rotary)
        and isinstance(ffn, MixtureOfExperts)
        and isinstance(ffn.expert, GatedMLP)
        and isinstance(ffn.router, TopK)
        and isinstance(rms, RMSNorm)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, rms))
        made_of = "Attention with Rotary, MixtureOfExperts of GatedMLP with TopK and RMSNorm"
        raise ValueError(f"mixtral is made of {made_of}; this model of {parts}")
    balance = ffn.router.balance
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": ffn.expert.hidden_dim,
        "hidden_act": activation_to_hf(ffn.expert.activation),
        "num_local_experts": ffn.num_experts,
        "num_experts_per_tok": ffn.experts_per_token,
        "output_router_logits": balance is not None,
        "router_aux_loss_coef": 0.001 if balance is None else balance.weight,
        **decoder_to_hf(model, mixer, rms),
    }
    check_same(model, from_hf(config), "mixtral")
    return config


_TENSORS, _PATH = "model.layers.{layer}.block_sparse_moe", "stack.{layer}.ffn"

WEIGHTS = WeightTable(
    prefix=llama.WEIGHTS.prefix,
    tied=llama.WEIGHTS.tied,
    ignored=llama.WEIGHTS.ignored,
    rows=(
        *(row for row in llama.WEIGHTS.rows if f"{_PATH}." not in row.path),
        Row(f"{_TENSORS}.gate.weight", f"{_PATH}.router.kernel", Linear()),
        Row(f"{_TENSORS}.experts.{{expert}}.w1.weight", f"{_PATH}.experts.gate.kernel", Stacked(Linear())),
        Row(f"{_TENSORS}.experts.{{expert}}.w3.weight", f"{_PATH}.experts.up.kernel", Stacked(Linear())),
        Row(f"{_TENSORS}.experts.{{expert}}.w2.weight", f"{_PATH}.experts.down.kernel", Stacked(Linear())),
    ),
)

FAMILY = Family(
    name="Mixtral",
    kind="decoder",
    paper="Jiang et al. 2024, 2401.04088",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers MixtralForCausalLM",
    hugging_face=HuggingFace(model_type="mixtral", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
