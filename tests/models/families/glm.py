"""GLM of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.mistral import random_decoder
from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {
        "glm": case(),
        "glm-tied-unbiased": case(
            attention_bias=False, tie_word_embeddings=True, partial_rotary_factor=1.0, head_dim=4
        ),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    return case(seed=int(rng.integers(1000)), **random_glm(rng))


def random_glm(rng: np.random.Generator) -> dict[str, Any]:
    """Attributes of GLM and of its successor."""
    return {
        **random_decoder(rng),
        "head_dim": 4 * int(rng.integers(1, 4)),
        "partial_rotary_factor": float(rng.choice([0.5, 1.0])),
        "hidden_act": str(rng.choice(["silu", "gelu", "relu"])),
        "attention_bias": bool(rng.random() < 0.5),
    }


def case(seed: int = 0, kind: str = "Glm", **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **changes})
    return Case(config, f"{kind}ForCausalLM", causal(config.vocab_size, seed))
