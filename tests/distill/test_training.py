"""Training with a teacher: one step against plain gradients, and whatever must not matter."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import llmlab
from llmlab.distill import (
    AttentionMaps,
    AttentionTransfer,
    Distill,
    Embeddings,
    Explicit,
    FeatureMaps,
    JensenShannon,
    LastLayers,
    Predictions,
    Relations,
    States,
    Uniform,
)
from llmlab.distill.teacher import digest
from llmlab.nn.capture import capturing
from llmlab.nn.module import merge, split
from llmlab.objectives import NextToken
from llmlab.objectives.companion import LEARNED, apart
from llmlab.objectives.relations import attention_transfer, map_error, relation
from llmlab.optim import AdamW, Constant
from llmlab.sharding.mesh import Mesh
from tests.distill.conftest import STUDENT, TEACHER

# Float32 sums in another order.
SAME: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-6}


def same_trees(found: Any, expected: Any) -> None:
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, **SAME), found, expected)


def logits(model: Any, batch: Any) -> Any:
    names = ("input_ids", "segment_ids", "position_ids")
    return model(**{name: jnp.asarray(batch[name]) for name in names}).logits


def plain_loss(graphdef: Any, params: Any, theirs: Any, batch: Any, temperature: float, labels: float) -> Any:
    """T^2 KL plus the cross-entropy, from whole logits, as a mean over labels."""
    mine = logits(merge(graphdef, params), batch)
    p, log_q = jax.nn.softmax(theirs / temperature), jax.nn.log_softmax(mine / temperature)
    kl = jnp.sum(p * (jnp.log(p) - log_q), axis=-1)
    counted = batch["labels"] != -100
    picked = jnp.take_along_axis(jax.nn.log_softmax(mine), np.where(counted, batch["labels"], 0)[..., None], -1)[..., 0]
    return jnp.sum(counted * (temperature**2 * kl - labels * picked)) / counted.sum()


def test_a_step_is_gradient_descent_on_the_softened_kl(teacher: str, program_of: Any, batch: Any) -> None:
    terms = (Predictions(temperature=2.0, labels=0.3),)
    program = program_of(Distill(teacher=teacher, terms=terms))
    state = program.initialise()
    theirs = logits(llmlab.load(teacher), batch)
    loss, gradient = jax.value_and_grad(lambda params: plain_loss(program.graphdef, params, theirs, batch, 2.0, 0.3))(
        state.params
    )
    expected = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), state.params, gradient)
    placed = program.place(batch)
    before = program.evaluate_step(state.params, placed)
    state, metrics = program.train_step(state, placed)
    same_trees(state.params, expected)
    np.testing.assert_allclose(metrics["train/distillation"], loss, rtol=1e-5)
    np.testing.assert_allclose(before.metrics["distillation"] / before.count, loss, rtol=1e-5)
    assert metrics["train/loss"] > 0


def test_nothing_of_the_teacher_is_trained_or_kept_by_the_optimizer(teacher: str, program_of: Any, batch: Any) -> None:
    program = program_of(Distill(teacher=teacher))
    of_student = STUDENT.with_vocabulary(program.model.vocab_size).abstract()[1]
    assert jax.tree.structure(program.state.params) == jax.tree.structure(of_student)
    numbers = sum(x.size for x in jax.tree.leaves((program.state.params, program.state.optimizer_state)))
    assert numbers < 2 * sum(x.size for x in jax.tree.leaves(of_student)) + 10
    before = jax.tree.map(np.asarray, program.frozen)
    same = split(llmlab.load(teacher))[1]
    jax.tree.map(np.testing.assert_array_equal, before, same)
    program.train_step(program.initialise(), program.place(batch))
    jax.tree.map(np.testing.assert_array_equal, program.frozen, before)
    # An argument and no constant: the compiled program takes the teacher's arrays besides its own.
    lowered = program.step.lower(program.state, program.batch, program.scalars)
    assert len(jax.tree.leaves(lowered.in_avals)) == len(
        jax.tree.leaves((program.state, program.batch, program.scalars))
    )


ALL_TERMS = (
    Predictions(divergence=JensenShannon(beta=0.3)),
    States(layers=Explicit(of=((0, 1),))),
    Embeddings(weight=0.5),
    AttentionMaps(layers=LastLayers(count=1)),
    AttentionTransfer(),
    Relations(of=("query", "key", "value"), heads=4),
)


@pytest.mark.parametrize("kind", ["sharded", "accumulated"])
@pytest.mark.scale
def test_layouts_and_parts_do_not_change_what_is_learned(kind: str, teacher: str, program_of: Any, batch: Any) -> None:
    objective = Distill(teacher=teacher, terms=ALL_TERMS)
    plain = program_of(objective)
    other = (
        program_of(objective, mesh=Mesh(data=2, fsdp=2, tensor=2))
        if kind == "sharded"
        else program_of(objective, accumulation=4)
    )
    states = []
    for program in (plain, other):
        state, metrics = program.train_step(program.initialise(), program.place(batch))
        states.append((jax.device_get(state.params), jax.device_get(metrics)))
    same_trees(states[1][0], states[0][0])
    same_trees(states[1][1], states[0][1])
    assert set(states[0][0][LEARNED]) == {"0_states", "1_embeddings"}
    names = {"train/states", "train/embeddings", "train/attention_maps", "train/attention", "train/relations"}
    assert names < set(states[0][1])
    if kind == "sharded":
        trained = program_of(NextToken(), TEACHER, mesh=Mesh(data=2, fsdp=2, tensor=2)).state.params
        where, expected = (jax.tree.map(lambda x: x.sharding, tree) for tree in (other.frozen, trained))
        assert where == expected, "the teacher is laid out as in its own training"
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(where))


def test_terms_over_layers_equal_their_functions_on_the_layers_own_outputs(
    teacher: str, program_of: Any, batch: Any
) -> None:
    """Of a student with other widths; in NumPy, but for the functions that have tests of their own."""
    program = program_of(Distill(teacher=teacher, terms=ALL_TERMS))
    state = program.initialise()
    own, learned = apart(state.params)
    inputs: Any = {name: jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids", "position_ids")}
    what: Any = ("input", "state", "scores", "attention", "query", "key", "value", "allowed")
    seen: list[dict[str, Any]] = []
    for model in (merge(program.graphdef, own), llmlab.load(teacher)):
        with capturing(*what):
            found = model.hidden_states(**inputs).auxiliary
        seen.append({name: found[f"capture/{name}"] for name in what})
    mine, theirs = seen
    real = jnp.asarray(batch["segment_ids"] != 0, jnp.float32)

    def projected(name: str, layer: int, kernel: str) -> Any:
        difference = np.asarray(mine[name][0]) @ np.asarray(learned[kernel]["kernel"]) - np.asarray(theirs[name][layer])
        return (real * (difference**2).mean(-1)).sum()

    allowed = mine["allowed"][0]
    relations = [[relation(side[name][-1], allowed, 4) for side in seen] for name in ("query", "key", "value")]
    expected = {
        "states": projected("state", 1, "0_states"),
        "embeddings": projected("input", 0, "1_embeddings"),
        "attention_maps": map_error(mine["scores"][0], theirs["scores"][-1], allowed, real),
        "attention": attention_transfer(mine["attention"][0], theirs["attention"][-1], real),
        "relations": sum(attention_transfer(*pair, weights=real) for pair in relations) / 3,
    }
    parts = program.evaluate_step(state.params, program.place(batch))
    for name, value in expected.items():
        np.testing.assert_allclose(parts.metrics[name] / parts.count, value / real.sum(), rtol=2e-4, err_msg=name)
    terms = {"divergence": 1.0, **dict.fromkeys(expected, 1.0), "embeddings": 0.5}
    total = sum(weight * parts.metrics[name] for name, weight in terms.items())
    np.testing.assert_allclose(parts.metrics["distillation"], total, rtol=1e-5)


def test_a_recipe_of_two_stages_computes_what_holds(teacher: str, program_of: Any, batch: Any) -> None:
    terms = (States(layers=Explicit(of=((0, 1),)), end=1), Predictions(begin=1))
    program = program_of(Distill(teacher=teacher, terms=terms))
    placed, state = program.place(batch), program.initialise()
    state, first = program.train_step(state, placed)
    state, second = program.train_step(state, placed)
    assert first["train/states"] > 0
    assert first["train/divergence"] == 0
    np.testing.assert_allclose(first["train/distillation"], first["train/states"])
    np.testing.assert_allclose(first["train/loss"], first["train/distillation"])
    assert second["train/states"] == 0
    np.testing.assert_allclose(second["train/distillation"], second["train/divergence"])


def feature_maps_by_hand(student: Any, teacher: Any, batch: Any) -> Any:
    """MobileBERT's loss of the first layer, in NumPy: normalised states, their means and their variances."""
    inputs: Any = {name: jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids", "position_ids")}
    layers = []
    for model in (student, teacher):
        with capturing("state"):
            layers.append(np.asarray(model.hidden_states(**inputs).auxiliary["capture/state"][0], np.float64))
    (mine, my_mean, my_variance), (theirs, their_mean, their_variance) = (
        (x, x.mean(-1, keepdims=True), x.var(-1, keepdims=True)) for x in layers
    )
    normalised = [
        (x - m) / np.sqrt(v) for x, m, v in ((mine, my_mean, my_variance), (theirs, their_mean, their_variance))
    ]
    error = ((normalised[0] - normalised[1]) ** 2).mean(-1)
    moments = (my_mean - their_mean) ** 2 + np.abs(my_variance - their_variance)
    real = batch["segment_ids"] != 0
    return (error + moments[..., 0])[real].mean()


@pytest.mark.scale
def test_progressive_training_changes_one_layer_at_a_time(teacher: str, program_of: Any, batch: Any) -> None:
    """Momentum and weight decay included, which move a parameter that has no gradient."""
    terms = (FeatureMaps(layers=Uniform(), decomposed=True), Predictions(begin=2))
    objective = Distill(teacher=teacher, terms=terms, progressive=1)
    adamw = AdamW(peak_lr=1e-2, schedule=Constant(), weight_decay=0.1)
    program = program_of(objective, TEACHER, optimizer=adamw, steps=3)
    placed, state = program.place(batch), program.initialise()
    feature_maps = feature_maps_by_hand(program.finished(state.params), llmlab.load(teacher), batch)

    def changes(before: Any, after: Any) -> tuple[bool, ...]:
        blocks = [tree["stack"]["blocks"]["0"] for tree in (before, after)]
        moved = [
            any(np.any(a[layer] != b[layer]) for a, b in zip(*map(jax.tree.leaves, blocks), strict=True))
            for layer in range(2)
        ]
        rest = [{name: tree[name] for name in tree if name != "stack"} for tree in (before, after)]
        return (*moved, any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, rest), strict=True)))

    found = []
    for step in range(3):
        before = jax.device_get(state.params)
        state, metrics = program.train_step(state, placed)
        found.append(changes(before, jax.device_get(state.params)))
        if step == 0:
            np.testing.assert_allclose(metrics["train/feature_maps"], feature_maps, rtol=2e-4)
    assert found == [(True, False, False), (False, True, False), (True, True, True)]


