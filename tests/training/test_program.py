"""What a program decides for its devices."""

from typing import Any

import jax
import numpy as np

from llmlab.distill import Distill
from llmlab.models.gpt2 import gpt2
from llmlab.objectives import MaskedToken, NextToken
from llmlab.optim import AdamW, Constant
from llmlab.sharding import Mesh
from llmlab.sharding.rules import DEFAULT_RULES
from llmlab.training.config import Train
from llmlab.training.program import Program, chunk

ONE: dict[str, int] = dict.fromkeys(("pipeline", "data", "fsdp", "expert", "sequence", "tensor"), 1)


def test_a_device_scores_as_many_positions_at_once_whatever_it_shares_a_batch_with() -> None:
    for platform, vocab_size in (("cpu", 8192), ("cpu", 50_000), ("tpu", 32_000)):
        alone = chunk(4, vocab_size, platform, DEFAULT_RULES, ONE)
        for axis in ("data", "fsdp", "expert"):
            assert chunk(4 * 8, vocab_size, platform, DEFAULT_RULES, ONE | {axis: 8}) == alone
        assert chunk(4, vocab_size, platform, DEFAULT_RULES, ONE | {"sequence": 8}) >= 8 * (alone - 1)
    # Where each device scores half of the vocabulary, twice as many fit.
    assert chunk(4, 2 * 32_000, "tpu", DEFAULT_RULES, ONE | {"tensor": 2}) == chunk(
        4, 32_000, "tpu", DEFAULT_RULES, ONE
    )


def test_chunks_that_the_objective_asks_for_stand() -> None:
    assert NextToken(chunk=3).chunked(lambda: 7) == NextToken(chunk=3)
    assert MaskedToken().chunked(lambda: 7) == MaskedToken(chunk=7)
    assert Distill(teacher="runs/teacher").chunked(lambda: 7) == Distill(
        teacher="runs/teacher", base=NextToken(chunk=7)
    )


def test_on_many_devices_the_heads_gradient_is_summed_once_and_not_once_a_chunk() -> None:
    vocab_size, rows, length = 8192, 8, 64
    config = gpt2(embed_dim=8, num_layers=1, num_heads=1, max_length=length, vocab_size=vocab_size)
    tokens = np.zeros((rows, length), np.int32)
    batch = {"input_ids": tokens, "labels": tokens}
    train = Train(steps=2, batch_size=rows, sequence_length=length)
    assert chunk(rows, vocab_size, "cpu", DEFAULT_RULES, ONE) < length, "one device would have several"

    def loops(placement: Any) -> int:
        program = Program.build(config, NextToken(), AdamW(peak_lr=1e-3, schedule=Constant()), placement, train, batch)
        return program.step.lower(program.state, program.batch, program.scalars).as_text().count("stablehlo.while")

    one, eight = Mesh().build(jax.devices()[:1]), Mesh(data=8).build(jax.devices())
    assert loops(eight) < loops(one)
