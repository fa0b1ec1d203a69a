"""Small models of every shape with dropout, their batches, and three steps of each on a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from llmlab.models import bert, gemma, paligemma, siglip, t5
from llmlab.models.config import ModelConfig, Transformer, Untied
from llmlab.models.heads import MaskedLM
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.module import split
from llmlab.nn.moe import MixtureOfExperts, TopK
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.stack import Execution
from llmlab.nn.wiring import PreNorm
from llmlab.objectives import MaskedToken, NextToken, Objective, SequenceToSequence
from llmlab.optim import SGD, Constant, Optimizer
from llmlab.sharding import Mesh
from llmlab.training.config import Train
from llmlab.training.precision import Precision
from llmlab.training.program import Program

ROWS, LENGTH, VOCAB = 16, 16, 64

Batch = dict[str, np.ndarray]


def packed(seed: int) -> Batch:
    """Rows of two documents, of different lengths, with padding at the end of some."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    cut, end = rng.integers(2, 9, (ROWS, 1)), rng.integers(11, LENGTH + 1, (ROWS, 1))
    at = np.arange(LENGTH)
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    counted = (segments > 0) & (at != cut - 1) & (at != end - 1)
    return {
        "input_ids": tokens[:, :-1].copy(),
        "labels": np.where(counted, tokens[:, 1:], -100).astype(np.int32),
        "segment_ids": segments,
        "position_ids": np.where(at < cut, at, at - cut).astype(np.int32),
    }


def masked(seed: int) -> Batch:
    """Padded rows of which a few tokens are to be told."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    real = np.arange(LENGTH) < rng.integers(9, LENGTH + 1, (ROWS, 1))
    hidden = real & (rng.random((ROWS, LENGTH)) < 0.3)
    return {
        "input_ids": np.where(hidden, 3, tokens).astype(np.int32),
        "attention_mask": real.astype(np.int32),
        "token_type_ids": (np.arange(LENGTH) > 6).astype(np.int32) * real.astype(np.int32),
        "labels": np.where(hidden, tokens, -100).astype(np.int32),
    }


def pairs(seed: int) -> Batch:
    """Sources and targets, the targets half as long."""
    rng = np.random.default_rng(seed)
    source = rng.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    target = rng.integers(1, VOCAB, (ROWS, LENGTH // 2)).astype(np.int32)
    real = np.arange(LENGTH) < rng.integers(7, LENGTH + 1, (ROWS, 1))
    counted = np.arange(LENGTH // 2) < rng.integers(3, LENGTH // 2 + 1, (ROWS, 1))
    return {
        "input_ids": source,
        "attention_mask": real.astype(np.int32),
        "decoder_input_ids": np.concatenate([np.zeros((ROWS, 1), np.int32), target[:, :-1]], 1),
        "decoder_attention_mask": counted.astype(np.int32),
        "labels": np.where(counted, target, -100).astype(np.int32),
    }


def pictures(seed: int) -> Batch:
    """Four patches of a picture in each row, and then text."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB - 1, (ROWS, LENGTH + 1)).astype(np.int32)
    image, prefix = np.arange(LENGTH) < 4, np.arange(LENGTH) < 6
    real = np.arange(LENGTH) < rng.integers(10, LENGTH + 1, (ROWS, 1))
    return {
        "input_ids": np.where(image, VOCAB - 1, tokens[:, :-1]).astype(np.int32),
        "pixel_values": rng.normal(size=(ROWS, 4, 4, 1)).astype(np.float32),
        "attention_mask": real.astype(np.int32),
        "token_type_ids": np.broadcast_to(~prefix, (ROWS, LENGTH)).astype(np.int32),
        "labels": np.where(real & ~prefix, tokens[:, 1:], -100).astype(np.int32),
    }


class Case(NamedTuple):
    """What is trained on what."""

    model: ModelConfig
    objective: Objective
    batch: Callable[[int], Batch]


def decoder(layers: int, ffn: Any, **execution: Any) -> Transformer:
    """Grouped queries, two heads of keys for four of queries."""
    block = Block(
        mixer=Attention(num_heads=4, num_kv_heads=2, position=Rotary(), dropout=0.1),
        ffn=ffn,
        norm=RMSNorm(),
        wiring=PreNorm(),
        dropout=0.1,
    )
    return Transformer(
        vocab_size=VOCAB,
        embed_dim=16,
        num_layers=layers,
        pattern=(block,),
        embedding_dropout=0.1,
        embedding_std=1.0,  # a norm right behind small embeddings makes their rounding large
        final_norm=RMSNorm(),
        head=Untied(),
        execution=Execution(mode="scan", **execution),  # one layer to compile
    )


