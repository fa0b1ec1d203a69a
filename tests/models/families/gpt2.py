"""GPT-2 of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    untied = {"tie_word_embeddings": False, "activation_function": "relu"}
    return {
        "gpt2": case(),
        "gpt2-untied": case(**untied, scale_attn_weights=False, layer_norm_epsilon=1e-3),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    heads = int(rng.integers(1, 5))
    return case(
        seed=int(rng.integers(1000)),
        n_head=heads,
        n_embd=heads * int(rng.integers(5, 9)),
        n_layer=int(rng.integers(1, 5)),
        n_inner=None if rng.random() < 0.5 else int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(2, 90)),
        activation_function=str(rng.choice(["gelu_new", "gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh"])),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
        scale_attn_weights=bool(rng.random() < 0.7),
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 40}
    config = transformers.GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})
    return Case(config, "GPT2LMHeadModel", causal(config.vocab_size, seed))
