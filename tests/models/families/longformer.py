"""Longformer of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from dataclasses import replace
from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import Case, Inputs

# Several blocks of keys, and no multiple of them or of a window.
LENGTH = 45
PAD, SEPARATOR = 1, 2
# Without tied embeddings transformers 5 keeps a bias that nothing reads; before, both biases were one.
UNREAD = {"lm_head.bias": "lm_head.decoder.bias"}


WITH_DEFAULTS = ("ForSequenceClassification", "ForQuestionAnswering")


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    untied = {"tie_word_embeddings": False, "type_vocab_size": 2}
    return {
        "longformer-masked": case("ForMaskedLM", num_global=0),
        "longformer-masked-untied": case("ForMaskedLM", num_global=3, attention_window=[32, 4], **untied),
        "longformer-classes": case("ForSequenceClassification", num_labels=3),  # its first token is global
        "longformer-spans": case("ForQuestionAnswering"),  # its question is global
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending = str(rng.choice([ending for ending in HEADS if ending != "ForPreTraining"]))
    heads, layers = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    return case(
        ending,
        seed=int(rng.integers(1000)),
        num_global=None if ending in WITH_DEFAULTS else int(rng.integers(0, 5)),
        length=int(rng.integers(8, 70)),
        # transformers fails on a window of 2 and where the largest is no multiple of the others
        attention_window=[2 ** int(rng.integers(2, 6)) for _ in range(layers)],
        num_attention_heads=heads,
        hidden_size=heads * int(rng.integers(4, 9)),
        num_hidden_layers=layers,
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(6, 90)),
        pad_token_id=int(rng.integers(0, 2)),
        type_vocab_size=int(rng.integers(1, 3)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu"])),
        layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.5),
        **random_labels(rng, ending),
    )


def case(ending: str, seed: int = 0, num_global: int | None = None, length: int = LENGTH, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes; `num_global` tokens a row, None for those that the head takes."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 20, "max_position_embeddings": 80, "type_vocab_size": 1, "pad_token_id": PAD}
    window = {"attention_window": [8] * changes.get("num_hidden_layers", 2), "sep_token_id": SEPARATOR}
    config = transformers.LongformerConfig(**{**sizes, **more, **window, **changes})
    lm = ending == "ForMaskedLM" and not config.tie_word_embeddings
    # Most heads look at padding: at its scores, or at a first token that is padding. transformers gives the row of
    # padding no gradient, so that other tokens stand there then and positions, which there count table rows, are given.
    given = ending not in ("ForMaskedLM", "ForTokenClassification")
    assert config.pad_token_id is not None
    first = config.pad_token_id + 1
    made = encoder_case(
        config,
        "Longformer",
        ending,
        seed,
        token_types=config.type_vocab_size,
        pooled=True,
        extra={"position_ids": np.tile(np.arange(length, dtype=np.int32), (3, 1))} if given else {},
        equal=UNREAD if lm else {},
        low=SEPARATOR + 1,
        pad_id=None if given else config.pad_token_id,
        length=length,
    )
    inputs = made.inputs | global_tokens(made.inputs, num_global, seed)
    if ending == "ForQuestionAnswering" and num_global is None:
        inputs["input_ids"] = with_question(inputs["input_ids"])
    made = replace(made, inputs=inputs)
    if not given:
        return made
    return replace(made, call=lambda model, inputs: model(**inputs | {"position_ids": inputs["position_ids"] + first}))


def global_tokens(inputs: Inputs, num_global: int | None, seed: int) -> Inputs:
    """`global_attention_mask` with this many random tokens of each row, of which padding ones are none."""
    if not num_global:
        return {}
    rng, shape = np.random.default_rng(seed + 3), inputs["input_ids"].shape
    mask = np.argsort(rng.random(shape), axis=1) < num_global
    return {"global_attention_mask": mask.astype(np.int32)}


def with_question(input_ids: np.ndarray) -> np.ndarray:
    """The rows with a question of one to three tokens in front: transformers asks for just three separators."""
    rows = input_ids.copy()
    for row, tokens in enumerate(rows):
        tokens[[row + 1, row + 2, -1]] = SEPARATOR
    return rows
