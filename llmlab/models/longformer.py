"""Longformer (Beltagy et al. 2020, 2004.05150): RoBERTa for long documents, its attention a sliding window.

    token + position + type -> LayerNorm -> (attention -(+)- LayerNorm - MLP -(+)- LayerNorm) x num_layers

    attention of token i          i-w ... i ... i+w, and the global tokens     O(S w)
    attention of a global token   all tokens                                   O(S G)

The blocks are RoBERTa's but for the attention (see nn/longformer.py), from whose weights the published models started
with the 512 positions copied eight times. A stack of 12 layers with w = 256 sees 3,072 tokens to each side. What must
be seen in one step is made global, and that is for the task to say: the first token for a class, the question for its
answer, nothing for masked tokens. `global_attention_mask` overrides this.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 (2 w + 1) D in attention, whatever S; 15 D^2
parameters, 3 of them for global tokens alone. What it trades: distant tokens meet after several layers, or through a
global token; a short sequence pays for windows that are wider than it needs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from llmlab.models.bert import LABEL_ROWS, bert, body_from_hf, body_rows, body_to_hf
from llmlab.models.config import named
from llmlab.models.encoder import Encoder, EncoderModel
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
from llmlab.models.hf_config import Attributes, canonical_block, check_same
from llmlab.models.hf_heads import decoder_from_hf, kind_of_head, labels_from_hf, problem_from_hf
from llmlab.models.roberta import roberta
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.longformer import LongformerAttention
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned

# Enough for a question; see nn/longformer.py for what room for global tokens costs.
_ROOM = 64


@dataclass(frozen=True, kw_only=True)
class Longformer(Encoder):
    """A Longformer; its head decides which tokens are global when a call does not."""

    separator: int = 2
    """Token that ends the question, where there is one."""

    def build(self, rngs: nnx.Rngs) -> "LongformerModel":
        return LongformerModel(self, rngs=rngs)


class LongformerModel(EncoderModel):
    """See the module's docstring."""

    config: Longformer

    def default_global_tokens(self, input_ids: Int[Array, "B S"]) -> Bool[Array, "B S"] | None:
        index_S = jnp.arange(input_ids.shape[1])
        if isinstance(self.config.head, SequenceClassification):
            return jnp.broadcast_to(index_S == 0, input_ids.shape)
        if isinstance(self.config.head, QuestionAnswering):
            return index_S < jnp.argmax(input_ids == self.config.separator, axis=1, keepdims=True)
        return None


def longformer(
    *,
    window: int | Sequence[int],
    max_global: int = _ROOM,
    padding: int = 1,
    separator: int = 2,
    head: EncoderHead | None = None,
    **sizes: Any,
) -> Longformer:
    """The Longformer shape at any size; a masked language model where no head is given.

    Args:
        window: tokens that are near a token on both sides together, the paper's w; one number, or one for each layer.
        max_global: most global tokens in a row; a model that masks tokens needs none.
        padding: the tokenizer's padding token, from which positions are counted.
        separator: the token that ends a question.
        head: what is answered.
        sizes: as for `roberta`.
    """
    body = roberta(padding=padding, head=head, **sizes)
    return _longformer(body, window, max_global, separator)


