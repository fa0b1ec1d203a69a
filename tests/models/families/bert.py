"""BERT of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import Case

# Without tied embeddings transformers 5 keeps a bias that nothing reads; before, both biases were one.
UNREAD = {"cls.predictions.bias": "cls.predictions.decoder.bias"}


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    names = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    return {
        "bert-masked": case("ForMaskedLM"),
        "bert-masked-untied": case("ForMaskedLM", tie_word_embeddings=False, hidden_act="relu", layer_norm_eps=1e-3),
        "bert-pretraining": case("ForPreTraining"),
        "bert-classes": case("ForSequenceClassification", **names),
        "bert-regression": case("ForSequenceClassification", seed=3, num_labels=1),
        "bert-several-classes": case("ForSequenceClassification", **several),
        "bert-tokens": case("ForTokenClassification", num_labels=5, classifier_dropout=0.3),
        "bert-spans": case("ForQuestionAnswering"),
        "bert-bare": case("Model"),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending, heads = str(rng.choice(HEADS)), int(rng.integers(1, 5))
    return case(
        ending,
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        hidden_size=heads * int(rng.integers(4, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(3, 90)),
        type_vocab_size=int(rng.integers(1, 4)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu", "gelu_new"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.5),
        **random_labels(rng, ending),
    )


def case(ending: str, seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}
    config = transformers.BertConfig(**{**sizes, **more, **changes})
    lm = ending in ("ForMaskedLM", "ForPreTraining") and not config.tie_word_embeddings
    # token 0 is padding: transformers gives its row no gradient
    return encoder_case(
        config,
        "Bert",
        ending,
        seed,
        token_types=config.type_vocab_size,
        pooled=True,
        equal=UNREAD if lm else {},
        low=1,
    )
