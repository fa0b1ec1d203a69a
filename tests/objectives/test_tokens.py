"""What objectives of tokens ask a model and count, against loops over rows and places."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.outputs import Hidden
from llmlab.objectives import (
    BlankInfilling,
    LossParts,
    MaskedToken,
    MaskedTokenAndNextSentence,
    NextToken,
    Permutation,
    PrefixLM,
    SequenceToSequence,
)
from llmlab.objectives.tokens import TokenObjective

B, S, P, D, V = 4, 9, 3, 5, 13
RNG = np.random.default_rng(0)
TABLE, HEAD, RELATION = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((V, D), (D, V), (D, 2)))


class Model:
    """States that depend on every input, so that one left out would show; keeps what it was called with."""

    def __init__(self, table: jax.Array = TABLE, terms: dict[str, float] | None = None) -> None:
        self.table, self.terms = table, terms or {}
        self.called: dict[str, Any] = {}

    def hidden_states(self, *, key: Any = None, **inputs: jax.Array) -> Hidden:
        self.called = dict(inputs)
        states = self.table[inputs.get("decoder_input_ids", inputs["input_ids"])]
        if "target_mapping" in inputs:
            states = jnp.einsum("BPS,BSD->BPD", inputs["target_mapping"], states)
        rows = len(states)
        sums = [jnp.sum(jnp.reshape(array, (rows, -1)).astype(jnp.float32), axis=1) for array in inputs.values()]
        extra = jnp.sum(jnp.stack(sums), axis=0)
        return Hidden(states=jnp.sin(states + 0.01 * extra[:, None, None]), auxiliary={"load": jnp.ones(2)})

    def auxiliary_losses(self, auxiliary: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: value * jnp.mean(auxiliary["load"]) for name, value in self.terms.items()}

    def project(self, hidden: jax.Array) -> jax.Array:
        return hidden @ HEAD

    def relate(self, hidden: jax.Array) -> jax.Array:
        return hidden[:, 0] @ RELATION


def some(*shape: int, below: int = V) -> jax.Array:
    return jnp.asarray(RNG.integers(0, below, shape), jnp.int32)


def with_holes(labels: jax.Array) -> jax.Array:
    return jnp.where(jnp.asarray(RNG.random(labels.shape) < 0.4), -100, labels)


def batch_for(objective: TokenObjective) -> dict[str, jax.Array]:
    """Every array that the objective may pass on, and one that it must not."""
    shapes = {"target_mapping": (B, P, S), "perm_mask": (B, S, S), "prefix_length": (B,), "pixel_values": (B, 2, 2, 1)}
    batch = {name: some(*shapes.get(name, (B, S)), below=4) for name in objective.inputs}
    if "target_mapping" in batch:
        batch["target_mapping"] = jnp.eye(S)[some(B, P, below=S)]
    labels = some(B, P if "target_mapping" in batch else S)
    return batch | {"labels": with_holes(labels), "unrelated": some(B)}


def by_hand(logits: Any, labels: Any, weights: Any = None) -> tuple[float, float, float]:
    """(nll, correct, count), place by place in float64."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    nll = correct = count = 0.0
    for place in np.ndindex(labels.shape):
        if labels[place] != -100:
            z, w = logits[place], 1.0 if weights is None else float(weights[place])
            nll += w * (np.log(np.exp(z).sum()) - z[labels[place]])
            correct += w * (z.argmax() == labels[place])
            count += w
    return nll, correct, count


OBJECTIVES = [NextToken(), PrefixLM(), BlankInfilling(), SequenceToSequence(), Permutation(), MaskedToken()]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_the_model_gets_its_inputs_and_its_predictions_are_scored(objective: TokenObjective) -> None:
    batch, model = batch_for(objective), Model()
    parts = objective.loss(model, batch)
    assert model.called.keys() == set(objective.inputs)
    logits = model.project(model.hidden_states(**{name: batch[name] for name in objective.inputs}).states)
    expected = by_hand(logits, batch["labels"])
    found = (parts.metrics["loss"], parts.metrics["accuracy"], parts.count)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(parts.total, expected[0], rtol=1e-5)
    assert objective.count(batch) == expected[2]
    # ... and inputs that the batch does not have are not made up
    needed = ("input_ids", "decoder_input_ids", "target_mapping", "labels")
    few = {name: batch[name] for name in needed if name in batch}
    objective.loss(model, few)
    assert model.called.keys() == few.keys() - {"labels"} & set(objective.inputs)


def test_terms_of_the_layers_are_added_to_the_mean_and_reported() -> None:
    batch, objective = batch_for(NextToken()), NextToken()
    plain, parts = objective.loss(Model(), batch), objective.loss(Model(terms={"balance": 0.25, "z": 0.5}), batch)
    np.testing.assert_allclose(parts.total / parts.count, plain.total / plain.count + 0.75, rtol=1e-6)
    np.testing.assert_allclose(parts.metrics["balance"] / parts.count, 0.25, rtol=1e-6)
    assert parts.metrics["loss"] == plain.metrics["loss"]


