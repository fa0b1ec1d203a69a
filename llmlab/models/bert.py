"""BERT (Devlin et al. 2019, 1810.04805): the encoder that pretraining by filling gaps made general.

    token + position + segment type -> LayerNorm -> x
    x --+-- attention --(+)-- LayerNorm --+-- MLP --(+)-- LayerNorm -- y       y = norm(h + MLP(h)),
        +----------------|                +----------|                        h = norm(x + Attention(x))

Post-norm blocks, as in the original Transformer: nothing is left to normalise after the last one, and training needs
warm-up. Attention is over both sides. Pretraining asks for 15% of the tokens, most of them replaced by [MASK], and
whether the second of two segments follows the first, from tanh(W x_0 + b) of the first token, [CLS].

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 S D in attention; 12 D^2 parameters. What it
trades: a state sees all of its sentence, but a pass teaches 15% of the tokens only, and nothing is generated.

TinyBERT (Jiao et al. 2020, 1909.10351) and MiniLM (Wang et al. 2020, 2002.10957) are this architecture, smaller and
distilled from a larger BERT, which is where they differ: TinyBERT copied attention maps and states of all layers,
MiniLM only the attention and the relations of values in the last.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import named
from llmlab.models.encoder import Encoder
from llmlab.models.family import Family, HuggingFace
from llmlab.models.heads import (
    EncoderHead,
    Labelled,
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
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PostNorm


def bert(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    max_length: int = 512,
    position_offset: int = 0,
    vocab_size: int | None = None,
    num_token_types: int = 2,
    activation: Activation = "gelu",
    epsilon: float = 1e-12,
    dropout: float = 0.0,
    attention_dropout: float | None = None,
    embedding_std: float = 0.02,
    unpositioned_token: int | None = None,
    pooler: Pooler | None = Pooler(),  # noqa: B008  frozen
    head: EncoderHead | None = PreTraining(),  # noqa: B008  frozen
) -> Encoder:
    """The BERT shape at any size; `dropout` holds for attention weights too unless theirs is given."""
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            bias=True,
            output_bias=True,
            dropout=dropout if attention_dropout is None else attention_dropout,
        ),
        ffn=MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation=activation),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PostNorm(),
        dropout=dropout,
    )
    return Encoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position=Learned(max_length, offset=position_offset, std=embedding_std),
        num_token_types=num_token_types,
        embedding_norm=LayerNorm(epsilon=epsilon),
        embedding_std=embedding_std,
        embedding_dropout=dropout,
        unpositioned_token=unpositioned_token,
        pooler=pooler,
        head=head,
    )


_english = partial(bert, vocab_size=30522)
_distilled = partial(_english, head=None)

PRESETS: dict[str, Encoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "bert-nano": bert(embed_dim=192, num_layers=4, num_heads=6),
    # Turc et al. 2019 (1908.08962), table 1
    "bert-tiny": _english(embed_dim=128, num_layers=2, num_heads=2),
    "bert-mini": _english(embed_dim=256, num_layers=4, num_heads=4),
    "bert-small": _english(embed_dim=512, num_layers=4, num_heads=8),
    "bert-medium": _english(embed_dim=512, num_layers=8, num_heads=8),
    # the two of the paper
    "bert-base": _english(embed_dim=768, num_layers=12, num_heads=12),
    "bert-large": _english(embed_dim=1024, num_layers=24, num_heads=16),
    # distilled ones, published without a pretraining head
    "tinybert-4-312": _distilled(embed_dim=312, num_layers=4, num_heads=12, hidden_dim=1200),
    "tinybert-6-768": _distilled(embed_dim=768, num_layers=6, num_heads=12),
    "minilm-l6-h384": _distilled(embed_dim=384, num_layers=6, num_heads=12),
    "minilm-l12-h384": _distilled(embed_dim=384, num_layers=12, num_heads=12),
    "minilm-l6-h768": _distilled(embed_dim=768, num_layers=6, num_heads=12),
}


def preset(name: str) -> Encoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Encoder:
    """Model of a Hugging Face config with model_type bert; ValueError lists every attribute that is not implemented."""
    hf = Attributes(config, "bert")
    kind, body = kind_of_head(hf, "Bert"), body_from_hf(hf)
    max_length = hf.integer("max_position_embeddings", 512)
    dropout = classifier_dropout(hf, body)
    summarised = kind in (PreTraining, SequenceClassification, None)
    problem, labels, decoder = problem_from_hf(hf), labels_from_hf(hf), decoder_from_hf(hf)
    transform = Transform(activation=body["activation"], norm=LayerNorm(epsilon=body["epsilon"]))
    # directionality, pooler_*: of the first release's converter; cell, emb_size, ...: of TinyBERT's
    hf.finish(
        *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
        *("pooler_size_per_head", "pooler_type", "cell", "emb_size", "pre_trained", "structure", "training"),
    )
    head: EncoderHead | None = None
    if kind is not None and issubclass(kind, MaskedLM):
        head = kind(transform=transform, **decoder)
    elif kind is SequenceClassification:
        head = SequenceClassification(dropout=dropout, problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=dropout, **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering()
    return bert(**body, max_length=max_length, pooler=Pooler() if summarised else None, head=head)


def to_hf(model: Encoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a bert config cannot express."""
    config = body_to_hf(model, "bert", "Bert") | {"max_position_embeddings": model.max_length}
    check_same(model, from_hf(config), "bert")
    return config


