"""Flamingo: closed gates are the plain language model, tokens see the images they are told to, costs as counted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import clip, flamingo, llama
from llmlab.models.visual_decoder import VisualDecoder
from llmlab.nn.gated_cross import GatedBlock
from llmlab.nn.module import merge, split
from llmlab.nn.norms import LayerNorm
from llmlab.nn.perceiver import Resampler
from llmlab.plan.cost import count

RESAMPLER = Resampler(num_latents=3, num_layers=2, num_heads=2, head_dim=5, qk_norm=LayerNorm())
TINY = flamingo.flamingo(
    embed_dim=16,
    num_layers=4,
    num_heads=2,
    hidden_dim=20,
    interval=2,
    vision=clip.clip_vision(embed_dim=12, num_layers=1, num_heads=2, image_size=4, patch_size=2, channels=1),
    resampler=RESAMPLER,
    vocab_size=20,
    additional_tokens=2,
)
IDS = jax.random.randint(jax.random.key(0), (2, 6), 0, 22)
PIXELS = jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 1))
# Which images each token sees: row 0 none, then the first, then the second; row 1 all but the third.
SEES = jnp.array([[[0, 0, 0]] * 2 + [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2, [[1, 1, 0]] * 6])


def opened(config: VisualDecoder, gate: float = 0.7) -> Any:
    """The model with gates open: at first they are closed and images change nothing."""
    graphdef, params = split(config.build(nnx.Rngs(params=0)))

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, gate) if str(path[-1].key).startswith("gate_") else leaf

    return merge(graphdef, jax.tree_util.tree_map_with_path(one, params))


def test_closed_gates_are_the_language_model_without_images():
    model = dataclasses.replace(TINY, additional_tokens=0).build(nnx.Rngs(params=0))
    plain = llama.llama(embed_dim=16, num_layers=4, num_heads=2, hidden_dim=20, vocab_size=20, epsilon=1e-6)
    graphdef, _, _ = plain.abstract()
    own, params = split(model)
    layers = [params["stack"]["blocks"][str(i % 2)] for i in range(4)]
    parts = [
        {k: jax.tree.map(lambda x: x[i // 2], v) for k, v in layer.items() if k != "gated"}  # noqa: B023  called in this iteration
        for i, layer in enumerate(layers)
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
    text = {"embedding": params["embedding"], "final_norm": params["final_norm"], "head": params["head"]}
    ids = jnp.minimum(IDS, 19)
    ours = jax.jit(lambda params: merge(own, params)(ids, PIXELS).logits)(params)
    text |= {"stack": {"blocks": {"0": stacked}}}
    theirs = jax.jit(lambda params: merge(graphdef, params)(ids).logits)(text)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_token_sees_the_images_that_it_is_told_to_and_what_earlier_tokens_saw():
    model = opened(TINY)
    before = model(IDS, PIXELS, SEES).logits
    for image, row_0 in ((0, [False] * 2 + [True] * 4), (1, [False] * 4 + [True] * 2), (2, [False] * 6)):
        after = model(IDS, PIXELS.at[:, image].add(1.0), SEES).logits
        changed = np.asarray(jnp.max(jnp.abs(after - before), axis=-1) > 1e-6)
        np.testing.assert_array_equal(changed, [row_0, [image < 2] * 6])


def test_without_a_mask_every_token_sees_every_image():
    model = opened(TINY)
    np.testing.assert_allclose(
        model(IDS, PIXELS).logits, model(IDS, PIXELS, jnp.ones_like(SEES)).logits, rtol=1e-5, atol=1e-6
    )


def test_additional_tokens_have_rows_and_scores_of_their_own():
    model = opened(TINY)
    graphdef, params = split(model)
    extra = params["embedding"]["extra"]["table"]
    params["embedding"]["extra"]["table"] = extra.at[1].add(1.0)
    changed = merge(graphdef, params)(IDS.at[:, 0].set(21), PIXELS).logits
    assert changed.shape == (2, 6, 22)
    assert not np.allclose(changed, model(IDS.at[:, 0].set(21), PIXELS).logits, atol=1e-3)
    ids = jnp.minimum(IDS, 20)
    np.testing.assert_array_equal(merge(graphdef, params)(ids, PIXELS).logits, model(ids, PIXELS).logits)
    assert dataclasses.replace(TINY, vocab_size=None).with_vocabulary(130).vocab_size == 128


@pytest.mark.parametrize("resampler", [RESAMPLER, None])
def test_the_formula_equals_the_count_of_the_program(resampler, monkeypatch):
    # the product with the identity keeps XLA on CPU from computing cosines again and is no arithmetic of the model
    monkeypatch.setattr("llmlab.nn.positions.platform", lambda: "tpu")
    # every score, whatever the kernel on this platform skips
    monkeypatch.setattr("llmlab.nn.kernels.dispatch.choose", lambda *arguments: "reference")
    config = dataclasses.replace(TINY, resampler=resampler)
    graphdef, params, _ = config.abstract()
    inputs = {"input_ids": IDS, "pixel_values": PIXELS}
    shapes = {name: value.shape for name, value in inputs.items()}

    def forward(params: Any, inputs: Any) -> jax.Array:
        return merge(graphdef, params)(**inputs).logits

    assert count(forward, params, inputs).matmul_flops == config.flops(shapes, training=False)
    assert config.num_tokens(shapes) == 12


def test_sizes_that_do_not_fit_are_refused():
    block = TINY.pattern[0]
    assert isinstance(block, GatedBlock)
    narrow = dataclasses.replace(block, look=dataclasses.replace(block.look, memory_dim=8))
    with pytest.raises(ValueError, match=r"looks at states of width 8 and the vision tower gives 12"):
        dataclasses.replace(TINY, pattern=(narrow,))
    with pytest.raises(ValueError, match="additional_tokens=-1"):
        dataclasses.replace(TINY, additional_tokens=-1)
    with pytest.raises(ValueError, match="whole number of repeats"):
        flamingo.to_hf(dataclasses.replace(TINY, num_layers=3))


def test_the_published_sizes_are_those_that_their_names_say():
    assert abs(flamingo.preset("idefics-9b").num_parameters() / 9e9 - 1) < 0.02
    assert abs(flamingo.preset("idefics-80b").num_parameters() / 80e9 - 1) < 0.02


def test_a_config_of_the_first_release_with_attributes_that_nothing_reads_is_the_same_model():
    silent = {
        "cross_layer_activation_function": "swiglu",
        "ffn_dim": 64,
        "max_new_tokens": 128,
        "word_embed_proj_dim": 16,
        "freeze_text_layers": True,
        "alpha_initializer": "ones",
    }
    config = flamingo.to_hf(TINY)
    assert flamingo.from_hf(config | silent) == flamingo.from_hf(config)
    with pytest.raises(ValueError, match="cross_layer_activation_function='gelu'"):
        flamingo.from_hf(config | {"cross_layer_activation_function": "gelu"})
