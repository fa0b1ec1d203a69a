"""Every family: what llmlab computes is what transformers computed when the fixtures were written."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmlab.models.catalog import FAMILIES
from llmlab.models.heads import MaskedLM
from llmlab.models.huggingface import HeadKind, load_hf, load_hf_config, save_hf, with_head
from llmlab.nn.module import merge, split
from llmlab.nn.stack import Execution
from tests.models.comparison import assert_equals_reference, assert_same_weights
from tests.models.references import FIXTURES
from tests.selection import at_scale_but

CASES = sorted(path.name for path in FIXTURES.iterdir())
PRESETS = {(family.name, name): (family, config) for family in FAMILIES for name, config in family.presets.items()}
MEGABYTES = 12


def model_type(case: str) -> str:
    return json.loads((FIXTURES / case / "config.json").read_text())["model_type"]


PLAIN = [case for case in CASES if "-" not in case or case.endswith("-masked")]
"""One of every family. The others are the same classes with another head or flag; they take long and are `scale`'s."""


def executed(model: Any, execution: Execution) -> Any:
    """The same parameters, the stack applied otherwise."""
    graphdef = dataclasses.replace(model.config, execution=execution).abstract()[0]
    return merge(graphdef, split(model)[1])


@pytest.mark.parametrize("case", at_scale_but(PLAIN, CASES))
def test_outputs_and_gradients_equal_those_of_transformers(case):
    assert_equals_reference(
        load_hf(FIXTURES / case), load_file(FIXTURES / case / "reference.safetensors"), model_type(case)
    )


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa-tied"])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_either_way_to_apply_the_stack_equals_transformers(case, mode):
    model = executed(load_hf(FIXTURES / case), Execution(mode=mode))
    assert_equals_reference(model, load_file(FIXTURES / case / "reference.safetensors"), model_type(case))


@pytest.mark.parametrize("case", at_scale_but(PLAIN, CASES))
def test_export_then_import_is_exact_and_writes_the_tensors_that_transformers_wrote(case, tmp_path):
    model = load_hf(FIXTURES / case)
    again = load_hf(save_hf(model, tmp_path / "out"))
    assert again.config == model.config
    assert_same_weights(again, model)
    if (FIXTURES / case / "model.safetensors").exists() and "bfloat16" not in case:
        ours, theirs = (
            load_file(tmp_path / "out" / "model.safetensors"),
            load_file(FIXTURES / case / "model.safetensors"),
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(ours[name], tensor)


HEADS: tuple[HeadKind, ...] = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def architecture(case: str) -> str:
    return json.loads((FIXTURES / case / "config.json").read_text()).get("architectures", [""])[0]


@pytest.mark.parametrize("case", [case for case in CASES if architecture(case).endswith(HEADS)])
def test_a_familys_head_is_the_one_that_transformers_builds(case):
    config: Any = load_hf_config(FIXTURES / case)
    kind: HeadKind = next(kind for kind in HEADS if architecture(case).endswith(kind))
    labels = None if kind == "QuestionAnswering" else config.head.names or config.head.num_labels
    if kind == "SequenceClassification":  # what labels are is the data's affair
        config = dataclasses.replace(config, head=dataclasses.replace(config.head, problem_type=None))
    assert with_head(config, kind, labels=labels) == config
    if kind != "QuestionAnswering":
        other: Any = with_head(config, kind, labels=["yes", "no", "maybe"])
        assert other.head == dataclasses.replace(config.head, num_labels=3, names=("yes", "no", "maybe"))
        assert with_head(other, kind, labels=labels) == config


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mobilebert", "longformer"])
def test_a_head_can_be_exchanged_and_back(family):
    config: Any = load_hf_config(FIXTURES / f"{family}-classes")
    masked: Any = with_head(config, "MaskedLM")
    assert isinstance(masked.head, MaskedLM)
    assert with_head(masked, "SequenceClassification", labels=config.head.names or config.head.num_labels) == config


def test_a_head_that_a_family_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"GPT2ForQuestionAnswering"):
        with_head(load_hf_config(FIXTURES / "gpt2"), "QuestionAnswering")


@pytest.mark.parametrize(("family", "name"), list(PRESETS), ids=lambda part: str(part))
def test_presets_survive_the_way_to_a_config_and_back(family, name):
    entry, config = PRESETS[family, name]
    if entry.hugging_face is None:
        pytest.skip(f"{family} has no Hugging Face directory")
    if config.vocab_size is None:
        config = config.with_vocabulary(1024)
    hub = entry.hugging_face
    again = hub.from_hf(json.loads(json.dumps(hub.to_hf(config))))
    assert hub.to_hf(again) == hub.to_hf(config)
    assert again == config or again.num_parameters() == config.num_parameters()


def test_every_family_has_a_plain_case():
    assert {model_type(case) for case in PLAIN} == {model_type(case) for case in CASES}


def test_fixtures_stay_small():
    sizes = {path: path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < MEGABYTES * 1e6


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_plain_batch_has_what_a_models_cost_depends_on(family):
    config = next(config for name, config in family.presets.items() if name.endswith("nano"))
    config = config.with_vocabulary(128) if config.vocab_size is None else config
    shapes = config.batch_shapes(2, 16)
    assert config.num_tokens(shapes) > 0
    assert config.flops(shapes) == 3 * config.flops(shapes, training=False) > 0
