"""The encoder-decoder: one stack reads the source, another writes the target and looks at what the first understood.

    input_ids --- embedding --- encoder block x N ------------- memory (B, T, D)
                                self-attention, both ways        |  |  |
    decoder_input_ids --- embedding --- decoder block x M  <-----+--+--+
                                        causal self-attention, cross-attention over the memory
                                        +--- head --- logits of the next target token

Sutskever et al. 2014 (1409.3215) split the work so; Vaswani et al. 2017 (1706.03762) made both halves of attention.
For source and target of lengths T and S, a decoder layer costs O(S^2 D) in self-attention, O(S T D) in
cross-attention, and S D^2 and T D^2 in projections (queries of the target, keys and values of the memory). Against a
decoder that reads source and target as one sequence: every source token sees all others, and half of the parameters
work on each token, so that at equal parameters a step costs about half; in return source and target must be told
apart, and the memory is read by attention alone.

Positions are added to the embeddings (BART) or are one bias on the self-attention logits that all layers of a stack
share (T5); cross-attention has none. Decoding with a cache runs the encoder once: every decoder layer keeps its keys
and values of the target so far, and those of the memory.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.config import Head, ModelConfig, Shapes, Tied, check_stack, layers_of
from llmlab.models.decoder import auxiliary_losses, valid_tokens
from llmlab.models.losses import IGNORED, mean_cross_entropy
from llmlab.models.outputs import EncoderDecoderOutput, Hidden
from llmlab.nn.attention import Attention
from llmlab.nn.config import Auxiliary, Block, Context, LayerCache, Norm
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.embedding import Embedding
from llmlab.nn.masks import Causal, Full, Mask, Padding, Segments
from llmlab.nn.module import Params
from llmlab.nn.positions import AddedPosition, BiasPosition
from llmlab.nn.stack import Execution, Stack
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two stacks and what surrounds it."""

    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth; the decoder's have cross-attention (`Block.cross`)."""
    position: AddedPosition | None = None
    """Positions added to the embeddings (Learned, Sinusoidal)."""
    relative: BiasPosition | None = None
    """Positions as a bias on self-attention, one table for all layers (T5Relative, ALiBi)."""
    embedding_norm: Norm | None = None
    """Norm of the embeddings, positions added."""
    final_norm: Norm | None = None
    """Norm of the stack's output; pre-norm stacks need one."""

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(ModelConfig):
    """An encoder-decoder language model."""

    embed_dim: int
    """Width of both residual streams."""
    encoder: Side
    """Reads the source."""
    decoder: Side
    """Writes the target."""
    shared_embedding: bool = True
    """One table for source and target tokens; else the decoder has its own, which a tied head uses."""
    embedding_scale: float = 1.0
    """Factor on the embeddings (the original Transformer uses sqrt(embed_dim))."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding table."""
    embedding_dropout: float = 0.0
    """Dropout on the embeddings."""
    final_dropout: float = 0.0
    """Dropout on the output of each stack (T5)."""
    head: Head = Tied()
    """Tied() or Untied()."""
    logits_scale: float = 1.0
    """Factor on the states that the head scores (T5 with a tied head: 1/sqrt(embed_dim))."""
    logits_constant: bool = False
    """Whether checkpoints hold a vector added to the logits that training leaves as it is (BART)."""
    decoder_start_id: int | None = None
    """Token before the target; None for the target's own last token (mBART's language code)."""
    pad_id: int = 0
    """Token where a row has ended."""
    execution: Execution = Execution()
    """How both stacks are applied: scan or unroll, rematerialisation, LayerDrop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            check_stack(side.pattern, side.num_layers, self.embed_dim)
            if any((block.cross is None) == (name == "decoder") for block in side.pattern):
                raise ValueError(
                    f"{name}.pattern: blocks of a decoder have cross-attention (Block.cross), an encoder's have none"
                )
            if side.relative is not None and not isinstance(side.pattern[0].mixer, Attention):
                raise ValueError(f"{name}.relative biases attention, but layer 0 mixes otherwise; use None")
        check_rate("embedding_dropout", self.embedding_dropout)
        check_rate("final_dropout", self.final_dropout)

    @property
    def pipeline_repeats(self) -> int:
        return self.decoder.num_layers // len(self.decoder.pattern)

    @property
    def max_length(self) -> int | None:
        positions = (self.encoder.position, self.decoder.position)
        return min((p.max_length for p in positions if p is not None and p.max_length is not None), default=None)

    def build(self, rngs: nnx.Rngs) -> "EncoderDecoderModel":
        return EncoderDecoderModel(self, rngs=rngs)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("SequenceToSequence",)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Decoding begins with `decoder_start_id`: training must as well."""
        rows = batch.get("decoder_input_ids")
        if self.decoder_start_id is None or rows is None:
            return
        counted = (np.asarray(batch["labels"]) >= 0).any(axis=1) if "labels" in batch else np.ones(len(rows), bool)
        starts = np.unique(np.asarray(rows)[counted, 0]).tolist()
        if starts and starts != [self.decoder_start_id]:
            raise ValueError(
                f"model.decoder_start_id={self.decoder_start_id}, but the data's targets begin with token "
                f"{' and '.join(map(str, starts))}: decoding would begin as training never does; use "
                f"decoder_start_id={starts[0] if len(starts) == 1 else None}"
            )

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        """As of any model; keys and values of the memory count for each source token, once per decoder layer."""
        (batch, source), (_, target) = shapes["input_ids"], _target(shapes)
        dim, params = self.embed_dim, self.abstract()[1]
        head = _kernels(params.get("head", {}))
        if isinstance(self.head, Tied):
            head = math.prod(params["embedding"]["table"].shape)
        remembered = sum(_kernels(params["decoder"], part) for part in ("key", "value"))
        idle = {name: sum(b.ffn.idle_parameters(dim) for b in self._side(name).layers()) for name in _SIDES}
        per_source = 2 * (_kernels(params["encoder"]) - idle["encoder"] + remembered)
        per_source += sum(block.mixer.context_flops(dim, source) for block in self.encoder.layers())
        per_target = 2 * (_kernels(params["decoder"]) - idle["decoder"] - remembered + head)
        for block in self.decoder.layers():
            assert block.cross is not None
            per_target += block.mixer.context_flops(dim, target) + block.cross.context_flops(dim, source)
        return (3 if training else 1) * batch * (source * per_source + target * per_target)

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        return {"input_ids": (batch_size, length), "decoder_input_ids": (batch_size, length)}

    def num_tokens(self, shapes: Shapes) -> int:
        """Positions of source and target."""
        return math.prod(shapes["input_ids"]) + math.prod(_target(shapes))

    def _side(self, name: str) -> Side:
        return self.encoder if name == "encoder" else self.decoder


