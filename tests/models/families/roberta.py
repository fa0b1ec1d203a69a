"""RoBERTa of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from dataclasses import replace
from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import SEQUENCE, Case

PAD = 1
# Without tied embeddings transformers 5 keeps a bias that nothing reads; before, both biases were one.
UNREAD = {"lm_head.bias": "lm_head.decoder.bias"}


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {
        "roberta-masked": case("ForMaskedLM"),
        "roberta-masked-untied": case("ForMaskedLM", tie_word_embeddings=False, pad_token_id=3, type_vocab_size=2),
        "roberta-classes": case("ForSequenceClassification", num_labels=3),
        "roberta-tokens": case("ForTokenClassification", num_labels=5),
        "roberta-spans": case("ForQuestionAnswering", seed=4),
        "roberta-bare": case("Model"),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending = str(rng.choice([ending for ending in HEADS if ending != "ForPreTraining"]))
    heads = int(rng.integers(1, 5))
    return case(
        ending,
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        hidden_size=heads * int(rng.integers(4, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(6, 90)),
        pad_token_id=int(rng.integers(0, 4)),
        type_vocab_size=int(rng.integers(1, 3)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu"])),
        layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.5),
        **random_labels(rng, ending),
    )


def case(ending: str, seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 20, "max_position_embeddings": 20, "type_vocab_size": 1, "pad_token_id": PAD}
    options: dict[str, Any] = {**sizes, **more, **changes}
    config, first = transformers.RobertaConfig(**options), options["pad_token_id"] + 1
    lm = ending == "ForMaskedLM" and not config.tie_word_embeddings
    # Answers are scored on padding too, rows are summarised by it where it is on the left, and the bare model's loss
    # looks at it; transformers gives the row of padding no gradient, so that other tokens stand there then, and the
    # positions are given. transformers' count table rows.
    given = ending in ("ForQuestionAnswering", "ForSequenceClassification", "Model")
    made = encoder_case(
        config,
        "Roberta",
        ending,
        seed,
        token_types=config.type_vocab_size,
        pooled=True,
        extra={"position_ids": np.tile(np.arange(SEQUENCE, dtype=np.int32), (3, 1))} if given else {},
        equal=UNREAD if lm else {},
        low=first,
        pad_id=None if given else first - 1,
    )
    if not given:
        return made
    return replace(made, call=lambda model, inputs: model(**inputs | {"position_ids": inputs["position_ids"] + first}))
