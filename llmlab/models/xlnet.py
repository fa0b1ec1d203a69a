"""XLNet (Yang et al. 2019, 1906.08237): BERT's two-sided context, learnt without masks, as an autoregressive model.

    h --+-- two-stream attention --(+)-- LayerNorm --+-- MLP --(+)-- LayerNorm -- h     content, and beside it
        +---------------------------|                +----------|
    g --+-- two-stream attention --(+)-- LayerNorm --+-- MLP --(+)-- LayerNorm -- g     query: same parameters

A masked language model predicts its targets independently of each other from an input with [MASK] in it, a token that
fine-tuning never sees. XLNet predicts them one after the other, in a random order,

    log p(x_z(t) | x_z(<t)) = softmax over v of e(v) . g_z(t),    g begins as one vector w for every place

so that each target has the earlier ones as context and the input holds real tokens only. The price is the query
stream, P / S more of everything but keys and values, and scores by distance: with S / 6 targets a step costs about
1.4 times BERT's of the same size. Against GPT: every token sees both sides once the model is fine-tuned. Blocks are
post-norm with biases in the MLP only; positions are Transformer-XL's; `nn/two_stream.py` has the equations.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models.config import Tied, Untied, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.heads import EncoderHead, MaskedLM, Pooler, QuestionAnswering, SequenceClassification, Summary
from llmlab.models.hf_config import ACTIVATIONS, Attributes, activation_to_hf, block_of, check_same
from llmlab.models.hf_heads import labels_from_hf, labels_to_hf, problem_from_hf
from llmlab.models.permutation import PermutationTransformer
from llmlab.models.transforms import Leading, Linear, OutputFirst
from llmlab.models.weights import Row, WeightTable, linear, norm
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.two_stream import TwoStreamAttention
from llmlab.nn.wiring import PostNorm


def xlnet(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int | None = None,
    vocab_size: int | None = None,
    activation: Activation = "gelu",
    epsilon: float = 1e-12,
    dropout: float = 0.0,
    embedding_std: float = 0.02,
    bidirectional: bool = True,
    same_length: bool = False,
    backward_half: bool = False,
    clamp_length: int | None = None,
    memory_length: int | None = None,
    reuse_length: int | None = None,
    head: EncoderHead | None = MaskedLM(transform=None),  # noqa: B008  frozen
) -> PermutationTransformer:
    """The XLNet shape at any size; `dropout` holds everywhere."""
    block = Block(
        mixer=TwoStreamAttention(num_heads=num_heads, dropout=dropout),
        ffn=MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation=activation, dropout=dropout),
        norm=LayerNorm(epsilon=epsilon),
        wiring=PostNorm(),
        dropout=dropout,
    )
    return PermutationTransformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        embedding_std=embedding_std,
        dropout=dropout,
        bidirectional=bidirectional,
        same_length=same_length,
        backward_half=backward_half,
        clamp_length=clamp_length,
        memory_length=memory_length,
        reuse_length=reuse_length,
        head=head,
    )


PRESETS: dict[str, PermutationTransformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "xlnet-nano": xlnet(embed_dim=192, num_layers=4, num_heads=6),
    # the paper's, appendix A.4.1; memory as released
    "xlnet-base": xlnet(embed_dim=768, num_layers=12, num_heads=12, vocab_size=32000, dropout=0.1),
    "xlnet-large": xlnet(embed_dim=1024, num_layers=24, num_heads=16, vocab_size=32000, dropout=0.1),
}


def preset(name: str) -> PermutationTransformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


_SUMMARIES: dict[str, Summary] = {"last": "last", "first": "first", "mean": "mean"}
_HEADS: dict[str, type[EncoderHead] | None] = {
    "XLNetLMHeadModel": MaskedLM,
    "XLNetForSequenceClassification": SequenceClassification,
    "XLNetForQuestionAnsweringSimple": QuestionAnswering,
    "XLNetModel": None,
}


def from_hf(config: Mapping[str, Any]) -> PermutationTransformer:
    """Model of a Hugging Face config with model_type xlnet; ValueError lists every attribute not implemented."""
    hf = Attributes(config, "xlnet")
    hf.common()
    head = _head_from_hf(hf, hf.architecture(_HEADS))
    embed_dim, num_heads = hf.integer("d_model", 1024), hf.integer("n_head", 16)
    hf.fixed("d_head", embed_dim // num_heads)
    hf.fixed("untie_r", True)
    build = partial(
        xlnet,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_layers=hf.integer("n_layer", 24),
        hidden_dim=hf.integer("d_inner", 4096),
        vocab_size=hf.integer("vocab_size", 32000),
        activation=hf.choice("ff_activation", ACTIVATIONS, "gelu"),
        epsilon=hf.real("layer_norm_eps", 1e-12),
        dropout=hf.real("dropout", 0.1),
        embedding_std=hf.real("initializer_range", 0.02),
        bidirectional=hf.choice("attn_type", {"bi": True, "uni": False}, "bi"),
        same_length=hf.flag("same_length", False),
        backward_half=hf.flag("bi_data", False),
        clamp_length=_limit(hf.optional("clamp_len", int)),
        memory_length=_limit(hf.optional("mem_len", int, 512 if "mem_len" not in config else None)),
        reuse_length=_limit(hf.optional("reuse_len", int)),
        head=head,
    )
    # of other heads, or of what a call returns without being asked
    hf.finish(
        "start_n_top",
        "end_n_top",
        "use_mems_eval",
        "use_mems_train",
        *(name for name in config if name.startswith("summary_")),
    )
    return build()


def _head_from_hf(hf: Attributes, kind: type[EncoderHead] | None) -> EncoderHead | None:
    tied, problem, labels = hf.flag("tie_word_embeddings", True), problem_from_hf(hf), labels_from_hf(hf)
    if kind is MaskedLM:
        return MaskedLM(transform=None, decoder=Tied() if tied else Untied())
    if kind is QuestionAnswering:
        return QuestionAnswering()
    if kind is not SequenceClassification:
        return None
    hf.fixed("summary_use_proj", True)
    pooler = Pooler(
        take=hf.choice("summary_type", _SUMMARIES, "last"),
        activation=hf.choice("summary_activation", ACTIVATIONS, "tanh"),
    )
    dropout = hf.real("summary_last_dropout", 0.1)
    return SequenceClassification(pooler=pooler, dropout=dropout, problem_type=problem, **labels)


def _head_to_hf(head: EncoderHead | None) -> dict[str, Any]:
    names = [name for name, kind in _HEADS.items() if kind is (None if head is None else type(head))]
    if not names:
        raise ValueError(f"xlnet has no {type(head).__name__}; it has {', '.join(_HEADS)}")
    config = {
        "architectures": names,
        "tie_word_embeddings": not isinstance(head, MaskedLM) or isinstance(head.decoder, Tied),
        **labels_to_hf(head),
    }
    if isinstance(head, SequenceClassification):
        pooler = head.pooler or Pooler()
        config["summary_type"] = pooler.take
        config["summary_activation"] = activation_to_hf(pooler.activation)
        config["summary_last_dropout"] = head.dropout
    return config


def _limit(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def to_hf(model: PermutationTransformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that an xlnet config cannot express."""
    block = block_of(model, "xlnet")
    mixer, ffn, layer_norm = block.mixer, block.ffn, block.norm
    if not (isinstance(mixer, TwoStreamAttention) and isinstance(ffn, MLP) and isinstance(layer_norm, LayerNorm)):
        parts = ", ".join(type(part).__name__ for part in (mixer, ffn, layer_norm))
        raise ValueError(f"xlnet is made of TwoStreamAttention, MLP and LayerNorm; this model of {parts}")
    config = {
        "model_type": "xlnet",
        **_head_to_hf(model.head),
        "vocab_size": model.vocab_size,
        "d_model": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": mixer.num_heads,
        "d_head": mixer.resolved_head_dim(model.embed_dim),
        "d_inner": ffn.hidden_dim,
        "ff_activation": activation_to_hf(ffn.activation),
        "layer_norm_eps": layer_norm.epsilon,
        "dropout": model.dropout,
        "initializer_range": model.embedding_std,
        "attn_type": "bi" if model.bidirectional else "uni",
        "same_length": model.same_length,
        "bi_data": model.backward_half,
        "clamp_len": model.clamp_length or -1,
        "mem_len": model.memory_length,
        "reuse_len": model.reuse_length,
        "torch_dtype": "float32",
    }
    check_same(model, from_hf(config), "xlnet")
    return config