def body_from_hf(hf: Attributes) -> dict[str, Any]:
    """Arguments of `bert` that its relatives have in common, from attributes that they spell alike."""
    hf.common()
    hf.fixed("is_decoder", False)
    hf.fixed("position_embedding_type", "absolute")
    return {
        "embed_dim": hf.integer("hidden_size", 768),
        "num_layers": hf.integer("num_hidden_layers", 12),
        "num_heads": hf.integer("num_attention_heads", 12),
        "hidden_dim": hf.integer("intermediate_size", 3072),
        "vocab_size": hf.integer("vocab_size", 30522),
        "num_token_types": hf.integer("type_vocab_size", 2),
        "activation": hf.choice("hidden_act", ACTIVATIONS, "gelu"),
        "epsilon": hf.real("layer_norm_eps", 1e-12),
        "dropout": hf.real("hidden_dropout_prob", 0.1),
        "attention_dropout": hf.real("attention_probs_dropout_prob", 0.1),
        "embedding_std": hf.real("initializer_range", 0.02),
    }


def classifier_dropout(hf: Attributes, body: Mapping[str, Any]) -> float:
    """Dropout of a head over labels; that of the layers where the config gives none."""
    return hf.real("classifier_dropout", body["dropout"])


def body_to_hf(model: Encoder, family: str, stem: str) -> dict[str, Any]:
    """What the configs of BERT and its relatives have in common, positions aside.

    Args:
        model: the model.
        family: the family's `model_type`.
        stem: beginning of its class names.

    Raises:
        ValueError: the model is not made of BERT's parts.
    """
    block, position = block_of(model, family), model.position
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (
        isinstance(mixer, Attention)
        and isinstance(ffn, MLP)
        and isinstance(layer_norm, LayerNorm)
        and isinstance(position, Learned)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm, position))
        raise ValueError(f"{family} is made of Attention, MLP, LayerNorm and Learned positions; this model of {parts}")
    return {
        "architectures": [class_of_head(model.head, stem)],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "intermediate_size": ffn.hidden_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "type_vocab_size": model.num_token_types,
        "initializer_range": model.embedding_std,
        "layer_norm_eps": layer_norm.epsilon,
        "classifier_dropout": model.head.dropout if isinstance(model.head, Labelled) else None,
        "tie_word_embeddings": is_tied(model),
        "torch_dtype": "float32",
        **labels_to_hf(model.head),
    }


def body_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of embedding, layers and pooler, which BERT's relatives name alike after their own prefix."""
    tensors, path = f"{prefix}.encoder.layer.{{layer}}", "stack.{layer}"
    return (
        Row(f"{prefix}.embeddings.word_embeddings.weight", "embedding.tokens.table"),
        Row(f"{prefix}.embeddings.position_embeddings.weight", "embedding.position.table"),
        Row(f"{prefix}.embeddings.token_type_embeddings.weight", "embedding.segments.types.table"),
        *norm(f"{prefix}.embeddings.LayerNorm", "embedding.norm"),
        *(
            row
            for name in ("query", "key", "value")
            for row in linear(f"{tensors}.attention.self.{name}", f"{path}.mixer.{name}")
        ),
        *linear(f"{tensors}.attention.output.dense", f"{path}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{tensors}.attention.output.LayerNorm", f"{path}.mixer_branch.norm_sum"),
        *linear(f"{tensors}.intermediate.dense", f"{path}.ffn.up"),
        *linear(f"{tensors}.output.dense", f"{path}.ffn.down"),
        *norm(f"{tensors}.output.LayerNorm", f"{path}.ffn_branch.norm_sum"),
        *linear(f"{prefix}.pooler.dense", "pooler.dense"),
    )


LM_ROWS: tuple[Row, ...] = (
    *linear("cls.predictions.transform.dense", "head.transform.dense"),
    *norm("cls.predictions.transform.LayerNorm", "head.transform.norm"),
    Row("cls.predictions.bias", "head.bias"),
    *linear("cls.predictions.decoder", "head.decoder"),
    *linear("cls.seq_relationship", "head.seq_relationship"),
)
"""Rows of the pretraining heads."""

LABEL_ROWS: tuple[Row, ...] = (*linear("classifier", "head.tagger"), *linear("qa_outputs", "head.spans"))
"""Rows of the heads over the labels of tokens and over spans, which most relatives name alike."""

WEIGHTS = WeightTable(
    prefix="bert.",
    head="head",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    # A checkpoint of pretraining holds heads that a masked language model or a tagger has no use for.
    ignored=(
        "bert.embeddings.position_ids",
        *(f"{name}.{kind}" for name in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")),
    ),
    synonyms={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    rows=(*body_rows("bert"), *LM_ROWS, *linear("classifier", "head.classifier"), *LABEL_ROWS),
)

HEADS = ("PreTraining", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "None")

FAMILY = Family(
    name="BERT",
    kind="encoder",
    paper="Devlin et al. 2019 (1810.04805)",
    presets=PRESETS,
    heads=HEADS,
    objectives=(
        *("MaskedToken", "MaskedTokenAndNextSentence"),
        *("Classification", "TokenClassification", "QuestionAnswering"),
    ),
    reference="transformers BertForPreTraining and its other heads",
    hugging_face=HuggingFace(model_type="bert", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=Encoder),
)
