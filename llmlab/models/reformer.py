"""Reformer (Kitaev et al. 2020, 2001.04451): long sequences by hashing, deep stacks by reversible layers.

    x1 ----------------------------------(+)-------------------------------- y1
                                          |                       |
    x2 --+-- LayerNorm -- local or LSH ---+                       v
         |                                            LayerNorm -- MLP
         +-------------------------------------------------------(+)-------- y2

Layers alternate: attention of a chunk to itself and its neighbours, and attention among what locality-sensitive
hashing puts together, wherever it stands (nn/lsh.py has the equations). Both streams start as the embedding and the
head reads both; layers are computed again from their outputs in the backward pass (nn/reversible.py), and positions
are a grid of two short tables (nn/axial.py). No biases but in the MLP; the head is a matrix of its own, 2D wide.

Cost per token and layer: 6 to 8 D^2 + 4 D F FLOPs forward in parameter matmuls and 4 C (1 + before + after) D per
round in attention, whatever the length; memory O(S) in length and O(1) in depth. What it trades: attention is
approximate and differs with the rotations, a sequence is padded to whole chunks, documents cannot share a row, and
hashing layers cannot be decoded from a cache: every new token sorts the row anew.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.heads import EncoderHead, MaskedLM, Pooler, QuestionAnswering, SequenceClassification
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, check_same
from llmlab.models.hf_heads import labels_from_hf, labels_to_hf, problem_from_hf
from llmlab.models.reversible import ReversibleTransformer
from llmlab.models.transforms import Axis, Linear
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.attention import head_width
from llmlab.nn.axial import Axial
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.lsh import ChunkedAttention, LocalAttention, LSHAttention
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import AddedPosition, Learned
from llmlab.nn.reversible import Reversible

LANGUAGE_MODEL = MaskedLM(transform=None, decoder=Untied(), bias=False)
"""A matrix over both streams, without a bias; transformers keeps a bias that nothing reads."""


def reformer(
    *,
    embed_dim: int,
    layers: tuple[str, ...],
    local: LocalAttention,
    lsh: LSHAttention,
    hidden_dim: int,
    position: AddedPosition,
    causal: bool = True,
    vocab_size: int | None = None,
    activation: Activation = "relu",
    epsilon: float = 1e-12,
    dropout: float = 0.0,
    embedding_std: float = 0.02,
    ffn_chunk: int | None = None,
    head: EncoderHead | None = LANGUAGE_MODEL,
) -> ReversibleTransformer:
    """The Reformer shape at any size; `layers` names each layer's attention, "local" or "lsh"."""
    ffn, layer_norm = MLP(hidden_dim=hidden_dim, activation=activation, dropout=dropout), LayerNorm(epsilon=epsilon)
    blocks = {
        name: Block(mixer=mixer, ffn=ffn, norm=layer_norm, wiring=Reversible(chunk=ffn_chunk), dropout=dropout)
        for name, mixer in (("local", local), ("lsh", lsh))
    }
    period = next(n for n in range(1, len(layers) + 1) if all(a == b for a, b in zip(layers, layers[n:], strict=False)))
    return ReversibleTransformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=len(layers),
        pattern=tuple(blocks[name] for name in layers[:period]),
        causal=causal,
        position=position,
        embedding_std=embedding_std,
        dropout=dropout,
        final_norm=layer_norm,
        head=head,
    )


def _attention(num_heads: int, head_dim: int, *, local: Any, lsh: Any) -> dict[str, Any]:
    """Both attentions of a preset: what they share, and what each has."""
    heads = {"num_heads": num_heads, "head_dim": head_dim}
    return {"local": LocalAttention(**heads, **local), "lsh": LSHAttention(**heads, **lsh, seed=None)}


