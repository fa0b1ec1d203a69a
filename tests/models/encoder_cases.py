"""Batches for every head of an encoder, as transformers is called with them; shared by the families of encoders."""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.references import Case, Inputs, masked, own_loss, squares, tokens

HEADS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "Model",
)


def encoder_case(
    config: Any,
    stem: str,
    ending: str,
    seed: int = 0,
    *,
    token_types: int = 0,
    pooled: bool = False,
    extra: Inputs | None = None,
    equal: Mapping[str, str] | None = None,
    **options: Any,
) -> Case:
    """The case of one head.

    Args:
        config: transformers config.
        stem: beginning of the class's name, "Bert".
        ending: one of HEADS.
        seed: of the batch.
        token_types: number of token types; 0 for a family without.
        pooled: whether the model without a head has pooled states.
        extra: further inputs.
        equal: see Case.
        options: of `tokens`.
    """
    rng = np.random.default_rng(seed + 2)
    inputs = tokens(config.vocab_size, seed, **options)
    if token_types:
        inputs["token_type_ids"] = rng.integers(0, token_types, inputs["input_ids"].shape).astype(np.int32)
    outputs: tuple[str, ...] = ("logits",)
    rows = len(inputs["input_ids"])
    if ending in ("ForMaskedLM", "ForPreTraining"):
        inputs["labels"] = masked(config.vocab_size, seed, **options)["labels"]
    if ending == "ForPreTraining":
        inputs["next_sentence_label"] = rng.integers(0, 2, rows).astype(np.int32)
        outputs = ("logits", "seq_relationship_logits")
    if ending == "ForSequenceClassification":
        inputs["labels"] = sequence_labels(config, rng, rows)
    if ending == "ForTokenClassification":
        labels = masked(config.vocab_size, seed, **options)["labels"]
        inputs["labels"] = np.where(labels < 0, labels, labels % config.num_labels).astype(np.int32)
    if ending == "ForQuestionAnswering":
        # the last row's answer is beyond it
        length = inputs["input_ids"].shape[1]
        inputs["start_positions"] = np.asarray([2, 5, length + 3], np.int32)
        inputs["end_positions"] = np.asarray([4, 7, length], np.int32)
        outputs = ("start_logits", "end_logits")
    if ending == "Model":
        outputs = ("last_hidden_state", "pooled") if pooled else ("last_hidden_state",)
    names = {"pooled": "pooler_output", **({"logits": "prediction_logits"} if ending == "ForPreTraining" else {})}
    return Case(
        config,
        f"{stem}{ending}",
        inputs | (extra or {}),
        outputs=outputs,
        loss=squares(*(names.get(name, name) for name in outputs)) if ending == "Model" else own_loss,
        hidden=(),
        fields=names,
        equal=equal or {},
    )


def sequence_labels(config: Any, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Labels of rows as the config's problem type has them."""
    if config.problem_type == "regression" or config.num_labels == 1:
        shape = (rows,) if config.num_labels == 1 else (rows, config.num_labels)
        return rng.normal(size=shape).astype(np.float32)
    if config.problem_type == "multi_label_classification":
        return rng.integers(0, 2, (rows, config.num_labels)).astype(np.float32)
    return rng.integers(0, config.num_labels, rows).astype(np.int32)


def random_labels(rng: np.random.Generator, ending: str) -> dict[str, Any]:
    """Labels and problem type of a random config."""
    if ending == "ForTokenClassification":
        return {"num_labels": int(rng.integers(1, 6))}
    if ending != "ForSequenceClassification":
        return {}
    problem = rng.choice(["regression", "single_label_classification", "multi_label_classification", "none"])
    least = 2 if problem == "single_label_classification" else 1
    if problem == "multi_label_classification":
        least = 2
    return {"num_labels": int(rng.integers(least, 5)), "problem_type": None if problem == "none" else str(problem)}
