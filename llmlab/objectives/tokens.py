"""Objectives that predict tokens. All are one cross-entropy; they differ in what is predicted from what.

    objective            a label is                            its prediction sees
    NextToken            the token after the place             what came before
    PrefixLM             the same, after a prefix              the prefix, and what came before
    MaskedToken          the token that was hidden at a place  the whole row, as it was corrupted
    Permutation          the token of a target's place         all that precedes it in a random order
    SequenceToSequence   the next token of the target          the source, and the target so far
    BlankInfilling       the next token of a blank             the text around, earlier blanks, the blank so far

Which labels there are is the data's affair (`llmlab.data`, whose corruptions make the rows); -100 is none. A model is
asked for `hidden_states(...)`, the states from which its head `project` scores the vocabulary.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.objectives.base import Batch, LossParts, Objective, check_smoothing, named
from llmlab.objectives.cross_entropy import IGNORED, chunked_cross_entropy, weights_of


@dataclass(frozen=True, kw_only=True)
class TokenObjective(Objective):
    """Cross-entropy of tokens in nats, summed over the counted ones.

    A batch has `labels`, the target of each place, or -100 where it is not counted; and, optional, `loss_mask`, a
    weight per place.
    """

    perplexity: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ()
    """Arrays that the model is called with, where the batch has them."""

    label_smoothing: float = 0.0
    """Probability taken from the target and spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Factor on the squared log-normaliser, which keeps logits small; 1e-4 is usual where it is used."""
    chunk: int | None = None
    """Positions of every row that are scored at once; None for what suits the platform."""

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)
        if self.z_loss < 0.0:
            raise ValueError(f"z_loss={self.z_loss} is negative; 0 is none, 1e-4 is usual")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} is not positive; None chooses one")

    def chunked(self, choose: Callable[[], int]) -> "TokenObjective":
        return self if self.chunk is not None else dataclasses.replace(self, chunk=choose())

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """Sums over the batch.

        metrics: "loss", the plain nll; "accuracy", how often the target scored highest; "objective", what is minimised,
        where smoothing or z-loss make that another number; and terms that the model's layers add, by name.
        """
        hidden = model.hidden_states(**named(batch, self.inputs), key=key)
        parts = self.score(model, hidden.states, batch)
        return parts.plus(model.auxiliary_losses(hidden.auxiliary))

    def scored(self, states: Float[Array, "B S D"], batch: Batch) -> tuple[Float[Array, "B P D"], Batch]:
        """The states that are scored, with `labels` and `loss_mask` of their places: all, for most objectives."""
        return states, batch

    def score(self, model: Any, states: Float[Array, "B S D"], batch: Batch) -> LossParts:
        """The cross-entropy from the states that `hidden_states` gave."""
        states, batch = self.scored(states, batch)
        return chunked_cross_entropy(
            states,
            model.project,
            batch["labels"],
            batch.get("loss_mask"),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            chunk=self.chunk,
        )

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Number of places whose label is not -100, or the sum of their weights."""
        return jnp.sum(weights_of(batch["labels"], batch.get("loss_mask")))


@dataclass(frozen=True, kw_only=True)
class NextToken(TokenObjective):
    """Predict the next token (Radford et al. 2018).

    labels[b, s] is the token after input_ids[b, s]: the data has shifted it already.
    """

    tasks: ClassVar[tuple[str, ...]] = ("next tokens",)
    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "position_ids",
        "segment_ids",
        "pixel_values",
        "image_attention_mask",
        "token_type_ids",
    )


@dataclass(frozen=True, kw_only=True)
class PrefixLM(TokenObjective):
    """Predict the next token after a prefix that is read in both directions (Raffel et al. 2020, 1910.10683).

    A batch has `prefix_length`, tokens at the start of each row that see each other; labels are -100 where the target
    is one of them.
    """

    tasks: ClassVar[tuple[str, ...]] = ("tokens after a prefix",)
    unit: ClassVar[str] = "token after the prefix"
    inputs: ClassVar[tuple[str, ...]] = (*NextToken.inputs, "prefix_length")