PRESETS: dict[str, ReversibleTransformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "reformer-nano": reformer(
        embed_dim=192,
        layers=("local", "lsh") * 2,
        hidden_dim=768,
        position=Axial((64, 64), (64, 128)),
        **_attention(6, 32, local={}, lsh={"num_hashes": 2}),
    ),
    # as released: a novel in one sequence, and Wikipedia by bytes
    "reformer-crime-and-punishment": reformer(
        embed_dim=256,
        layers=("local", "lsh") * 3,
        hidden_dim=512,
        position=Axial((512, 1024), (64, 192)),
        vocab_size=320,
        dropout=0.05,
        **_attention(2, 64, local={"dropout": 0.05}, lsh={"num_buckets": (64, 128), "max_length": 524288}),
    ),
    "reformer-enwik8": reformer(
        embed_dim=1024,
        layers=("local", "local", "lsh", "local") * 3,
        hidden_dim=4096,
        position=Axial((128, 512), (256, 768)),
        vocab_size=258,
        dropout=0.2,
        **_attention(
            8,
            128,
            local={"chunk": 128, "dropout": 0.2},
            lsh={"chunk": 256, "dropout": 0.1, "num_buckets": 512, "num_hashes": 4, "max_length": 65536},
        ),
    ),
}


def preset(name: str) -> ReversibleTransformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


_HEADS: dict[str, type[EncoderHead] | None] = {
    "ReformerModelWithLMHead": MaskedLM,
    "ReformerForMaskedLM": MaskedLM,
    "ReformerForSequenceClassification": SequenceClassification,
    "ReformerForQuestionAnswering": QuestionAnswering,
    "ReformerModel": None,
}


