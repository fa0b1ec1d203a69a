"""The FLOP formula of a model's config equals what its program computes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmlab.models.config import Transformer
from llmlab.models.gpt2 import gpt2
from llmlab.models.llama import llama
from llmlab.nn.attention import Attention
from llmlab.nn.module import Params, merge
from llmlab.nn.stack import Execution
from llmlab.plan.cost import count

BATCH, LENGTH, VOCAB = 2, 24, 40
MODELS = {
    "gpt2": gpt2(embed_dim=12, num_layers=3, num_heads=2, max_length=LENGTH, vocab_size=VOCAB),
    "llama": llama(embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=20, vocab_size=VOCAB),
}


@pytest.fixture(autouse=True)
def rotary_without_its_identity_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU the rotary table goes through a product with the identity, which only keeps XLA from computing cosines
    again (see nn/positions.py); it is no arithmetic of the model."""
    monkeypatch.setattr("llmlab.nn.positions.platform", lambda: "tpu")


def program(model: Transformer, execution: Execution) -> tuple[Callable[[Params, Any], jax.Array], Params, Any]:
    """Forward pass, its abstract parameters and its abstract input, with the kernel that computes every score."""
    block = model.pattern[0]
    assert isinstance(block.mixer, Attention)
    reference = replace(block, mixer=replace(block.mixer, kernel="reference"))
    graphdef, params, _ = replace(model, pattern=(reference,), execution=execution).abstract()

    def forward(params: Params, input_ids: jax.Array) -> jax.Array:
        return merge(graphdef, params)(input_ids).logits

    return forward, params, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)


def gradient(forward: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Any], Params]:
    return jax.grad(lambda params, input_ids: jnp.sum(jnp.square(forward(params, input_ids))))


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("name", MODELS)
def test_the_formula_equals_the_count_of_the_program(name: str, mode: Any) -> None:
    model = MODELS[name]
    forward, params, ids = program(model, Execution(mode=mode))
    tokens = BATCH * LENGTH
    assert count(forward, params, ids).matmul_flops == tokens * model.flops_per_token(LENGTH, training=False)
    assert count(gradient(forward), params, ids).matmul_flops == tokens * model.flops_per_token(LENGTH)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_full_rematerialisation_computes_all_but_the_last_product_of_each_layer_again(mode: Any) -> None:
    model = MODELS["gpt2"]
    forward, params, ids = program(model, Execution(mode=mode, remat="full"))
    down, head = 2 * 48 * 12, 2 * 12 * VOCAB
    again = model.flops_per_token(LENGTH, training=False) - head - 3 * down
    assert count(gradient(forward), params, ids).matmul_flops == (
        BATCH * LENGTH * (model.flops_per_token(LENGTH) + again)
    )
