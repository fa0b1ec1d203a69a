"""What tensor parallelism sends and computes, read in the compiled program of a decoder."""

import dataclasses
import math
import re

import pytest

from llmlab.sharding import Mesh
from tests.training.models_on_meshes import CASES, LENGTH, ROWS, program

VOCAB, DIM, TENSOR = 4096, 16, 4


@pytest.fixture(scope="module")
def text() -> str:
    case = CASES["decoder"]
    case = case._replace(model=dataclasses.replace(case.model, vocab_size=VOCAB, num_layers=2))
    built = program(case, Mesh(data=1, tensor=TENSOR), TENSOR, accumulation=1)
    return built.train_step.lower(built.state, built.batch).compile().as_text()


def shapes(text: str, operation: str) -> list[tuple[int, ...]]:
    """Of the results of an operation, on one device."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {operation}\(", text)
    return [tuple(int(size) for size in shape.split(",") if size) for shape in found]


def test_scores_and_vocabulary_tables_stay_where_they_are(text: str) -> None:
    """The lookup, the head and the cross-entropy send states of the tokens and numbers per token, no more."""
    sent = [
        shape for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all") for shape in shapes(text, kind)
    ]
    assert sent
    assert max(map(math.prod, sent)) == ROWS * LENGTH * DIM < DIM * VOCAB // TENSOR
    # the head's matmul is of a device's part of the vocabulary
    assert any(VOCAB // TENSOR in shape for shape in shapes(text, "dot"))
    assert not any(VOCAB in shape for shape in shapes(text, "dot"))


def test_norms_and_residual_additions_are_shared_out_over_tokens(text: str) -> None:
    normalised = shapes(text, "rsqrt")
    assert normalised
    assert {math.prod(shape) for shape in normalised if len(shape) > 1} == {ROWS * LENGTH // TENSOR}
