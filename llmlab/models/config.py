"""Typed model configs: what a whole model is made of.

A config alone answers how many parameters the model has and how many FLOPs a token costs; `build` makes the model.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from flax import nnx

from llmlab.nn.attention import Attention
from llmlab.nn.config import Block, Norm
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate
from llmlab.nn.module import Axes, NoNumbers, Params, logical_axes, num_parameters, split
from llmlab.nn.mup import MuP
from llmlab.nn.positions import AddedPosition
from llmlab.nn.stack import Execution

if TYPE_CHECKING:
    from llmlab.models.decoder import DecoderModel


Config = TypeVar("Config", bound="ModelConfig")

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every array of a batch, by name."""


@dataclass(frozen=True, kw_only=True)
class Head(abc.ABC):
    """How hidden states become scores over the vocabulary."""

    @abc.abstractmethod
    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs, gain: float = 1.0) -> Dense | None:
        """The projection, or None where the embedding table serves; `gain` is a factor on its initial deviation."""


@dataclass(frozen=True, kw_only=True)
class Tied(Head):
    """The embedding table scores the next token (Press and Wolf 2017, 1608.05859)."""

    scale: float = 1.0
    """Factor on the scores; 1/sqrt(embed_dim) where embeddings have size one (PaLM)."""

    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs, gain: float = 1.0) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Untied(Head):
    """A matrix of its own scores the next token."""

    bias: bool = False
    """Whether to add a bias per token."""

    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs, gain: float = 1.0) -> Dense:
        return Dense((("embed", dim),), (("vocab", vocab_size),), bias=self.bias, rngs=rngs, gain=gain)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """A whole model. Knows its size and cost without being built."""

    vocab_size: int | None = None
    """Rows of the embedding; None for the tokenizer's size rounded up to a multiple of 128."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} is not positive; None takes the tokenizer's")

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with freshly drawn parameters."""

    @property
    @abc.abstractmethod
    def max_length(self) -> int | None:
        """Longest sequence that the position table holds; None for no limit."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives that can train it, head and all; () where it does not say."""
        return ()

    @property
    def pipeline_repeats(self) -> int:
        """Repeats of its layers that the stages of a pipeline can share; 0 where a pipeline cannot split it."""
        return 0

    @property
    def width_growth(self) -> Mapping[str, float]:
        """How many times as long as in muP's base model each logical axis is, for the optimizer; {} without muP."""
        return {}

    @property
    def num_labels(self) -> int | None:
        """How many classes its head tells apart; None where it has no such head."""
        return None

    @abc.abstractmethod
    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        """Matmul FLOPs of one forward pass, or of forward and backward (three times that), over a batch.

        Convention: two per multiply-add; the head's matmul counts, the embedding lookup does not; attention counts
        every key of the sequence (or window), masked or not; norms, activations, softmax and rematerialisation do not
        count.

        Args:
            shapes: of the batch's arrays by name, among them those that the model is called with.
            training: whether the backward pass counts too.
        """

    def batch_shapes(self, batch_size: int, length: int) -> Shapes:
        """Shapes of a plain batch, for sizes and costs: what the model is called with at least.

        Args:
            batch_size: rows.
            length: tokens of a row, where the model has tokens.
        """
        return {"input_ids": (batch_size, length)}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises a ValueError for a batch (host arrays) that means something else to the data than to the model."""
        return

    @property
    def replaceable(self) -> tuple[str, ...]:
        """Parts, by the first name of their parameters, that a model which starts from another's weights may have of
        its own: a classifier on a pretrained encoder."""
        return ()

    def num_tokens(self, shapes: Shapes) -> int:
        """Positions of a batch that the model processes, which is what tokens/s counts."""
        return math.prod(shapes["input_ids"])

    def with_vocabulary(self: Config, size: int) -> Config:
        """The config with its vocabulary settled: the tokenizer's, rounded up to a multiple of 128, where it is None.

        Raises:
            ValueError: it is smaller than the tokenizer's.
        """
        if self.vocab_size is None:
            return dataclasses.replace(self, vocab_size=-(-size // 128) * 128)
        if self.vocab_size < size:
            raise ValueError(
                f"model.vocab_size={self.vocab_size} is less than the tokenizer's {size} tokens; use at least that, "
                "or None for the tokenizer's size rounded up to a multiple of 128"
            )
        return self

    def abstract(self) -> "tuple[nnx.GraphDef, Params, Axes]":
        """Graph definition, parameter shapes and logical axes, without allocating anything."""
        model = nnx.eval_shape(lambda: self.build(NoNumbers(jax.random.key(0))))
        graphdef, params = split(model)
        return graphdef, params, logical_axes(model)

    def num_parameters(self) -> int:
        """Number of parameters, a tied table counted once."""
        return num_parameters(self.abstract()[1])


def matmul_parameters(params: Params) -> int:
    """Parameters that every token is multiplied with: all arrays named "kernel"."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(math.prod(leaf.shape) for path, leaf in flat if str(path[-1].key) == "kernel")


