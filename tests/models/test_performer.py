"""Performers as whole models against the paper's equations in float64."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models import performer
from llmlab.models.config import ModelConfig
from llmlab.nn.favor import orthogonal_features
from llmlab.nn.module import merge, split
from llmlab.objectives import NextToken
from llmlab.plan.cost import count
from tests.drawing import built
from tests.models.equations import (
    assert_model_is_its_equations,
    gelu,
    joined,
    layer,
    layer_norm,
    mlp,
    projected,
    randomised,
    sinusoids,
)

VOCAB, DIM, HEADS, LENGTH, FEATURES = 23, 8, 2, 10, 5
SIZES: dict[str, Any] = {"embed_dim": DIM, "num_layers": 2, "vocab_size": VOCAB}


def config(causal: bool, epsilon: float = 0.03) -> ModelConfig:
    """With an epsilon large enough to be seen, and chunks shorter than the row."""
    block = performer.block(num_heads=HEADS, hidden_dim=12, causal=causal, num_features=FEATURES)
    mixer: Any = block.mixer
    block = replace(block, mixer=replace(mixer, epsilon=epsilon, chunk=4))
    return (performer.decoder if causal else performer.encoder)(block, **SIZES)


def batch(causal: bool) -> dict[str, np.ndarray]:
    """Two documents in row 0; padding after row 1, before row 2."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    segments = np.array([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3, [0] * 2 + [1] * 8], np.int32)
    positions = np.array([[*range(4), *range(6)], [*range(LENGTH)], [0, 0, *range(8)]], np.int32)
    labels = np.where((segments > 0) & (rng.random(ids.shape) < 0.7), rng.integers(0, VOCAB, ids.shape), -100)
    return {
        "input_ids": ids,
        "attention_mask": (segments > 0).astype(np.int32),
        "segment_ids": segments,
        "position_ids": positions,
        "labels": labels.astype(np.int32),
    }


def attention(params: Any, x: np.ndarray, segments: np.ndarray, causal: bool, epsilon: float) -> np.ndarray:
    """One row."""
    w = orthogonal_features(0, HEADS, FEATURES, DIM // HEADS).astype(np.float64)
    q, k, v = (projected(params[name], x) for name in ("query", "key", "value"))
    q, k = q / (DIM // HEADS) ** 0.25, k / (DIM // HEADS) ** 0.25
    o = np.zeros(q.shape)
    for n in range(HEADS):
        for i in range(LENGTH):
            seen = [j for j in range(LENGTH) if segments[j] == segments[i] > 0 and (j <= i or not causal)]
            if seen:
                keys = k[seen, n]
                phi_q = np.exp(w[n] @ q[i, n] - q[i, n] @ q[i, n] / 2 - np.max(w[n] @ q[i, n])) + epsilon
                phi_k = np.exp(keys @ w[n].T - (keys**2).sum(-1)[:, None] / 2 - np.max(keys @ w[n].T)) + epsilon
                o[i, n] = (phi_k @ phi_q) @ v[seen, n] / np.sum(phi_k @ phi_q)
    return joined(params["output"], o)


def equations(params: Any, inputs: dict[str, np.ndarray], causal: bool, epsilon: float = 0.03) -> np.ndarray:
    table = params["embedding"]["tokens"]["table"]
    x = table[inputs["input_ids"]] + sinusoids(inputs["position_ids"], DIM)
    for number in range(2):
        p = layer(params, number)
        h = layer_norm(p["mixer_branch"]["norm_input"], x, 1e-5)
        x = x + np.stack(
            [attention(p["mixer"], h[b], inputs["segment_ids"][b], causal, epsilon) for b in range(len(x))]
        )
        x = x + mlp(p["ffn"], layer_norm(p["ffn_branch"]["norm_input"], x, 1e-5))
    x = layer_norm(params["final_norm"], x, 1e-5)
    if causal:
        return x @ table.T
    head = params["head"]
    x = gelu(x @ head["transform"]["dense"]["kernel"] + head["transform"]["dense"]["bias"])
    return layer_norm(head["transform"]["norm"], x, 1e-12) @ table.T + head["bias"]


@pytest.mark.parametrize("causal", [True, False])
def test_the_model_is_the_equations(causal):
    inputs = batch(causal)
    model = randomised(built(config(causal)))
    assert_model_is_its_equations(
        model, inputs, lambda params: equations(params, inputs, causal), inputs["attention_mask"] == 1
    )


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_the_program(causal):
    model = config(causal)
    graphdef, params, _ = model.abstract()
    for length in (4, 8):  # whole chunks
        ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
        counted = count(lambda p, ids: merge(graphdef, p)(ids).logits, params, ids).matmul_flops
        assert counted == model.flops({"input_ids": (2, length)}, training=False)


def test_the_objective_of_packed_rows_is_the_loss_of_a_call():
    graphdef, params = split(built(config(causal=True)))
    inputs = {name: jnp.asarray(value) for name, value in batch(True).items() if name != "attention_mask"}

    def losses(params: Any) -> Any:
        model = merge(graphdef, params)
        parts = NextToken().loss(model, inputs)
        return parts.total / parts.count, model(**inputs).loss

    ours, theirs = jax.jit(losses)(params)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_presets_have_the_sizes_of_the_paper():
    # 36 layers of 4 D^2 + 2 D F matrices, their biases, two norms; a table of 32 rows
    assert (
        performer.preset("proteins").num_parameters()
        == 36 * (4 * 512**2 + 2 * 512 * 1024 + 1024 + 512 + 4 * 512) + 2 * 512 + 32 * 512
    )
    with pytest.raises(ValueError, match="no preset is called 'large'; there are performer-nano"):
        performer.preset("large")
