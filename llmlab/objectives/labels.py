"""Objectives over labels of the user's own: classes of rows or of tokens, and the answer's place in a text.

    Classification       a class for each row, of text or image       (Devlin et al. 2018, 1810.04805, section 4.1)
    TokenClassification  a class for each token                       (section 5.3)
    QuestionAnswering    the answer's first and last token            (section 4.2)

The model is called and its scores are read: `logits`, or `start_logits` and `end_logits`. A label of -100 is not
counted. With label smoothing e over C classes, what is minimised is that of `cross_entropy`: the target has 1 - e, and
all classes share e.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.objectives.base import Batch, LossParts, Objective, check_smoothing, named
from llmlab.objectives.cross_entropy import cross_entropy, weights_of


@dataclass(frozen=True, kw_only=True)
class LabelObjective(Objective):
    """Cross-entropy of labels, in nats."""

    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "segment_ids",
        "global_attention_mask",
    )
    """Arrays that the model is called with, where the batch has them."""

    label_smoothing: float = 0.0
    """Probability taken from the target and spread evenly over the labels."""

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """metrics: "loss", the plain nll; "accuracy"; and "objective", what is minimised, where labels are smoothed."""
        output = model(**named(batch, self.inputs), key=key)
        parts = self.score(output.logits, batch["labels"], batch.get("loss_mask"))
        return parts.plus(_terms(model, output))

    def score(
        self,
        logits: Float[Array, "*B C"],
        labels: Int[Array, "*B"],
        weights: Float[Array, "*B"] | Int[Array, "*B"] | None = None,
    ) -> LossParts:
        """The sums of these scores."""
        weights = weights_of(labels, weights)
        logits = logits.astype(jnp.float32)
        objective, nll = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        right = jnp.argmax(logits, axis=-1) == labels
        total = jnp.sum(weights * objective)
        metrics = {"loss": jnp.sum(weights * nll), "accuracy": jnp.sum(weights * right)}
        if self.label_smoothing:
            metrics["objective"] = total
        return LossParts(total=total, count=jnp.sum(weights), metrics=jax.lax.stop_gradient(metrics))

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Number of labels that are not -100, or the sum of their weights."""
        return jnp.sum(weights_of(batch["labels"], batch.get("loss_mask")))


@dataclass(frozen=True, kw_only=True)
class Classification(LabelObjective):
    """Tell the class of each row: `labels` (B,), of `input_ids` or `pixel_values`."""

    tasks: ClassVar[tuple[str, ...]] = ("classes of texts", "classes of images")
    unit: ClassVar[str] = "row"
    inputs: ClassVar[tuple[str, ...]] = (*LabelObjective.inputs, "pixel_values")


@dataclass(frozen=True, kw_only=True)
class TokenClassification(LabelObjective):
    """Tell the class of each token: `labels` (B, S)."""

    tasks: ClassVar[tuple[str, ...]] = ("classes of tokens",)
    unit: ClassVar[str] = "label"


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(LabelObjective):
    """Tell where the answer begins and ends: `start_positions` and `end_positions` (B,), -100 for no row.

    The loss is the mean of both. A position beyond the row is not counted, in either.
    """

    tasks: ClassVar[tuple[str, ...]] = ("answers in texts",)
    unit: ClassVar[str] = "answer"

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """metrics: "loss"; "exact_accuracy", how often both ends score highest; "objective" as for labels."""
        output = model(**named(batch, self.inputs), key=key)
        start, end = _within(batch)
        starts, ends = self.score(output.start_logits, start), self.score(output.end_logits, end)
        both = jnp.argmax(output.start_logits, axis=-1) == start
        both &= jnp.argmax(output.end_logits, axis=-1) == end
        metrics = {name: (starts.metrics[name] + ends.metrics[name]) / 2 for name in starts.metrics}
        del metrics["accuracy"]
        parts = LossParts(
            total=(starts.total + ends.total) / 2,
            count=starts.count,
            metrics=metrics | {"exact_accuracy": jnp.sum(both).astype(jnp.float32)},
        )
        return parts.plus(_terms(model, output))

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Number of rows with an answer."""
        return jnp.sum(weights_of(_within(batch)[0]))


def _within(batch: Batch) -> tuple[jax.Array, jax.Array]:
    start, end = batch["start_positions"], batch["end_positions"]
    length = batch["input_ids"].shape[1]
    counted = (start >= 0) & (start < length) & (end >= 0) & (end < length)
    return jnp.where(counted, start, -100), jnp.where(counted, end, -100)


def _terms(model: Any, output: Any) -> dict[str, jax.Array]:
    """What the model's layers add to the loss. Outputs of models whose layers report nothing have no such field."""
    auxiliary = getattr(output, "auxiliary", None)
    return model.auxiliary_losses(auxiliary) if auxiliary else {}
