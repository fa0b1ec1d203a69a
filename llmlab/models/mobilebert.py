"""MobileBERT (Sun et al. 2020, 2004.02984): BERT-large's depth in a quarter of BERT-base's parameters.

    [token i+1; i; i-1] (3 x 128) -> W -> + position + segment type -> g x + b -> x (512)
    x -> bottleneck block (512 -> 128 -> 512) x 24 -> head

Blocks are narrow inside (see nn/bottleneck.py), with four feed-forwards each; LayerNorm is replaced by a gain and a
shift, gelu by relu, for the sake of phones; the token table is 128 wide, widened by a matrix that reads a token with
its neighbours. It cannot be trained from nothing as it is: a teacher of BERT-large's size with such bottlenecks holds
its states and attention maps in place, layer by layer.

The masked language model's decoder scores 512 dimensions: the first 128 with the token table, the others with a matrix
of its own.

Cost: 25 million parameters; 4.3 times smaller and 5.5 times faster than BERT-base at nearly its scores (abstract).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.bert import HEADS, LABEL_ROWS, LM_ROWS, classifier_dropout
from llmlab.models.config import named
from llmlab.models.encoder import Encoder, Factorised
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
from llmlab.models.hf_heads import class_of_head, kind_of_head, labels_from_hf, labels_to_hf, problem_from_hf
from llmlab.models.transforms import Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.bottleneck import Bottleneck
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm, NoNorm
from llmlab.nn.positions import Learned

MAX_FFNS = 16
"""Feed-forwards in a block that the weight table has rows for; published models have 4 and 2."""


def mobilebert(
    *,
    embed_dim: int = 512,
    num_layers: int = 24,
    num_heads: int = 4,
    width: int = 128,
    hidden_dim: int = 512,
    num_ffns: int = 4,
    narrow_values: bool = False,
    table_dim: int = 128,
    neighbours: int = 1,
    max_length: int = 512,
    vocab_size: int | None = None,
    num_token_types: int = 2,
    activation: Activation = "relu",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    embedding_std: float = 0.02,
    head: EncoderHead | None = PreTraining(transform=Transform(activation="relu")),  # noqa: B008  frozen
) -> Encoder:
    """The MobileBERT shape at any size; `width`, `hidden_dim` and heads are those inside the bottleneck."""
    if width % num_heads:
        raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
    block = Block(
        mixer=Attention(
            num_heads=num_heads,
            head_dim=width // num_heads,
            bias=True,
            output_bias=True,
            dropout=attention_dropout,
        ),
        ffn=MLP(hidden_dim=hidden_dim, activation=activation),
        norm=NoNorm(),
        wiring=Bottleneck(width=width, num_ffns=num_ffns, narrow_values=narrow_values),
        dropout=dropout,
    )
    factorised = Factorised(dim=table_dim, neighbours=neighbours) if neighbours or table_dim != embed_dim else None
    pools = head is None or head.reads_pooled
    return Encoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position=Learned(max_length, std=embedding_std),
        num_token_types=num_token_types,
        factorised=factorised,
        embedding_norm=NoNorm(),
        embedding_std=embedding_std,
        embedding_dropout=dropout,
        pooler=Pooler() if pools else None,
        head=head,
    )


PRESETS: dict[str, Encoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "mobilebert-nano": mobilebert(embed_dim=192, num_layers=6, width=64, hidden_dim=256, num_ffns=2, table_dim=64),
    "mobilebert": mobilebert(vocab_size=30522),
    # half the feed-forwards and narrow values (paper, table 1)
    "mobilebert-tiny": mobilebert(vocab_size=30522, num_ffns=2, narrow_values=True),
}


def preset(name: str) -> Encoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Encoder:
    """Model of a Hugging Face config with model_type mobilebert; ValueError lists all that is not implemented."""
    hf = Attributes(config, "mobilebert")
    hf.common()
    kind = kind_of_head(hf, "MobileBert")
    width, narrow = hf.integer("intra_bottleneck_size", 128), hf.flag("use_bottleneck_attention", False)
    hf.fixed("use_bottleneck", True)
    hf.fixed("key_query_shared_bottleneck", not narrow)
    hf.fixed("true_hidden_size", width)
    for name, only in {"is_decoder": False, "normalization_type": "no_norm", "classifier_activation": True}.items():
        hf.fixed(name, only)
    hf.fixed("tie_word_embeddings", True)
    num_ffns, activation = hf.integer("num_feedforward_networks", 4), hf.choice("hidden_act", ACTIVATIONS, "relu")
    if num_ffns > MAX_FFNS:
        hf.problem(f"num_feedforward_networks={num_ffns} is beyond the {MAX_FFNS} that have rows in the weight table")
    body: dict[str, Any] = {
        "embed_dim": hf.integer("hidden_size", 512),
        "num_layers": hf.integer("num_hidden_layers", 24),
        "num_heads": hf.integer("num_attention_heads", 4),
        "hidden_dim": hf.integer("intermediate_size", 512),
        "table_dim": hf.integer("embedding_size", 128),
        "neighbours": int(hf.flag("trigram_input", True)),
        "max_length": hf.integer("max_position_embeddings", 512),
        "vocab_size": hf.integer("vocab_size", 30522),
        "num_token_types": hf.integer("type_vocab_size", 2),
        "dropout": hf.real("hidden_dropout_prob", 0.0),
        "attention_dropout": hf.real("attention_probs_dropout_prob", 0.1),
        "embedding_std": hf.real("initializer_range", 0.02),
    }
    if not body["neighbours"] and body["table_dim"] == body["embed_dim"]:
        hf.problem("trigram_input=False with embedding_size=hidden_size leaves embedding_transformation without a use")
    transform = Transform(activation=activation, norm=LayerNorm(epsilon=hf.real("layer_norm_eps", 1e-12)))
    dropout = classifier_dropout(hf, body)
    problem, labels = problem_from_hf(hf), labels_from_hf(hf)
    hf.finish()
    head: EncoderHead | None = None
    if kind is not None and issubclass(kind, MaskedLM):
        head = kind(transform=transform)
    elif kind is SequenceClassification:
        head = SequenceClassification(dropout=dropout, problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=dropout, **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering()
    build = partial(mobilebert, **body, width=width, num_ffns=num_ffns, narrow_values=narrow, activation=activation)
    return build(head=head)


def to_hf(model: Encoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a mobilebert config cannot express."""
    block, position, head = block_of(model, "mobilebert"), model.position, model.head
    mixer, ffn, wiring = block.mixer, block.ffn, block.wiring
    if not (
        isinstance(mixer, Attention)
        and isinstance(ffn, MLP)
        and isinstance(wiring, Bottleneck)
        and isinstance(position, Learned)
    ):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, wiring, position))
        raise ValueError(f"mobilebert is made of Attention, MLP, Bottleneck and Learned positions; this of {parts}")
    transform = head.transform if isinstance(head, MaskedLM) else None
    config: dict[str, Any] = {
        "architectures": [class_of_head(head, "MobileBert")],
        "model_type": "mobilebert",
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "intermediate_size": ffn.hidden_dim,
        "embedding_size": model.table_dim,
        "trigram_input": model.factorised is not None and model.factorised.neighbours == 1,
        "use_bottleneck": True,
        "intra_bottleneck_size": wiring.width,
        "use_bottleneck_attention": wiring.narrow_values,
        "key_query_shared_bottleneck": not wiring.narrow_values,
        "num_feedforward_networks": wiring.num_ffns,
        "normalization_type": "no_norm",
        "max_position_embeddings": position.max_length,
        "type_vocab_size": model.num_token_types,
        "hidden_act": activation_to_hf(ffn.activation),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": mixer.dropout,
        "initializer_range": model.embedding_std,
        "layer_norm_eps": transform.norm.epsilon if transform and isinstance(transform.norm, LayerNorm) else 1e-12,
        "classifier_dropout": head.dropout if isinstance(head, Labelled) else None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **labels_to_hf(head),
    }
    check_same(model, from_hf(config), "mobilebert")
    return config


