"""Attention weights against softmaxes written out, and their sharpness at the two ends of its scale."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.interpret.attention import attention_weights, sharpness
from llmlab.models.llama import llama
from llmlab.nn.config import Context
from llmlab.nn.masks import Causal
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import ALiBi
from tests.drawing import built

CONFIG = llama(vocab_size=16, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=16)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)), jnp.int32)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], jnp.int32)


def with_mixer(**changes: Any) -> Any:
    block = CONFIG.pattern[0]
    return replace(CONFIG, pattern=(replace(block, mixer=replace(block.mixer, **changes)),))


def test_weights_are_the_softmax_of_scaled_products_of_positioned_queries_and_keys() -> None:
    model = built(with_mixer(position=ALiBi(), window=3, qk_norm=RMSNorm(), softcap=2.0))
    first, second = attention_weights(model, input_ids=IDS, segment_ids=SEGMENTS)
    assert first.shape == second.shape == (2, 2, 6, 6)
    layer: Any = next(model.stack.repeats.layers([nnx.split(block)[1] for block in model.stack.blocks]))
    h = layer.mixer_branch.norm_input(model.embedding.tokens(IDS))
    q, k = layer.mixer.norm_query(layer.mixer.query(h)), layer.mixer.norm_key(layer.mixer.key(h))
    slopes = layer.mixer.relative.slopes
    for row in range(2):
        for head in range(2):
            for s in range(6):
                seen = [t for t in range(6) if s - 3 < t <= s and SEGMENTS[row, t] == SEGMENTS[row, s]]
                if SEGMENTS[row, s] == 0:
                    continue  # padding: what it sees is nobody's business
                logits = np.array([float(q[row, s, head] @ k[row, t, 0]) * 4**-0.5 for t in seen])
                logits = 2 * np.tanh(logits / 2) - slopes[head] * np.array([s - t for t in seen])
                expected = np.zeros(6)
                expected[seen] = np.exp(logits) / np.exp(logits).sum()
                np.testing.assert_allclose(first[row, head, s], expected, rtol=1e-4, atol=1e-6)


def test_what_attention_gives_is_the_values_weighted_so_in_the_last_layer_too() -> None:
    model = built(CONFIG)
    weights = attention_weights(model, input_ids=IDS)
    layers: list[Any] = list(model.stack.repeats.layers([nnx.split(block)[1] for block in model.stack.blocks]))
    context = Context(mask=Causal(), position_ids=jnp.broadcast_to(jnp.arange(6), (2, 6)))
    x, _, _ = layers[0](model.embedding.tokens(IDS), context)
    h = layers[1].mixer_branch.norm_input(x)
    v = layers[1].mixer.value(h)
    mixed = layers[1].mixer.output(jnp.einsum("BNST,BTH->BSNH", weights[1], v[:, :, 0]))
    np.testing.assert_allclose(layers[1].mixer(h, context)[0], mixed, rtol=1e-4, atol=1e-6)


def test_equal_weights_have_entropy_one_and_a_single_key_saturates() -> None:
    seen = jnp.broadcast_to(jnp.arange(1.0, 7.0), (2, 6))
    equal = jnp.tril(jnp.ones((6, 6))) / jnp.arange(1.0, 7.0)[:, None]
    spread = sharpness([jnp.broadcast_to(equal, (2, 3, 6, 6))], seen)
    assert (spread.entropy, spread.saturated) == (pytest.approx(1.0, abs=1e-6), 0.0)
    one = sharpness([jnp.broadcast_to(jnp.eye(6), (2, 3, 6, 6))], seen)
    assert (one.entropy, one.saturated) == (pytest.approx(0.0, abs=1e-6), 1.0)
    both = sharpness([jnp.broadcast_to(w, (2, 3, 6, 6)) for w in (equal, jnp.eye(6))], seen)
    assert (both.entropy, both.saturated) == (pytest.approx(0.5, abs=1e-6), 0.5)


def test_layers_that_cannot_be_looked_at_are_named() -> None:
    block = CONFIG.pattern[0]
    with pytest.raises(ValueError, match="3 layers are no whole number of patterns of 2 blocks"):
        attention_weights(
            replace(CONFIG, num_layers=3, pattern=(block, block)).build(nnx.Rngs(params=0)), input_ids=IDS
        )
    with pytest.raises(ValueError, match="no query sees two keys"):
        sharpness([jnp.ones((1, 1, 1, 1))], jnp.ones((1, 1)))
