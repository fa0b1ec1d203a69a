"""What is Longformer's own: windows for each layer, and the tokens that a task makes global."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.heads import MaskedLM, QuestionAnswering, SequenceClassification
from llmlab.models.longformer import from_hf, longformer, to_hf
from llmlab.nn.longformer import LongformerAttention
from tests.drawing import built

SIZES: dict[str, Any] = {"embed_dim": 8, "num_heads": 2, "vocab_size": 20, "max_length": 32}


def reaches(model: Any) -> list[int]:
    return [block.mixer.reach for block in model.layers() if isinstance(block.mixer, LongformerAttention)]


def test_windows_are_one_number_or_one_for_each_layer():
    assert reaches(longformer(num_layers=3, window=8, **SIZES)) == [4, 4, 4]
    model = longformer(num_layers=3, window=[8, 4, 2], **SIZES)
    assert reaches(model) == [4, 2, 1]
    assert to_hf(model)["attention_window"] == [8, 4, 2]
    assert reaches(from_hf(to_hf(model))) == [4, 2, 1]
    with pytest.raises(ValueError, match="window has 2 entries and num_layers=3"):
        longformer(num_layers=3, window=[8, 4], **SIZES)
    with pytest.raises(ValueError, match=r"window=7 must be even"):
        longformer(num_layers=3, window=7, **SIZES)


def test_layers_that_differ_in_more_than_their_windows_are_not_exported():
    model = longformer(num_layers=2, window=[8, 4], **SIZES)
    last = model.pattern[1]
    other = dataclasses.replace(last, mixer=dataclasses.replace(last.mixer, dropout=0.5))
    with pytest.raises(ValueError, match="layer 1 differs in more"):
        to_hf(dataclasses.replace(model, pattern=(model.pattern[0], other)))


def test_room_for_global_tokens_survives_the_way_through_a_directory():
    assert from_hf(to_hf(longformer(num_layers=1, window=8, max_global=5, **SIZES))).pattern[0].mixer == (
        LongformerAttention(num_heads=2, bias=True, output_bias=True, reach=4, max_global=5)
    )


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (MaskedLM(), None),
        (SequenceClassification(), [[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]),
        (QuestionAnswering(), [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
    ],
    ids=lambda part: type(part).__name__,
)
def test_the_head_decides_which_tokens_are_global_by_default(head, expected):
    model = built(longformer(num_layers=1, window=8, head=head, separator=2, **SIZES))
    found = model.default_global_tokens(jnp.asarray([[0, 7, 9, 2, 2, 5], [0, 7, 9, 5, 5, 5]]))
    if expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, np.asarray(expected, bool))
