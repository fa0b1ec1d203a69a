"""DistilBERT (Sanh et al. 2019, 1910.01108): BERT at half the depth, distilled.

    token + position -> LayerNorm -> (attention -(+)- LayerNorm - MLP -(+)- LayerNorm) x 6

The blocks are BERT's (see bert.py). Gone are every second layer, the segment types and the pooler: sentences are
classified from the first token's state through a dense layer with a relu of the classifier's own. It starts from its
teacher's layers and learns from the teacher's token distribution, the masked tokens and the cosine between states;
97% of BERT-base's score on GLUE at 60% of its time, says the paper.

Cost per token and layer: as BERT, 24 D^2 FLOPs forward in parameter matmuls and 4 S D in attention.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.bert import LABEL_ROWS, bert
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
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_heads import (
    class_of_head,
    decoder_from_hf,
    is_tied,
    kind_of_head,
    labels_from_hf,
    labels_to_hf,
    problem_from_hf,
)
from llmlab.models.transforms import Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.feed_forward import MLP
from llmlab.nn.positions import Learned

distilbert = partial(bert, num_token_types=0, pooler=None, head=MaskedLM())
"""The DistilBERT shape at any size; arguments as for `bert`."""

PRESETS: dict[str, Encoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "distilbert-nano": distilbert(embed_dim=192, num_layers=2, num_heads=6),
    "distilbert-base": distilbert(embed_dim=768, num_layers=6, num_heads=12, vocab_size=30522),
}


def preset(name: str) -> Encoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Encoder:
    """Model of a Hugging Face config with model_type distilbert; ValueError lists all that is not implemented."""
    hf = Attributes(config, "distilbert")
    hf.common()
    kind = kind_of_head(hf, "DistilBert", PreTraining)
    activation = hf.choice("activation", ACTIVATIONS, "gelu")
    dropout = hf.real("dropout", 0.1)
    answering, classifying = hf.real("qa_dropout", 0.1), hf.real("seq_classif_dropout", 0.2)
    build = partial(
        distilbert,
        embed_dim=hf.integer("dim", 768),
        num_layers=hf.integer("n_layers", 6),
        num_heads=hf.integer("n_heads", 12),
        hidden_dim=hf.integer("hidden_dim", 3072),
        max_length=hf.integer("max_position_embeddings", 512),
        vocab_size=hf.integer("vocab_size", 30522),
        activation=activation,
        dropout=dropout,
        attention_dropout=hf.real("attention_dropout", 0.1),
        embedding_std=hf.real("initializer_range", 0.02),
    )
    problem, labels, decoder = problem_from_hf(hf), labels_from_hf(hf), decoder_from_hf(hf)
    hf.fixed("tie_weights_", True)
    hf.finish("sinusoidal_pos_embds")  # how the table of positions began; checkpoints hold it
    head: EncoderHead | None = None
    if kind is MaskedLM:
        head = MaskedLM(transform=Transform(activation=activation), **decoder)
    elif kind is SequenceClassification:
        own = Pooler(activation="relu")
        head = SequenceClassification(pooler=own, dropout=classifying, problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=dropout, **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering(dropout=answering)
    return build(head=head)


def to_hf(model: Encoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a distilbert config cannot express."""
    block, position, head = block_of(model, "distilbert"), model.position, model.head
    mixer, ffn = block.mixer, block.ffn
    if not (isinstance(mixer, Attention) and isinstance(ffn, MLP) and isinstance(position, Learned)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, position))
        raise ValueError(f"distilbert is made of Attention, MLP and Learned positions; this model of {parts}")
    config = {
        "architectures": [class_of_head(head, "DistilBert")],
        "model_type": "distilbert",
        "vocab_size": model.vocab_size,
        "dim": model.embed_dim,
        "n_layers": model.num_layers,
        "n_heads": mixer.num_heads,
        "hidden_dim": ffn.hidden_dim,
        "max_position_embeddings": position.max_length,
        "activation": activation_to_hf(ffn.activation),
        "dropout": block.dropout,
        "attention_dropout": mixer.dropout,
        "qa_dropout": head.dropout if isinstance(head, QuestionAnswering) else 0.1,
        "seq_classif_dropout": head.dropout if isinstance(head, SequenceClassification) else 0.2,
        "initializer_range": model.embedding_std,
        "tie_word_embeddings": is_tied(model),
        "torch_dtype": "float32",
        **labels_to_hf(head),
    }
    check_same(model, from_hf(config), "distilbert")
    return config


_TENSORS, _PATH = "distilbert.transformer.layer.{layer}", "stack.{layer}"

WEIGHTS = WeightTable(
    prefix="distilbert.",
    head="head",
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ignored=("distilbert.embeddings.position_ids",),
    rows=(
        Row("distilbert.embeddings.word_embeddings.weight", "embedding.tokens.table"),
        Row("distilbert.embeddings.position_embeddings.weight", "embedding.position.table"),
        *norm("distilbert.embeddings.LayerNorm", "embedding.norm"),
        *linear(f"{_TENSORS}.attention.q_lin", f"{_PATH}.mixer.query"),
        *linear(f"{_TENSORS}.attention.k_lin", f"{_PATH}.mixer.key"),
        *linear(f"{_TENSORS}.attention.v_lin", f"{_PATH}.mixer.value"),
        *linear(f"{_TENSORS}.attention.out_lin", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.sa_layer_norm", f"{_PATH}.mixer_branch.norm_sum"),
        *linear(f"{_TENSORS}.ffn.lin1", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.ffn.lin2", f"{_PATH}.ffn.down"),
        *norm(f"{_TENSORS}.output_layer_norm", f"{_PATH}.ffn_branch.norm_sum"),
        *linear("vocab_transform", "head.transform.dense"),
        *norm("vocab_layer_norm", "head.transform.norm"),
        Row("vocab_projector.bias", "head.bias"),
        *linear("vocab_projector", "head.decoder"),
        *linear("pre_classifier", "head.pooler.dense"),
        *linear("classifier", "head.classifier"),
        *LABEL_ROWS,
    ),
)

FAMILY = Family(
    name="DistilBERT",
    kind="encoder",
    paper="Sanh et al. 2019 (1910.01108)",
    presets=PRESETS,
    heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "None"),
    objectives=("MaskedToken", "Classification", "TokenClassification", "QuestionAnswering"),
    reference="transformers DistilBertForMaskedLM and its other heads",
    hugging_face=HuggingFace(model_type="distilbert", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=Encoder),
)
