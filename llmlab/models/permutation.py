"""The permutation language model: one bidirectional stack, and a second stream of states that may not see themselves.

    input_ids -> embedding ----------------------> h_1 ... h_S --+
                                                                 +-- two-stream block x num_layers --> h, g -> head
    target_mapping (which places) -- one vector -> g_1 ... g_P --+

    log p(x) = sum over t of log p(x_z(t) | x_z(1) ... x_z(t-1)),  in expectation over orders z

(Yang et al. 2019, 1906.08237, equation 3). `perm_mask` says who may see whom in the order at hand, `target_mapping`
which places are predicted, the last sixth of the order in the paper. Without a target mapping there is no query
stream: the model is a bidirectional encoder, which is how it is fine-tuned. With `bidirectional=False` and no order it
is a Transformer-XL, a causal decoder with memory.

`mems` are the layers' inputs of the segments before, and come back with this one's added. Distances are relative, so
the padding's place changes nothing and packed documents compute what they would alone.

Text is written in the order z = 1, 2, 3, ...: token t's content state sees those up to it, and a query state at the
place behind it predicts the next one. So content states never change again, and `next_states` caches their keys and
values.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from llmlab.models.config import ModelConfig, Shapes, check_stack, layers_of
from llmlab.models.decoder import auxiliary_losses
from llmlab.models.heads import EncoderHead, Inputs, Labelled, MaskedLM, MaskedLMHead, Targets
from llmlab.models.losses import mean_cross_entropy
from llmlab.models.outputs import EncoderOutput, Hidden, PermutationOutput, SequenceOutput, SpanOutput, TokenOutput
from llmlab.nn.cache import KVCache
from llmlab.nn.config import Auxiliary, Block, Memory
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.embedding import Embedding
from llmlab.nn.masks import Full
from llmlab.nn.module import normal
from llmlab.nn.stack import Execution, Stack
from llmlab.nn.two_stream import Stream, TwoStreamAttention, TwoStreamContext, encoded_distances
from llmlab.sharding import shard

Flags = Bool[Array, "B ..."] | Int[Array, "B ..."] | Float[Array, "B ..."]


@dataclass(frozen=True, kw_only=True)
class PermutationTransformer(ModelConfig):
    """A permutation language model; every block's mixer is TwoStreamAttention."""

    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding table."""
    dropout: float = 0.0
    """Dropout on the embeddings and on the last states."""
    bidirectional: bool = True
    """Whether a token sees those after it; where not, the model is a Transformer-XL."""
    same_length: bool = False
    """Whether all tokens of a Transformer-XL see as many keys: the later, the less of the memory."""
    backward_half: bool = False
    """Whether the second half of every batch holds texts from last token to first: their distances change sign."""
    clamp_length: int | None = None
    """Largest distance that is told apart; None for no limit."""
    memory_length: int | None = None
    """How many states the memory keeps; None for all."""
    reuse_length: int | None = None
    """How many of a segment's first states enter the memory; None for all."""
    head: EncoderHead | None = MaskedLM(transform=None)
    """What the states are for; None returns them."""
    execution: Execution = Execution()
    """How the layer stack is applied; a call with memory is always unrolled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        check_rate("dropout", self.dropout)
        for name in ("clamp_length", "memory_length", "reuse_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; None is no limit")
        others = [
            type(block.mixer).__name__ for block in self.pattern if not isinstance(block.mixer, TwoStreamAttention)
        ]
        if others:
            raise ValueError(f"mixer={others[0]}: a permutation model's mixers are all TwoStreamAttention")

    @property
    def max_length(self) -> None:
        return None

    @property
    def objectives(self) -> tuple[str, ...]:
        if self.head is None:
            return ()
        return ("Permutation",) if isinstance(self.head, MaskedLM) else self.head.objectives

    @property
    def num_labels(self) -> int | None:
        return self.head.num_labels if isinstance(self.head, Labelled) else None

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    def build(self, rngs: nnx.Rngs) -> "PermutationModel":
        return PermutationModel(self, rngs=rngs)

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        batch, length = shapes["input_ids"]
        targets = shapes["target_mapping"][1] if "target_mapping" in shapes else 0
        num_keys = length + (shapes["mems"][2] if "mems" in shapes else 0)
        num_distances = num_keys + (length if self.bidirectional else 1)
        total = 0
        params = self.abstract()[1]["stack"]
        for block in self.layers():
            assert isinstance(block.mixer, TwoStreamAttention)
            projection = 2 * self.embed_dim * block.mixer.num_heads * block.mixer.resolved_head_dim(self.embed_dim)
            scores = block.mixer.content_flops(self.embed_dim, length, num_keys, num_distances)
            scores += block.mixer.query_flops(self.embed_dim, targets, num_keys, num_distances)
            idle = 2 * block.ffn.idle_parameters(self.embed_dim)
            total += batch * (scores + (length + targets) * (2 * projection - idle))
            total += batch * num_keys * 2 * projection + num_distances * projection * (1 + self.backward_half)
        total += batch * (length + targets) * 2 * _ffn_kernels(params)
        if self.head is not None:
            total += self.head.flops(self.inputs, batch, targets or length)
        return (3 if training else 1) * total

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        if not self.bidirectional:
            return super().batch_shapes(batch_size, length)
        targets = max(1, length // 6)  # the paper's share
        return {
            "input_ids": (batch_size, length),
            "perm_mask": (batch_size, length, length),
            "target_mapping": (batch_size, targets, length),
        }

    @property
    def inputs(self) -> Inputs:
        """Sizes of what the head reads."""
        assert self.vocab_size is not None
        return Inputs(dim=self.embed_dim, table=(self.vocab_size, self.embed_dim))


class PermutationModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: PermutationTransformer, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")
        self.config = config
        self.tokens = Embedding(config.vocab_size, config.embed_dim, rngs=rngs, std=config.embedding_std)
        start_D = config.embedding_std * normal(rngs, (config.embed_dim,))
        self.query_start = nnx.Param(start_D, axes=("embed",))
        self.stack = Stack(config.pattern, config.num_layers, config.embed_dim, config.execution, rngs=rngs)
        self.head: Any = None if config.head is None else config.head.build(config.inputs, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        attention_mask: Flags | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        perm_mask: Flags | None = None,
        target_mapping: Flags | None = None,
        input_mask: Flags | None = None,
        mems: Float[Array, "L B M D"] | None = None,
        use_mems: bool = False,
        segment_ids: Int[Array, "B S"] | None = None,
        labels: Shaped[Array, "B ..."] | None = None,
        start_positions: Int[Array, "B"] | None = None,
        end_positions: Int[Array, "B"] | None = None,
        key: jax.Array | None = None,
    ) -> PermutationOutput | EncoderOutput | TokenOutput | SequenceOutput | SpanOutput:
        """What the head makes of the states: of all S tokens, or of the P targets where a target mapping is given.

        Args:
            input_ids: tokens.
            attention_mask: (B, S), 1 where a token is real.
            token_type_ids: text segment of each token; scores depend on whether two tokens share it.
            perm_mask: (B, S, S), 1 where token i may not see token j. A token's content state always sees itself.
            target_mapping: (B, P, S), row p is one-hot at the place that is predicted. Its prediction sees what
                perm_mask lets that place see; mask a target's own column, or its token is no secret.
            input_mask: (B, S), 1 where a token is padding: attention_mask the other way round, as in the authors' code.
            mems: memory, each layer's inputs of earlier segments, which all tokens see; gives `mems` back, this
                segment added and cut to `memory_length`.
            use_mems: give `mems` back where there was no memory yet.
            segment_ids: number of the document a token belongs to in a packed row; attention stays inside it.
            labels: targets of the head, -100 where none counts; (B, P) with a target mapping. Gives `loss`.
            start_positions: first token of the answer, for a question answering head.
            end_positions: its last token.
            key: makes dropout active.
        """
        key_states, key_head = split_key(key, 2)
        hidden = self.hidden_states(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            perm_mask=perm_mask,
            target_mapping=target_mapping,
            input_mask=input_mask,
            mems=mems,
            use_mems=use_mems,
            segment_ids=segment_ids,
            key=key_states,
        )
        states, new_mems = hidden.states, _mems(hidden)
        if self.head is None:
            return PermutationOutput(last_hidden_state=states, mems=new_mems)
        if isinstance(self.head, MaskedLMHead):
            logits, loss = self.project(states), None
            if labels is not None:
                terms = self.auxiliary_losses(hidden.auxiliary).values()
                loss = sum(terms, mean_cross_entropy(logits, labels))
            return PermutationOutput(logits=logits, last_hidden_state=states, loss=loss, mems=new_mems)
        asked = Targets(labels=labels, start_positions=start_positions, end_positions=end_positions)
        return self.head(states, None, None, asked, hidden.auxiliary, key_head)

    def hidden_states(
        self,
        input_ids: Int[Array, "B S"],
        *,
        attention_mask: Flags | None = None,
        token_type_ids: Int[Array, "B S"] | None = None,
        perm_mask: Flags | None = None,
        target_mapping: Flags | None = None,
        input_mask: Flags | None = None,
        mems: Float[Array, "L B M D"] | None = None,
        use_mems: bool = False,
        segment_ids: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        """Input of the head, (B, P, D) with a target mapping, else (B, S, D); `cache` is the memory of every layer.

        Arguments as for a call. `position_ids` change nothing, as only distances count.
        """
        if use_mems and mems is None:
            mems = jnp.zeros((self.config.num_layers, input_ids.shape[0], 0, self.config.embed_dim))
        key_input, key_query, key_stack, key_output = split_key(key, 4)
        x_BXD = dropout(self.tokens(input_ids), self.config.dropout, key_input)
        if target_mapping is not None:
            shape = (*target_mapping.shape[:2], self.config.embed_dim)
            g_BPD = jnp.broadcast_to(self.query_start[...].astype(x_BXD.dtype), shape)
            x_BXD = jnp.concatenate([x_BXD, dropout(g_BPD, self.config.dropout, key_query)], axis=1)
        memory_length = 0 if mems is None else mems.shape[2]
        real_BS = _real(attention_mask, input_mask)
        allowed_BST = _allowed(self.config, input_ids.shape, memory_length, real_BS, perm_mask, segment_ids)
        context = self._context(x_BXD, input_ids, memory_length, allowed_BST, token_type_ids, target_mapping, real_BS)
        memories = None if mems is None else tuple(Memory(states=states) for states in mems)
        x_BXD = shard(x_BXD, "batch", "residual", "embed")
        x_BXD, inputs, auxiliary = self.stack(x_BXD, context, key_stack, memories)
        states = x_BXD if target_mapping is None else x_BXD[:, input_ids.shape[1] :]
        states = dropout(states, self.config.dropout, key_output)
        kept: Any = None
        if inputs is not None and memories is not None:
            kept = tuple(self._remembered(*pair) for pair in zip(memories, inputs, strict=True))
        return Hidden(states=states, cache=kept, auxiliary=auxiliary)

    def next_states(
        self, input_ids: Int[Array, "B S"], position_ids: Int[Array, "B S"], cache: Sequence[KVCache]
    ) -> Hidden:
        """Query states of the place behind each token, which sees the tokens up to it: what predicts the next token.

        Equal to a call with these tokens and one more of any kind at the end, a `perm_mask` that hides from token i all
        from i on, and a `target_mapping` to the places from 1 on.

        Args:
            input_ids: tokens.
            position_ids: their consecutive places in the row; -1 for padding.
            cache: keys and values of the tokens before, one per layer.

        Raises:
            ValueError: an option of the model under which content states would change as the row grows.
        """
        config, (batch, length) = self.config, input_ids.shape
        if config.same_length or config.backward_half:
            option = "same_length" if config.same_length else "backward_half"
            raise ValueError(
                f"{option}=True: what a token sees depends on the whole batch; generate with {option}=False"
            )
        num_keys = cache[0].key.num_slots
        seen_BST = jnp.arange(num_keys) <= position_ids[:, :, None]
        distances = encoded_distances(num_keys, 0, config.embed_dim, clamp=config.clamp_length)
        place_BS = jnp.maximum(position_ids, 0)
        context = TwoStreamContext(
            mask=Full(),
            position_ids=position_ids,
            valid=jnp.tile(position_ids >= 0, (1, 2)),
            distances_GRD=jnp.asarray(distances)[None],
            content=Stream(first_BQ=num_keys - place_BS, allowed_BQT=seen_BST, other_BQT=None),
            query=Stream(first_BQ=num_keys - place_BS - 1, allowed_BQT=seen_BST, other_BQT=None),
        )
        h_BSD = self.tokens(input_ids)
        g_BSD = jnp.broadcast_to(self.query_start[...].astype(h_BSD.dtype), (batch, length, config.embed_dim))
        x_BXD = shard(jnp.concatenate([h_BSD, g_BSD], axis=1), "batch", "residual", "embed")
        x_BXD, caches, auxiliary = self.stack(x_BXD, context, None, cache)
        return Hidden(states=x_BXD[:, length:], cache=caches, auxiliary=auxiliary)

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by name; none for most models."""
        return auxiliary_losses(self.config.pattern, auxiliary)

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary (or a token classifier's labels), float32."""
        return self.head.project(hidden, self.tokens.table[...])

    def _context(
        self,
        x_BXD: jax.Array,
        input_ids: jax.Array,
        memory_length: int,
        allowed_BST: jax.Array | None,
        token_type_ids: jax.Array | None,
        target_mapping: jax.Array | None,
        real_BS: jax.Array | None,
    ) -> TwoStreamContext:
        config, (batch, length) = self.config, input_ids.shape
        if config.backward_half and batch % 2:
            raise ValueError(f"a batch of {batch} rows has no second half to be read backwards; give it an even number")
        num_keys = memory_length + length
        other_BST = None
        if token_type_ids is not None:
            types_BT = jnp.pad(token_type_ids, ((0, 0), (memory_length, 0)))  # the memory is of segment 0
            other_BST = token_type_ids[:, :, None] != types_BT[:, None, :]
        content_BST, query, valid_BX = allowed_BST, None, real_BS
        if allowed_BST is not None:
            content_BST = allowed_BST | jnp.eye(length, num_keys, memory_length, dtype=bool)
        if target_mapping is not None:
            place_BP = jnp.argmax(target_mapping, axis=-1).astype(jnp.int32)

            def rows(x: jax.Array | None) -> jax.Array | None:
                return None if x is None else jnp.take_along_axis(x, place_BP[:, :, None], axis=1)

            # one row for the whole batch where the rule is the same for all
            by_row = None if allowed_BST is None else jnp.broadcast_to(allowed_BST, (batch, length, num_keys))
            query = Stream(first_BQ=length - place_BP, allowed_BQT=rows(by_row), other_BQT=rows(other_BST))
            if real_BS is not None:
                valid_BX = jnp.concatenate([real_BS, jnp.any(target_mapping > 0, axis=-1)], axis=1)
        ahead = length if config.bidirectional else 0
        distances = [
            encoded_distances(num_keys, ahead, config.embed_dim, clamp=config.clamp_length, backwards=backwards)
            for backwards in ((False, True) if config.backward_half else (False,))
        ]
        return TwoStreamContext(
            mask=Full(),
            position_ids=jnp.broadcast_to(jnp.arange(x_BXD.shape[1]), x_BXD.shape[:2]),
            valid=valid_BX,
            distances_GRD=jnp.asarray(distances),
            content=Stream(first_BQ=None, allowed_BQT=content_BST, other_BQT=other_BST),
            query=query,
        )

    def _remembered(self, before: Memory, segment: Memory) -> Memory:
        states_BMD = jnp.concatenate([before.states, segment.states[:, : self.config.reuse_length]], axis=1)
        first = 0 if self.config.memory_length is None else -self.config.memory_length
        return Memory(states=jax.lax.stop_gradient(states_BMD[:, first:]))


def _mems(hidden: Hidden) -> jax.Array | None:
    memories: Any = hidden.cache
    return None if memories is None else jnp.stack([memory.states for memory in memories])


def _real(attention_mask: jax.Array | None, input_mask: jax.Array | None) -> jax.Array | None:
    if attention_mask is not None and input_mask is not None:
        raise ValueError("attention_mask and input_mask say the same, one the other way round; give one of them")
    if input_mask is not None:
        return input_mask == 0
    return None if attention_mask is None else attention_mask > 0


def _allowed(
    config: PermutationTransformer,
    shape: tuple[int, ...],
    memory_length: int,
    real_BS: jax.Array | None,
    perm_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array | None:
    """Which keys, memory first, the query stream may see from each place, (B or 1, S, T); None for all."""
    if segment_ids is not None and memory_length:
        raise ValueError("a packed row has no memory: its documents have different pasts; give segment_ids or mems")
    rules = []
    if real_BS is not None:
        rules.append(real_BS[:, None, :])
    if perm_mask is not None:
        rules.append(perm_mask == 0)
    if segment_ids is not None:
        rules.append(segment_ids[:, :, None] == segment_ids[:, None, :])
    length = shape[1]
    allowed_BST = None
    if rules:
        allowed_BSS = jnp.broadcast_to(reduce(operator.and_, rules), (shape[0], length, length))
        allowed_BST = jnp.pad(allowed_BSS, ((0, 0), (0, 0), (memory_length, 0)), constant_values=True)
    if not config.bidirectional:
        query, kv = jnp.arange(length)[:, None], jnp.arange(memory_length + length)
        causal_ST = kv <= query + memory_length
        if config.same_length:
            causal_ST &= kv >= query
        allowed_BST = causal_ST[None] if allowed_BST is None else allowed_BST & causal_ST
    return allowed_BST


def _ffn_kernels(stack: dict[str, Any]) -> int:
    """Parameters of the feed-forwards' matmuls, of all layers."""
    flat = jax.tree_util.tree_flatten_with_path(stack)[0]
    names = [([str(part.key) for part in path], leaf) for path, leaf in flat]
    return sum(math.prod(leaf.shape) for path, leaf in names if "ffn" in path and path[-1] == "kernel")