@pytest.mark.scale
def test_a_run_with_projections_is_a_model_without_them_and_resumes_to_the_same_bits(
    teacher: str, experiment_of: Callable[..., Any], program_of: Any, tmp_path: Path
) -> None:
    objective = Distill(teacher=teacher, terms=(Predictions(), States(layers=Explicit(of=((0, 0),)))))
    run = llmlab.train(experiment_of(objective, steps=3), tmp_path / "whole")
    assert LEARNED not in split(run.model)[1]
    assert run.summary["num_parameters"] == STUDENT.with_vocabulary(384).num_parameters()
    assert {"validation/loss", "validation/divergence", "validation/states"} <= run.summary.keys()
    provenance = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    assert provenance["fingerprints"]["teacher"] == digest(teacher)
    # A checkpoint holds the student, the projection and the step: plain gradient descent keeps nothing, and what it
    # would keep of a teacher is not there.
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").iterdir()
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        stored: Any = [checkpointer.metadata(checkpoint / item).item_metadata for item in ("params", "training")]
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(item.tree)) for item in stored]
    assert sizes[0] == STUDENT.with_vocabulary(384).num_parameters() + 8 * 16
    assert sizes[1] < 10
    # What it brought along does not go on to its own students.
    taught = program_of(Distill(teacher=str(tmp_path / "whole")), mesh=Mesh(fsdp=8)).frozen
    jax.tree.map(np.testing.assert_array_equal, taught, split(run.model)[1])
    # Two steps, and then a third.
    first = experiment_of(objective, steps=2)
    llmlab.train(first, tmp_path / "parts")
    again = llmlab.train(experiment_of(objective, steps=3), tmp_path / "parts", allow_config_change=True)
    jax.tree.map(np.testing.assert_array_equal, split(again.model)[1], split(run.model)[1])


def test_a_teacher_of_another_width_depth_head_count_and_precision_is_read_as_it_is_laid_out(
    teacher: str, program_of: Any, tmp_path: Path
) -> None:
    """A Hugging Face directory and a run give the same arrays, split over devices, in the run's precision."""
    (block,) = STUDENT.pattern
    student = replace(STUDENT, pattern=(replace(block, mixer=replace(block.mixer, num_heads=4, num_kv_heads=1)),))
    llmlab.save_hf(llmlab.load(teacher), tmp_path / "hf")
    trees = []
    for path in (teacher, str(tmp_path / "hf")):
        program = program_of(Distill(teacher=path), student, mesh=Mesh(fsdp=8), precision="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(program.frozen)} == {jnp.dtype(jnp.bfloat16)}
        assert any(len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated
                   for leaf in jax.tree.leaves(program.frozen))  # fmt: skip
        trees.append(program.frozen)
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_pipeline_is_refused_with_the_way_out(teacher: str, program_of: Any) -> None:
    with pytest.raises(ValueError, match=r"use mesh\.pipeline=1 and another axis"):
        program_of(Distill(teacher=teacher), TEACHER, mesh=Mesh(pipeline=2, data=4), accumulation=2)
