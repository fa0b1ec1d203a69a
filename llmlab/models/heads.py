"""Heads: what stands on an encoder and turns its states into an answer.

    states (B, S, D) --+-- MaskedLM              token scores         decoder(norm(act(W x))) + b
                       +-- TokenClassification   label scores         W x + b
                       +-- QuestionAnswering     span scores          start, end = W x + b
                       |
                       +-- pooler (B, P) --+-- SequenceClassification    W p + b
                                           +-- PreTraining               MaskedLM, and the next sentence: W p + b

The first token stands for the row (Devlin et al. 2019, 1810.04805, section 3): the pooler is tanh(W x_0 + b). A row
has one summary, so that a packed row is summarised by the first of its documents; heads over tokens are packed as any
other.

Costs per token: 2 D V for a masked language model's decoder, which at BERT's sizes is a fifth of the model; the
others are negligible. A head is built from the width of the states it reads and knows nothing of the layers below:
any encoder, of text or of images, can carry any of them.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from llmlab.models.config import Head, Tied
from llmlab.models.losses import mean_binary_cross_entropy, mean_cross_entropy, mean_squared_error
from llmlab.models.outputs import PreTrainingOutput, SequenceOutput, SpanOutput, TokenOutput
from llmlab.nn.config import Auxiliary, Norm
from llmlab.nn.dense import Dense, contract_rows
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.feed_forward import ACTIVATIONS, Activation
from llmlab.nn.norms import LayerNorm

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
"""What labels of a sequence are: numbers, one class, or a yes or no for each class."""


Summary = Literal["first", "last", "mean"]
"""What stands for a row."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Sizes of what a head can read."""

    dim: int
    """Width of the states."""
    pooled_dim: int | None = None
    """Width of the model's pooled states; None where it has no pooler."""
    table: tuple[int, int] | None = None
    """Shape of the token embedding; None in a model that embeds no tokens."""

    @property
    def pooled(self) -> int:
        """Width of the pooled states; of the first token's where there are none."""
        return self.pooled_dim or self.dim

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        if self.table is None:
            raise ValueError("this head scores tokens and the model embeds none; use a head over labels")
        return self.table[0]


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a model is to answer, by the names that the field uses; each head reads its own."""

    labels: Shaped[Array, "B ..."] | None = None
    next_sentence_label: Int[Array, "B"] | None = None
    start_positions: Int[Array, "B"] | None = None
    end_positions: Int[Array, "B"] | None = None


@dataclass(frozen=True, kw_only=True)
class Pooler:
    """Summary of a row from one of its tokens: dropout, a dense layer, an activation."""

    take: Summary = "first"
    """Which token: the first, where encoders have [CLS]; the last place, where XLNet has it, padding or not; or the
    mean of all places."""
    dim: int | None = None
    """Width of the summary; None for that of the states."""
    activation: Activation = "tanh"
    """Nonlinearity: BERT's and RoBERTa's is tanh, DistilBERT's relu."""
    dropout: float = 0.0
    """Dropout on the token's state (RoBERTa)."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "PoolerLayer":
        """Module `(states_BSD, key=None) -> pooled_BP`."""
        return PoolerLayer(self, dim, rngs=rngs)

    def flops(self, dim: int) -> int:
        """Forward FLOPs per row."""
        return 2 * dim * (self.dim or dim)


class PoolerLayer(nnx.Module):
    """See Pooler."""

    def __init__(self, config: Pooler, dim: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dense = Dense((("embed", dim),), (("pooled", config.dim or dim),), bias=True, rngs=rngs)

    def __call__(self, states_BSD: Float[Array, "B S D"], key: jax.Array | None = None) -> Float[Array, "B P"]:
        match self.config.take:
            case "first":
                taken_BD = states_BSD[:, 0]
            case "last":
                taken_BD = states_BSD[:, -1]
            case "mean":
                taken_BD = jnp.mean(states_BSD, axis=1)
        return ACTIVATIONS[self.config.activation](self.dense(dropout(taken_BD, self.config.dropout, key)))


@dataclass(frozen=True, kw_only=True)
class EncoderHead(abc.ABC):
    """What an encoder answers."""

    objectives: ClassVar[tuple[str, ...]] = ()
    """Names of the objectives that can train it."""

    @abc.abstractmethod
    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> nnx.Module:
        """Module `(states_BSD, pooled_BP, table_VE, targets, auxiliary, key=None) -> output`.

        Heads that score tokens also have `project(states, table_VE) -> logits`."""

    @abc.abstractmethod
    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        """Forward FLOPs of a batch."""

    @property
    def reads_pooled(self) -> bool:
        """Whether it reads the encoder's pooled states."""
        return False


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What a masked language model does to a state before it is scored: norm(act(W x + b))."""

    dim: int | None = None
    """Width of the result; None for that of the states."""
    activation: Activation = "gelu"
    """Nonlinearity."""
    norm: Norm | None = LayerNorm(epsilon=1e-12)
    """Norm of the result."""

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "TransformLayer":
        """Module mapping (..., dim) to (..., self.dim or dim)."""
        return TransformLayer(self, dim, rngs=rngs)


class TransformLayer(nnx.Module):
    """See Transform."""

    def __init__(self, config: Transform, dim: int, *, rngs: nnx.Rngs) -> None:
        width = config.dim or dim
        self.activation = config.activation
        self.dense = Dense((("embed", dim),), (("embed", width),), bias=True, rngs=rngs)
        self.norm = config.norm.build(width, rngs=rngs) if config.norm is not None else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        x = ACTIVATIONS[self.activation](self.dense(x))
        return x if self.norm is None else self.norm(x)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(EncoderHead):
    """Scores every token over the vocabulary (Devlin et al. 2019, section 3.1)."""

    objectives: ClassVar[tuple[str, ...]] = ("MaskedToken",)

    transform: Transform | None = Transform()
    """What is done to a state before it is scored."""
    decoder: Head = Tied()
    """Tied(): the embedding table scores; where it is narrower than the states, its rows go on in a matrix of their
    own (MobileBERT). Untied(): a matrix of its own."""
    bias: bool = True
    """Whether to add a bias per token, beside an untied decoder's own."""

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "MaskedLMHead":
        return MaskedLMHead(self, inputs, rngs=rngs)

    def width(self, dim: int) -> int:
        """Width of what is scored."""
        return dim if self.transform is None else self.transform.dim or dim

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        width = self.width(inputs.dim)
        transform = 0 if self.transform is None else 2 * inputs.dim * width
        return batch * length * (transform + 2 * width * inputs.vocab_size)