def from_hf(config: Mapping[str, Any]) -> ReversibleTransformer:
    """Model of a Hugging Face config with model_type reformer; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "reformer")
    hf.common()
    kind, named_class = hf.architecture(_HEADS), (config.get("architectures") or ["ReformerModelWithLMHead"])[0]
    causal = hf.flag("is_decoder", False)
    if kind is MaskedLM and causal != (named_class == "ReformerModelWithLMHead"):
        hf.problem(f"is_decoder={causal} does not go with {named_class}")
    hf.fixed("tie_word_embeddings", False)
    layers = tuple(hf.optional("attn_layers", list, ["local", "lsh"] * 3) or ())
    if not layers or {*layers} - {"local", "lsh"}:
        hf.problem(f"attn_layers={list(layers)} must name at least one layer, each local or lsh")
        layers = ("local",)
    hf.fixed("num_hidden_layers", len(layers))
    dim, std = hf.integer("hidden_size", 256), hf.real("initializer_range", 0.02)
    max_length = hf.integer("max_position_embeddings", 4096)
    heads = {"num_heads": hf.integer("num_attention_heads", 12), "head_dim": hf.integer("attention_head_size", 64)}
    dropout = hf.real("hidden_dropout_prob", 0.05)
    build = partial(
        reformer,
        embed_dim=dim,
        layers=layers,
        local=LocalAttention(**heads, **_chunks(hf, "local", 0.05)),
        hidden_dim=hf.integer("feed_forward_size", 512),
        causal=causal,
        vocab_size=hf.integer("vocab_size", 320),
        activation=hf.choice("hidden_act", ACTIVATIONS, "relu"),
        epsilon=hf.real("layer_norm_eps", 1e-12),
        dropout=dropout,
        embedding_std=std,
        ffn_chunk=int(hf.real("chunk_size_feed_forward", 0)) or None,
    )
    lsh = partial(
        LSHAttention,
        **heads,
        **_chunks(hf, "lsh", 0.0),
        num_hashes=hf.integer("num_hashes", 1),
        num_buckets=_buckets(hf),
        max_length=max_length,
        seed=hf.optional("hash_seed", int),
    )
    position = _position(hf, dim, std, max_length)
    classifier = hf.real("classifier_dropout", dropout)
    problem, labels = problem_from_hf(hf), labels_from_hf(hf)
    hf.finish("chunk_size_lm_head")
    head: EncoderHead | None = None
    if kind is MaskedLM:
        head = LANGUAGE_MODEL
    elif kind is SequenceClassification:
        pooler = Pooler(dim=dim, dropout=classifier)
        head = SequenceClassification(pooler=pooler, dropout=classifier, problem_type=problem, **labels)
    elif kind is QuestionAnswering:
        head = QuestionAnswering()
    return build(lsh=lsh(), position=position, head=head)


def _chunks(hf: Attributes, kind: str, dropout: float) -> dict[str, Any]:
    """Chunks of one kind of attention."""
    return {
        "chunk": hf.integer(f"{kind}_attn_chunk_length", 64),
        "before": int(hf.real(f"{kind}_num_chunks_before", 1)),
        "after": int(hf.real(f"{kind}_num_chunks_after", 0)),
        "dropout": hf.real(f"{kind}_attention_probs_dropout_prob", dropout),
    }


def _buckets(hf: Attributes) -> int | tuple[int, ...] | None:
    value: Any = hf.optional("num_buckets", object)
    factors = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(n, int) and n > 1 and n % 2 == 0 for n in factors):
        hf.problem(f"num_buckets={value!r} is neither an even number nor a list of such")
        return None
    return tuple(factors) if isinstance(value, list) else value


def _position(hf: Attributes, dim: int, std: float, max_length: int) -> AddedPosition:
    axial = hf.flag("axial_pos_embds", True)
    shape = tuple(hf.optional("axial_pos_shape", list, [64, 64]) or ())
    dims = tuple(hf.optional("axial_pos_embds_dim", list, [64, 192]) or ())
    axial_std = hf.real("axial_norm_std", 1.0)
    if not axial:
        return Learned(max_length, std=std)
    if len(shape) != 2 or len(dims) != 2 or sum(dims) != dim:
        hf.problem(f"axial_pos_shape={shape} and axial_pos_embds_dim={dims}: two axes whose dims add up to {dim} only")
        return Learned(max_length)
    return Axial(shape, dims, axial_std)


def to_hf(model: ReversibleTransformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a reformer config cannot express."""
    kinds = {LocalAttention: "local", LSHAttention: "lsh"}
    first, mixers, position = model.layers()[0], [block.mixer for block in model.layers()], model.position
    ffn, wiring = first.ffn, first.wiring
    if not (
        all(type(mixer) in kinds for mixer in mixers)
        and isinstance(ffn, MLP)
        and isinstance(model.final_norm, LayerNorm)
        and isinstance(position, Axial | Learned)
        and (model.head is None or isinstance(model.head, MaskedLM | SequenceClassification | QuestionAnswering))
    ):
        parts = ", ".join(sorted({type(part).__name__ for part in (*mixers, ffn, model.final_norm, position)}))
        raise ValueError(
            "reformer is made of LocalAttention, LSHAttention, MLP, LayerNorm and Axial or Learned positions, with "
            f"heads {', '.join(HEADS)}; this model of {parts} with {type(model.head).__name__}"
        )
    width = mixers[0]
    assert isinstance(width, ChunkedAttention)
    config = {
        "architectures": [_class_of(model)],
        "model_type": "reformer",
        "is_decoder": model.causal,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "attn_layers": [kinds[type(mixer)] for mixer in mixers],
        "num_attention_heads": width.num_heads,
        "attention_head_size": head_width(model.embed_dim, width.num_heads, width.head_dim),
        "feed_forward_size": ffn.hidden_dim,
        "hidden_act": activation_to_hf(ffn.activation),
        "chunk_size_feed_forward": wiring.chunk or 0 if isinstance(wiring, Reversible) else 0,
        "hidden_dropout_prob": model.dropout,
        "initializer_range": model.embedding_std,
        "layer_norm_eps": model.final_norm.epsilon,
        "max_position_embeddings": position.max_length,
        **_position_to_hf(position),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **labels_to_hf(model.head),
    }
    for mixer in mixers:
        assert isinstance(mixer, ChunkedAttention)
        name = kinds[type(mixer)]
        config |= {
            f"{name}_attn_chunk_length": mixer.chunk,
            f"{name}_num_chunks_before": mixer.before,
            f"{name}_num_chunks_after": mixer.after,
            f"{name}_attention_probs_dropout_prob": mixer.dropout,
        }
        if isinstance(mixer, LSHAttention):
            config |= {"num_hashes": mixer.num_hashes, "hash_seed": mixer.seed, "num_buckets": mixer.num_buckets}
            config["max_position_embeddings"] = mixer.max_length
    if isinstance(model.head, SequenceClassification):
        config["classifier_dropout"] = model.head.dropout
    check_same(model, from_hf(json.loads(json.dumps(config))), "reformer")
    return config


