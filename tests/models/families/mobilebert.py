"""MobileBERT of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from dataclasses import replace
from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import Case

TINY = {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False}


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {
        "mobilebert-masked": case("ForMaskedLM"),
        "mobilebert-pretraining": case("ForPreTraining", trigram_input=False, num_feedforward_networks=1),
        "mobilebert-classes": case("ForSequenceClassification", num_labels=3, **TINY),
        "mobilebert-tokens": case("ForTokenClassification", num_labels=5),
        # With seed 0 the reference's own gradients are 1e-5 from those that it computes in float64, with this one 3e-6.
        "mobilebert-spans": case("ForQuestionAnswering", seed=1),
        "mobilebert-bare": case("Model", embedding_size=16, num_feedforward_networks=3),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending, heads = str(rng.choice(HEADS)), int(rng.integers(1, 4))
    hidden, trigram = int(rng.integers(12, 30)), bool(rng.random() < 0.6)
    return case(
        ending,
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        intra_bottleneck_size=heads * int(rng.integers(3, 6)),
        hidden_size=hidden,
        embedding_size=hidden if trigram and rng.random() < 0.5 else int(rng.integers(2, hidden)),
        trigram_input=trigram,
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 40)),
        num_feedforward_networks=int(rng.integers(1, 4)),
        vocab_size=int(rng.integers(3, 90)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
        **random_labels(rng, ending),
        **(TINY if rng.random() < 0.4 else {}),
    )


def case(ending: str, seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    narrow = {"intra_bottleneck_size": 8, "intermediate_size": 12, "embedding_size": 6, "num_feedforward_networks": 2}
    options: dict[str, Any] = {**sizes, **narrow, "max_position_embeddings": 16, **changes}
    config = transformers.MobileBertConfig(**options)
    # token 0 is padding: transformers gives its row no gradient
    made = encoder_case(config, "MobileBert", ending, seed, token_types=config.type_vocab_size, pooled=True, low=1)
    return replace(made, std=0.25)  # no norm holds the states' size: at 0.3 they grow from layer to layer
