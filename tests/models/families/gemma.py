"""Gemma of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.llama import random_rope
from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    untied = {"tie_word_embeddings": False, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1e-3}
    return {"gemma": case(), "gemma-untied": case(**untied)}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    rope = random_rope(rng)
    return case(
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=int(rng.integers(5, 30)),
        head_dim=2 * int(rng.integers(2, 7)),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(2, 90)),
        hidden_act=str(rng.choice(["gelu_pytorch_tanh", "gelu", "silu", "relu"])),
        attention_bias=bool(rng.random() < 0.5),
        rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
        rope_parameters=rope,
        # sequences have 12 tokens: a dynamic scaling must have something to scale
        max_position_embeddings=8 if rope["rope_type"] == "dynamic" else 16,
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 16}
    # torch drops the gradient of a padding token's row of the table; there is none here
    config = transformers.GemmaConfig(**{**sizes, **heads, "pad_token_id": None, **changes})
    return Case(config, "GemmaForCausalLM", causal(config.vocab_size, seed), std=0.2)  # gains are around 2 here
