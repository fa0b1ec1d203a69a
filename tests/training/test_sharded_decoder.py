"""A real decoder on eight devices equals the same on one: loss, gradients, three optimizer steps, dropout included."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from llmlab.models.config import Transformer, Untied
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.objectives import NextToken
from llmlab.optim import SGD, AdamW, Optimizer
from llmlab.sharding import Mesh
from llmlab.training.config import Train
from llmlab.training.program import Program

BLOCK = Block(
    mixer=Attention(num_heads=4, num_kv_heads=2, position=Rotary(), dropout=0.1),
    ffn=GatedMLP(hidden_dim=32, activation="silu"),
    norm=RMSNorm(),
    wiring=PreNorm(),
    dropout=0.1,
)
MODEL = Transformer(
    vocab_size=64,
    embed_dim=16,
    num_layers=2,
    pattern=(BLOCK,),
    embedding_dropout=0.1,
    final_norm=RMSNorm(),
    head=Untied(),
)
MESHES = {"data": Mesh(data=8), "fsdp": Mesh(data=1, fsdp=8), "data x fsdp": Mesh(data=2, fsdp=4)}


def batch(seed: int) -> dict[str, np.ndarray]:
    """Packed rows: two documents in each, of different lengths, and padding at the end of some."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (16, 13)).astype(np.int32)
    cut, end = rng.integers(2, 8, (16, 1)), rng.integers(9, 13, (16, 1))
    at = np.arange(12)
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    counted = (segments > 0) & (at != cut - 1) & (at != end - 1)
    return {
        "input_ids": tokens[:, :-1].copy(),
        "labels": np.where(counted, tokens[:, 1:], -100).astype(np.int32),
        "segment_ids": segments,
        "position_ids": np.where(at < cut, at, at - cut).astype(np.int32),
    }


@functools.cache
def train(mesh: Mesh, num_devices: int, optimizer: Optimizer, accumulation: int = 1) -> tuple[Any, list[Any]]:
    """Parameters and metrics after three steps."""
    program = Program.build(
        MODEL,
        NextToken(),
        optimizer,
        mesh.build(jax.devices()[:num_devices]),
        Train(steps=3, batch_size=16, sequence_length=12, accumulation=accumulation, seed=5),
        batch(0),
    )
    state, metrics = program.initialise(None), []
    for seed in range(3):
        state, numbers = program.train_step(state, program.place(batch(seed)))
        metrics.append({name: float(value) for name, value in numbers.items()})
    return jax.tree.map(np.asarray, state.params), metrics


def assert_close(found: Any, expected: Any) -> None:
    # 1e-5 relative to the largest number of an array: sums in another order differ in the last place of their largest
    # term, whatever the sum is.
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5 * np.abs(e).max()), found, expected)


@pytest.mark.parametrize(("mesh", "accumulation"), [("data", 1), ("fsdp", 1), ("data x fsdp", 1), ("data x fsdp", 2)])
def test_three_steps_on_eight_devices_equal_three_steps_on_one(mesh: str, accumulation: int) -> None:
    # Plain gradient descent: the parameters are the gradients' sum, nothing is normalised away.
    optimizer = SGD(peak_lr=0.5, clip_norm=None)
    params, metrics = train(MESHES[mesh], 8, optimizer, accumulation)
    expected_params, expected_metrics = train(Mesh(), 1, optimizer, accumulation)
    assert_close(metrics, expected_metrics)
    assert_close(params, expected_params)


def test_an_optimizer_with_state_does_not_see_the_layout() -> None:
    # epsilon: Adam divides a gradient by its own size, so where that is rounding (5e-8 here), its direction is random.
    # The moments are held against an epsilon that rounding does not reach.
    optimizer = AdamW(peak_lr=1e-1, weight_decay=0.1, epsilon=1.0)
    params, metrics = train(MESHES["data x fsdp"], 8, optimizer)
    expected_params, expected_metrics = train(Mesh(), 1, optimizer)
    assert_close(metrics, expected_metrics)
    assert_close(params, expected_params)
