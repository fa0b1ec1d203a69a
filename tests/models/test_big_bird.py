"""What is BigBird's own: random blocks for each layer, and answers that are no part of their question."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.big_bird import big_bird, from_hf, to_hf
from llmlab.models.big_bird_model import DeepQuestionAnswering
from llmlab.nn.big_bird import BigBirdAttention
from llmlab.plan.cost import count
from tests.drawing import built

SIZES: dict[str, Any] = {"embed_dim": 8, "num_heads": 2, "vocab_size": 20, "max_length": 64, "num_layers": 2}
SMALL: dict[str, Any] = {**SIZES, "block_size": 2, "num_random_blocks": 1, "separator": 2}


def mixers(model: Any) -> list[BigBirdAttention]:
    return [block.mixer for block in model.layers() if isinstance(block.mixer, BigBirdAttention)]


def test_layers_draw_different_blocks_and_keep_them_through_a_directory():
    model = big_bird(seed=5, **SMALL)
    first, second = (mixer.random_blocks(20) for mixer in mixers(model))
    assert (first != second).any()
    again = from_hf(to_hf(model))
    assert again == model
    without = {name: value for name, value in to_hf(model).items() if name != "random_block_seed"}
    assert [mixer.seed for mixer in mixers(from_hf(without))] == [None, None]  # what transformers evaluates


def test_layers_that_differ_in_more_than_their_blocks_are_not_exported():
    model = big_bird(**SMALL)
    last = model.pattern[1]
    other = dataclasses.replace(last, mixer=dataclasses.replace(last.mixer, dropout=0.5))
    with pytest.raises(ValueError, match="layer 1 differs in more"):
        to_hf(dataclasses.replace(model, pattern=(model.pattern[0], other)))


def test_a_draw_of_the_caller_replaces_the_seeds():
    seeded, other = (built(big_bird(seed=seed, **SMALL)) for seed in (0, 1))
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 20, (1, 24)), jnp.int32)
    draws = {"random_blocks": jnp.asarray(np.stack([mixer.random_blocks(12) for mixer in mixers(seeded.config)]))}
    logits = jax.jit(seeded.__call__)(ids).logits
    assert np.abs(logits - jax.jit(other.__call__)(ids).logits).max() > 1e-4
    np.testing.assert_allclose(logits, jax.jit(other.__call__)(ids, draws=draws).logits, rtol=0, atol=1e-6)


def test_answers_are_not_in_the_question_and_its_token_type_is_another():
    model = built(big_bird(head=DeepQuestionAnswering(hidden_dim=12), **SMALL))
    ids = jnp.asarray([[0, 7, 9, 2, 8, 5], [0, 7, 9, 5, 5, 5]])
    np.testing.assert_array_equal(model.default_token_types(ids), [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
    output = model(ids, start_positions=jnp.asarray([4, 0]), end_positions=jnp.asarray([5, 0]))
    barred = np.asarray([[0, 1, 1, 1, 0, 0], [0] * 6], bool)
    for scores in (output.start_logits, output.end_logits):
        assert (np.asarray(scores)[barred] < -9e5).all()
        assert (np.abs(np.asarray(scores)[~barred]) < 10).all()

    def loss(scores: Any, at: tuple[int, int]) -> float:
        rows = np.asarray(scores, np.float64)
        return -float(np.mean([row[i] - np.log(np.exp(row).sum()) for row, i in zip(rows, at, strict=True)]))

    expected = (loss(output.start_logits, (4, 0)) + loss(output.end_logits, (5, 0))) / 2
    np.testing.assert_allclose(output.loss, expected, rtol=1e-5)


def test_the_flop_formula_counts_the_deeper_head():
    config = big_bird(head=DeepQuestionAnswering(hidden_dim=12), **SMALL)
    model, ids = built(config), jnp.zeros((2, 24), jnp.int32)
    counted = count(lambda ids: model(ids).start_logits, ids).matmul_flops
    assert counted == config.flops({"input_ids": (2, 24)}, training=False)


def test_a_model_for_questions_survives_the_way_through_a_config():
    model = big_bird(head=DeepQuestionAnswering(hidden_dim=32), **SMALL)
    assert from_hf(to_hf(model)) == model
