"""Contrastive objectives: what belongs together is told from everything else in the batch (van den Oord et al. 2018,
1807.03748: InfoNCE).

    loss of row i = log sum_j exp s_ij - s_ii            s: scaled cosines of row i's vector with all the others'

A classification whose classes are the rows of the batch, so guessing costs log B, and a larger batch is a harder and a
better question. The negatives are the rows that are computed together: the whole global batch, over all devices and
hosts, and with `train.accumulation` parts one part of it, B / parts rows (the gradient of one part then knows nothing
of the others). Rows that only fill up the last validation batch (`loss_mask` 0) are nobody's negatives.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmlab.objectives.base import Batch, LossParts, Objective, named

_FAR = -1e30  # a score whose exponential is 0, and finite: inf - inf is no number


@dataclass(frozen=True, kw_only=True)
class Contrastive(Objective):
    """What both contrastive objectives count: rows. A batch has `loss_mask` (B,), 0 for rows that are no rows."""

    def count(self, batch: Batch) -> Float[Array, ""]:
        """Number of rows, those left out whose `loss_mask` is 0."""
        return jnp.sum(_real(batch))


@dataclass(frozen=True, kw_only=True)
class ImageTextContrastive(Contrastive):
    """Tell which text is an image's, and which image is a text's (Radford et al. 2021, 2103.00020): CLIP.

    A batch has `pixel_values`, `input_ids` and `attention_mask`; text i is image i's. The model gives
    `logits_per_image`, cosines times a learned scale. The loss is the mean of both directions.
    """

    tasks: ClassVar[tuple[str, ...]] = ("images and texts",)
    unit: ClassVar[str] = "pair"
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "input_ids", "attention_mask", "position_ids")

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """metrics: "loss"; "image_accuracy" and "text_accuracy", how often the own text or image scores highest;
        "logit_scale", the inverse temperature."""
        output = model(**named(batch, self.inputs), key=key)
        real = _real(batch)
        logits = output.logits_per_image.astype(jnp.float32)
        of_image, image_right = _info_nce(logits, real)
        of_text, text_right = _info_nce(logits.T, real)
        total = (of_image + of_text) / 2
        count = jnp.sum(real)
        metrics = {"loss": total, "image_accuracy": image_right, "text_accuracy": text_right}
        metrics["logit_scale"] = output.logit_scale.astype(jnp.float32) * count
        return LossParts(total=total, count=count, metrics=jax.lax.stop_gradient(metrics))


@dataclass(frozen=True, kw_only=True)
class SentenceContrastive(Contrastive):
    """Tell which sentence is the same one (Gao et al. 2021, 2104.08821): SimCSE.

    Each row is encoded twice, with different dropout, or, where the batch has `pair_input_ids`, with its pair; the two
    vectors belong together. Without dropout (in evaluation) both are equal and the loss measures only how far apart
    different sentences are.
    """

    tasks: ClassVar[tuple[str, ...]] = ("sentences",)
    unit: ClassVar[str] = "sentence"
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids", "position_ids")

    temperature: float = 0.05
    """What cosines are divided by."""
    pooling: Literal["mean", "first"] = "mean"
    """The vector of a row: the mean of its tokens' states, or the first token's ([CLS])."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} is not positive; 0.05 is usual")

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """metrics: "loss"; "accuracy", how often a sentence is nearest to itself; and terms that layers add."""
        paired = "pair_input_ids" in batch
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        first, terms = self.embed(model, named(batch, self.inputs), keys[0])
        second = first
        if paired or key is not None:
            names = tuple(f"pair_{name}" if paired else name for name in self.inputs)
            view = {name.removeprefix("pair_"): array for name, array in named(batch, names).items()}
            second, more = self.embed(model, view, keys[1])
            terms = {name: (term + more[name]) / 2 for name, term in terms.items()}
        real = _real(batch)
        total, right = _info_nce(jnp.einsum("BD,CD->BC", first, second) / self.temperature, real)
        metrics = jax.lax.stop_gradient({"loss": total, "accuracy": right})
        return LossParts(total=total, count=jnp.sum(real), metrics=metrics).plus(terms)

    def embed(
        self, model: Any, inputs: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, "B D"], dict[str, Float[Array, ""]]]:
        """Vectors of length one, float32, and the terms that the model's layers add to the loss."""
        hidden = model.hidden_states(**inputs, key=key)
        states_BSD = hidden.states.astype(jnp.float32)
        vectors_BD = states_BSD[:, 0]
        if self.pooling == "mean":
            shown_BS = inputs.get("attention_mask", jnp.ones(states_BSD.shape[:2])).astype(jnp.float32)
            sums = jnp.einsum("BSD,BS->BD", states_BSD, shown_BS)
            vectors_BD = sums / jnp.maximum(jnp.sum(shown_BS, axis=1), 1.0)[:, None]
        length = jnp.sqrt(jnp.sum(jnp.square(vectors_BD), axis=-1, keepdims=True) + 1e-12)
        return vectors_BD / length, model.auxiliary_losses(hidden.auxiliary)


def _real(batch: Batch) -> jax.Array:
    rows = batch["input_ids"].shape[:1]
    return (batch["loss_mask"] != 0).astype(jnp.float32) if "loss_mask" in batch else jnp.ones(rows)


def _info_nce(logits: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses of the real rows, how often their own column scores highest among the real ones)."""
    logits = jnp.where(real[None, :] > 0, logits, _FAR)
    own = jnp.diagonal(logits)
    loss = jnp.where(real > 0, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)
    return jnp.sum(loss), jnp.sum(real * (own >= jnp.max(logits, axis=-1)))
