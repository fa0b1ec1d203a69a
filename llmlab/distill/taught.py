"""The objective bound to its teacher: what is computed in a step.

student (rows, dropout) --+-- states of layers --+
                          +-- logits ------------+-- terms, each a mean over tokens -- total
teacher (rows) -----------+-- logits ------------+
                          +-- states of layers --+
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.distill.objective import Distill
from llmlab.distill.terms import LayerTerm, Predictions, Views, when
from llmlab.nn.capture import PREFIX, What, capturing
from llmlab.objectives.base import Batch, LossParts, Objective, named
from llmlab.objectives.companion import LEARNED
from llmlab.objectives.cross_entropy import IGNORED, weights_of
from llmlab.objectives.labels import LabelObjective
from llmlab.objectives.soft_targets import LiveTeacher, Mixing, StoredTeacher, soft_target_loss
from llmlab.objectives.tokens import TokenObjective

IDS, LOG_PROBABILITIES, LOG_REST = "teacher_ids", "teacher_log_probabilities", "teacher_log_rest"
"""Arrays of a batch with a cache, the last not where tokens were drawn."""
_STATES_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "segment_ids")


@dataclass(frozen=True, kw_only=True)
class Taught(Objective):
    """`Distill` with its arrays; lives inside of a traced step."""

    distill: Distill
    teacher: Any
    """The model; None where a cache answers for it."""
    configs: tuple[Any, Any]
    """Of student and teacher."""
    learned: Mapping[str, Any]
    """What the terms bring along, by the term."""
    step: Any
    """Steps done, in training; None in evaluation."""
    num_tokens: int | None
    """Rows of the vocabulary that both have."""

    @property
    def plain(self) -> Objective:
        return self.distill.plain

    def rewritten(self, model: Any, batch: Batch, key: jax.Array) -> Batch:
        on_policy = self.distill.on_policy
        if on_policy is None:
            return batch
        return on_policy.rewritten(self.teacher if on_policy.by == "teacher" else model, batch, key)

    def prepare(self, batch: Batch) -> Batch:
        """Adds what each token weighs in the terms over layers, so that those are means over the whole batch."""
        if self.distill.base is not None:
            batch = self.distill.base.prepare(batch)
        weights: Batch = {}
        for side in {term.side for term in self.distill.layer_terms}:
            real = real_tokens(batch, side)
            weights[_weight_name(side)] = real * (self.count(batch) / jnp.maximum(jnp.sum(real), 1.0))
        return batch | weights

    def count(self, batch: Batch) -> Float[Array, ""]:
        return self.distill.count(batch)

    def loss(self, model: Any, batch: Batch, *, key: jax.Array | None = None) -> LossParts:
        """metrics: "loss", the plain one of `base` (without base, and in steps that score nothing, what is minimised);
        "distillation", what is minimised, layers' own terms apart; "divergence", "accuracy" and "agreement" where
        distributions are compared; and every term over layers, by name."""
        base = self.distill.base
        inputs = named(batch, _STATES_INPUTS if base is None else base.inputs)  # type: ignore[attr-defined]  # each has some
        student, theirs = self._run(model, inputs, key), None
        if self.teacher is not None:
            theirs = self._run(self.teacher, inputs, None)
        parts = self._scored(model, student, theirs, batch)
        total, metrics = parts.total, dict(parts.metrics)
        for number, term in enumerate(self.distill.layer_terms):
            assert theirs is not None, "a cache has no layers"
            value = self._of_layers(number, term, student.captured(term), theirs.captured(term), batch)
            total = total + term.weight * value
            metrics[term.metric] = metrics.get(term.metric, 0.0) + value
        metrics["distillation"] = total
        metrics["loss"] = self._plain_loss(metrics, total)
        parts = LossParts(total=total, count=parts.count, metrics=jax.lax.stop_gradient(metrics), counts=parts.counts)
        return parts.plus(model.auxiliary_losses(student.auxiliary) if student.auxiliary else {})

    def _plain_loss(self, metrics: Mapping[str, Any], total: jax.Array) -> jax.Array:
        """The base's, in steps that have it."""
        terms = self.distill.predictions
        if "loss" not in metrics:
            return total
        if not terms or terms[0].always or self.step is None:
            return metrics["loss"]
        return jnp.where(terms[0].holds(self.step), metrics["loss"], total)

    def _run(self, model: Any, inputs: Batch, key: jax.Array | None) -> "_Outcome":
        """A forward pass, with what the terms look at."""
        wanted: list[What] = sorted({what for term in self.distill.layer_terms for what in term.captures})
        keyed = {} if key is None else {"key": key}
        with capturing(*wanted):
            if isinstance(self.distill.base, LabelObjective):
                output = model(**inputs, **keyed)
                return _Outcome(states=None, logits=output.logits, reports=output.auxiliary)
            hidden = model.hidden_states(**inputs, **keyed)
        return _Outcome(states=hidden.states, logits=None, reports=hidden.auxiliary)

    def _scored(self, model: Any, student: "_Outcome", theirs: "_Outcome | None", batch: Batch) -> LossParts:
        """The part of the loss that is over the vocabulary, or over classes; nothing where there is none."""
        base, terms = self.distill.base, self.distill.predictions
        count, zero = self.count(batch), jnp.zeros(())
        if base is None:
            return LossParts(total=zero, count=count, metrics={})
        if not terms or (theirs is None and self.step is None):  # a cache holds rows to train on only
            if self.step is not None:
                return LossParts(total=zero, count=count, metrics={})
            plain = _plain(base, model, student, batch)
            return LossParts(total=zero, count=count, metrics=plain.metrics | {"loss": _loss_of(plain)})
        (term,) = terms
        compute = functools.partial(self._compared, term, model, student, theirs, batch)
        if term.always or self.step is None:
            return compute()
        shapes = jax.eval_shape(compute)
        parts = jax.lax.cond(
            term.holds(self.step), compute, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        )
        return LossParts(total=parts.total, count=count, metrics=parts.metrics)

    def _compared(
        self, term: Predictions, model: Any, student: "_Outcome", theirs: "_Outcome | None", batch: Batch
    ) -> LossParts:
        base = self.distill.base
        mixing = Mixing(
            divergence=term.divergence,
            temperature=term.temperature,
            soft=term.weight,
            hard=term.labels,
            label_smoothing=getattr(base, "label_smoothing", 0.0),
            z_loss=getattr(base, "z_loss", 0.0),
        )
        if not isinstance(base, TokenObjective):
            assert theirs is not None, "a cache is of tokens"
            logits, labels = (
                (x if x.ndim == 3 else x[:, None] for x in (student.logits, theirs.logits)),
                batch["labels"],
            )
            mine, other = logits
            labels = labels if labels.ndim == 2 else labels[:, None]
            return soft_target_loss(
                mine,
                lambda x: x,
                LiveTeacher(hidden=other, project=lambda x: x),
                labels,
                _rows(batch, labels),
                mixing=mixing,
            )
        states, picked = base.scored(student.states, batch)
        if theirs is None:
            teacher: Any = stored_teacher(batch)
        else:
            teacher = LiveTeacher(hidden=base.scored(theirs.states, batch)[0], project=self.teacher.project)
        return soft_target_loss(
            states,
            model.project,
            teacher,
            picked["labels"],
            picked.get("loss_mask"),
            mixing=mixing,
            num_tokens=self.num_tokens,
            chunk=base.chunk,
        )

    def _of_layers(
        self, number: int, term: LayerTerm, student: Batch, teacher: Batch, batch: Batch
    ) -> Float[Array, ""]:
        pairs = term.pairs(*self.configs)
        views = Views(
            student=student,
            teacher=teacher,
            weights=batch[_weight_name(term.side)],
            learned=self.learned.get(f"{number}_{term.metric}", {}),
            pairs=pairs,
            factors=self._factors(len(pairs)),
        )
        last = max((other.begin for other in self.distill.terms), default=None)
        return when(term, self.step, lambda: term.loss(views), last)

    def _factors(self, pairs: int) -> Float[Array, "P"]:
        """Of every pair of layers: all alike, or, one after the other, of the one whose turn it is."""
        if self.distill.progressive is None or self.step is None:
            return jnp.full((pairs,), 1.0 / pairs)
        return (jnp.arange(pairs) == self.step // self.distill.progressive).astype(jnp.float32)

    def unfrozen(self, params: Any) -> Any:
        """While one layer after the other is learned, 1 for that layer and for what the terms bring along, else 0."""
        if self.distill.progressive is None or self.step is None:
            return None
        layers = np.asarray([mine for mine, _ in self.distill.layer_terms[0].pairs(*self.configs)])
        turn = self.step // self.distill.progressive
        over = (turn >= len(layers)).astype(jnp.float32)
        own = jnp.asarray(layers)[jnp.minimum(turn, len(layers) - 1)]
        return {name: _turns(tree, own, over, name == LEARNED) for name, tree in params.items()}


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Of a forward pass."""

    states: Any
    """Input of the head; None where classes were scored."""
    logits: Any
    """Of classes."""
    reports: Mapping[str, Any]
    """Of the layers, what was captured among them."""

    def captured(self, term: LayerTerm) -> Batch:
        """What the term looks at, by its name."""
        prefix = f"{term.side}/{PREFIX}" if term.side else PREFIX
        return {name.removeprefix(prefix): x for name, x in self.reports.items() if name.startswith(prefix)}

    @property
    def auxiliary(self) -> Batch:
        """What the layers report of themselves."""
        return {name: x for name, x in self.reports.items() if PREFIX not in name}


def stored_teacher(batch: Batch) -> StoredTeacher:
    """What the cache says of a batch."""
    ids, sampled = batch[IDS], LOG_REST not in batch
    return StoredTeacher(
        ids=ids,
        log_probabilities=batch[LOG_PROBABILITIES].astype(jnp.float32),
        log_rest=jnp.zeros(ids.shape[:2]) if sampled else batch[LOG_REST].astype(jnp.float32),
        sampled=sampled,
    )


def real_tokens(batch: Batch, side: str) -> Float[Array, "B S"]:
    """1 for every token that is no padding, of the rows that count."""
    target = side == "decoder" or (side == "" and "input_ids" not in batch)
    ids = batch["decoder_input_ids" if target else "input_ids"]
    mask = batch.get("decoder_attention_mask" if target else "attention_mask")
    segments = batch.get("decoder_segment_ids" if target else "segment_ids")
    real = jnp.ones(ids.shape, jnp.float32)
    if mask is not None:
        real = real * (mask != 0)
    if segments is not None:
        real = real * (segments != 0)
    rows = batch.get("loss_mask")
    return real if rows is None or rows.ndim != 1 else real * (rows != 0)[:, None]


def _weight_name(side: str) -> str:
    return f"weight_of_{side or 'token'}"


def _plain(base: Objective, model: Any, student: _Outcome, batch: Batch) -> LossParts:
    """The plain loss of what was computed already."""
    if isinstance(base, TokenObjective):
        return base.score(model, student.states, batch)
    if isinstance(base, LabelObjective):
        return base.score(student.logits, batch["labels"], batch.get("loss_mask"))
    return base.loss(model, batch)


def _loss_of(parts: LossParts) -> jax.Array:
    return parts.metrics.get("loss", parts.total)


def _rows(batch: Batch, labels: jax.Array) -> jax.Array:
    """Weights of labels (B, L)."""
    mask = batch.get("loss_mask")
    if mask is None:
        return weights_of(jnp.where(labels == IGNORED, IGNORED, labels))
    return jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], labels.shape).astype(jnp.float32)


def _turns(tree: Any, turn: jax.Array, over: jax.Array, learned: bool) -> Any:
    """Factors of a part of the parameters."""
    if not isinstance(tree, dict):
        return jnp.ones((1,) * tree.ndim) if learned else jnp.broadcast_to(over, (1,) * tree.ndim)
    if "blocks" not in tree and "remainder" not in tree:
        return {name: _turns(part, turn, over, learned) for name, part in tree.items()}
    blocks = tree.get("blocks", {})
    result: dict[str, Any] = {}
    repeats = [leaf.shape[0] for leaf in jax.tree.leaves(blocks)][:1]
    for name, block in blocks.items():
        layers = np.arange(repeats[0]) * len(blocks) + int(name)
        factor = jnp.maximum((layers == turn).astype(jnp.float32), over)
        result.setdefault("blocks", {})[name] = jax.tree.map(
            lambda x, factor=factor: factor.reshape(-1, *(1,) * (x.ndim - 1)), block
        )
    for name, layer in tree.get("remainder", {}).items():
        own = sum(repeats) * len(blocks) + int(name)
        factor = jnp.maximum(jnp.equal(turn, own).astype(jnp.float32), over)
        result.setdefault("remainder", {})[name] = jax.tree.map(
            lambda x, factor=factor: factor.reshape((1,) * x.ndim), layer
        )
    return result