_TENSORS, _PATH = "mobilebert.encoder.layer.{layer}", "stack.{layer}"


def _ffn_rows(tensors: str, ffn: str, ffn_norm: str) -> tuple[Row, ...]:
    """Rows of one of a block's feed-forwards."""
    return (
        *linear(f"{tensors}.intermediate.dense", f"{ffn}.up"),
        *linear(f"{tensors}.output.dense", f"{ffn}.down"),
        *norm(f"{tensors}.output.LayerNorm", ffn_norm),
    )


def _narrowing_rows(tensors: str, path: str) -> tuple[Row, ...]:
    """Rows of a way into the bottleneck."""
    return (*linear(f"{tensors}.dense", f"{path}.dense"), *norm(f"{tensors}.LayerNorm", f"{path}.norm"))


_EARLIER = [
    _ffn_rows(f"{_TENSORS}.ffn.{i}", f"{_PATH}.ffns.{i}", f"{_PATH}.ffn_norms.{i}") for i in range(MAX_FFNS - 1)
]

WEIGHTS = WeightTable(
    prefix="mobilebert.",
    head="head",
    tied={
        "cls.predictions.decoder.weight": "mobilebert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # A checkpoint of pretraining holds heads that a masked language model or a tagger has no use for.
    ignored=(
        "mobilebert.embeddings.position_ids",
        *(
            f"{name}.{kind}"
            for name in ("mobilebert.pooler.dense", "cls.seq_relationship")
            for kind in ("weight", "bias")
        ),
    ),
    rows=(
        Row("mobilebert.embeddings.word_embeddings.weight", "embedding.tokens.table"),
        Row("mobilebert.embeddings.position_embeddings.weight", "embedding.position.table"),
        Row("mobilebert.embeddings.token_type_embeddings.weight", "embedding.segments.types.table"),
        *linear("mobilebert.embeddings.embedding_transformation", "embedding.projection"),
        *norm("mobilebert.embeddings.LayerNorm", "embedding.norm"),
        *_narrowing_rows(f"{_TENSORS}.bottleneck.input", f"{_PATH}.enter"),
        *_narrowing_rows(f"{_TENSORS}.bottleneck.attention", f"{_PATH}.share"),
        *linear(f"{_TENSORS}.attention.self.query", f"{_PATH}.mixer.query"),
        *linear(f"{_TENSORS}.attention.self.key", f"{_PATH}.mixer.key"),
        *linear(f"{_TENSORS}.attention.self.value", f"{_PATH}.mixer.value"),
        *linear(f"{_TENSORS}.attention.output.dense", f"{_PATH}.mixer.output", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.attention.output.LayerNorm", f"{_PATH}.mixer_norm"),
        *(row for rows in _EARLIER for row in rows),
        *_ffn_rows(_TENSORS, f"{_PATH}.ffn", f"{_PATH}.ffn_norm"),
        *linear(f"{_TENSORS}.output.bottleneck.dense", f"{_PATH}.leave"),
        *norm(f"{_TENSORS}.output.bottleneck.LayerNorm", f"{_PATH}.leave_norm"),
        *linear("mobilebert.pooler.dense", "pooler.dense"),
        *LM_ROWS,
        Row("cls.predictions.dense.weight", "head.rest.kernel"),
        *linear("classifier", "head.classifier"),
        *LABEL_ROWS,
    ),
)

FAMILY = Family(
    name="MobileBERT",
    kind="encoder",
    paper="Sun et al. 2020 (2004.02984)",
    presets=PRESETS,
    heads=HEADS,
    objectives=(
        *("MaskedToken", "MaskedTokenAndNextSentence"),
        *("Classification", "TokenClassification", "QuestionAnswering"),
    ),
    reference="transformers MobileBertForPreTraining and its other heads",
    hugging_face=HuggingFace(model_type="mobilebert", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=Encoder),
)
