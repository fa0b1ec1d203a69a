"""Layer maps, and students that start from chosen layers of a teacher."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab.distill import Distill, Explicit, FirstLayers, LastLayers, States, Uniform
from llmlab.distill.layers import student_weights
from llmlab.models import bert
from llmlab.models.heads import SequenceClassification
from llmlab.nn.module import merge, split
from llmlab.objectives import NextToken
from tests.distill.conftest import STUDENT, TEACHER
from tests.drawing import built


def test_maps_are_what_they_are_called() -> None:
    assert Uniform().pairs(2, 6) == ((0, 2), (1, 5))
    assert LastLayers().pairs(2, 6) == ((0, 4), (1, 5))
    assert LastLayers(count=1).pairs(2, 6) == ((1, 5),)
    assert FirstLayers().pairs(2, 6) == ((0, 0), (1, 1))
    assert Explicit(of=((1, 3), (0, 5))).pairs(2, 6) == ((1, 3), (0, 5))


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        (Uniform(), "4 does not divide 6"),
        (LastLayers(count=5), "past the layers that there are: the student has 4, the teacher 6"),
        (Explicit(of=((0, 6),)), "layer 6 of the teacher, which has 6: they are counted from 0 to 5"),
        (Explicit(of=((4, 0),)), "layer 4 of the student"),
        (Explicit(of=()), "empty"),
    ],
)
def test_a_map_past_the_last_layer_is_refused(layer_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_map.pairs(4, 6)


def patterned(num_layers: int, kinds: int) -> Any:
    """A decoder whose layers differ in nothing that has parameters, in patterns of so many blocks."""
    (block,) = TEACHER.pattern
    blocks = [replace(block, mixer=replace(block.mixer, window=8 + i)) for i in range(kinds)]
    return replace(TEACHER, vocab_size=17, num_layers=num_layers, pattern=tuple(blocks))


def layers(model: Any) -> list[Any]:
    stack = model.stack
    params = [split(block)[1] for block in stack.blocks]
    repeats = stack.repeats.num
    rows = [jax.tree.map(lambda x, r=r: x[r], block) for r in range(repeats) for block in params]
    return rows + [split(layer)[1] for layer in stack.remainder]


@pytest.mark.parametrize(("student", "teacher"), [((3, 1), (6, 1)), ((3, 2), (6, 1)), ((5, 2), (6, 4))])
def test_a_student_starts_from_the_layers_that_are_chosen(student: Any, teacher: Any) -> None:
    configs = patterned(*student), patterned(*teacher)
    pairs = tuple((i, 5 - i) for i in range(student[0]))

    theirs = built(configs[1], 1)
    graphdef, shapes, _ = configs[0].abstract()
    params = student_weights(shapes, split(theirs)[1], Explicit(of=pairs), ())
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    model = merge(graphdef, params)
    given = layers(theirs)
    for mine, (_, layer) in zip(layers(model), pairs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, given[layer])
    np.testing.assert_array_equal(model.embedding.tokens.table[...], theirs.embedding.tokens.table[...])


def test_a_student_of_all_layers_is_the_teacher(teacher: str, program_of: Any, batch: Any) -> None:
    objective = Distill(teacher=teacher, initialize=Uniform())
    program = program_of(objective, TEACHER)
    state = program.initialise(objective.weights(TEACHER))
    parts = program.evaluate_step(state.params, program.place(batch))
    np.testing.assert_allclose(parts.metrics["divergence"], 0.0, atol=1e-4)
    assert parts.metrics["agreement"] == parts.count


def test_what_does_not_fit_is_listed_and_a_layer_without_a_teacher_is_told(teacher: str) -> None:
    params = split(llmlab.load(teacher))[1]
    shapes = STUDENT.with_vocabulary(384).abstract()[1]
    with pytest.raises(ValueError, match=r"(?s)embedding.tokens.table: \(384, 16\) there, \(384, 8\) here.*layer.0"):
        student_weights(shapes, params, LastLayers(), ())
    shapes = replace(TEACHER, num_layers=3).with_vocabulary(384).abstract()[1]
    with pytest.raises(ValueError, match=r"gives layers \[2\] of the student no layer"):
        student_weights(shapes, params, Explicit(of=((0, 0), (1, 1))), ())


def test_a_head_of_the_students_own_is_left_to_be_drawn() -> None:
    def encoder(labels: int) -> Any:
        head = SequenceClassification(num_labels=labels)
        return bert.bert(embed_dim=8, num_layers=1, num_heads=2, hidden_dim=8, max_length=8, vocab_size=17, head=head)

    theirs = jax.tree.map(lambda s: jnp.ones(s.shape), encoder(3).abstract()[1])
    params = student_weights(encoder(2).abstract()[1], theirs, LastLayers(), encoder(2).replaceable)
    assert set(params) == set(theirs) - {"head"}


def test_an_experiment_says_before_any_work_that_its_layers_do_not_exist(teacher: str, experiment_of: Any) -> None:
    objective = Distill(teacher=teacher, terms=(States(layers=Explicit(of=((0, 9),))),))
    with pytest.raises(ValueError, match="States: the layer map names layer 9 of the teacher, which has 2"):
        experiment_of(objective).validate()
    with pytest.raises(ValueError, match="teacher=nowhere is not a directory"):
        experiment_of(Distill(teacher="nowhere")).validate()
    experiment_of(NextToken()).validate()
