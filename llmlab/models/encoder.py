"""The encoder: embedding, a stack in which every token sees every other, a head.

    input_ids -> tokens + positions + segment types -> norm -> block x num_layers -> (final norm) -> head
                                                                              |
                                                                              +-> pooler on the first token

Nothing is predicted from the left alone, so a state knows both sides of its token (Devlin et al. 2019, 1810.04805):
better for understanding than a decoder of its size, and no generator. It learns by filling in what was masked out;
15% of the tokens teach at every step, where all of a decoder's do. Which keys a query may see is up to padding,
documents in a packed row, and the mixer; nothing here is causal.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from llmlab.models.config import ModelConfig, Shapes, check_stack, layers_of, matmul_parameters
from llmlab.models.decoder import auxiliary_losses, valid_tokens
from llmlab.models.heads import EncoderHead, Inputs, Labelled, MaskedLM, Pooler, PreTraining, Targets
from llmlab.models.outputs import EncoderOutput, Hidden, PreTrainingOutput, SequenceOutput, SpanOutput, TokenOutput
from llmlab.nn.config import Auxiliary, Block, Context, Norm
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, dropout
from llmlab.nn.embedding import Embedding, SegmentEmbedding
from llmlab.nn.masks import Full, Mask, Padding, Segments
from llmlab.nn.positions import AddedPosition
from llmlab.nn.stack import Execution, Stack
from llmlab.sharding import shard

# fold_in constants that separate the dropout of embedding and head from the layers', which fold in their index.
_EMBEDDING_KEY, _HEAD_KEY = 0xE4B, 0x4EAD

Output = EncoderOutput | TokenOutput | PreTrainingOutput | SequenceOutput | SpanOutput


@dataclass(frozen=True, kw_only=True)
class Factorised:
    """A narrow token table and a matrix that widens its rows (Lan et al. 2020, 1909.11942, section 3.1).

    V E + (2 n + 1) E D parameters instead of V D, where n neighbours on each side are read with a token.
    """

    dim: int
    """Width of the table."""
    neighbours: int = 0
    """Tokens on each side whose rows are read with a token's own (MobileBERT: 1). Beyond a document they are zero."""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.neighbours < 0:
            raise ValueError(f"dim={self.dim} must be positive and neighbours={self.neighbours} not negative")


