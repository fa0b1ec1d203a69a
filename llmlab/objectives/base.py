"""What training asks of an objective.

An objective gives sums, never means: a mean over one microbatch, one device or one host has the wrong weight as soon
as the parts count different numbers of tokens. Training divides once, by the count over the whole global batch.
"""

import abc
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

Batch = dict[str, jax.Array]
"""Named arrays whose first dimension is the batch: input_ids, labels, segment_ids, position_ids, ..."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossParts:
    """Sums over the counted tokens of a batch, or of a part of it."""

    total: Float[Array, ""]
    """Sum of what is minimised. Its gradient is the objective's gradient."""
    count: Float[Array, ""]
    """Number of counted tokens; with weights, their sum."""
    metrics: dict[str, Float[Array, ""]]
    """Further sums, without gradient; "loss" is the plain loss in nats, which is what runs report."""


@dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """What a model is trained to minimise."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """Sums over this batch; dropout is active when, and only when, a key is given."""

    @abc.abstractmethod
    def count(self, batch: Batch) -> Float[Array, ""]:
        """The `count` that `loss` will return for this batch, from the batch alone."""