def _longformer(body: Encoder, window: int | Sequence[int], max_global: int, separator: int) -> Longformer:
    """BERT's body with Longformer's attention."""
    windows = [window] if isinstance(window, int) else list(window)
    if len(windows) not in (1, body.num_layers):
        raise ValueError(
            f"window has {len(windows)} entries and num_layers={body.num_layers}; give one or one for each"
        )
    if any(w < 2 or w % 2 for w in windows):
        raise ValueError(f"window={window} must be even and positive: as many tokens before a token as after it")
    block = body.pattern[0]
    kinds = windows[:1] if len(set(windows)) == 1 else windows
    mixers = [LongformerAttention(**vars(block.mixer), reach=w // 2, max_global=max_global) for w in kinds]
    pattern = tuple(dataclasses.replace(block, mixer=mixer) for mixer in mixers)
    return Longformer(**{**vars(body), "pattern": pattern}, separator=separator)


_english = partial(longformer, vocab_size=50265, max_length=4096, window=512)

PRESETS: dict[str, Longformer] = {
    # a laptop's model, for masked tokens; its vocabulary follows the tokenizer
    "longformer-nano": longformer(embed_dim=192, num_layers=4, num_heads=6, max_length=4096, window=128, max_global=0),
    "longformer-base-4096": _english(embed_dim=768, num_layers=12, num_heads=12),
    "longformer-large-4096": _english(embed_dim=1024, num_layers=24, num_heads=16),
}


def preset(name: str) -> Longformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Longformer:
    """Model of a Hugging Face config with model_type longformer; ValueError lists all that is not implemented."""
    hf = Attributes(config, "longformer")
    kind, body = kind_of_head(hf, "Longformer", PreTraining), body_from_hf(hf)
    hf.fixed("attention_mode", "longformer", "sliding_chunks")
    hf.fixed("ignore_attention_mask", False)
    window: Any = hf.optional(
        "attention_window", list if isinstance(config.get("attention_window"), list) else int, 512
    )
    max_global, separator = hf.optional("max_global_tokens", int, _ROOM), hf.optional("sep_token_id", int, 2)
    padding, rows = hf.optional("pad_token_id", int, 1), hf.integer("max_position_embeddings", 512)
    if padding is None or padding < 0 or rows <= padding + 1:
        hf.problem(f"pad_token_id={padding} leaves no positions of max_position_embeddings={rows}")
    problem, labels, decoder = problem_from_hf(hf), labels_from_hf(hf), decoder_from_hf(hf)
    hf.finish("onnx_export")
    assert padding is not None
    assert separator is not None
    assert max_global is not None
    head: EncoderHead | None = None
    if kind is MaskedLM:
        head = MaskedLM(transform=Transform(norm=LayerNorm(epsilon=body["epsilon"])), **decoder)
    elif kind is SequenceClassification:
        own = Pooler(dropout=body["dropout"])
        head = SequenceClassification(pooler=own, dropout=body["dropout"], problem_type=problem, **labels)
    elif kind is TokenClassification:
        head = TokenClassification(dropout=body["dropout"], **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering()
    encoder = bert(
        **body,
        max_length=rows - padding - 1,
        position_offset=padding + 1,
        unpositioned_token=padding,
        pooler=Pooler() if head is None else None,
        head=head,
    )
    return _longformer(encoder, window, max_global, separator)


def to_hf(model: Longformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a longformer config cannot express.

    `max_global_tokens` is llmlab's own; transformers keeps such attributes and looks at none of them.
    """
    blocks = [canonical_block(block, model.embed_dim) for block in model.layers()]
    mixers = [block.mixer for block in blocks if isinstance(block.mixer, LongformerAttention)]
    if len(mixers) < len(blocks) or not isinstance(model.position, Learned):
        raise ValueError("longformer is made of LongformerAttention and Learned positions; this model is not")
    if model.unpositioned_token is None:
        raise ValueError(
            "longformer counts positions from its padding token; set unpositioned_token to the tokenizer's"
        )
    first = dataclasses.replace(model, pattern=model.pattern[:1])
    for number, mixer in enumerate(mixers):
        alike = dataclasses.replace(blocks[0], mixer=dataclasses.replace(mixers[0], reach=mixer.reach))
        if blocks[number] != alike:
            raise ValueError(f"longformer's layers differ in their windows alone; layer {number} differs in more")
    config = body_to_hf(first, "longformer", "Longformer")
    del config["classifier_dropout"]
    config |= {
        "attention_window": [2 * mixer.reach for mixer in mixers],
        "max_global_tokens": mixers[0].max_global,
        "sep_token_id": model.separator,
        "pad_token_id": model.unpositioned_token,
        "max_position_embeddings": model.position.max_length + model.position.offset,
    }
    check_same(model, from_hf(config), "longformer")
    return config


_ATTENTION = "longformer.encoder.layer.{layer}.attention.self"

WEIGHTS = WeightTable(
    prefix="longformer.",
    head="head",
    tied={
        "lm_head.decoder.weight": "longformer.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    unread={"lm_head.bias": "lm_head.decoder.bias"},
    # A checkpoint of another head may hold a pooler that this one has no use for.
    ignored=("longformer.embeddings.position_ids", "longformer.pooler.dense.weight", "longformer.pooler.dense.bias"),
    rows=(
        *body_rows("longformer"),
        *(
            row
            for name in ("query_global", "key_global", "value_global")
            for row in linear(f"{_ATTENTION}.{name}", f"stack.{{layer}}.mixer.{name}")
        ),
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
    name="Longformer",
    kind="encoder",
    paper="Beltagy et al. 2020 (2004.05150)",
    presets=PRESETS,
    heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "None"),
    objectives=("MaskedToken", "Classification", "TokenClassification", "QuestionAnswering"),
    reference="transformers LongformerForMaskedLM and its other heads",
    hugging_face=HuggingFace(model_type="longformer", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=Longformer),
)
