"""Learning from a teacher's distribution instead of from one right answer (Hinton et al. 2015, 1503.02531).

    loss of a position = a T^n D(softmax(z/T), softmax(y/T)) + b nll(y, label)      z: teacher's logits, y: student's

A label says which token came next; a distribution says which others might have, and how much less likely each was. D is
any of llmlab.objectives.divergences; b mixes the label back in.

The teacher's logits come from its head at this moment (`LiveTeacher`), or from disk (`StoredTeacher`), where a few
entries of each distribution were kept:

    top-k       the k most probable tokens; all others are one outcome more, with the mass that is left. The divergence
                of the joined distributions is a lower bound of the whole one, and is it for k = vocabulary
    sampled     n tokens drawn from the teacher, each with weight 1/n: the gradient is that of KL(p||q) on average,
                where top-k's is biased towards what is kept (Anshumann et al. 2025, 2503.16870)

Memory is that of a chunk of both models' logits (llmlab.objectives.chunks).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmlab.objectives.base import LossParts
from llmlab.objectives.chunks import Sums, chunk_length, chunked_sums
from llmlab.objectives.cross_entropy import IGNORED, Project, cross_entropy, weights_of
from llmlab.objectives.divergences import Divergence, ForwardKL


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """A teacher that is there: its states, and the head that scores them."""

    hidden: Float[Array, "B S D"]
    """Input of the teacher's head."""
    project: Project
    """The teacher's head, (b, s, D) to (b, s, V)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StoredTeacher:
    """What was kept of a teacher's distributions."""

    ids: Int[Array, "B S K"]
    """Tokens that were kept, the most probable first; or those that were drawn."""
    log_probabilities: Float[Array, "B S K"]
    """Theirs, softened by the temperature that the loss is computed with."""
    log_rest: Float[Array, "B S"]
    """Of the mass of all other tokens; not looked at where all tokens were kept, or some drawn."""
    sampled: bool = field(default=False, metadata={"static": True})
    """Whether the tokens were drawn, each to weigh the same."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What the loss of a position is made of."""

    divergence: Divergence = ForwardKL()
    """Of the softened distributions."""
    temperature: float = 1.0
    """Divides both models' logits."""
    soft: float = 1.0
    """Factor a on the divergence."""
    hard: float = 0.0
    """Factor b on the cross-entropy with the label."""
    label_smoothing: float = 0.0
    """Of that cross-entropy."""
    z_loss: float = 0.0
    """Of that cross-entropy."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} is not positive; 1 softens nothing, 2 to 4 are usual")
        if self.soft < 0 or self.hard < 0 or self.soft + self.hard == 0:
            raise ValueError(f"soft={self.soft} and hard={self.hard} must not be negative, nor both 0")


def soft_target_loss(
    hidden: Float[Array, "B S D"],
    project: Project,
    teacher: LiveTeacher | StoredTeacher,
    labels: Int[Array, "B S"],
    weights: Float[Array, "B S"] | Int[Array, "B S"] | None = None,
    *,
    mixing: Mixing = Mixing(),
    num_tokens: int | None = None,
    chunk: int | None = None,
) -> LossParts:
    """Distillation of token distributions, with never more than a chunk of logits in memory.

    Args:
        hidden: input of the student's head.
        project: the student's head, (b, s, D) to logits (b, s, V). Gradients flow to the arrays it closes over.
        teacher: what the distributions are compared with; without gradient.
        labels: the next token of each position, -100 where it is not counted.
        weights: factor on each position's loss and on its share of the count.
        mixing: divergence, temperature, weights.
        num_tokens: compare the scores of so many tokens only, the first ones: vocabularies that were rounded up
            differently have rows beyond it that are no tokens. None for all.
        chunk: positions of each row scored at once.

    Returns:
        Sums in float32. metrics: "loss", the plain nll; "accuracy"; "divergence", before factors and with the
        temperature's; "agreement", how often both models' most probable token is the same.

    Raises:
        ValueError: drawn tokens are to be compared by another divergence than ForwardKL.
    """
    weights = weights_of(labels, weights)
    arrays: dict[str, Any] = {"labels": jnp.where(labels == IGNORED, 0, labels), "weights": weights}
    shared: Any = ()
    if isinstance(teacher, LiveTeacher):
        # Of the very shape that it will be called with: what is traced may hold for no other.
        example = teacher.hidden[:, : chunk_length(hidden, project, chunk)]
        pure, params = jax.closure_convert(teacher.project, example)
        arrays["teacher"], shared = teacher.hidden, tuple(params)
    else:
        pure = None
        arrays["teacher"] = teacher
        if teacher.sampled and not isinstance(mixing.divergence, ForwardKL):
            raise ValueError(
                f"{type(mixing.divergence).__name__} cannot be computed from drawn tokens, which estimate ForwardKL; "
                "keep the most probable ones (top-k), or use ForwardKL()"
            )

    def score(logits: jax.Array, chunk: dict[str, Any], shared: Any) -> Sums:
        if pure is not None:
            theirs = pure(chunk["teacher"], *shared).astype(jnp.float32)[..., :num_tokens]
            divergence = mixing.divergence.softened(theirs, logits[..., :num_tokens], mixing.temperature)
            agrees = _highest(logits, theirs >= jnp.max(theirs, axis=-1, keepdims=True))
        else:
            divergence = stored_divergence(chunk["teacher"], logits[..., :num_tokens], mixing)
            agrees = _highest(logits, _is(chunk["teacher"].ids[..., 0], logits.shape[-1]))
        total = mixing.soft * divergence
        smoothed = {"label_smoothing": mixing.label_smoothing, "z_loss": mixing.z_loss}
        if mixing.hard:
            objective, nll = cross_entropy(logits, chunk["labels"], **smoothed)
            total = total + mixing.hard * objective
        else:  # 0 times a gradient is computed all the same
            _, nll = cross_entropy(jax.lax.stop_gradient(logits), chunk["labels"])
        each = {"total": total, "loss": nll, "divergence": divergence}
        each |= {"accuracy": _highest(logits, _is(chunk["labels"], logits.shape[-1])), "agreement": agrees}
        return {name: jnp.sum(chunk["weights"] * values) for name, values in each.items()}

    sums = chunked_sums(score, hidden, project, arrays, shared, chunk=chunk)
    total = sums.pop("total")
    return LossParts(total=total, count=jnp.sum(weights), metrics=jax.lax.stop_gradient(sums))


def _is(tokens: Int[Array, "B S"], size: int) -> Bool[Array, "B S V"]:
    return jnp.arange(size) == tokens[..., None]


def _highest(logits: Float[Array, "B S V"], chosen: Bool[Array, "B S W"]) -> Bool[Array, "B S"]:
    """Whether one of the chosen tokens scores highest. Comparisons fuse into reductions, where an argmax on a CPU costs
    as much as a softmax."""
    return jnp.max(jnp.where(chosen, logits[..., : chosen.shape[-1]], -jnp.inf), axis=-1) >= jnp.max(logits, axis=-1)


def stored_divergence(teacher: StoredTeacher, logits: Float[Array, "B S V"], mixing: Mixing) -> Float[Array, "B S"]:
    """T^n D(stored, softmax(logits / T)) of every position; see the module's docstring."""
    scaled = logits / mixing.temperature
    lse = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(scaled, teacher.ids, axis=-1) - lse
    log_p, factor = teacher.log_probabilities, mixing.temperature**mixing.divergence.order
    if teacher.sampled or teacher.ids.shape[-1] == logits.shape[-1]:
        return factor * mixing.divergence(log_p, log_q)
    # One outcome more: a token that was not kept. Its probability is summed over those, for 1 - sum(kept) has no
    # digits left where the kept ones have almost all.
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), teacher.ids, True, axis=-1, inplace=False)
    others = jax.nn.logsumexp(jnp.where(kept, -jnp.inf, scaled), axis=-1, keepdims=True) - lse
    log_p = jnp.concatenate([log_p, teacher.log_rest[..., None]], axis=-1)
    return factor * mixing.divergence(log_p, jnp.concatenate([log_q, others], axis=-1))
