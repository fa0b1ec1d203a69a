"""Typed model configs: what a whole model is made of.

A config alone answers how many parameters the model has and how many FLOPs a token costs; `build` makes the model.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from llmlab.nn.config import Block, Norm
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate
from llmlab.nn.module import Axes, Params, logical_axes, num_parameters, split
from llmlab.nn.positions import AddedPosition
from llmlab.nn.stack import Execution

if TYPE_CHECKING:
    from llmlab.models.decoder import DecoderModel


@dataclass(frozen=True, kw_only=True)
class Head(abc.ABC):
    """How hidden states become scores over the vocabulary."""

    @abc.abstractmethod
    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs) -> Dense | None:
        """The projection, or None where the embedding table serves."""


@dataclass(frozen=True, kw_only=True)
class Tied(Head):
    """The embedding table scores the next token (Press and Wolf 2017, 1608.05859)."""

    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Untied(Head):
    """A matrix of its own scores the next token."""

    bias: bool = False
    """Whether to add a bias per token."""

    def build(self, dim: int, vocab_size: int, *, rngs: nnx.Rngs) -> Dense:
        return Dense((("embed", dim),), (("vocab", vocab_size),), bias=self.bias, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder-only language model."""

    vocab_size: int | None = None
    """Rows of the embedding; None for the tokenizer's size rounded up to a multiple of 128."""
    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Depth."""
    pattern: tuple[Block, ...]
    """Blocks repeated through depth."""
    position: AddedPosition | None = None
    """Positions added to the embeddings (Learned, Sinusoidal); None when attention has its own (Rotary, ALiBi)."""
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

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty; give it at least one Block")
        for name in ("embed_dim", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} is not positive; None takes the tokenizer's")
        check_rate("embedding_dropout", self.embedding_dropout)
        for block in self.pattern:
            block.mixer.context_flops(self.embed_dim, 1)  # heads that do not divide the width are an error here

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the position table holds; None for no limit."""
        return None if self.position is None else self.position.max_length

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def build(self, rngs: nnx.Rngs) -> "DecoderModel":
        """The model with freshly drawn parameters."""
        from llmlab.models.decoder import DecoderModel

        return DecoderModel(self, rngs=rngs)

    def abstract(self) -> "tuple[nnx.GraphDef, Params, Axes]":
        """Graph definition, parameter shapes and logical axes, without allocating anything."""
        model = nnx.eval_shape(lambda: self.build(nnx.Rngs(params=0)))
        graphdef, params = split(model)
        return graphdef, params, logical_axes(model)

    def num_parameters(self) -> int:
        """Number of parameters, a tied table counted once."""
        return num_parameters(self.abstract()[1])

    def flops_per_token(self, sequence_length: int, *, training: bool = True) -> int:
        """Matmul FLOPs per token of one forward pass, or of forward and backward (three times that).

        Convention: two per multiply-add; the head's matmul counts, the embedding lookup does not; attention counts
        every key of the sequence (or window), masked or not; norms, activations, softmax and rematerialisation do not
        count.
        """
        params = self.abstract()[1]
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        matmul = sum(math.prod(leaf.shape) for path, leaf in flat if _name(path[-1]) == "kernel")
        if isinstance(self.head, Tied):
            matmul += math.prod(params["embedding"]["tokens"]["table"].shape)
        context = sum(block.mixer.context_flops(self.embed_dim, sequence_length) for block in self.layers())
        return (3 if training else 1) * (2 * matmul + context)


def named(presets: Mapping[str, Transformer], name: str) -> Transformer:
    """The preset of this name, with or without the family in front: "nano" finds "llama-nano" among Llama's.

    Raises:
        ValueError: no preset has the name; the message lists those there are.
    """
    matches = [key for key in presets if key == name] or [key for key in presets if key.partition("-")[2] == name]
    if len(matches) != 1:
        raise ValueError(f"no preset is called {name!r}; there are {', '.join(presets)}")
    return presets[matches[0]]


def _name(key: Any) -> str:
    return str(key.key)
