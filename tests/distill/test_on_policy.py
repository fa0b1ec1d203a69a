"""Rows that the student writes: what they are, what counts, and that a coin decides."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmlab
from llmlab.distill import Distill, OnPolicy, ReverseKL
from llmlab.distill.on_policy import continuations
from llmlab.distill.terms import Predictions
from llmlab.models import t5
from llmlab.models.config import Untied
from llmlab.sharding.mesh import Mesh
from tests.distill.conftest import STUDENT

MODEL = STUDENT.with_vocabulary(384).build(nnx.Rngs(params=3))


def jitted(model: Any, prompt: Any, count: int, **settings: Any) -> np.ndarray:
    graphdef, params = nnx.split(model)
    write = jax.jit(
        lambda params, key: continuations(nnx.merge(graphdef, params), jnp.asarray(prompt), count, key, **settings)
    )
    return np.asarray(write(params, jax.random.key(0)))


@pytest.mark.scale
def test_continuations_at_temperature_zero_are_the_argmax_of_the_whole_row(batch: Any) -> None:
    prompt = batch["input_ids"][:, :4]
    new = jitted(MODEL, prompt, 5, temperature=0.0)
    text = prompt
    for _ in range(5):
        best = np.asarray(MODEL(jnp.asarray(text)).logits[:, -1].argmax(-1), np.int32)
        text = np.concatenate([text, best[:, None]], axis=1)
    np.testing.assert_array_equal(new, text[:, 4:])


def test_draws_follow_the_models_distribution() -> None:
    rows = 4000
    new = jitted(MODEL, np.full((rows, 1), 65, np.int32), 1)
    p = np.asarray(jax.nn.softmax(MODEL(jnp.full((1, 1), 65, jnp.int32)).logits[0, 0]))
    found = np.bincount(new[:, 0], minlength=len(p)) / rows
    # Half the sum of the differences of 384 frequencies: sqrt(384 / (2 pi 4000)) = 0.12 is expected of chance alone.
    assert np.abs(found - p).sum() / 2 < 0.16


def test_a_written_row_keeps_the_prompt_and_counts_what_was_written(batch: Any) -> None:
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    on_policy = OnPolicy(fraction=1.0, prompt=4)
    written = jax.jit(lambda key: on_policy.rewritten(MODEL, placed, key))(jax.random.key(1))
    ids, labels = np.asarray(written["input_ids"]), np.asarray(written["labels"])
    np.testing.assert_array_equal(ids[:, :4], batch["input_ids"][:, :4])
    np.testing.assert_array_equal(labels[:, 3:-1], ids[:, 4:])
    assert np.all(labels[:, :3] == -100)
    assert np.all(labels[:, 3:] >= 0)
    assert np.all(np.asarray(written["segment_ids"]) == 1)
    np.testing.assert_array_equal(np.asarray(written["position_ids"]), np.tile(np.arange(12), (8, 1)))
    assert {name: (x.shape, x.dtype) for name, x in written.items()} == {
        name: (x.shape, x.dtype) for name, x in placed.items()
    }


def test_a_coin_decides_and_nothing_counts_beyond_the_end_of_a_text(batch: Any) -> None:
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    half = jax.jit(lambda key: OnPolicy(fraction=0.5, prompt=4).rewritten(MODEL, placed, key)["input_ids"])
    kept = [np.array_equal(half(jax.random.key(seed)), batch["input_ids"]) for seed in range(40)]
    assert 8 < sum(kept) < 32  # binomial of 40: 99.99% of it
    first = jitted(MODEL, batch["input_ids"][:, :4], 9, temperature=0.0)
    eos = int(first[0, 2])
    ended = OnPolicy(fraction=1.0, prompt=4, temperature=0.0, eos_id=eos).written(MODEL, placed, jax.random.key(0))
    for row, labels in zip(first, np.asarray(ended["labels"])[:, 3:], strict=True):
        end = np.flatnonzero(row == eos)
        last = end[0] + 1 if len(end) else len(row)
        np.testing.assert_array_equal(labels[:last], row[:last])
        assert np.all(labels[last:] == -100)


@pytest.mark.scale
def test_an_encoder_decoder_writes_a_target_for_its_source() -> None:
    config = t5.t5(
        embed_dim=16, num_layers=1, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=17, head=Untied(),
        decoder_start_id=0,
    )  # fmt: skip
    model = config.build(nnx.Rngs(params=0))
    rng = np.random.default_rng(0)
    source = jnp.asarray(rng.integers(1, 17, (3, 6)), jnp.int32)
    mask = jnp.asarray([[1] * 6, [1] * 4 + [0] * 2, [1] * 6], jnp.int32)
    batch = {
        "input_ids": source,
        "attention_mask": mask,
        "decoder_input_ids": jnp.zeros((3, 5), jnp.int32),
        "decoder_attention_mask": jnp.ones((3, 5), jnp.int32),
        "labels": jnp.ones((3, 5), jnp.int32),
    }
    written = OnPolicy(fraction=1.0, temperature=0.0).written(model, batch, jax.random.key(0))
    logits = model(source, attention_mask=mask, decoder_input_ids=written["decoder_input_ids"]).logits
    np.testing.assert_array_equal(written["labels"], logits.argmax(-1))
    np.testing.assert_array_equal(written["decoder_input_ids"][:, 1:], written["labels"][:, :-1])


@pytest.mark.parametrize("by", ["student", "teacher"])
@pytest.mark.scale
def test_a_step_on_written_rows_learns_what_the_teacher_says_of_them(
    by: Any, teacher: str, program_of: Any, batch: Any
) -> None:
    on_policy = OnPolicy(fraction=1.0, prompt=4, by=by, temperature=0.0)
    objective = Distill(teacher=teacher, terms=(Predictions(divergence=ReverseKL()),), on_policy=on_policy)
    program = program_of(objective)
    state = program.initialise()
    model, theirs = (nnx.merge(*nnx.split(m)) for m in (program.finished(state.params), llmlab.load(teacher)))
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    written = on_policy.written(theirs if by == "teacher" else model, placed, jax.random.key(0))
    logits = [m(written["input_ids"]).logits for m in (model, theirs)]
    log_q, log_p = (jax.nn.log_softmax(x) for x in logits)
    expected = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)[:, 3:].mean()
    _, metrics = program.train_step(state, program.place(batch))
    np.testing.assert_allclose(metrics["train/divergence"], expected, rtol=1e-4)


@pytest.mark.scale
def test_rows_that_are_written_on_eight_devices_are_those_of_one(teacher: str, program_of: Any, batch: Any) -> None:
    """At temperature 0; drawn rows may differ where two scores are as close as sums in another order."""
    on_policy = OnPolicy(fraction=1.0, prompt=4, temperature=0.0)
    objective = Distill(teacher=teacher, terms=(Predictions(divergence=ReverseKL()),), on_policy=on_policy)
    steps = []
    for mesh in (None, Mesh(data=2, fsdp=2, tensor=2)):
        program = program_of(objective, mesh=mesh)
        state, metrics = program.train_step(program.initialise(), program.place(batch))
        steps.append(jax.device_get((state.params, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), *steps)


def test_bad_fractions_and_prompts_are_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"fraction=1.5 is not in \(0, 1\]"):
        OnPolicy(fraction=1.5)
    with pytest.raises(ValueError, match="prompt=0"):
        OnPolicy(prompt=0)
    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    with pytest.raises(ValueError, match="prompt=12 leaves nothing of a row of 12 tokens"):
        OnPolicy(prompt=12).written(MODEL, placed, jax.random.key(0))