MLP = GatedMLP(hidden_dim=32, activation="silu", dropout=0.1)
EXPERTS = MixtureOfExperts(num_experts=4, experts_per_token=2, expert=MLP, router=TopK(), z_loss=0.1)
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 4, "vocab_size": VOCAB}


def _scanned(model: Any) -> Any:
    return dataclasses.replace(model, execution=Execution(mode="scan"))


CASES: dict[str, Case] = {
    "decoder": Case(decoder(5, MLP), NextToken(), packed),
    "mixture": Case(decoder(2, EXPERTS), NextToken(), packed),
    "encoder": Case(
        _scanned(
            dataclasses.replace(
                bert.bert(**SMALL, num_layers=2, hidden_dim=32, max_length=LENGTH, dropout=0.1, embedding_std=1.0),
                pooler=None,
                head=MaskedLM(),
            )
        ),
        MaskedToken(),
        masked,
    ),
    "encoder-decoder": Case(
        _scanned(t5.t5(**SMALL, num_layers=2, head_dim=4, hidden_dim=32, gated=True, dropout=0.1, embedding_std=1.0)),
        SequenceToSequence(),
        pairs,
    ),
    "vision-language": Case(
        paligemma.PaliGemma(
            vision=_scanned(
                siglip.siglip(
                    embed_dim=16,
                    num_layers=2,
                    num_heads=4,
                    hidden_dim=32,
                    image_size=4,
                    patch_size=2,
                    channels=1,
                    pooled=False,
                )
            ),
            text=_scanned(
                gemma.gemma(**SMALL, num_layers=2, num_kv_heads=1, hidden_dim=32, head_dim=8, embedding_std=0.25)
            ),
            image_token_id=VOCAB - 1,
        ),
        NextToken(),
        pictures,
    ),
}


class Outcome(NamedTuple):
    """Of three steps, and of an evaluation after them."""

    params: Any
    metrics: list[dict[str, float]]
    evaluation: dict[str, float] | None


def program(
    case: Case,
    mesh: Mesh,
    num_devices: int,
    *,
    accumulation: int = 2,
    optimizer: Optimizer | None = None,
    precision: Precision = "float32",
) -> Program:
    """The steps of a case on the first devices."""
    return Program.build(
        case.model,
        case.objective,
        # Plain gradient descent: parameters are the gradients' sum, nothing is normalised away.
        optimizer or SGD(peak_lr=0.1, schedule=Constant(), clip_norm=None),
        mesh.build(jax.devices()[:num_devices]),
        Train(steps=3, batch_size=ROWS, sequence_length=LENGTH, accumulation=accumulation, seed=5, precision=precision),
        case.batch(0),
    )


@functools.cache
def initial(case: Case) -> Any:
    """Parameters before the first step: drawn once, since drawing them takes a program on every mesh."""
    draw = jax.jit(lambda key: split(case.model.build(nnx.Rngs(params=key)))[1])
    return jax.tree.map(np.asarray, draw(jax.random.key(5)))


def outcome(built: Program, case: Case, *, evaluate: bool = True) -> Outcome:
    """Of three steps and, where it is asked for, an evaluation."""
    state, metrics = built.initialise(lambda _: initial(case)), []
    for seed in range(3):
        state, numbers = built.train_step(state, built.place(case.batch(seed)))
        metrics.append({name: float(value) for name, value in numbers.items()})
    evaluation = None
    if evaluate:
        sums = built.evaluate_step(state.params, built.place(case.batch(9)))
        evaluation = {"total": float(sums.total), "count": float(sums.count)}
    return Outcome(jax.tree.map(np.asarray, state.params), metrics, evaluation)


@functools.cache
def on_one_device(name: str, accumulation: int = 2) -> Outcome:
    """What every mesh must equal."""
    case = CASES[name]
    return outcome(program(case, Mesh(), 1, accumulation=accumulation), case)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Within 1e-5 of the largest number of an array: sums in another order differ in the last place of their largest
    term, whatever the sum is."""
    close(found.metrics, expected.metrics, "metrics")
    if found.evaluation is not None:
        close(found.evaluation, expected.evaluation, "evaluation")
    leaves = jax.tree_util.tree_leaves_with_path(found.params)
    for (path, mine), exact in zip(leaves, jax.tree.leaves(expected.params), strict=True):
        close(mine, exact, jax.tree_util.keystr(path))


def close(found: Any, expected: Any, name: str) -> None:
    """The same within 1e-5 of the largest, or of 1e-3: biases of keys have no gradient but its rounding."""

    def one(found: Any, expected: Any) -> None:
        largest = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * largest, err_msg=name)

    jax.tree.map(one, found, expected)
