"""BigBird (Zaheer et al. 2020, 2007.14062): BERT for long documents, its attention near, global and random blocks.

    token + position + segment type -> LayerNorm -> (attention -(+)- LayerNorm - MLP -(+)- LayerNorm) x num_layers

    attention of block i          first, last | i-1, i, i+1 | R random blocks       O(S (5 + R) b)
    attention of the end blocks   all blocks                                        O(S b)

The blocks of layers are BERT's but for the attention (see nn/big_bird.py), and so are heads and pretraining; weights
start from RoBERTa's. Against Longformer: what is global is a place (the ends of the row) and not data, and random
blocks join what is neither near nor global. A question is answered from the text behind it: its own tokens, up to the
separator, cannot be the answer, and the head is a feed-forward layer deeper than BERT's.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 (5 + R) b D in attention, whatever S; 12 D^2
parameters. What it trades: every layer needs its own random blocks, which are part of what a model has learnt with;
sequences below (5 + 2 R) b tokens gain nothing.

transformers draws the blocks in training, and takes the first block for all of them when it evaluates. So does a model
from a directory, whose config knows no seed; a model of the presets keeps its blocks, and its seed goes along when it
is saved.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.bert import LM_ROWS, bert, body_from_hf, body_rows, body_to_hf, classifier_dropout
from llmlab.models.big_bird_model import BigBird, DeepQuestionAnswering
from llmlab.models.config import named
from llmlab.models.encoder import Encoder
from llmlab.models.family import Family, HuggingFace
from llmlab.models.heads import (
    EncoderHead,
    MaskedLM,
    Pooler,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    Transform,
)
from llmlab.models.hf_config import Attributes, canonical_block, check_same
from llmlab.models.hf_heads import decoder_from_hf, kind_of_head, labels_from_hf, problem_from_hf
from llmlab.models.weights import WeightTable, linear, norm
from llmlab.nn.attention import Attention
from llmlab.nn.big_bird import BigBirdAttention
from llmlab.nn.norms import LayerNorm

EPSILON = 1e-12
"""Of the published models' norms."""


def big_bird(
    *,
    block_size: int = 64,
    num_random_blocks: int = 3,
    seed: int | None = 0,
    separator: int = 66,
    head: EncoderHead | None = None,
    **sizes: Any,
) -> BigBird:
    """The BigBird shape at any size; a masked language model where no head is given.

    Args:
        block_size: tokens per block.
        num_random_blocks: random blocks that a block of queries meets.
        seed: of the random blocks; None takes the first block for all, as transformers does when it evaluates.
        separator: the token that ends a question.
        head: what is answered.
        sizes: as for `bert`.
    """
    head = head or MaskedLM(transform=Transform(activation="gelu_tanh", norm=LayerNorm(epsilon=EPSILON)))
    # transformers gives every model but that for questions a pooler, read or not
    pooler = None if isinstance(head, QuestionAnswering) else Pooler()
    defaults = {"activation": "gelu_tanh", "epsilon": EPSILON, "max_length": 4096, "pooler": pooler}
    body = bert(**defaults | sizes, head=head)
    return _sparse(body, separator, block_size=block_size, num_random_blocks=num_random_blocks, seed=seed)


def _sparse(body: Encoder, separator: int, *, bias: bool = True, **pattern: Any) -> BigBird:
    """BERT's body with BigBird's attention; with plain attention where no pattern is given."""
    block = body.pattern[0]
    attention = {**vars(block.mixer), "bias": bias}
    mixers = [BigBirdAttention(**attention, **pattern, layer=i) for i in range(body.num_layers) if pattern]
    blocks = tuple(dataclasses.replace(block, mixer=mixer) for mixer in mixers or [Attention(**attention)])
    return BigBird(**{**vars(body), "pattern": blocks}, separator=separator)


_english = partial(big_bird, vocab_size=50358)

PRESETS: dict[str, BigBird] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "bigbird-nano": big_bird(embed_dim=192, num_layers=4, num_heads=6, block_size=32),
    "bigbird-roberta-base": _english(embed_dim=768, num_layers=12, num_heads=12),
    "bigbird-roberta-large": _english(embed_dim=1024, num_layers=24, num_heads=16),
}