_SIDES = ("encoder", "decoder")


def _target(shapes: Shapes) -> tuple[int, ...]:
    return shapes["decoder_input_ids"] if "decoder_input_ids" in shapes else shapes["labels"]


def _kernels(params: Params, part: str | None = None) -> int:
    """Matmul parameters; with `part`, those of this part of cross-attention."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [[str(key.key) for key in path] for path, _ in flat]
    sizes = [math.prod(leaf.shape) for _, leaf in flat]
    wanted = ["kernel"] if part is None else ["cross", part, "kernel"]
    return sum(size for name, size in zip(names, sizes, strict=True) if name[-len(wanted) :] == wanted)


class SideStack(nnx.Module):
    """See Side."""

    def __init__(self, config: Side, dim: int, execution: Execution, rate: float, *, rngs: nnx.Rngs) -> None:
        mixer = config.pattern[0].mixer
        heads = mixer.num_heads if isinstance(mixer, Attention) else 1
        self.dropout = rate
        self.position = config.position.build(dim, rngs=rngs) if config.position else None
        self.relative: Any = config.relative.build(heads, rngs=rngs) if config.relative else None
        self.embedding_norm = config.embedding_norm.build(dim, rngs=rngs) if config.embedding_norm else None
        self.stack = Stack(config.pattern, config.num_layers, dim, execution, rngs=rngs)
        self.final_norm = config.final_norm.build(dim, rngs=rngs) if config.final_norm else None

    def embed(self, x_BSD: Float[Array, "B S D"], position_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Token embeddings with positions, normalised."""
        if self.position is not None:
            x_BSD = self.position(x_BSD, position_ids)
        return x_BSD if self.embedding_norm is None else self.embedding_norm(x_BSD)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        """Output of the stack, normalised."""
        if self.relative is not None:
            context = dataclasses.replace(context, bias=self.relative.bias())
        key_stack, key_final = split_key(key, 2)
        x_BSD, caches, auxiliary = self.stack(shard(x_BSD, "batch", "residual", "embed"), context, key_stack, cache)
        x_BSD = x_BSD if self.final_norm is None else self.final_norm(x_BSD)
        return Hidden(states=dropout(x_BSD, self.dropout, key_final), cache=caches, auxiliary=auxiliary)


