"""PaliGemma: who sees whom, where images go, sizes and costs against published numbers and the program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models import paligemma
from llmlab.models.gemma import gemma
from llmlab.models.siglip import siglip
from llmlab.nn.module import merge
from llmlab.plan.cost import count
from tests.drawing import built

IMAGE = 20
TINY = paligemma.PaliGemma(
    vision=siglip(embed_dim=8, num_layers=1, num_heads=2, image_size=4, patch_size=2, channels=1, pooled=False),
    text=gemma(embed_dim=12, num_layers=2, num_heads=2, hidden_dim=20, num_kv_heads=1, head_dim=6, vocab_size=20),
    image_token_id=IMAGE,
)
IDS = jnp.array([[IMAGE] * 4 + [3, 5, 7, 9], [2, 8] + [IMAGE] * 4 + [6, 1]])
PIXELS = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
TYPES = jnp.array([[0] * 6 + [1, 1], [0] * 7 + [1]])


@pytest.fixture(scope="module")
def model() -> Any:
    return built(TINY)


def changed(model: Any, ids: jax.Array = IDS, pixels: jax.Array = PIXELS) -> np.ndarray:
    """Where the logits differ from those of the batch above."""
    before, after = (model(i, p, token_type_ids=TYPES).logits for i, p in ((IDS, PIXELS), (ids, pixels)))
    return np.asarray(jnp.max(jnp.abs(after - before), axis=-1) > 1e-6)


def test_the_published_model_has_the_published_number_of_parameters():
    assert paligemma.preset("3b-224").num_parameters() == 2_923_466_480


def test_image_and_prefix_see_each_other_and_the_suffix_what_is_before_it(model):
    seen = changed(model, pixels=PIXELS.at[1].add(1.0))
    np.testing.assert_array_equal(seen, [[False] * 8, [True] * 8])
    seen = changed(model, ids=IDS.at[0, 5].set(11))  # the end of the prefix
    np.testing.assert_array_equal(seen, [[True] * 8, [False] * 8])
    seen = changed(model, ids=IDS.at[0, 6].set(11))  # the suffix
    np.testing.assert_array_equal(seen, [[False] * 6 + [True] * 2, [False] * 8])


def test_states_of_patches_take_the_places_of_image_tokens_row_by_row():
    states = jnp.arange(16.0).reshape(2, 4, 2)
    x = paligemma.placed(jnp.full((2, 8, 2), -1.0), IDS == IMAGE, states)
    np.testing.assert_array_equal(x[0], [[0, 1], [2, 3], [4, 5], [6, 7]] + [[-1, -1]] * 4)
    np.testing.assert_array_equal(x[1], [[-1, -1]] * 2 + [[8, 9], [10, 11], [12, 13], [14, 15]] + [[-1, -1]] * 2)


def test_several_images_in_a_row_are_those_images_one_after_the_other(model):
    ids = jnp.array([[IMAGE] * 4 + [3] + [IMAGE] * 4 + [5]])
    out = model(ids, PIXELS[None])
    np.testing.assert_array_equal(out.logits, model(ids, PIXELS).logits)
    assert out.image_hidden_states.shape == (2, 4, 12)


def test_more_or_fewer_image_tokens_than_patches_are_refused(model):
    with pytest.raises(ValueError, match="7 image tokens and the images 8 patches"):
        model(IDS.at[0, 0].set(1), PIXELS)


def test_the_formula_equals_the_count_of_the_program(monkeypatch):
    # the product with the identity keeps XLA on CPU from computing cosines again and is no arithmetic of the model
    monkeypatch.setattr("llmlab.nn.positions.platform", lambda: "tpu")
    towers = {}
    for name, tower in (("vision", TINY.vision), ("text", TINY.text)):
        mixer: Any = dataclasses.replace(tower.pattern[0].mixer, kernel="reference")
        towers[name] = dataclasses.replace(tower, pattern=(dataclasses.replace(tower.pattern[0], mixer=mixer),))
    config = dataclasses.replace(TINY, **towers)
    graphdef, params, _ = config.abstract()
    inputs = {"input_ids": jnp.concatenate([IDS, IDS[:1]]), "pixel_values": jnp.concatenate([PIXELS, PIXELS[:1]])}
    shapes = {name: value.shape for name, value in inputs.items()}

    def forward(params: Any, inputs: Any) -> jax.Array:
        return merge(graphdef, params)(**inputs).logits

    assert count(forward, params, inputs).matmul_flops == config.flops(shapes, training=False)
    assert config.num_tokens(shapes) == 24
