"""Linformer as a whole model against the paper's equations in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import linformer
from llmlab.models.encoder import Encoder
from llmlab.nn.module import merge
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
    softmax,
)

VOCAB, DIM, HEADS, LENGTH = 23, 8, 2, 9


def config(sharing: Any = "headwise") -> Encoder:
    return linformer.linformer(
        embed_dim=DIM,
        num_layers=2,
        num_heads=HEADS,
        hidden_dim=12,
        max_length=12,
        projected=4,
        sharing=sharing,
        vocab_size=VOCAB,
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (3, LENGTH)
    mask = np.array([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7], np.int32)
    labels = np.where((mask == 1) & (rng.random(shape) < 0.7), rng.integers(0, VOCAB, shape), -100)
    return {
        "input_ids": rng.integers(0, VOCAB, shape).astype(np.int32),
        "token_type_ids": rng.integers(0, 2, shape).astype(np.int32),
        "attention_mask": mask,
        "labels": labels.astype(np.int32),
    }


def attention(params: Any, x: np.ndarray, mask: np.ndarray, sharing: str) -> np.ndarray:
    """One row."""
    q, k, v = (projected(params[name], x) for name in ("query", "key", "value"))
    e = params["mix_keys"]
    f = e if sharing == "key-value" else params["mix_values"]
    o = np.zeros(q.shape)
    for n in range(HEADS):
        e_n, f_n = (mix[n] if sharing == "none" else mix for mix in (e, f))
        real = np.flatnonzero(mask)
        mixed_k, mixed_v = e_n[:, real] @ k[real, n], f_n[:, real] @ v[real, n]
        o[:, n] = softmax(q[:, n] @ mixed_k.T / math.sqrt(DIM // HEADS)) @ mixed_v
    return joined(params["output"], o)


def equations(params: Any, inputs: dict[str, np.ndarray], sharing: str) -> np.ndarray:
    embedding, head = params["embedding"], params["head"]
    table = embedding["tokens"]["table"]
    x = table[inputs["input_ids"]] + embedding["position"]["table"][:LENGTH]
    x = x + embedding["segments"]["types"]["table"][inputs["token_type_ids"]]
    x = layer_norm(embedding["norm"], x, 1e-12)
    for number in range(2):
        p = layer(params, number)
        mixed = [attention(p["mixer"], x[b], inputs["attention_mask"][b], sharing) for b in range(len(x))]
        x = layer_norm(p["mixer_branch"]["norm_sum"], x + np.stack(mixed), 1e-12)
        x = layer_norm(p["ffn_branch"]["norm_sum"], x + mlp(p["ffn"], x), 1e-12)
    x = gelu(x @ head["transform"]["dense"]["kernel"] + head["transform"]["dense"]["bias"])
    return layer_norm(head["transform"]["norm"], x, 1e-12) @ table.T + head["bias"]


@pytest.mark.parametrize("sharing", ["headwise", "none"])
def test_the_model_is_the_equations(sharing):
    inputs = batch()
    model = randomised(built(config(sharing)))
    assert_model_is_its_equations(
        model, inputs, lambda params: equations(params, inputs, sharing), inputs["attention_mask"] == 1
    )


def test_flops_are_those_of_the_program():
    model = config()
    graphdef, params, _ = model.abstract()
    ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    counted = count(lambda p, ids: merge(graphdef, p)(ids).logits, params, ids).matmul_flops
    assert counted == model.flops({"input_ids": (2, LENGTH)}, training=False)


def test_packed_rows_are_refused():
    with pytest.raises(ValueError, match="would mix the documents"):
        config().build(nnx.Rngs(0))(jnp.zeros((1, 4), jnp.int32), segment_ids=jnp.ones((1, 4), jnp.int32))


def test_presets_have_the_sizes_of_the_paper():
    base, fewer = linformer.preset("base-k256"), linformer.preset("base-k128")
    assert base.num_parameters() - fewer.num_parameters() == 12 * 128 * 512  # one projection a layer
