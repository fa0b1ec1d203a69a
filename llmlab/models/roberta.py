"""RoBERTa (Liu et al. 2019, 1907.11692): BERT's architecture, trained well.

    token + position + type -> LayerNorm -> (attention -(+)- LayerNorm - MLP -(+)- LayerNorm) x num_layers

The blocks are BERT's (see bert.py). What differs is training: no next-sentence objective and so no segments (one token
type), masks drawn anew at every pass over the data, ten times the text, batches of 8,000, a vocabulary of 50,265
byte-level pieces. Sentences are classified by a dense layer of the classifier's own instead of a pretrained pooler.

Positions are counted from the padding token's index on: the table's first rows are never used and the others stand for
the first, second, ... token that is no padding, on whichever side of a row the padding is.

Costs and trades are BERT's; the paper's finding is that BERT was undertrained.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.bert import LABEL_ROWS, bert, body_from_hf, body_rows, body_to_hf, classifier_dropout
from llmlab.models.config import named
from llmlab.models.encoder import Encoder
from llmlab.models.family import Family, HuggingFace
from llmlab.models.heads import (
    EncoderHead,
    MaskedLM,
    Pooler,
    PreTraining,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    Transform,
)
from llmlab.models.hf_config import Attributes, check_same
from llmlab.models.hf_heads import decoder_from_hf, kind_of_head, labels_from_hf, problem_from_hf
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned

EPSILON = 1e-5
"""Of the published models' norms; fairseq's default."""


def roberta(*, padding: int = 1, epsilon: float = EPSILON, head: EncoderHead | None = None, **sizes: Any) -> Encoder:
    """The RoBERTa shape at any size; a masked language model where no head is given.

    Args:
        padding: the tokenizer's padding token, from which positions are counted.
        epsilon: added to the variance in norms.
        head: what is answered.
        sizes: as for `bert`.
    """
    defaults = {"num_token_types": 1, "pooler": None}
    return bert(
        **defaults | sizes,
        epsilon=epsilon,
        position_offset=padding + 1,
        unpositioned_token=padding,
        head=head or MaskedLM(transform=Transform(norm=LayerNorm(epsilon=epsilon))),
    )


_english = partial(roberta, vocab_size=50265)

PRESETS: dict[str, Encoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "roberta-nano": roberta(embed_dim=192, num_layers=4, num_heads=6),
    "roberta-base": _english(embed_dim=768, num_layers=12, num_heads=12),
    "roberta-large": _english(embed_dim=1024, num_layers=24, num_heads=16),
    # Sanh et al. 2019 (1910.01108): six layers, distilled from roberta-base
    "roberta-distilled": _english(embed_dim=768, num_layers=6, num_heads=12),
}


def preset(name: str) -> Encoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Encoder:
    """Model of a Hugging Face config with model_type roberta; ValueError lists all that is not implemented."""
    hf = Attributes(config, "roberta")
    kind, body = kind_of_head(hf, "Roberta", PreTraining), body_from_hf(hf)
    padding, rows = hf.optional("pad_token_id", int, 1), hf.integer("max_position_embeddings", 512)
    if padding is None or padding < 0 or rows <= padding + 1:
        hf.problem(f"pad_token_id={padding} leaves no positions of max_position_embeddings={rows}")
    dropout = classifier_dropout(hf, body)
    problem, labels, decoder = problem_from_hf(hf), labels_from_hf(hf), decoder_from_hf(hf)
    hf.finish()
    assert padding is not None
    head: EncoderHead | None = None
    if kind is MaskedLM:
        head = MaskedLM(transform=Transform(norm=LayerNorm(epsilon=body["epsilon"])), **decoder)
    elif kind is SequenceClassification:
        own = Pooler(dropout=dropout)
        head = SequenceClassification(pooler=own, dropout=dropout, problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=dropout, **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering()
    return bert(
        **body,
        max_length=rows - padding - 1,
        position_offset=padding + 1,
        unpositioned_token=padding,
        pooler=Pooler() if head is None else None,
        head=head,
    )


def to_hf(model: Encoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a roberta config cannot express."""
    config = body_to_hf(model, "roberta", "Roberta")
    assert isinstance(model.position, Learned)
    if model.unpositioned_token is None:
        raise ValueError("roberta counts positions from its padding token; set unpositioned_token to the tokenizer's")
    config |= {
        "pad_token_id": model.unpositioned_token,
        "max_position_embeddings": model.position.max_length + model.position.offset,
    }
    check_same(model, from_hf(config), "roberta")
    return config


WEIGHTS = WeightTable(
    prefix="roberta.",
    head="head",
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    unread={"lm_head.bias": "lm_head.decoder.bias"},
    # A checkpoint of another head may hold a pooler that this one has no use for.
    ignored=("roberta.embeddings.position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
    rows=(
        *body_rows("roberta"),
        *linear("lm_head.dense", "head.transform.dense"),
        *norm("lm_head.layer_norm", "head.transform.norm"),
        Row("lm_head.bias", "head.bias"),
        *linear("lm_head.decoder", "head.decoder"),
        *linear("classifier.dense", "head.pooler.dense"),
        *linear("classifier.out_proj", "head.classifier"),
        *LABEL_ROWS,
    ),
)

FAMILY = Family(
    name="RoBERTa",
    kind="encoder",
    paper="Liu et al. 2019 (1907.11692)",
    presets=PRESETS,
    heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "None"),
    objectives=("MaskedToken", "Classification", "TokenClassification", "QuestionAnswering"),
    reference="transformers RobertaForMaskedLM and its other heads",
    hugging_face=HuggingFace(model_type="roberta", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=Encoder),
)
