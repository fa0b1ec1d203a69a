"""DistilBERT of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import Case


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {
        "distilbert-masked": case("ForMaskedLM"),
        "distilbert-masked-untied": case("ForMaskedLM", tie_word_embeddings=False, activation="relu"),
        "distilbert-classes": case("ForSequenceClassification", num_labels=3),
        "distilbert-tokens": case("ForTokenClassification", num_labels=5),
        "distilbert-spans": case("ForQuestionAnswering"),
        "distilbert-bare": case("Model"),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending = str(rng.choice([ending for ending in HEADS if ending != "ForPreTraining"]))
    heads = int(rng.integers(1, 5))
    return case(
        ending,
        seed=int(rng.integers(1000)),
        n_heads=heads,
        dim=heads * int(rng.integers(4, 9)),
        n_layers=int(rng.integers(1, 4)),
        hidden_dim=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(3, 90)),
        activation=str(rng.choice(["gelu", "relu", "silu"])),
        sinusoidal_pos_embds=bool(rng.random() < 0.5),
        tie_word_embeddings=bool(rng.random() < 0.5),
        **random_labels(rng, ending),
    )


def case(ending: str, seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 43, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20, "max_position_embeddings": 16}
    config = transformers.DistilBertConfig(**{**sizes, "pad_token_id": 0, **changes})
    # token 0 is padding: transformers gives its row no gradient
    return encoder_case(config, "DistilBert", ending, seed, low=1)
