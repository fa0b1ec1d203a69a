"""CLIP, SigLIP and Gemma: sizes and costs against published numbers and the program, the loss against its equation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import clip, gemma, siglip
from llmlab.models.config import Untied
from llmlab.nn.config import Block
from llmlab.nn.module import merge, split
from llmlab.plan.cost import count

TINY = clip.CLIP(
    text=clip.clip_text(embed_dim=12, num_layers=2, num_heads=2, vocab_size=20, max_length=10),
    vision=clip.clip_vision(embed_dim=8, num_layers=1, num_heads=2, image_size=6, patch_size=2, channels=1),
    projection_dim=5,
)


def with_reference_kernel(block: Block) -> Block:
    mixer: Any = block.mixer
    return dataclasses.replace(block, mixer=dataclasses.replace(mixer, kernel="reference"))


def batch(texts: int, images: int) -> dict[str, jax.Array]:
    return {
        "input_ids": jax.random.randint(jax.random.key(0), (texts, 7), 0, 20),
        "pixel_values": jax.random.normal(jax.random.key(1), (images, 6, 6, 1)),
    }


def built(config: clip.CLIP) -> Any:
    return config.build(nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("config", "published"),
    [  # the released checkpoints' own counts
        (clip.preset("b32"), 151_277_313),
        (clip.preset("b16"), 149_620_737),
        (clip.preset("l14"), 427_616_513),
        (clip.preset("l14-336"), 427_944_193),
        (siglip.preset("b16-224"), 92_884_224),
        (siglip.preset("so400m-384"), 428_225_600),
        (gemma.preset("2b"), 2_506_172_416),
        (gemma.preset("7b"), 8_537_680_896),
    ],
    ids=str,
)
def test_presets_have_the_published_number_of_parameters(config, published):
    assert config.num_parameters() == published


def test_the_formula_equals_the_count_of_the_program():
    towers = {
        name: dataclasses.replace(tower, pattern=tuple(with_reference_kernel(block) for block in tower.pattern))
        for name, tower in (("text", TINY.text), ("vision", TINY.vision))
    }
    config = dataclasses.replace(TINY, **towers)
    graphdef, params, _ = config.abstract()
    inputs = batch(texts=3, images=2)
    shapes = {name: value.shape for name, value in inputs.items()}

    def forward(params: Any, inputs: Any) -> jax.Array:
        return merge(graphdef, params)(**inputs).logits_per_image

    assert count(forward, params, inputs).matmul_flops == config.flops(shapes, training=False)
    assert config.num_tokens(shapes) == 3 * 7 + 2 * 10


def test_the_loss_is_cross_entropy_over_rows_and_over_columns():
    graphdef, params = split(built(TINY))
    out = jax.jit(lambda params, inputs: merge(graphdef, params)(**inputs))(params, batch(texts=4, images=4))
    logits = np.asarray(out.image_embeds, np.float64) @ np.asarray(out.text_embeds, np.float64).T / 0.07
    np.testing.assert_allclose(out.logits_per_image, logits, rtol=1e-4, atol=1e-4)  # 2.6592 has five digits
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(out.loss, (rows.mean() + columns.mean()) / 2, rtol=1e-4)
    assert built(TINY)(**batch(texts=4, images=3)).loss is None


def test_a_text_is_pooled_at_its_end_token_and_what_follows_changes_nothing():
    model = built(dataclasses.replace(TINY, pooling=clip.EndToken(id=7)))
    ids = jnp.array([[1, 2, 7, 9, 9], [7, 3, 3, 7, 3]])
    after = ids.at[0, 3:].set(jnp.array([19, 7])).at[1, 1:].set(5)
    np.testing.assert_allclose(model.embed_text(ids), model.embed_text(after), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clip.HighestToken().index(ids), [3, 0])


def test_towers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"text\.vocab_size"):
        dataclasses.replace(TINY, vocab_size=10)
    with pytest.raises(ValueError, match="scores no tokens"):
        dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, head=Untied()))
    with pytest.raises(ValueError, match="set its pooling"):
        dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, pooling=None))
    without = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=None))
    assert without.with_vocabulary(200).text.vocab_size == 256