def masked_batch(*, weights: bool = False) -> dict[str, jax.Array]:
    ids, labels = np.array(some(B, S)), np.full((B, S), -100)
    places = np.full((B, P), -1)
    for b, count in enumerate((3, 1, 0, 2)):
        chosen = np.sort(RNG.choice(S, count, replace=False))
        labels[b, chosen], places[b, :count] = ids[b, chosen], chosen
    batch = {"input_ids": ids, "labels": labels, "masked_positions": places, "attention_mask": np.ones((B, S))}
    if weights:
        batch["loss_mask"] = RNG.choice([0.5, 1.0, 2.0], (B, S))
    return {
        name: jnp.asarray(array, jnp.float32 if name == "loss_mask" else jnp.int32) for name, array in batch.items()
    }


@pytest.mark.parametrize("weights", [False, True])
def test_scoring_the_masked_places_alone_equals_scoring_all(weights: bool) -> None:
    batch = masked_batch(weights=weights)
    everywhere = {name: array for name, array in batch.items() if name != "masked_positions"}
    objective = MaskedToken(label_smoothing=0.1, z_loss=1e-3)

    def gradient(batch: dict[str, jax.Array]) -> tuple[LossParts, jax.Array]:
        def total(table: jax.Array) -> tuple[jax.Array, LossParts]:
            parts = objective.loss(Model(table), batch)
            return parts.total, parts

        d_table, parts = jax.grad(total, has_aux=True)(TABLE)
        return parts, d_table

    (few, d_few), (all_, d_all) = gradient(batch), gradient(everywhere)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), few, all_)
    np.testing.assert_allclose(d_few, d_all, rtol=1e-5, atol=1e-6)
    expected = by_hand(Model().project(_states(batch)), batch["labels"], batch.get("loss_mask"))
    np.testing.assert_allclose((few.metrics["loss"], few.metrics["accuracy"], few.count), expected, rtol=1e-5)
    assert objective.count(batch) == few.count


def _states(batch: dict[str, jax.Array]) -> jax.Array:
    names = ("input_ids", "attention_mask")
    return Model().hidden_states(**{name: batch[name] for name in names}).states


def test_the_head_scores_as_many_places_as_there_are_predictions() -> None:
    scored: list[tuple[int, ...]] = []

    class Watching(Model):
        def project(self, hidden: jax.Array) -> jax.Array:
            scored.append(hidden.shape)
            return super().project(hidden)

    MaskedToken().loss(Watching(), masked_batch())
    assert {shape[:2] for shape in scored} <= {(B, P), (B, 1)}  # one place, to ask for the number of logits


def pair_batch() -> dict[str, jax.Array]:
    return masked_batch() | {"next_sentence_label": jnp.asarray([0, 1, -100, 1], jnp.int32)}


def test_both_terms_of_berts_pretraining_are_means_over_what_they_count() -> None:
    batch, model = pair_batch(), Model()
    parts = MaskedTokenAndNextSentence().loss(model, batch)
    masked, right, count = by_hand(model.project(_states(batch)), batch["labels"])
    related, related_right, rows = by_hand(model.relate(_states(batch)), batch["next_sentence_label"])
    np.testing.assert_allclose(parts.total / parts.count, masked / count + related / rows, rtol=1e-5)
    assert (parts.count, rows) == (count, 3)
    means = {name: value / parts.counts.get(name, parts.count) for name, value in parts.metrics.items()}
    expected = {
        "loss": masked / count + related / rows,
        "masked_loss": masked / count,
        "next_sentence_loss": related / rows,
        "accuracy": right / count,
        "next_sentence_accuracy": related_right / rows,
    }
    assert means.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(means[name], value, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_parts_of_a_batch_add_up_to_the_whole_though_they_count_differently(cut: int) -> None:
    objective, batch = MaskedTokenAndNextSentence(label_smoothing=0.1), pair_batch()
    whole = objective.loss(Model(), batch)
    prepared = objective.prepare(batch)
    sides = [{name: array[rows] for name, array in prepared.items()} for rows in (slice(cut), slice(cut, None))]
    first, second = (objective.loss(Model(), side) for side in sides)
    summed = jax.tree.map(lambda a, b: a + b, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), summed, whole)


def test_a_batch_that_asks_no_row_has_a_masked_term_only() -> None:
    batch = pair_batch() | {"next_sentence_label": jnp.full(B, -100, jnp.int32)}
    parts = MaskedTokenAndNextSentence().loss(Model(), batch)
    np.testing.assert_allclose(parts.total, parts.metrics["masked_loss"], rtol=1e-6)
    assert parts.counts["next_sentence_loss"] == 0
