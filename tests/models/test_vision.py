"""The vision transformer: patches against a convolution, sizes and costs against published numbers and the program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models import vit
from llmlab.models.vision import (
    AttentionPooling,
    FirstToken,
    ImageClassification,
    MeanTokens,
    Pooler,
    Pooling,
    VisionTransformer,
    patchify,
)
from llmlab.nn.feed_forward import MLP
from llmlab.nn.module import merge, split
from llmlab.nn.norms import LayerNorm
from llmlab.plan.cost import count
from tests.drawing import built

TINY = vit.vit(embed_dim=12, num_layers=2, num_heads=3, image_size=6, patch_size=2, channels=2, hidden_dim=20)
POOLINGS: dict[str, Pooling] = {
    "first": FirstToken(norm=LayerNorm()),
    "pooler": Pooler(dim=5),
    "mean": MeanTokens(),
    "attention": AttentionPooling(num_heads=2, ffn=MLP(hidden_dim=7), norm=LayerNorm()),
}
poolings = pytest.mark.parametrize("pooling", POOLINGS)


def tiny(pooling: str, **changes: Any) -> VisionTransformer:
    head = ImageClassification(num_labels=3)
    return dataclasses.replace(TINY, pooling=POOLINGS[pooling], head=head, **changes)


def images(*batch: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*batch, 6, 6, 2))


def test_the_patch_projection_is_a_convolution_whose_stride_is_its_size():
    model = built(TINY, 0)
    x = images(2)
    expected = jax.lax.conv_general_dilated(
        x, model.patches.kernel[...], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    expected = expected.reshape(2, 9, 12) + model.patches.bias[...]
    np.testing.assert_allclose(model.patches(patchify(x, TINY)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "published"),
    [  # the released checkpoints' own counts, with 1,000 classes
        ("ti16", 5_717_416),
        ("s16", 22_050_664),
        ("b16", 86_567_656),
        ("b32", 88_224_232),
        ("l16", 304_326_632),
        ("h14", 632_045_800),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, published):
    assert vit.preset(name).num_parameters() == published


@poolings
@pytest.mark.parametrize("class_token", [True, False])
def test_the_formula_equals_the_count_of_the_program(pooling, class_token):
    block = TINY.pattern[0]
    block = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, kernel="reference"))
    config = tiny(pooling, class_token=class_token, pattern=(block,))
    graphdef, params, _ = config.abstract()
    pixels = jax.ShapeDtypeStruct((3, 6, 6, 2), jnp.float32)
    shapes = {"pixel_values": pixels.shape}

    def forward(params: Any, pixel_values: jax.Array) -> jax.Array:
        return merge(graphdef, params)(pixel_values).logits

    assert count(forward, params, pixels).matmul_flops == config.flops(shapes, training=False)
    assert config.flops(shapes) == 3 * config.flops(shapes, training=False)
    assert config.num_tokens(shapes) == 3 * (9 + class_token)


def test_vit_flops_are_the_matmuls_written_out():
    config, d, tokens = vit.preset("b16"), 768, 197
    layer = 2 * (4 * d * d + 8 * d * d) + 2 * 2 * tokens * d
    expected = tokens * 12 * layer + 196 * 2 * (16 * 16 * 3) * d + 2 * d * 1000
    assert config.flops({"pixel_values": (5, 224, 224, 3)}, training=False) == 5 * expected
    assert abs(expected - 35.1e9) < 0.1e9  # 17.56 billion multiply-adds


@poolings
def test_the_loss_is_the_mean_over_counted_labels(pooling):
    model = built(tiny(pooling), 1)
    out = model(images(3), labels=jnp.array([2, -100, 0]))
    log_probs = np.asarray(jax.nn.log_softmax(out.logits))
    np.testing.assert_allclose(out.loss, -(log_probs[0, 2] + log_probs[2, 0]) / 2, rtol=1e-6)


def test_mean_tokens_is_the_mean_of_the_normalised_states():
    out = built(tiny("mean"), 1)(images(2))
    np.testing.assert_allclose(out.pooled, np.asarray(out.last_hidden_state).mean(1), rtol=1e-5, atol=1e-6)


def test_patches_are_told_apart_by_their_positions_only():
    """Permuting patches and position rows alike permutes the states: attention itself is blind to order."""
    model = built(dataclasses.replace(TINY, class_token=False), 2)
    x = images(1)
    swapped = x.at[:, 0:2, 0:2].set(x[:, 4:6, 2:4]).at[:, 4:6, 2:4].set(x[:, 0:2, 0:2])  # patches 0 and 7
    order = np.array([7, 1, 2, 3, 4, 5, 6, 0, 8])
    graphdef, params = split(model)
    params["position"]["table"] = params["position"]["table"][order]
    moved = merge(graphdef, params)(swapped).last_hidden_state
    np.testing.assert_allclose(moved, model(x).last_hidden_state[:, order], rtol=1e-4, atol=1e-5)
    assert not np.allclose(model(swapped).last_hidden_state, moved, atol=1e-3)


def test_dropout_is_active_with_a_key_only():
    config = vit.vit(embed_dim=12, num_layers=2, num_heads=3, image_size=6, patch_size=2, channels=2, dropout=0.5)
    model = built(config)
    once, again = model(images(1)).pooled, model(images(1)).pooled
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(model(images(1), key=jax.random.key(1)).pooled, once)


def test_a_vision_transformer_has_no_vocabulary():
    assert TINY.with_vocabulary(500) is TINY
    with pytest.raises(ValueError, match="no vocabulary"):
        dataclasses.replace(TINY, vocab_size=10)


def test_sizes_that_do_not_fit_are_refused():
    model = built(TINY, 0)
    with pytest.raises(ValueError, match="6 x 8 pixels of 2 channels"):
        model(jnp.zeros((1, 6, 8, 2)))
    with pytest.raises(ValueError, match="no head"):
        model(images(1), labels=jnp.array([1]))
    with pytest.raises(ValueError, match="patch_size=7 is not between 1 and image_size=6"):
        dataclasses.replace(TINY, patch_size=7)
    with pytest.raises(ValueError, match="needs a pooling"):
        dataclasses.replace(TINY, pooling=None, head=ImageClassification(num_labels=2))
    with pytest.raises(ValueError, match="num_labels=1"):
        ImageClassification(num_labels=1)