@dataclass(frozen=True, kw_only=True)
class Transformer(ModelConfig):
    """A decoder-only language model."""

    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    position: AddedPosition | None = None
    """Positions added to the embeddings (Learned, Sinusoidal); None when attention has its own (Rotary, ALiBi)."""
    block_position: AddedPosition | None = None
    """Second positions added to the embeddings, of a token in the blank that it fills (GLM); None for none."""
    embedding_norm: Norm | None = None
    """Norm right after the embedding (BLOOM)."""
    embedding_scale: float = 1.0
    """Factor on the embedding (Gemma and the original Transformer use sqrt(embed_dim))."""
    embedding_std: float = 0.02
    """Standard deviation of the initial embedding table."""
    embedding_dropout: float = 0.0
    """Dropout on the embeddings."""
    final_norm: Norm | None = None
    """Norm before the head; pre-norm models need one."""
    head: Head = Tied()
    """Tied() or Untied()."""
    execution: Execution = Execution()
    """How the layer stack is applied: scan or unroll, rematerialisation, LayerDrop."""
    context_length: int | None = None
    """Longest sequence the model is meant for, where no position table says so; recorded in exports, not enforced."""
    mup: MuP | None = None
    """The base model of a family whose best learning rate is the same at every width; None for the standard
    parametrisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stack(self.pattern, self.num_layers, self.embed_dim)
        check_rate("embedding_dropout", self.embedding_dropout)
        if self.mup is not None:
            self.blocks()
            _check_own_scales(self, self.mup)
            dict(self.width_growth)

    @property
    def width_growth(self) -> Mapping[str, float]:
        if self.mup is None:
            return {}
        heads: dict[str, tuple[int, int]] = {}
        for i, block in enumerate(self.pattern):
            for part, mixer in (("mixer", block.mixer), ("cross", block.cross)):
                if isinstance(mixer, Attention):
                    width, where = mixer.resolved_head_dim(self.embed_dim), f"pattern.{i}.{part}"
                    heads[f"{where}.num_heads"] = mixer.num_heads, width
                    heads[f"{where}.num_kv_heads"] = mixer.num_kv_heads or mixer.num_heads, width
        return self.mup.growth(self.embed_dim, heads)

    def blocks(self) -> tuple[Block, ...]:
        """The pattern as it is built: with muP's factors where there is a base model."""
        if self.mup is None:
            return self.pattern
        return tuple(block.under_mup(self.mup, self.embed_dim) for block in self.pattern)

    @property
    def pipeline_repeats(self) -> int:
        return self.num_layers // len(self.pattern)

    @property
    def max_length(self) -> int | None:
        positions = (self.position, self.block_position)
        return min((p.max_length for p in positions if p is not None and p.max_length is not None), default=None)

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("NextToken", "PrefixLM", "BlankInfilling")

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Positions in blanks need a table."""
        if "block_position_ids" in batch and self.block_position is None:
            raise ValueError(
                "the data gives block_position_ids, and the model has no block_position: give it one, such as "
                "block_position=Learned(max_length), or leave them out with Blanks(two_dimensional=False)"
            )

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return layers_of(self.pattern, self.num_layers)

    def build(self, rngs: nnx.Rngs) -> "DecoderModel":
        from llmlab.models.decoder import DecoderModel

        return DecoderModel(self, rngs=rngs)

    def flops(self, shapes: Shapes, *, training: bool = True) -> int:
        batch, length = shapes["input_ids"]
        return batch * length * self.flops_per_token(length, training=training)

    def flops_per_token(self, sequence_length: int, *, training: bool = True) -> int:
        """`flops` of a sequence of this length, for each of its tokens."""
        params = self.abstract()[1]
        matmul = matmul_parameters(params) - sum(b.ffn.idle_parameters(self.embed_dim) for b in self.layers())
        if isinstance(self.head, Tied):
            matmul += math.prod(params["embedding"]["tokens"]["table"].shape)
        context = sum(block.mixer.context_flops(self.embed_dim, sequence_length) for block in self.layers())
        return (3 if training else 1) * (2 * matmul + context)


def _check_own_scales(model: Transformer, mup: MuP) -> None:
    """Raise ValueError where a factor of the config follows the width by a law of its own."""
    if model.embed_dim == mup.base_width:
        return
    root = math.sqrt(model.embed_dim)
    laws = [("embedding_scale", model.embedding_scale, root, "sqrt(embed_dim)")]
    if isinstance(model.head, Tied):
        laws.append(("head.scale", model.head.scale, 1 / root, "1/sqrt(embed_dim)"))
    for name, value, law, formula in laws:
        if value != 1.0 and math.isclose(value, law, rel_tol=1e-6):
            base = law * (mup.width_ratio(model.embed_dim) ** (0.5 if law < 1 else -0.5))
            raise ValueError(
                f"{name}={value:g} is {formula}, and under muP factors are the base model's at every width: use "
                f"{base!r}, its value at mup.base_width={mup.base_width}"
            )


def layers_of(pattern: tuple[Block, ...], num_layers: int) -> tuple[Block, ...]:
    """The block of every layer of a stack, first to last."""
    return tuple(pattern[i % len(pattern)] for i in range(num_layers))


def check_stack(pattern: tuple[Block, ...], num_layers: int, embed_dim: int) -> None:
    """Raise ValueError for a stack that cannot be built."""
    if not pattern:
        raise ValueError("pattern is empty; give it at least one Block")
    for name, value in (("embed_dim", embed_dim), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
    for block in pattern:
        block.mixer.context_flops(embed_dim, 1)  # heads that do not divide the width are an error here


def named(presets: Mapping[str, Config], name: str) -> Config:
    """The preset of this name, with or without the family in front: "nano" finds "llama-nano" among Llama's.

    Raises:
        ValueError: no preset has the name; the message lists those there are.
    """
    matches = [key for key in presets if key == name] or [key for key in presets if key.partition("-")[2] == name]
    if len(matches) != 1:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(presets)}")
    return presets[matches[0]]
