"""Training with a teacher: one step against plain gradients, and whatever must not matter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from llmlab.nn.module import merge, split
from llmlab.objectives.companion import LEARNED, apart
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
        specs = [leaf.sharding.spec for leaf in jax.tree.leaves(other.frozen)]
        assert any(any(axis is not None for axis in spec) for spec in specs), "the teacher is split as a model is"


def test_terms_over_layers_equal_their_functions_on_the_layers_own_outputs(
    teacher: str, program_of: Any, batch: Any
) -> None:
    from llmlab.nn.capture import capturing
    from llmlab.objectives.states import projected_error

    objective = Distill(teacher=teacher, terms=(States(layers=Explicit(of=((0, 0),)), weight=2.0),))
    program = program_of(objective)
    state = program.initialise()
    own, learned = apart(state.params)
    names = ("input_ids", "segment_ids", "position_ids")
    inputs: Any = {name: jnp.asarray(batch[name]) for name in names}
    captured: Any = []
    for model in (merge(program.graphdef, own), llmlab.load(teacher)):
        with capturing("state"):
            captured.append(model.hidden_states(**inputs).auxiliary["capture/state"][0])
    real = jnp.asarray(batch["segment_ids"] != 0, jnp.float32)
    mine, theirs = captured
    expected = 2.0 * projected_error(mine, theirs, real, learned["0_states"]["kernel"]) / real.sum()
    parts = program.evaluate_step(state.params, program.place(batch))
    np.testing.assert_allclose(parts.metrics["distillation"] / parts.count, expected, rtol=1e-4)


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


def test_progressive_training_changes_one_layer_at_a_time(teacher: str, program_of: Any, batch: Any) -> None:
    import dataclasses

    student = dataclasses.replace(TEACHER, execution=TEACHER.execution)
    terms = (FeatureMaps(layers=Uniform(), decomposed=True), Predictions(begin=2))
    objective = Distill(teacher=teacher, terms=terms, progressive=1)
    program = program_of(objective, student)
    placed, state = program.place(batch), program.initialise()

    def changes(before: Any, after: Any) -> tuple[bool, ...]:
        blocks = [tree["stack"]["blocks"]["0"] for tree in (before, after)]
        moved = [
            any(np.any(a[layer] != b[layer]) for a, b in zip(*map(jax.tree.leaves, blocks), strict=True))
            for layer in range(2)
        ]
        rest = [{name: tree[name] for name in tree if name != "stack"} for tree in (before, after)]
        return (*moved, any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, rest), strict=True)))

    found = []
    for _ in range(3):
        before = jax.device_get(state.params)
        state, _ = program.train_step(state, placed)
        found.append(changes(before, jax.device_get(state.params)))
    assert found == [(True, False, False), (False, True, False), (True, True, True)]


def test_a_run_with_projections_is_a_model_without_them_and_resumes_to_the_same_bits(
    teacher: str, experiment_of: Callable[..., Any], tmp_path: Path
) -> None:
    objective = Distill(teacher=teacher, terms=(Predictions(), States(layers=Explicit(of=((0, 0),)))))
    run = llmlab.train(experiment_of(objective, steps=3), tmp_path / "whole")
    assert LEARNED not in split(run.model)[1]
    assert run.summary["num_parameters"] == STUDENT.with_vocabulary(384).num_parameters()
    assert {"validation/loss", "validation/divergence", "validation/states"} <= run.summary.keys()
    fingerprints = (tmp_path / "whole" / "provenance.json").read_text()
    assert '"teacher"' in fingerprints
    # Two steps, and then a third.
    first = experiment_of(objective, steps=2)
    llmlab.train(first, tmp_path / "parts")
    again = llmlab.train(experiment_of(objective, steps=3), tmp_path / "parts", allow_config_change=True)
    jax.tree.map(np.testing.assert_array_equal, split(again.model)[1], split(run.model)[1])


def test_a_teacher_of_another_width_depth_and_precision_is_read_as_it_is_laid_out(
    teacher: str, program_of: Any, tmp_path: Path
) -> None:
    """A Hugging Face directory and a run give the same arrays, split over devices, in the run's precision."""
    llmlab.save_hf(llmlab.load(teacher), tmp_path / "hf")
    trees = []
    for path in (teacher, str(tmp_path / "hf")):
        program = program_of(Distill(teacher=path), mesh=Mesh(fsdp=8), precision="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(program.frozen)} == {jnp.dtype(jnp.bfloat16)}
        assert any(len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated
                   for leaf in jax.tree.leaves(program.frozen))  # fmt: skip
        trees.append(program.frozen)
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_pipeline_is_refused_with_the_way_out(teacher: str, program_of: Any) -> None:
    with pytest.raises(ValueError, match=r"use mesh\.pipeline=1 and another axis"):
        program_of(Distill(teacher=teacher), TEACHER, mesh=Mesh(pipeline=2, data=4), accumulation=2)
