"""Encoder heads in Hugging Face configs: the class that `architectures` names, labels and what they are.

    BertForMaskedLM                  MaskedLM
    BertForPreTraining               PreTraining
    BertForSequenceClassification    SequenceClassification
    BertForTokenClassification       TokenClassification
    BertForQuestionAnswering         QuestionAnswering
    BertModel                        None

Every family of encoders spells them so, after its own name; not every family has all.
"""

from collections.abc import Mapping
from typing import Any, get_args

from llmlab.models.config import Tied, Untied
from llmlab.models.encoder import Encoder
from llmlab.models.heads import (
    EncoderHead,
    Labelled,
    MaskedLM,
    PreTraining,
    ProblemType,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from llmlab.models.hf_config import Attributes

CLASSES: dict[str, type[EncoderHead] | None] = {
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "Model": None,
}
"""Ending of the class in `architectures` -> head."""


def kind_of_head(hf: Attributes, stem: str, *absent: type[EncoderHead]) -> type[EncoderHead] | None:
    """Class of the head that a config names; that of a masked language model where it names none.

    Args:
        hf: the config.
        stem: beginning of the family's class names: "Bert".
        absent: heads that the family does not have.
    """
    return hf.architecture({f"{stem}{ending}": kind for ending, kind in CLASSES.items() if kind not in absent})


def class_of_head(head: EncoderHead | None, stem: str) -> str:
    """The class of transformers that has this head."""
    return next(f"{stem}{ending}" for ending, kind in CLASSES.items() if kind is (type(head) if head else None))


def labels_from_hf(hf: Attributes) -> dict[str, Any]:
    """`num_labels` and `names`: names that only count, LABEL_0 and so on, are none."""
    names = hf.optional("id2label", dict)
    hf.optional("label2id", dict)
    if names is None:
        return {"num_labels": hf.integer("num_labels", 2)}
    hf.optional("num_labels", int)
    try:
        ordered = tuple(str(name) for _, name in sorted((int(number), name) for number, name in names.items()))
    except ValueError:
        hf.problem(f"id2label={names!r} has keys that are no numbers")
        return {}
    numbered = ordered == tuple(f"LABEL_{i}" for i in range(len(ordered)))
    return {"num_labels": len(ordered), "names": None if numbered else ordered}


def labels_to_hf(head: EncoderHead | None) -> dict[str, Any]:
    """`id2label`, `label2id` and `problem_type` of a head that has labels."""
    if not isinstance(head, Labelled):
        return {}
    names = head.names or tuple(f"LABEL_{i}" for i in range(head.num_labels))
    labels: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if isinstance(head, SequenceClassification) and head.problem_type is not None:
        labels["problem_type"] = head.problem_type
    return labels


def problem_from_hf(hf: Attributes) -> ProblemType | None:
    """What the labels of sequences are."""
    if not hf.given("problem_type"):
        return None
    return hf.choice("problem_type", {name: name for name in get_args(ProblemType)}, get_args(ProblemType)[0])


def decoder_from_hf(hf: Attributes) -> Mapping[str, Any]:
    """Fields of a masked language model's head: one bias, the head's where the decoder is tied, else the decoder's."""
    if hf.flag("tie_word_embeddings", True):
        return {"decoder": Tied(), "bias": True}
    return {"decoder": Untied(bias=True), "bias": False}


def is_tied(model: Encoder) -> bool:
    """Whether the embedding table scores; true where nothing scores tokens."""
    return not (isinstance(model.head, MaskedLM) and isinstance(model.head.decoder, Untied))