class EncoderDecoderModel(nnx.Module):
    """See the module's docstring. Dropout is active when, and only when, a key is given."""

    def __init__(self, config: EncoderDecoder, *, rngs: nnx.Rngs) -> None:
        if config.vocab_size is None:
            raise ValueError("vocab_size is None: it follows the tokenizer; set it to build the model by itself")

        def table() -> Embedding:
            assert config.vocab_size is not None
            return Embedding(config.vocab_size, config.embed_dim, rngs=rngs, std=config.embedding_std)

        dim, execution, rate = config.embed_dim, config.execution, config.final_dropout
        self.config = config
        self.embedding = table()
        self.decoder_embedding = None if config.shared_embedding else table()
        self.encoder = SideStack(config.encoder, dim, execution, rate, rngs=rngs)
        self.decoder = SideStack(config.decoder, dim, execution, rate, rngs=rngs)
        self.head = config.head.build(dim, config.vocab_size, rngs=rngs)
        constant = nnx.Param(jnp.zeros(config.vocab_size), axes=("vocab",))
        self.logits_bias = constant if config.logits_constant else None

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        decoder_input_ids: Int[Array, "B S"] | None = None,
        decoder_attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        decoder_position_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B S"] | None = None,
        labels: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> EncoderDecoderOutput:
        """Logits of every target position.

        Args:
            input_ids: source tokens.
            attention_mask: true or 1 where a source token is real.
            decoder_input_ids: target tokens, starting with `config.decoder_start_id`; by default the labels shifted
                to the right.
            decoder_attention_mask: true or 1 where a target token is real.
            position_ids: position of each source token in its document; 0, 1, 2... by default.
            segment_ids: number of the document a source token belongs to, in a packed row.
            decoder_position_ids: as position_ids, of the target.
            decoder_segment_ids: as segment_ids, of the target; it sees the source with the same number.
            labels: the next target token of each position, -100 where it is not counted; gives `loss`.
            key: makes dropout active.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("an encoder-decoder needs decoder_input_ids, or labels to shift to the right")
            decoder_input_ids = shift_right(labels, self.config.decoder_start_id, self.config.pad_id)
        key_encoder, key_decoder = split_key(key, 2)
        memory = self.encode(input_ids, attention_mask, position_ids, segment_ids, key_encoder)
        hidden = self.decode(
            decoder_input_ids,
            memory.states,
            self.memory_mask(attention_mask, segment_ids, decoder_segment_ids),
            decoder_attention_mask,
            decoder_position_ids,
            decoder_segment_ids,
            key_decoder,
        )
        logits_BSV = self.project(hidden.states)
        auxiliary = _both(memory.auxiliary, hidden.auxiliary)
        loss = None
        if labels is not None:
            loss = sum(self.auxiliary_losses(auxiliary).values(), mean_cross_entropy(logits_BSV, labels))
        return EncoderDecoderOutput(
            logits=logits_BSV,
            last_hidden_state=hidden.states,
            encoder_last_hidden_state=memory.states,
            loss=loss,
            auxiliary=auxiliary,
        )

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        decoder_input_ids: Int[Array, "B S"] | None = None,
        decoder_attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        decoder_position_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        """The decoder's states, input of `project`; arguments as for a call."""
        if decoder_input_ids is None:
            raise ValueError("an encoder-decoder needs decoder_input_ids: what the target is before each position")
        key_encoder, key_decoder = split_key(key, 2)
        memory = self.encode(input_ids, attention_mask, position_ids, segment_ids, key_encoder)
        mask = self.memory_mask(attention_mask, segment_ids, decoder_segment_ids)
        own = (decoder_attention_mask, decoder_position_ids, decoder_segment_ids)
        hidden = self.decode(decoder_input_ids, memory.states, mask, *own, key_decoder)
        return dataclasses.replace(hidden, auxiliary=_both(memory.auxiliary, hidden.auxiliary))

    def encode(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        """What the encoder makes of the source: the memory that `decode` looks at."""
        valid = valid_tokens(input_ids, attention_mask, segment_ids)
        mask = _own_mask(Full(), attention_mask, segment_ids)
        key_embedding, key_side = split_key(key, 2)
        position_ids = _positions(input_ids) if position_ids is None else position_ids
        x_BTD = self._embed(self.embedding, self.encoder, input_ids, position_ids, key_embedding)
        return self.encoder(x_BTD, Context(mask=mask, position_ids=position_ids, valid=valid), key_side)

    def decode(
        self,
        decoder_input_ids: Int[Array, "B S"],
        memory: Float[Array, "B T D"] | None,
        memory_mask: Mask | None = None,
        decoder_attention_mask: Bool[Array, "B U"] | Int[Array, "B U"] | None = None,
        decoder_position_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B S"] | None = None,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Hidden:
        """The decoder's states over a memory.

        Args:
            decoder_input_ids: target tokens; with a cache, those at decoder_position_ids.
            memory: from `encode`; None where the cache has its keys and values from an earlier call.
            memory_mask: which of the memory is seen, from `memory_mask`.
            decoder_attention_mask: as for a call; with a cache, over its slots.
            decoder_position_ids: as for a call; with a cache, -1 is padding.
            decoder_segment_ids: as for a call.
            key: makes dropout active.
            cache: one per layer; this call's positions, and the memory's keys and values, are stored in it.
        """
        positions = _positions(decoder_input_ids) if decoder_position_ids is None else decoder_position_ids
        valid = valid_tokens(decoder_input_ids, decoder_attention_mask, decoder_segment_ids)
        context = Context(
            mask=_own_mask(Causal(), decoder_attention_mask, decoder_segment_ids),
            position_ids=positions,
            valid=valid if cache is None else positions >= 0,
            memory=memory,
            memory_mask=memory_mask,
        )
        key_embedding, key_side = split_key(key, 2)
        table = self.embedding if self.decoder_embedding is None else self.decoder_embedding
        x_BSD = self._embed(table, self.decoder, decoder_input_ids, positions, key_embedding)
        return self.decoder(x_BSD, context, key_side, cache)

    def memory_mask(
        self,
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        decoder_segment_ids: Int[Array, "B S"] | None = None,
    ) -> Mask:
        """Which of the memory each target position sees: real tokens of its own document."""
        mask: Mask = Full()
        if attention_mask is not None:
            mask = mask & Padding(attention_mask.astype(bool))
        if (segment_ids is None) != (decoder_segment_ids is None):
            raise ValueError("packed rows have segment_ids and decoder_segment_ids; only one of them was given")
        if segment_ids is not None and decoder_segment_ids is not None:
            mask = mask & Segments(decoder_segment_ids, segment_ids)
        return mask

    def auxiliary_losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted terms that training adds to the mean loss, by side and name; none for most models."""
        losses: dict[str, Float[Array, ""]] = {}
        for name, pattern in (("encoder", self.config.encoder.pattern), ("decoder", self.config.decoder.pattern)):
            own = {key.removeprefix(f"{name}/"): a for key, a in auxiliary.items() if key.startswith(f"{name}/")}
            losses |= {f"{name}/{key}": loss for key, loss in auxiliary_losses(pattern, own).items()}
        return losses

    def project(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        if self.config.logits_scale != 1.0:
            hidden = hidden * jnp.asarray(self.config.logits_scale, hidden.dtype)
        table = self.embedding if self.decoder_embedding is None else self.decoder_embedding
        logits = (table.attend(hidden) if self.head is None else self.head(hidden)).astype(jnp.float32)
        if self.logits_bias is None:
            return logits
        return logits + jax.lax.stop_gradient(self.logits_bias[...].astype(jnp.float32))

    def _embed(
        self,
        table: Embedding,
        side: SideStack,
        ids: Int[Array, "B S"],
        position_ids: Int[Array, "B S"],
        key: jax.Array | None,
    ) -> Float[Array, "B S D"]:
        x_BSD = table(ids)
        if self.config.embedding_scale != 1.0:
            x_BSD = x_BSD * jnp.asarray(self.config.embedding_scale, x_BSD.dtype)
        return dropout(side.embed(x_BSD, position_ids), self.config.embedding_dropout, key)


def shift_right(labels: Int[Array, "B S"], start_id: int | None, pad_id: int) -> Int[Array, "B S"]:
    """Decoder inputs for labels: the start token, then all labels but the last; -100 becomes padding.

    Without a start token every row begins with its own last real label (mBART's targets end with a language code).
    """
    ids = jnp.where(labels == IGNORED, pad_id, labels)
    if start_id is None:
        last_B1 = jnp.maximum(jnp.sum(ids != pad_id, axis=1, keepdims=True) - 1, 0)
        first_B1 = jnp.take_along_axis(ids, last_B1, axis=1)
    else:
        first_B1 = jnp.full_like(ids[:, :1], start_id)
    return jnp.concatenate([first_B1, ids[:, :-1]], axis=1)


def _positions(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def _own_mask(
    mask: Mask, attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None, segment_ids: jax.Array | None
) -> Mask:
    """Mask of self-attention."""
    if attention_mask is not None:
        mask = mask & Padding(attention_mask.astype(bool))
    if segment_ids is not None:
        mask = mask & Segments(segment_ids, segment_ids)
    return mask


def _both(encoder: Auxiliary, decoder: Auxiliary) -> Auxiliary:
    return {f"encoder/{k}": a for k, a in encoder.items()} | {f"decoder/{k}": a for k, a in decoder.items()}