@dataclass(frozen=True, kw_only=True)
class Encoder(ModelConfig):
    """An encoder of tokens."""

    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    position: AddedPosition | None = None
    """Positions added to the embeddings (Learned, Sinusoidal); None when attention has its own."""
    num_token_types: int = 0
    """Types of tokens that have an embedding of their own (BERT: 2, for a first and a second sentence)."""
    factorised: Factorised | None = None
    """A token table narrower than the model; None for one of embed_dim."""
    embedding_norm: Norm | None = None
    """Norm right after the embedding."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding table."""
    embedding_dropout: float = 0.0
    """Dropout on the embeddings."""
    unpositioned_token: int | None = None
    """Token that positions do not count (RoBERTa's padding): by default a token's position is how many others precede
    it. None counts all."""
    final_norm: Norm | None = None
    """Norm of the last layer's output; pre-norm models need one."""
    pooler: Pooler | None = None
    """Summary of a row, for the heads that read it."""
    head: EncoderHead | None = MaskedLM()
    """What is answered: MaskedLM(), PreTraining(), SequenceClassification(), TokenClassification(),
    QuestionAnswering(); None for the states themselves."""
    execution: Execution = Execution()
    """How the layer stack is applied: scan or unroll, rematerialisation, LayerDrop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        check_rate("embedding_dropout", self.embedding_dropout)
        if isinstance(self.head, PreTraining) and self.pooler is None:
            raise ValueError("PreTraining reads pooled states and pooler=None makes none; use pooler=Pooler()")

    @property
    def pipeline_repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def max_length(self) -> int | None:
        return None if self.position is None else self.position.max_length

    @property
    def objectives(self) -> tuple[str, ...]:
        of_head = () if self.head is None else self.head.objectives
        return (*of_head, "SentenceContrastive")

    @property
    def num_labels(self) -> int | None:
        return self.head.num_labels if isinstance(self.head, Labelled) else None

    @property
    def replaceable(self) -> tuple[str, ...]:
        return ("head", "pooler")

    @property
    def table_dim(self) -> int:
        """Width of the token table."""
        return self.embed_dim if self.factorised is None else self.factorised.dim

    @property
    def pools(self) -> bool:
        """Whether a call computes pooled states: the head reads them, or there is no head."""
        return self.pooler is not None and (self.head is None or self.head.reads_pooled)

    def head_inputs(self) -> Inputs:
        """Sizes of what the head reads."""
        assert self.vocab_size is not None
        pooled_dim = None if self.pooler is None else self.pooler.dim or self.embed_dim
        return Inputs(dim=self.embed_dim, pooled_dim=pooled_dim, table=(self.vocab_size, self.table_dim))

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    def build(self, rngs: nnx.Rngs) -> "EncoderModel":
        return EncoderModel(self, rngs=rngs)

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        batch, length = shapes["input_ids"]
        params, tokens = self.abstract()[1], batch * length
        matmul = matmul_parameters({name: params[name] for name in ("embedding", "stack")})
        matmul -= sum(block.ffn.idle_parameters(self.embed_dim) for block in self.layers())
        context = sum(block.mixer.context_flops(self.embed_dim, length) for block in self.layers())
        forward = tokens * (2 * matmul + context)
        if self.pooler is not None and self.pools:
            forward += batch * self.pooler.flops(self.embed_dim)
        if self.head is not None:
            # a masked language model scores the masked places alone, where the batch names them
            scored = shapes["masked_positions"][1] if "masked_positions" in shapes else length
            forward += self.head.flops(self.head_inputs(), batch, scored)
        return (3 if training else 1) * forward


class EncoderEmbedding(nnx.Module):
    """Tokens, positions and segment types added up, norm, dropout."""

    def __init__(self, config: Encoder, *, rngs: nnx.Rngs) -> None:
        assert config.vocab_size is not None
        dim, table_dim, std = config.embed_dim, config.table_dim, config.embedding_std
        self.dropout = config.embedding_dropout
        self.neighbours = 0 if config.factorised is None else config.factorised.neighbours
        axes = ("vocab", "embed") if config.factorised is None else ("vocab", "factor")
        self.tokens = Embedding(config.vocab_size, table_dim, rngs=rngs, std=std, axes=axes)
        read, embed = (("factor", (1 + 2 * self.neighbours) * table_dim),), (("embed", dim),)
        self.projection = Dense(read, embed, bias=True, rngs=rngs) if config.factorised is not None else None
        self.position = config.position.build(dim, rngs=rngs) if config.position is not None else None
        self.segments = SegmentEmbedding(config.num_token_types, dim, rngs=rngs) if config.num_token_types else None
        self.norm = config.embedding_norm.build(dim, rngs=rngs) if config.embedding_norm is not None else None

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        token_type_ids: Int[Array, "B S"] | None,
        position_ids: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B S D"]:
        x_BSD = self.tokens(input_ids)
        if self.projection is not None:
            x_BSD = self.projection(_with_neighbours(x_BSD, self.neighbours, segment_ids))
        if self.position is not None:
            x_BSD = self.position(x_BSD, position_ids)
        if self.segments is not None:
            x_BSD = self.segments(x_BSD, jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None:
            raise ValueError("token_type_ids were given to a model without token types; leave them out")
        if self.norm is not None:
            x_BSD = self.norm(x_BSD)
        return dropout(x_BSD, self.dropout, key)


class EncoderModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: Encoder, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")
        self.config = config
        self.embedding = EncoderEmbedding(config, rngs=rngs)
        self.stack = Stack(config.pattern, config.num_layers, config.embed_dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(config.embed_dim, rngs=rngs) if config.final_norm else None
        self.pooler = config.pooler.build(config.embed_dim, rngs=rngs) if config.pooler is not None else None
        self.head: Any = config.head.build(config.head_inputs(), rngs=rngs) if config.head is not None else None

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        labels: Shaped[Array, "B ..."] | None = None,
        next_sentence_label: Int[Array, "B"] | None = None,
        start_positions: Int[Array, "B"] | None = None,
        end_positions: Int[Array, "B"] | None = None,
        global_attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        draws: Mapping[str, Array] | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """What the head answers; without a head, the states and their summary.

        Args:
            input_ids: tokens.
            attention_mask: true or 1 where a token is real.
            token_type_ids: segment type of each token, 0 by default.
            position_ids: position of each token in its document; 0, 1, 2... by default, whatever the padding, unless
                the config names a token that is not counted.
            segment_ids: number of the document a token belongs to in a packed row; attention stays inside it.
            labels: the target of each token (-100 where it is not counted) or of each row, as the head has it.
            next_sentence_label: 0 where the second sentence follows the first, 1 where it does not.
            start_positions: index of the answer's first token, beyond the row where there is none.
            end_positions: index of the answer's last token.
            global_attention_mask: true or 1 where a token sees all and is seen by all, in sparse attention.
            draws: random draws by name, where mixers take them.
            key: makes dropout active.
        """
        hidden = self.hidden_states(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            segment_ids=segment_ids,
            global_attention_mask=global_attention_mask,
            draws=draws,
            key=key,
        )
        targets = Targets(
            labels=labels,
            next_sentence_label=next_sentence_label,
            start_positions=start_positions,
            end_positions=end_positions,
        )
        return self.answer(input_ids, hidden, targets, key)

    def answer(self, input_ids: Int[Array, "B S"], hidden: Hidden, targets: Targets, key: jax.Array | None) -> Output:
        """What the head makes of the states."""
        states_BSD = hidden.states
        pooled_BP = self.pool(states_BSD) if self.config.pools else None
        if self.head is None:
            return EncoderOutput(last_hidden_state=states_BSD, pooled=pooled_BP, auxiliary=hidden.auxiliary)
        table_VE, head_key = self.embedding.tokens.table[...], _folded(key, _HEAD_KEY)
        output = self.head(states_BSD, pooled_BP, table_VE, targets, hidden.auxiliary, head_key)
        if output.loss is None:
            return output
        extra = self.auxiliary_losses(hidden.auxiliary)
        return dataclasses.replace(output, loss=sum(extra.values(), output.loss))

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        global_attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        draws: Mapping[str, Array] | None = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        """Input of the head, and what else the stack gives; arguments as for a call."""
        if position_ids is None:
            position_ids = default_positions(input_ids, self.config.unpositioned_token)
        if token_type_ids is None:
            token_type_ids = self.default_token_types(input_ids)
        if global_attention_mask is None:
            global_attention_mask = self.default_global_tokens(input_ids)
        mask: Mask = Full()
        if attention_mask is not None:
            mask = mask & Padding(attention_mask.astype(bool))
        if segment_ids is not None:
            mask = mask & Segments(segment_ids, segment_ids)
        embedding_key = _folded(key, _EMBEDDING_KEY)
        x_BSD = self.embedding(input_ids, token_type_ids, position_ids, segment_ids, embedding_key)
        context = Context(
            mask=mask,
            position_ids=position_ids,
            valid=valid_tokens(input_ids, attention_mask, segment_ids),
            global_tokens=None if global_attention_mask is None else global_attention_mask.astype(bool),
            draws=draws,
        )
        x_BSD, _, auxiliary = self.stack(shard(x_BSD, "batch", "residual", "embed"), context, key)
        states_BSD = x_BSD if self.final_norm is None else self.final_norm(x_BSD)
        return Hidden(states=states_BSD, auxiliary=auxiliary)

    def default_token_types(self, input_ids: Int[Array, "B S"]) -> Int[Array, "B S"] | None:
        """Token types where a call gives none; None is type 0 for all. A family in which they follow overrides this."""
        return None

    def default_global_tokens(self, input_ids: Int[Array, "B S"]) -> Bool[Array, "B S"] | None:
        """Global tokens where a call names none: none. A family in which the task has some overrides this."""
        return None

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by name; none for most models."""
        return auxiliary_losses(self.config.pattern, auxiliary)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """Scores of tokens from their states, float32: over the vocabulary, or over the labels of tokens."""
        return self.head.project(hidden, self.embedding.tokens.table[...])

    def pool(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B P"]:
        """Summary of each row."""
        assert self.pooler is not None
        return self.pooler(hidden)

    def relate(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B 2"]:
        """Scores of (second sentence follows, is a random one) from the states, for a PreTraining head; float32."""
        return self.head.relate(self.pool(hidden))


def default_positions(input_ids: Int[Array, "B S"], unpositioned_token: int | None = None) -> Int[Array, "B S"]:
    """0, 1, 2... in every row. With a token that is not counted, the others are numbered and it is at -1 everywhere."""
    if unpositioned_token is None:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    counted = input_ids != unpositioned_token
    return jnp.where(counted, jnp.cumsum(counted, axis=1) - 1, -1)


def _with_neighbours(
    x_BSE: Float[Array, "B S E"], num: int, segment_ids: Int[Array, "B S"] | None
) -> Float[Array, "B S F"]:
    """Each token's row between those of the `num` tokens after it, and then before it, as MobileBERT orders them."""
    if num == 0:
        return x_BSE
    parts = []
    for shift in range(num, -num - 1, -1):
        moved = _moved(x_BSE, shift)
        if segment_ids is not None and shift != 0:
            same = _moved(segment_ids, shift, fill=-1) == segment_ids
            moved = jnp.where(same[..., None], moved, jnp.zeros_like(moved))
        parts.append(moved)
    return jnp.concatenate(parts, axis=-1)


def _moved(x: Shaped[Array, "B S ..."], shift: int, fill: float = 0) -> Shaped[Array, "B S ..."]:
    """x[:, i + shift] at every i, `fill` beyond the row."""
    length = x.shape[1]
    before, after = max(-shift, 0), max(shift, 0)
    widths = ((0, 0), (before, after), *(((0, 0),) * (x.ndim - 2)))
    return jnp.pad(x, widths, constant_values=fill)[:, after : after + length]


def _folded(key: jax.Array | None, number: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)
