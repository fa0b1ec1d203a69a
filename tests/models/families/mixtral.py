"""Mixtral of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.families.mistral import random_decoder
from tests.models.references import Case, causal, cross_entropy


def cases() -> dict[str, Case]:
    """Fixtures by name: with the load-balance loss, large enough to be seen in every gradient, and without."""
    return {
        "mixtral": case(output_router_logits=True, router_aux_loss_coef=0.5),
        "mixtral-tied-window": case(
            num_experts_per_tok=1, num_local_experts=3, tie_word_embeddings=True, sliding_window=4
        ),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    experts = int(rng.integers(1, 7))
    decoder = random_decoder(rng)
    # torch's grouped matmul wants rows of whole 16 bytes
    decoder |= {name: 4 * int(rng.integers(1, 9)) for name in ("hidden_size", "intermediate_size")}
    return case(
        seed=int(rng.integers(1000)),
        **decoder,
        hidden_act=str(rng.choice(["silu", "gelu", "relu"])),
        sliding_window=None if rng.random() < 0.5 else int(rng.integers(1, 14)),
        num_local_experts=experts,
        num_experts_per_tok=int(rng.integers(1, experts + 1)),
        output_router_logits=bool(rng.random() < 0.7),
        router_aux_loss_coef=float(rng.choice([0.001, 0.3])),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**{**sizes, **heads, **experts, **changes})

    def loss(output: Any, inputs: Mapping[str, Any]) -> Any:
        weighted = config.router_aux_loss_coef * output.aux_loss if config.output_router_logits else 0.0
        return cross_entropy(output, inputs) + weighted

    return Case(
        config, "MixtralForCausalLM", causal(config.vocab_size, seed), loss=loss, saved=saved, parts=experts_apart
    )


def saved(name: str) -> str:
    """Checkpoints keep the first release's name of the feed-forward."""
    return name.replace(".mlp.", ".block_sparse_moe.")


def experts_apart(name: str, gradient: Any) -> Mapping[str, Any]:
    """The matrices of all experts, gate and up joined, as checkpoints hold them: w1 is the gate, w3 up, w2 down."""
    place, _, kind = name.rpartition(".")
    if kind == "gate_up_proj":
        gates, ups = gradient.chunk(2, dim=1)
        parts = {"w1": gates, "w3": ups}
    elif kind == "down_proj":
        parts = {"w2": gradient}
    else:
        return {name: gradient}
    return {f"{place}.{e}.{w}.weight": matrix for w, stack in parts.items() for e, matrix in enumerate(stack)}