_TENSORS, _PATH = "transformer.layer.{layer}", "stack.{layer}"
_ATTENTION = f"{_TENSORS}.rel_attn"

WEIGHTS = WeightTable(
    prefix="transformer.",
    head="head",
    tied={"lm_loss.weight": "transformer.word_embedding.weight"},
    rows=(
        Row("transformer.mask_emb", "query_start", Leading(2)),
        Row("transformer.word_embedding.weight", "tokens.table"),
        *(
            Row(f"{_ATTENTION}.{name}", f"{_PATH}.mixer.{path}.kernel")
            for name, path in (("q", "query"), ("k", "key"), ("v", "value"), ("r", "distance"))
        ),
        Row(f"{_ATTENTION}.o", f"{_PATH}.mixer.output.kernel", OutputFirst()),
        Row(f"{_ATTENTION}.r_w_bias", f"{_PATH}.mixer.content_bias"),
        Row(f"{_ATTENTION}.r_r_bias", f"{_PATH}.mixer.distance_bias"),
        Row(f"{_ATTENTION}.r_s_bias", f"{_PATH}.mixer.segment_bias"),
        Row(f"{_ATTENTION}.seg_embed", f"{_PATH}.mixer.segments"),
        *norm(f"{_ATTENTION}.layer_norm", f"{_PATH}.mixer_branch.norm_sum"),
        *linear(f"{_TENSORS}.ff.layer_1", f"{_PATH}.ffn.up"),
        *linear(f"{_TENSORS}.ff.layer_2", f"{_PATH}.ffn.down"),
        *norm(f"{_TENSORS}.ff.layer_norm", f"{_PATH}.ffn_branch.norm_sum"),
        Row("lm_loss.weight", "head.decoder.kernel", Linear()),
        Row("lm_loss.bias", "head.bias"),
        *linear("sequence_summary.summary", "head.pooler.dense"),
        *linear("logits_proj", "head.classifier"),
        *linear("qa_outputs", "head.spans"),
    ),
)

FAMILY = Family(
    name="XLNet",
    kind="permutation",
    paper="Yang et al. 2019, 1906.08237",
    presets=PRESETS,
    heads=("MaskedLM", "SequenceClassification", "QuestionAnswering", "None"),
    objectives=("Permutation", "Classification", "QuestionAnswering"),
    reference="transformers XLNetLMHeadModel",
    hugging_face=HuggingFace(
        model_type="xlnet", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS, config=PermutationTransformer
    ),
)
