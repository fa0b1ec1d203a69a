"""Mistral of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.llama import random_rope
from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name; the window is far shorter than the sequence, so that layers must pass things on."""
    return {
        "mistral": case(),
        "mistral-tied-full": case(sliding_window=None, tie_word_embeddings=True, num_key_value_heads=4),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    return case(
        seed=int(rng.integers(1000)),
        **random_decoder(rng),
        hidden_act=str(rng.choice(["silu", "gelu", "relu"])),
        sliding_window=None if rng.random() < 0.2 else int(rng.integers(1, 14)),
    )


def random_decoder(rng: np.random.Generator) -> dict[str, Any]:
    """Attributes that Mistral, Mixtral and GLM have in common."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    rope = random_rope(rng)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * int(rng.integers(5, 9)),
        "head_dim": 2 * int(rng.integers(2, 7)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(1, 50)),
        "vocab_size": int(rng.integers(2, 90)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
        "rope_parameters": rope,
        "max_position_embeddings": 8 if rope["rope_type"] == "dynamic" else 16,
        "tie_word_embeddings": bool(rng.random() < 0.5),
    }


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "sliding_window": 4}
    config = transformers.MistralConfig(**{**sizes, **heads, **changes})
    return Case(config, "MistralForCausalLM", causal(config.vocab_size, seed))