def preset(name: str) -> BigBird:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> BigBird:
    """Model of a Hugging Face config with model_type big_bird; ValueError lists all that is not implemented."""
    hf = Attributes({"vocab_size": 50358, "hidden_act": "gelu_new", **config}, "big_bird")
    kind, body = kind_of_head(hf, "BigBird"), body_from_hf(hf)
    hf.fixed("rescale_embeddings", False)
    blocks = {
        "block_size": hf.integer("block_size", 64),
        "num_random_blocks": hf.integer("num_random_blocks", 3),
        "seed": hf.optional("random_block_seed", int),
    }
    sparse = hf.choice("attention_type", {"block_sparse": True, "original_full": False}, "block_sparse")
    bias, max_length = hf.flag("use_bias", True), hf.integer("max_position_embeddings", 4096)
    separator = hf.optional("sep_token_id", int, 66)
    dropout = classifier_dropout(hf, body)
    problem, labels, decoder = problem_from_hf(hf), labels_from_hf(hf), decoder_from_hf(hf)
    hf.finish()
    assert separator is not None
    activation, layer_norm = body["activation"], LayerNorm(epsilon=body["epsilon"])
    head: EncoderHead | None = None
    if kind is not None and issubclass(kind, MaskedLM):
        head = kind(transform=Transform(activation=activation, norm=layer_norm), **decoder)
    elif kind is SequenceClassification:
        own = Pooler(activation=activation, dropout=dropout)
        head = SequenceClassification(pooler=own, dropout=dropout, problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=dropout, **labels)
    elif kind is QuestionAnswering:
        deep = {"hidden_dim": body["hidden_dim"], "activation": activation, "norm": layer_norm}
        head = DeepQuestionAnswering(dropout=body["dropout"], **deep)
    encoder = bert(**body, max_length=max_length, pooler=None if kind is QuestionAnswering else Pooler(), head=head)
    return _sparse(encoder, separator, bias=bias, **blocks if sparse else {})


def to_hf(model: BigBird) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a big_bird config cannot express.

    `random_block_seed` is llmlab's own; transformers keeps such attributes and looks at none of them.
    """
    blocks = [canonical_block(block, model.embed_dim) for block in model.layers()]
    mixer = blocks[0].mixer
    if not isinstance(mixer, Attention):
        raise ValueError(f"big_bird is made of BigBirdAttention or Attention; this model of {type(mixer).__name__}")
    sparse = isinstance(mixer, BigBirdAttention)
    for number, block in enumerate(blocks):
        alike = dataclasses.replace(mixer, layer=number) if sparse else mixer
        if block != dataclasses.replace(blocks[0], mixer=alike):
            raise ValueError(f"big_bird's layers differ in their random blocks alone; layer {number} differs in more")
    head = QuestionAnswering() if isinstance(model.head, DeepQuestionAnswering) else model.head
    config = body_to_hf(dataclasses.replace(model, pattern=model.pattern[:1], head=head), "big_bird", "BigBird")
    config |= {
        "attention_type": "block_sparse" if sparse else "original_full",
        "use_bias": mixer.bias,
        "sep_token_id": model.separator,
        "max_position_embeddings": model.max_length,
    }
    if isinstance(mixer, BigBirdAttention):
        config |= {"block_size": mixer.block_size, "num_random_blocks": mixer.num_random_blocks}
        config |= {} if mixer.seed is None else {"random_block_seed": mixer.seed}
    check_same(model, from_hf(config), "big_bird")
    return config


WEIGHTS = WeightTable(
    prefix="bert.",
    head="head",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unread={"cls.predictions.bias": "cls.predictions.decoder.bias"},
    # A checkpoint of pretraining holds a head that a masked language model or a tagger has no use for.
    ignored=("bert.embeddings.position_ids", "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    rows=(
        *(row for row in body_rows("bert") if row.path != "pooler.dense.kernel" and row.path != "pooler.dense.bias"),
        *linear("bert.pooler", "pooler.dense"),
        *LM_ROWS,
        *linear("classifier.dense", "head.pooler.dense"),
        *linear("classifier.out_proj", "head.classifier"),
        *linear("qa_classifier.intermediate.dense", "head.up"),
        *linear("qa_classifier.output.dense", "head.down"),
        *norm("qa_classifier.output.LayerNorm", "head.norm"),
        *linear("qa_classifier.qa_outputs", "head.spans"),
        *linear("classifier", "head.tagger"),
    ),
)

FAMILY = Family(
    name="BigBird",
    kind="encoder",
    paper="Zaheer et al. 2020 (2007.14062)",
    presets=PRESETS,
    heads=("PreTraining", "MaskedLM", "SequenceClassification", "TokenClassification", "DeepQuestionAnswering", "None"),
    objectives=(
        *("MaskedToken", "MaskedTokenAndNextSentence"),
        *("Classification", "TokenClassification", "QuestionAnswering"),
    ),
    reference="transformers BigBirdForPreTraining and its other heads",
    hugging_face=HuggingFace(model_type="big_bird", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=BigBird),
)
