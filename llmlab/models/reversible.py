"""A model on a reversible stack, causal or seeing both sides: the Reformer's.

    input_ids -> tokens + positions --+--> x1 --+ reversible     +--> y1 --+
                                      |         | layer          |         +-- norm over both -- head
                                      +--> x2 --+ x num_layers   +--> y2 --+

The head reads both streams, 2D wide. A sequence longer than the shortest chunk of its mixers is padded, here and once
for all layers, to a multiple of all their chunks; the padding is masked and cut off again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from llmlab.models.config import ModelConfig, Shapes, Untied, check_stack, layers_of, matmul_parameters
from llmlab.models.decoder import valid_tokens
from llmlab.models.heads import EncoderHead, Inputs, Labelled, MaskedLM, Targets
from llmlab.models.outputs import EncoderOutput, Hidden, PreTrainingOutput, SequenceOutput, SpanOutput, TokenOutput
from llmlab.nn.config import Auxiliary, Block, Context, LayerCache, Norm
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.embedding import Embedding
from llmlab.nn.lsh import ChunkedAttention
from llmlab.nn.masks import Causal, Full, Mask, Padding, Segments
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import AddedPosition
from llmlab.nn.reversible import Reversible, ReversibleStack
from llmlab.nn.stack import Execution
from llmlab.sharding import shard

Output = EncoderOutput | TokenOutput | PreTrainingOutput | SequenceOutput | SpanOutput


@dataclass(frozen=True, kw_only=True)
class ReversibleTransformer(ModelConfig):
    """A model whose layers are computed again from their outputs in the backward pass; every wiring is Reversible."""

    embed_dim: int
    """Width of each of the two streams."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    causal: bool = True
    """Whether a token sees only what came before."""
    position: AddedPosition | None = None
    """Positions added to the embeddings (Axial, Learned, Sinusoidal)."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding table."""
    dropout: float = 0.0
    """Dropout on the embeddings and on the last states."""
    final_norm: Norm = LayerNorm()
    """Norm of both streams side by side."""
    head: EncoderHead | None = MaskedLM(transform=None, decoder=Untied(), bias=False)
    """What the states are for; None returns them. Of a causal model, MaskedLM scores the next token."""
    execution: Execution = Execution()
    """How the layer stack is applied; rematerialisation has nothing to do here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        check_rate("dropout", self.dropout)
        others = [type(block.wiring).__name__ for block in self.pattern if not isinstance(block.wiring, Reversible)]
        if others:
            raise ValueError(f"wiring={others[0]}: the wirings of a ReversibleTransformer are all Reversible")

    @property
    def max_length(self) -> int | None:
        return None if self.position is None else self.position.max_length

    @property
    def objectives(self) -> tuple[str, ...]:
        if isinstance(self.head, MaskedLM):
            return ("NextToken",) if self.causal else self.head.objectives
        return () if self.head is None else self.head.objectives

    @property
    def num_labels(self) -> int | None:
        return self.head.num_labels if isinstance(self.head, Labelled) else None

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    def padded(self, length: int) -> int:
        """Length to which a sequence is padded: a multiple of all chunks, unless the shortest holds it."""
        mixers = [block.mixer for block in self.layers()]
        chunks = [mixer.chunk for mixer in mixers if isinstance(mixer, ChunkedAttention)]
        return -(-length // (whole := math.lcm(*chunks))) * whole if chunks and length > min(chunks) else length

    def head_inputs(self) -> Inputs:
        """Sizes of what the head reads."""
        assert self.vocab_size is not None
        return Inputs(dim=2 * self.embed_dim, table=(self.vocab_size, self.embed_dim))

    def build(self, rngs: nnx.Rngs) -> "ReversibleModel":
        return ReversibleModel(self, rngs=rngs)

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        batch, length = shapes["input_ids"]
        padded = self.padded(length)
        context = sum(block.mixer.context_flops(self.embed_dim, padded) for block in self.layers())
        forward = batch * padded * (2 * matmul_parameters(self.abstract()[1]["stack"]) + context)
        if self.head is not None:
            forward += self.head.flops(self.head_inputs(), batch, length)
        return (3 if training else 1) * forward


class ReversibleModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: ReversibleTransformer, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")
        dim = config.embed_dim
        self.config = config
        self.tokens = Embedding(config.vocab_size, dim, rngs=rngs, std=config.embedding_std)
        self.position = config.position.build(dim, rngs=rngs) if config.position is not None else None
        self.stack = ReversibleStack(config.pattern, config.num_layers, dim, config.execution, rngs=rngs)
        self.final_norm = config.final_norm.build(2 * dim, rngs=rngs)
        self.head: Any = config.head.build(config.head_inputs(), rngs=rngs) if config.head is not None else None

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        labels: Shaped[Array, "B ..."] | None = None,
        start_positions: Int[Array, "B"] | None = None,
        end_positions: Int[Array, "B"] | None = None,
        draws: Mapping[str, Array] | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """What the head answers; without a head, the states of both streams.

        Args:
            input_ids: tokens.
            attention_mask: true or 1 where a token is real.
            position_ids: position of each token; 0, 1, 2... by default, whatever the padding.
            segment_ids: number of the document a token belongs to in a packed row; chunked attention refuses them.
            labels: the target of each token (-100 where it is not counted; of a causal model already shifted) or of
                each row, as the head has it.
            start_positions: index of the answer's first token, beyond the row where there is none.
            end_positions: index of the answer's last token.
            draws: random draws by name: "lsh_rotations".
            key: makes dropout active.
        """
        key_states, key_head = split_key(key, 2)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, segment_ids, draws, key_states)
        if self.head is None:
            return EncoderOutput(last_hidden_state=hidden.states)
        targets = Targets(labels=labels, start_positions=start_positions, end_positions=end_positions)
        return self.head(hidden.states, None, self.tokens.table[...], targets, hidden.auxiliary, key_head)

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        draws: Mapping[str, Array] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        """Input of the head; arguments as for a call, and a cache of every layer, which then holds these tokens too."""
        key_embedding, key_stack, key_states = split_key(key, 3)
        length = input_ids.shape[1]
        missing = self.config.padded(length) - length if cache is None else 0
        if position_ids is None:
            position_ids = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
        x_BSD = self.tokens(input_ids)
        if self.position is not None:
            x_BSD = self.position(x_BSD, position_ids)
        x_BSD = dropout(x_BSD, self.config.dropout, key_embedding)
        mask: Mask = Causal() if self.config.causal else Full()
        valid = valid_tokens(input_ids, attention_mask, segment_ids)
        if attention_mask is not None or missing:
            real = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
            mask = mask & Padding(_extended(real, missing))
        if segment_ids is not None:
            mask = mask & Segments(_extended(segment_ids, missing), _extended(segment_ids, missing))
        context = Context(
            mask=mask,
            position_ids=_extended(position_ids, missing),
            valid=None if valid is None else _extended(valid, missing),
            draws=draws,
        )
        x_BSD = shard(_extended(x_BSD, missing), "batch", "residual", "embed")
        y_BSE, caches, auxiliary = self.stack(x_BSD, context, key_stack, cache)
        states_BSE = self.final_norm(y_BSE[:, :length])
        return Hidden(dropout(states_BSE, self.config.dropout, key_states), caches, auxiliary)

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss: none, reversible layers report nothing."""
        return {}

    def project(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B C"]:
        """Scores of tokens from their states, float32: over the vocabulary, or over the labels of tokens."""
        return self.head.project(hidden, self.tokens.table[...])


def _extended(x: Shaped[Array, "B S ..."], missing: int) -> Shaped[Array, "B T ..."]:
    """x with so many zeros after the sequence."""
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x
