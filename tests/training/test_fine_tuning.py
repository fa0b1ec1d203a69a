"""Runs that start from pretrained weights: what a head of one's own leaves, and what it does not excuse."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llmlab import runs
from llmlab.models.heads import SequenceClassification
from llmlab.models.huggingface import load_hf
from llmlab.models.weights import flatten
from llmlab.nn.module import split
from llmlab.objectives import Classification
from llmlab.optim import AdamW, Constant
from llmlab.sharding.mesh import Mesh
from llmlab.training.config import Train
from llmlab.training.program import Program
from tests.models.references import FIXTURES

BARE = FIXTURES / "bert-bare"


def initialised(seed: int) -> dict[str, jax.Array]:
    """Parameters of a classifier of three classes on the pretrained encoder, before the first step."""
    model = replace(load_hf(BARE).config, head=SequenceClassification(num_labels=3))
    batch = {"input_ids": np.zeros((8, 6), np.int32), "labels": np.zeros(8, np.int32)}
    mesh, train = Mesh(fsdp=4, tensor=2).build(), Train(steps=1, batch_size=8, sequence_length=6, seed=seed)
    program = Program.build(model, Classification(), AdamW(peak_lr=1e-3, schedule=Constant()), mesh, train, batch)
    weights = runs.pretrained(str(BARE), model)
    return flatten(program.initialise(weights).params)


def test_a_classifier_of_its_own_stands_on_the_pretrained_encoder():
    pretrained, model = flatten(split(load_hf(BARE))[1]), initialised(0)
    assert model.keys() - pretrained.keys() == {"head.classifier.kernel", "head.classifier.bias"}
    for name, leaf in pretrained.items():
        np.testing.assert_array_equal(model[name], leaf)
    drawn = np.asarray(model["head.classifier.kernel"])
    assert np.std(drawn) == pytest.approx(drawn.shape[0] ** -0.5, rel=0.4)
    np.testing.assert_array_equal(drawn, initialised(0)["head.classifier.kernel"])
    assert not np.array_equal(drawn, initialised(1)["head.classifier.kernel"])


def test_a_head_that_is_the_one_there_is_kept_and_one_that_is_not_leaves_as_a_whole():
    source = FIXTURES / "bert-classes"
    model = load_hf(source)
    shapes = model.config.abstract()[1]
    assert flatten(runs.pretrained(str(source), model.config)(shapes)).keys() == flatten(shapes).keys()
    other = replace(model.config, head=SequenceClassification(num_labels=4))
    assert "head" not in runs.pretrained(str(source), other)(other.abstract()[1])


def test_layers_that_are_not_those_there_are_refused():
    deeper = replace(load_hf(BARE).config, num_layers=3, head=None)
    with pytest.raises(ValueError, match=r"holds another model(.|\n)*stack.blocks"):
        runs.pretrained(str(BARE), deeper)(deeper.abstract()[1])