@dataclass(frozen=True, kw_only=True)
class BlankInfilling(TokenObjective):
    """Write the blanks of a text after it, in random order (Du et al. 2022, 2103.10360).

    A batch has `prefix_length`, the length of the text with the blanks; where positions are two-dimensional,
    `position_ids` and `block_position_ids`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("blanks",)
    unit: ClassVar[str] = "blanked token"
    inputs: ClassVar[tuple[str, ...]] = (*PrefixLM.inputs, "block_position_ids")


@dataclass(frozen=True, kw_only=True)
class SequenceToSequence(TokenObjective):
    """Predict the next token of a target from a source and the target so far (Sutskever et al. 2014, 1409.3215).

    A batch has `input_ids`, the source, and `decoder_input_ids`, the target one place late (teacher forcing); labels
    are the target. Translation, span corruption (T5) and denoising (BART) differ in their rows only.
    """

    tasks: ClassVar[tuple[str, ...]] = ("sequence to sequence",)
    unit: ClassVar[str] = "target token"
    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
        "position_ids",
        "segment_ids",
        "decoder_position_ids",
        "decoder_segment_ids",
    )


@dataclass(frozen=True, kw_only=True)
class Permutation(TokenObjective):
    """Predict the last tokens of a random order (Yang et al. 2019, 1906.08237).

    A batch has `perm_mask` (B, S, S), 1 where a place must not see another; `target_mapping` (B, P, S), one-hot at the
    place of each prediction; and labels (B, P).
    """

    tasks: ClassVar[tuple[str, ...]] = ("permuted tokens",)
    unit: ClassVar[str] = "predicted token"
    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "segment_ids",
        "perm_mask",
        "target_mapping",
    )


@dataclass(frozen=True, kw_only=True)
class MaskedToken(TokenObjective):
    """Predict the tokens that were hidden (Devlin et al. 2018, 1810.04805).

    Where the batch has `masked_positions` (B, P), the places of the labels with -1 beyond the last, the head scores
    those places alone: at 15% masked, 15% of its FLOPs.
    """

    tasks: ClassVar[tuple[str, ...]] = ("masked tokens", "masked tokens and sentence pairs")
    unit: ClassVar[str] = "masked token"
    inputs: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "segment_ids",
        "global_attention_mask",
    )

    def scored(self, states: Float[Array, "B S D"], batch: Batch) -> tuple[Float[Array, "B P D"], Batch]:
        if "masked_positions" not in batch:
            return states, batch
        places = batch["masked_positions"]
        picked = {name: gathered(batch[name], places) for name in ("labels", "loss_mask") if name in batch}
        picked["labels"] = jnp.where(places >= 0, picked["labels"], IGNORED)
        return jnp.take_along_axis(states, jnp.maximum(places, 0)[..., None], axis=1), picked


def gathered(values: Float[Array, "B S"] | Int[Array, "B S"], places: Int[Array, "B P"]) -> Any:
    """The values at these places of their rows; a place of -1 gives the first."""
    return jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)


@dataclass(frozen=True, kw_only=True)
class MaskedTokenAndNextSentence(MaskedToken):
    """Predict hidden tokens, and whether two segments belong together: BERT's pretraining.

    The mean over the masked tokens plus the mean over the rows. The label `next_sentence_label` (B,) is 0 or 1, or
    -100 where the row does not ask: whether the second segment follows (Devlin et al. 2018, 1810.04805), or whether
    both stand in their order (Lan et al. 2019, 1909.11942). The model gives the scores: `relate(states)`.
    """

    tasks: ClassVar[tuple[str, ...]] = ("masked tokens and sentence pairs",)
    perplexity: ClassVar[bool] = False

    def prepare(self, batch: Batch) -> Batch:
        """Adds what each row's answer weighs, so that both terms are means over the whole batch however it is cut."""
        asked = weights_of(batch["next_sentence_label"])
        weight = self.count(batch) / jnp.maximum(jnp.sum(asked), 1.0)
        return batch | {"next_sentence_weight": asked * weight}

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """As for masked tokens; "loss" is the sum of both means, which have metrics of their own: "masked_loss" and
        "next_sentence_loss", "accuracy" and "next_sentence_accuracy"."""
        if "next_sentence_weight" not in batch:
            batch = self.prepare(batch)
        hidden = model.hidden_states(**named(batch, self.inputs), key=key)
        masked = self.score(model, hidden.states, batch)
        labels, weight = batch["next_sentence_label"], batch["next_sentence_weight"]
        logits_B2 = model.relate(hidden.states).astype(jnp.float32)
        asked = weights_of(labels)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits_B2), jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        related = jnp.sum(weight * nll)
        metrics = masked.metrics | {
            "loss": masked.metrics["loss"] + related,
            "masked_loss": masked.metrics["loss"],
            "next_sentence_loss": jnp.sum(asked * nll),
            "next_sentence_accuracy": jnp.sum(asked * (jnp.argmax(logits_B2, axis=-1) == labels)),
        }
        if "objective" in metrics:
            metrics["objective"] = metrics["objective"] + related
        rows = jnp.sum(asked)
        parts = LossParts(
            total=masked.total + related,
            count=masked.count,
            metrics=jax.lax.stop_gradient(metrics),
            counts={"next_sentence_loss": rows, "next_sentence_accuracy": rows},
        )
        return parts.plus(model.auxiliary_losses(hidden.auxiliary))