class MaskedLMHead(nnx.Module):
    """See MaskedLM."""

    def __init__(self, config: MaskedLM, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        dim, vocab_size, width = inputs.dim, inputs.vocab_size, config.width(inputs.dim)
        self.transform = config.transform.build(dim, rngs=rngs) if config.transform is not None else None
        self.decoder = config.decoder.build(width, vocab_size, rngs=rngs)
        self.scale = config.decoder.scale if isinstance(config.decoder, Tied) else 1.0
        # How much wider the states are than the table that scores them.
        beyond = width - inputs.table[1] if self.decoder is None and inputs.table is not None else 0
        if beyond < 0:
            raise ValueError(f"a table of width {width - beyond} scores {width}; use Transform(dim={width - beyond})")
        rest, vocab = (("embed", beyond),), (("vocab", vocab_size),)
        self.rest = Dense(rest, vocab, bias=False, rngs=rngs) if beyond else None
        self.bias = nnx.Param(jnp.zeros(vocab_size), axes=("vocab",)) if config.bias else None

    def project(self, states: Float[Array, "*B D"], table_VE: Float[Array, "V E"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        x = states if self.transform is None else self.transform(states)
        if self.decoder is not None:
            logits = self.decoder(x)
        else:
            width = table_VE.shape[1]
            logits = contract_rows(x[..., :width], table_VE)
            if self.rest is not None:
                logits = logits + self.rest(x[..., width:])
            logits = logits if self.scale == 1.0 else logits * self.scale
        return (logits if self.bias is None else logits + self.bias[...]).astype(jnp.float32)

    def __call__(
        self,
        states_BSD: Float[Array, "B S D"],
        pooled_BP: Float[Array, "B P"] | None,
        table_VE: Float[Array, "V E"] | None,
        targets: Targets,
        auxiliary: Auxiliary,
        key: jax.Array | None = None,
    ) -> TokenOutput | PreTrainingOutput:
        assert table_VE is not None
        logits_BSV = self.project(states_BSD, table_VE)
        loss = None if targets.labels is None else mean_cross_entropy(logits_BSV, targets.labels)
        return TokenOutput(logits=logits_BSV, last_hidden_state=states_BSD, loss=loss, auxiliary=auxiliary)


@dataclass(frozen=True, kw_only=True)
class PreTraining(MaskedLM):
    """BERT's pretraining: masked tokens, and whether the second sentence follows the first (section 3.1)."""

    objectives: ClassVar[tuple[str, ...]] = ("MaskedTokenAndNextSentence", "MaskedToken")

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "PreTrainingHead":
        return PreTrainingHead(self, inputs, rngs=rngs)

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        return super().flops(inputs, batch, length) + batch * 4 * inputs.pooled

    @property
    def reads_pooled(self) -> bool:
        return True


class PreTrainingHead(MaskedLMHead):
    """See PreTraining."""

    def __init__(self, config: PreTraining, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, inputs, rngs=rngs)
        self.seq_relationship = Dense((("pooled", inputs.pooled),), (("labels", 2),), bias=True, rngs=rngs)

    def relate(self, pooled_BP: Float[Array, "B P"]) -> Float[Array, "B 2"]:
        """Scores of (follows, is random), float32."""
        return self.seq_relationship(pooled_BP).astype(jnp.float32)

    def __call__(
        self,
        states_BSD: Float[Array, "B S D"],
        pooled_BP: Float[Array, "B P"] | None,
        table_VE: Float[Array, "V E"] | None,
        targets: Targets,
        auxiliary: Auxiliary,
        key: jax.Array | None = None,
    ) -> PreTrainingOutput:
        assert table_VE is not None
        assert pooled_BP is not None
        logits_BSV, related_B2 = self.project(states_BSD, table_VE), self.relate(pooled_BP)
        losses = []
        if targets.labels is not None:
            losses.append(mean_cross_entropy(logits_BSV, targets.labels))
        if targets.next_sentence_label is not None:
            losses.append(mean_cross_entropy(related_B2, targets.next_sentence_label))
        return PreTrainingOutput(
            logits=logits_BSV,
            seq_relationship_logits=related_B2,
            last_hidden_state=states_BSD,
            pooled=pooled_BP,
            loss=sum(losses[1:], losses[0]) if losses else None,
            auxiliary=auxiliary,
        )


@dataclass(frozen=True, kw_only=True)
class Labelled(EncoderHead):
    """A head over labels of the user's own."""

    num_labels: int = 2
    """How many labels there are."""
    dropout: float = 0.0
    """Dropout on what is scored."""
    names: tuple[str, ...] | None = None
    """What the labels are called, kept with the model; None for numbers."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)
        if self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels} is not positive; 1 is for regression, 2 for yes or no")
        if self.names is not None and len(self.names) != self.num_labels:
            raise ValueError(f"names has {len(self.names)} entries and num_labels={self.num_labels}; give one to each")


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Labelled):
    """Scores every row over labels (Devlin et al. 2019, section 4.1), or predicts numbers for it."""

    objectives: ClassVar[tuple[str, ...]] = ("Classification",)

    pooler: Pooler | None = None
    """Summary of the row that is scored (RoBERTa, DistilBERT); None for the encoder's own pooled state (BERT), or for
    the bare first token where the encoder has no pooler (ViT)."""
    problem_type: ProblemType | None = None
    """What labels are; None for regression with one label, one class if labels are integers, else yes or no each."""

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "SequenceClassificationHead":
        return SequenceClassificationHead(self, inputs, rngs=rngs)

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        summary = 0 if self.pooler is None else self.pooler.flops(inputs.dim)
        return batch * (summary + 2 * self.width(inputs) * self.num_labels)

    @property
    def reads_pooled(self) -> bool:
        return self.pooler is None

    def width(self, inputs: Inputs) -> int:
        """Width of what is scored."""
        return inputs.pooled if self.pooler is None else self.pooler.dim or inputs.dim

    def resolved(self, labels: Shaped[Array, "B ..."]) -> ProblemType:
        """What these labels are."""
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        whole = jnp.issubdtype(labels.dtype, jnp.integer)
        return "single_label_classification" if whole else "multi_label_classification"


class SequenceClassificationHead(nnx.Module):
    """See SequenceClassification."""

    def __init__(self, config: SequenceClassification, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.pooler = config.pooler.build(inputs.dim, rngs=rngs) if config.pooler is not None else None
        summary = (("pooled", config.width(inputs)),)
        self.classifier = Dense(summary, (("labels", config.num_labels),), bias=True, rngs=rngs)

    def __call__(
        self,
        states_BSD: Float[Array, "B S D"],
        pooled_BP: Float[Array, "B P"] | None,
        table_VE: Float[Array, "V E"] | None,
        targets: Targets,
        auxiliary: Auxiliary,
        key: jax.Array | None = None,
    ) -> SequenceOutput:
        key_pooler, key_classifier = split_key(key, 2)
        if self.pooler is not None:
            pooled_BP = self.pooler(states_BSD, key_pooler)
        elif pooled_BP is None:
            pooled_BP = states_BSD[:, 0]
        logits_BC = self.classifier(dropout(pooled_BP, self.config.dropout, key_classifier)).astype(jnp.float32)
        loss = None if targets.labels is None else self.loss(logits_BC, targets.labels)
        return SequenceOutput(
            logits=logits_BC, last_hidden_state=states_BSD, pooled=pooled_BP, loss=loss, auxiliary=auxiliary
        )

    def loss(self, logits_BC: Float[Array, "B C"], labels: Shaped[Array, "B ..."]) -> Float[Array, ""]:
        """Mean loss of the problem type."""
        match self.config.resolved(labels):
            case "regression":
                return mean_squared_error(logits_BC, labels.astype(jnp.float32))
            case "multi_label_classification":
                return mean_binary_cross_entropy(logits_BC, labels.astype(jnp.float32))
            case "single_label_classification":
                return mean_cross_entropy(logits_BC, labels)


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Labelled):
    """Scores every token over labels (Devlin et al. 2019, section 5.3: named entities)."""

    objectives: ClassVar[tuple[str, ...]] = ("TokenClassification",)

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "TokenClassificationHead":
        return TokenClassificationHead(self, inputs, rngs=rngs)

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        return batch * length * 2 * inputs.dim * self.num_labels


class TokenClassificationHead(nnx.Module):
    """See TokenClassification."""

    def __init__(self, config: TokenClassification, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.tagger = Dense((("embed", inputs.dim),), (("labels", config.num_labels),), bias=True, rngs=rngs)

    def project(self, states: Float[Array, "*B D"], table_VE: Float[Array, "V E"] | None) -> Float[Array, "*B C"]:
        """Scores over the labels, float32."""
        return self.tagger(states).astype(jnp.float32)

    def __call__(
        self,
        states_BSD: Float[Array, "B S D"],
        pooled_BP: Float[Array, "B P"] | None,
        table_VE: Float[Array, "V E"] | None,
        targets: Targets,
        auxiliary: Auxiliary,
        key: jax.Array | None = None,
    ) -> TokenOutput:
        logits_BSC = self.project(dropout(states_BSD, self.config.dropout, key), table_VE)
        loss = None if targets.labels is None else mean_cross_entropy(logits_BSC, targets.labels)
        return TokenOutput(logits=logits_BSC, last_hidden_state=states_BSD, loss=loss, auxiliary=auxiliary)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(EncoderHead):
    """Scores every token as the first and as the last of the answer (Devlin et al. 2019, section 4.2)."""

    objectives: ClassVar[tuple[str, ...]] = ("QuestionAnswering",)

    dropout: float = 0.0
    """Dropout on the states."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "QuestionAnsweringHead":
        return QuestionAnsweringHead(self, inputs, rngs=rngs)

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        return batch * length * 4 * inputs.dim


class QuestionAnsweringHead(nnx.Module):
    """See QuestionAnswering. Padding is scored like any token; a position outside of the row is not counted."""

    def __init__(self, config: QuestionAnswering, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.spans = Dense((("embed", inputs.dim),), (("labels", 2),), bias=True, rngs=rngs)

    def __call__(
        self,
        states_BSD: Float[Array, "B S D"],
        pooled_BP: Float[Array, "B P"] | None,
        table_VE: Float[Array, "V E"] | None,
        targets: Targets,
        auxiliary: Auxiliary,
        key: jax.Array | None = None,
    ) -> SpanOutput:
        scores_BS2 = self.score(states_BSD, key).astype(jnp.float32)
        start_BS, end_BS = scores_BS2[..., 0], scores_BS2[..., 1]
        loss = span_loss(start_BS, end_BS, targets)
        return SpanOutput(
            start_logits=start_BS, end_logits=end_BS, last_hidden_state=states_BSD, loss=loss, auxiliary=auxiliary
        )

    def score(self, states_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S 2"]:
        """Score of every token as the first and as the last."""
        return self.spans(dropout(states_BSD, self.config.dropout, key))


def span_loss(start_BS: Float[Array, "B S"], end_BS: Float[Array, "B S"], targets: Targets) -> Float[Array, ""] | None:
    """Mean of the cross-entropies of both ends of the answer; None where none is given."""
    if targets.start_positions is None or targets.end_positions is None:
        return None
    starts, ends = (_within(p, start_BS.shape[1]) for p in (targets.start_positions, targets.end_positions))
    return (mean_cross_entropy(start_BS, starts) + mean_cross_entropy(end_BS, ends)) / 2


def _within(positions_B: Int[Array, "B"], length: int) -> Int[Array, "B"]:
    """Positions from 0; -100, not counted, where the row ends before."""
    return jnp.where(positions_B >= length, -100, jnp.maximum(positions_B, 0))
