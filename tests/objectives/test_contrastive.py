"""InfoNCE against loops in float64; who is whose negative."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.outputs import Hidden
from llmlab.objectives import ImageTextContrastive, SentenceContrastive

B, S, D = 5, 4, 6
RNG = np.random.default_rng(2)


class Pairs:
    """Two towers whose embeddings are their inputs."""

    def __call__(self, *, pixel_values: jax.Array, input_ids: jax.Array, key: Any = None, **rest: Any) -> Any:
        images = pixel_values[:, 0, :, 0]
        texts = jnp.sin(input_ids.astype(jnp.float32))
        return SimpleNamespace(logits_per_image=3.0 * images @ texts.T, logit_scale=jnp.asarray(3.0))


def image_batch(real: list[int] | None = None) -> dict[str, jax.Array]:
    batch = {
        "pixel_values": jnp.asarray(RNG.normal(size=(B, 1, D, 1)), jnp.float32),
        "input_ids": jnp.asarray(RNG.integers(0, 9, (B, D)), jnp.int32),
    }
    return batch if real is None else batch | {"loss_mask": jnp.asarray(real, jnp.float32)}


def clip_by_hand(batch: dict[str, Any], real: list[int]) -> tuple[float, float, float]:
    """(loss, images that find their text, texts that find their image), one row at a time."""
    images = np.asarray(batch["pixel_values"], np.float64)[:, 0, :, 0]
    texts = np.sin(np.asarray(batch["input_ids"], np.float64))
    rows = [i for i in range(B) if real[i]]
    loss = found = sought = 0.0
    for i in rows:
        of_image = {j: 3.0 * images[i] @ texts[j] for j in rows}
        of_text = {j: 3.0 * images[j] @ texts[i] for j in rows}
        for scores in (of_image, of_text):
            loss += 0.5 * (math.log(sum(math.exp(s) for s in scores.values())) - scores[i])
        found += max(of_image, key=of_image.__getitem__) == i
        sought += max(of_text, key=of_text.__getitem__) == i
    return loss, found, sought


@pytest.mark.parametrize("real", [None, [1, 0, 1, 1, 0]])
def test_images_and_texts_are_told_apart_both_ways_among_the_real_rows(real: list[int] | None) -> None:
    batch, objective = image_batch(real), ImageTextContrastive()
    parts = objective.loss(Pairs(), batch)
    rows = real or [1] * B
    loss, found, sought = clip_by_hand(batch, rows)
    metrics = parts.metrics
    np.testing.assert_allclose((parts.total, metrics["loss"]), loss, rtol=1e-5)
    assert (metrics["image_accuracy"], metrics["text_accuracy"]) == (found, sought)
    np.testing.assert_allclose(metrics["logit_scale"] / parts.count, 3.0, rtol=1e-6)
    assert parts.count == objective.count(batch) == sum(rows)


def test_rows_that_are_none_change_nothing_and_have_no_gradient() -> None:
    batch = image_batch([1, 1, 1, 0, 0])

    def total(pixels: jax.Array) -> jax.Array:
        return ImageTextContrastive().loss(Pairs(), batch | {"pixel_values": pixels}).total

    pixels = batch["pixel_values"]
    gradient = jax.grad(total)(pixels)
    assert np.isfinite(gradient).all()
    assert gradient[:3].any()
    assert not gradient[3:].any()
    assert total(pixels.at[3:].set(1e3)) == total(pixels)


class Sentences:
    """States that depend on tokens and, as under dropout, on the key."""

    def hidden_states(self, *, input_ids: jax.Array, key: Any = None, **rest: jax.Array) -> Hidden:
        states = jnp.cos(input_ids[..., None] * jnp.arange(1.0, D + 1))
        if key is not None:
            states = states + 0.1 * jax.random.normal(key, states.shape)
        return Hidden(states=states)

    def auxiliary_losses(self, auxiliary: Any) -> dict[str, jax.Array]:
        return {"balance": jnp.asarray(0.5)}


def sentence_batch(pairs: bool) -> dict[str, jax.Array]:
    def text() -> dict[str, jax.Array]:
        lengths = RNG.integers(1, S + 1, B)
        return {
            "input_ids": jnp.asarray(RNG.integers(0, 9, (B, S)), jnp.int32),
            "attention_mask": jnp.asarray(np.arange(S) < lengths[:, None], jnp.int32),
        }

    batch = text() | {"loss_mask": jnp.asarray([1, 1, 1, 1, 0], jnp.float32)}
    return batch | ({f"pair_{name}": array for name, array in text().items()} if pairs else {})


def embedded(batch: dict[str, jax.Array], prefix: str, key: Any, pooling: str) -> np.ndarray:
    ids, mask = batch[f"{prefix}input_ids"], np.asarray(batch[f"{prefix}attention_mask"])
    states = np.asarray(Sentences().hidden_states(input_ids=ids, key=key).states, np.float64)
    vectors = []
    for b in range(B):
        if pooling == "first":
            vector = states[b, 0]
        else:
            vector = sum(states[b, s] for s in range(S) if mask[b, s]) / mask[b].sum()
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_sentence_is_told_from_the_others(pooling: Any, pairs: bool, training: bool) -> None:
    batch, key = sentence_batch(pairs), jax.random.key(7) if training else None
    objective = SentenceContrastive(temperature=0.5, pooling=pooling)
    parts = objective.loss(Sentences(), batch, key=key)
    keys = jax.random.split(key) if key is not None else (None, None)
    first = embedded(batch, "", keys[0], pooling)
    second = embedded(batch, "pair_" if pairs else "", keys[1], pooling)
    loss = right = 0.0
    for i in range(4):
        scores = [first[i] @ second[j] / 0.5 for j in range(4)]
        loss += math.log(sum(map(math.exp, scores))) - scores[i]
        right += scores[i] == max(scores)
    np.testing.assert_allclose(parts.metrics["loss"], loss, rtol=1e-5)
    assert parts.metrics["accuracy"] == right
    assert parts.count == objective.count(batch) == 4
    np.testing.assert_allclose(parts.total, loss + 4 * 0.5, rtol=1e-5)  # the layers' own term


def test_a_temperature_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature=0"):
        SentenceContrastive(temperature=0.0)
