"""BLOOM of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name; 6 heads are no power of two."""
    return {
        "bloom": case(),
        "bloom-untied": case(tie_word_embeddings=False, n_head=6, hidden_size=18, layer_norm_epsilon=1e-3),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    heads = int(rng.integers(1, 13))
    return case(
        seed=int(rng.integers(1000)),
        n_head=heads,
        hidden_size=heads * int(rng.integers(3, 6)),
        n_layer=int(rng.integers(1, 4)),
        vocab_size=int(rng.integers(2, 90)),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    config = transformers.BloomConfig(**{"vocab_size": 53, "hidden_size": 16, "n_layer": 2, "n_head": 4, **changes})
    return Case(config, "BloomForCausalLM", causal(config.vocab_size, seed))
