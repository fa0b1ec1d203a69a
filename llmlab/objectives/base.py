"""What training asks of an objective.

An objective gives sums, never means: a mean over one microbatch, one device or one host has the wrong weight as soon
as the parts count different numbers of tokens. Training divides once, by the count over the whole global batch.
"""

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from llmlab.objectives.companion import Companion

Batch = dict[str, jax.Array]
"""Named arrays whose first dimension is the batch: input_ids, labels, segment_ids, pixel_values, ..."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossParts:
    """Sums over what is counted (tokens, rows) in a batch, or in a part of it."""

    total: Float[Array, ""]
    """Sum of what is minimised. Its gradient is the objective's gradient."""
    count: Float[Array, ""]
    """Number of counted tokens or rows; with weights, their sum."""
    metrics: dict[str, Float[Array, ""]]
    """Further sums, without gradient; "loss" is the plain loss in nats, which is what runs report."""
    counts: dict[str, Float[Array, ""]] = field(default_factory=dict)
    """What the sum of a metric is divided by, where that is not `count`: in an objective of two terms, say."""

    def plus(self, terms: dict[str, Float[Array, ""]]) -> "LossParts":
        """With terms of the mean loss added (a router's load balance): each weighs like the mean over the count.

        They join what is minimised and get a metric each; the plain loss stays. A term that is no mean over tokens is
        computed for each accumulated part by itself.
        """
        if not terms:
            return self
        added = {name: term * self.count for name, term in terms.items()}
        return dataclasses.replace(
            self,
            total=sum(added.values(), self.total),
            metrics={"loss": self.total} | self.metrics | jax.lax.stop_gradient(added),
        )


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """What a model is trained to minimise."""

    tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks of data that it can be trained on; () where it does not say."""
    unit: ClassVar[str] = "token"
    """What is counted: losses are in nats per this."""
    perplexity: ClassVar[bool] = False
    """Whether the loss is a cross-entropy over the vocabulary, whose exponential is called perplexity."""

    @property
    def plain(self) -> "Objective":
        """What the data and the model's head are for: itself, or the objective that it adds to."""
        return self

    @property
    def asks_the_head(self) -> bool:
        """Whether the model's head must be one that answers it."""
        return True

    def problems(self, model: Any, tokenizer: Any) -> list[str]:
        """Why it cannot train this model config with this tokenizer config; empty where nothing is wrong."""
        return []

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises a ValueError for a tokenizer, now built, that it cannot be used with."""
        return

    def chunked(self, choose: Callable[[], int]) -> "Objective":
        """With as many positions scored at once as `choose` says, where it scores in chunks and does not say itself."""
        return self

    def companion(self, model: Any) -> Companion | None:
        """What it brings along to train this model config, its vocabulary settled; None for most."""
        return None

    def weights(self, model: Any) -> Any:
        """What a model of this config starts from, a function of its parameters' shapes; None for fresh values."""
        return None

    def dataset(self, dataset: Any, **made_with: Any) -> Any:
        """The data set with what it needs besides (what a teacher said of each row); the same for most.

        Args:
            dataset: as the data gives it.
            made_with: `steps`, `seed` and `sequence_length` of the run, and its `tokenizer`.

        Raises:
            ValueError: what it has was made for other data.
        """
        return dataset

    def rewritten(self, model: Any, batch: Batch, key: jax.Array) -> Batch:
        """The batch of a training step, before anything of it is counted: where a model writes its own targets."""
        return batch

    def prepare(self, batch: Batch) -> Batch:
        """The whole batch, before it is cut into parts: where weights that depend on all of it are added."""
        return batch

    def unfrozen(self, params: Any) -> Any:
        """Factor on the gradient and the update of every parameter, a tree of arrays that broadcast against it; None
        where all are trained at all times."""
        return None

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """Sums over this batch; dropout is active when, and only when, a key is given."""

    @abc.abstractmethod
    def count(self, batch: Batch) -> Float[Array, ""]:
        """The `count` that `loss` will return for this batch, from the batch alone."""


def named(batch: Batch, names: tuple[str, ...]) -> Batch:
    """The arrays of these names that the batch has: what a model is called with."""
    return {name: batch[name] for name in names if name in batch}


def check_smoothing(label_smoothing: float) -> None:
    """Raises a ValueError unless it is a probability below 1."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1); 0 is none, 0.1 is usual")