def _class_of(model: ReversibleTransformer) -> str:
    """The class of transformers that has the model's head."""
    if isinstance(model.head, MaskedLM):
        return "ReformerModelWithLMHead" if model.causal else "ReformerForMaskedLM"
    return next(name for name, kind in _HEADS.items() if kind is (type(model.head) if model.head else None))


def _position_to_hf(position: Axial | Learned) -> dict[str, Any]:
    if isinstance(position, Learned):
        return {"axial_pos_embds": False}
    return {
        "axial_pos_embds": True,
        "axial_pos_shape": list(position.shape),
        "axial_pos_embds_dim": list(position.dims),
        "axial_norm_std": position.std,
    }


_TENSORS, _PATH = "reformer.encoder.layers.{layer}", "stack.{layer}"
_POSITIONS, _SELF = "reformer.embeddings.position_embeddings", f"{_TENSORS}.attention.self_attention"

WEIGHTS = WeightTable(
    prefix="reformer.",
    head="head",
    blank={"lm_head.bias": "lm_head.decoder.weight"},
    rows=(
        Row("reformer.embeddings.word_embeddings.weight", "tokens.table"),
        Row(f"{_POSITIONS}.weights.0", "position.tables.0", Axis(after=1)),
        Row(f"{_POSITIONS}.weights.1", "position.tables.1", Axis(before=1)),
        Row(f"{_POSITIONS}.embedding.weight", "position.table"),
        *norm(f"{_TENSORS}.attention.layer_norm", f"{_PATH}.norm_mixer"),
        *(
            Row(f"{_SELF}.{name}.weight", f"{_PATH}.mixer.{name}.kernel", Linear())
            for name in ("query_key", "query", "key", "value")
        ),
        Row(f"{_TENSORS}.attention.output.dense.weight", f"{_PATH}.mixer.output.kernel", Linear(num_inputs=2)),
        *norm(f"{_TENSORS}.feed_forward.layer_norm", f"{_PATH}.norm_ffn"),
        *linear(f"{_TENSORS}.feed_forward.dense.dense", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.feed_forward.output.dense", f"{_PATH}.ffn.down"),
        *norm("reformer.encoder.layer_norm", "final_norm"),
        Row("lm_head.decoder.weight", "head.decoder.kernel", Linear()),
        *linear("classifier.dense", "head.pooler.dense"),
        *linear("classifier.out_proj", "head.classifier"),
        *linear("qa_outputs", "head.spans"),
    ),
)

HEADS = ("MaskedLM", "SequenceClassification", "QuestionAnswering", "None")

FAMILY = Family(
    name="Reformer",
    kind="encoder or decoder",
    paper="Kitaev et al. 2020 (2001.04451)",
    presets=PRESETS,
    heads=HEADS,
    objectives=("NextToken", "MaskedToken", "Classification", "QuestionAnswering"),
    reference="transformers ReformerModelWithLMHead and its other heads",
    hugging_face=HuggingFace(
        model_type="reformer", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=ReversibleTransformer
    ),
)
