"""Next-token cross-entropy against NumPy written from the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.outputs import Hidden
from llmlab.objectives import NextToken
from llmlab.objectives.cross_entropy import chunked_cross_entropy, cross_entropy
from tests.optimised import compiled

B, S, D, V = 3, 10, 6, 17


class LinearModel:
    """hidden = table[input_ids], logits = hidden @ head: what the objective asks of a model, and no more."""

    def __init__(self, params: dict[str, jax.Array]) -> None:
        self.params = params

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        return Hidden(states=self.params["table"][input_ids])

    def auxiliary_losses(self, auxiliary: Any) -> dict[str, jax.Array]:
        return {}

    def project(self, hidden: jax.Array) -> jax.Array:
        return (hidden @ self.params["head"]).astype(jnp.float32)


def make_params(dtype: Any = jnp.float32, scale: float = 1.0) -> dict[str, jax.Array]:
    key_table, key_head = jax.random.split(jax.random.key(0))
    params = {"table": jax.random.normal(key_table, (V, D)), "head": scale * jax.random.normal(key_head, (D, V))}
    return jax.tree.map(lambda p: p.astype(dtype), params)


def make_batch(masked: bool = True) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, S + 1))
    labels = tokens[:, 1:].copy()
    if masked:
        labels[0, 3:] = -100
        labels[2, ::2] = -100
    return {"input_ids": jnp.asarray(tokens[:, :-1], jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}


def by_hand(
    params: dict[str, Any], batch: dict[str, Any], smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[float, float, float, float]:
    """(objective, nll, correct, count), position by position in float64, from the definitions."""
    table, head = (np.asarray(params[name], np.float64) for name in ("table", "head"))
    labels, ids = np.asarray(batch["labels"]), np.asarray(batch["input_ids"])
    weights = np.asarray(batch.get("loss_mask", np.ones(labels.shape)), np.float64)
    objective = nll = correct = count = 0.0
    for b in range(labels.shape[0]):
        for s in range(labels.shape[1]):
            if labels[b, s] == -100:
                continue
            logits = table[ids[b, s]] @ head
            log_probs = logits - np.log(np.exp(logits).sum())
            target = np.full(V, smoothing / V)
            target[labels[b, s]] += 1 - smoothing
            w = weights[b, s]
            objective += w * (-(target * log_probs).sum() + z_loss * np.log(np.exp(logits).sum()) ** 2)
            nll += w * -log_probs[labels[b, s]]
            correct += w * (logits.argmax() == labels[b, s])
            count += w
    return objective, nll, correct, count


def numeric_gradient(params: dict[str, Any], batch: dict[str, Any], smoothing: float, z_loss: float) -> dict[str, Any]:
    """Central differences of the float64 definition."""
    wide = {name: np.asarray(p, np.float64) for name, p in params.items()}
    gradient = {name: np.zeros_like(p) for name, p in wide.items()}
    for name, p in wide.items():
        for index in np.ndindex(*p.shape):
            values = []
            for sign in (1, -1):
                moved = {**wide, name: p.copy()}
                moved[name][index] += sign * 1e-6
                values.append(by_hand(moved, batch, smoothing, z_loss)[0])
            gradient[name][index] = (values[0] - values[1]) / 2e-6
    return gradient


@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 100])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_sums_equal_the_definition_for_every_chunk(chunk: int | None, smoothing: float, z_loss: float) -> None:
    params, batch = make_params(), make_batch()
    objective = NextToken(label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    parts = jax.jit(lambda p: objective.loss(LinearModel(p), batch))(params)
    expected = by_hand(params, batch, smoothing, z_loss)
    found = (parts.total, parts.metrics["loss"], parts.metrics["accuracy"], parts.count)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert objective.count(batch) == expected[3]


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 1e-2)])
def test_gradient_equals_numeric_differentiation_of_the_definition(
    chunk: int | None, smoothing: float, z_loss: float
) -> None:
    params, batch = make_params(), make_batch()
    objective = NextToken(label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(LinearModel(p), batch).total))(params)
    expected = numeric_gradient(params, batch, smoothing, z_loss)
    for name in params:
        # 1e-5 absolute: central differences in float64 are good to about 1e-8, the float32 sums to 1e-6
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-4, atol=1e-5)


def test_gradient_equals_autodiff_of_the_unchunked_formula() -> None:
    params, batch = make_params(), make_batch()

    def plain(p: dict[str, jax.Array]) -> jax.Array:
        model = LinearModel(p)
        logits = model.project(model.hidden_states(batch["input_ids"]).states)
        return jnp.sum(cross_entropy(logits, batch["labels"], label_smoothing=0.1, z_loss=1e-3)[0])

    objective = NextToken(label_smoothing=0.1, z_loss=1e-3, chunk=4)
    gradient = jax.grad(lambda p: 3.0 * objective.loss(LinearModel(p), batch).total)(params)
    expected = jax.grad(lambda p: 3.0 * plain(p))(params)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5), gradient, expected)


def test_loss_mask_weighs_loss_and_count() -> None:
    params, batch = make_params(), make_batch()
    batch["loss_mask"] = jnp.asarray(np.random.default_rng(1).choice([0.0, 0.5, 1.0, 2.0], (B, S)), jnp.float32)
    parts = NextToken(chunk=4).loss(LinearModel(params), batch)
    expected = by_hand(params, batch)
    np.testing.assert_allclose(
        (parts.total, parts.metrics["loss"], parts.count), np.take(expected, [0, 1, 3]), rtol=1e-6
    )
    assert NextToken().count(batch) == parts.count


def test_uncounted_positions_have_no_gradient() -> None:
    params, batch = make_params(), make_batch()
    hidden = LinearModel(params).hidden_states(batch["input_ids"]).states
    project = LinearModel(params).project
    gradient = jax.grad(lambda h: chunked_cross_entropy(h, project, batch["labels"], chunk=4).total)(hidden)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), batch["labels"] != -100)


def test_a_batch_without_counted_tokens_has_zero_loss_and_gradient() -> None:
    params, batch = make_params(), make_batch()
    batch["labels"] = jnp.full_like(batch["labels"], -100)
    value, gradient = jax.value_and_grad(lambda p: NextToken().loss(LinearModel(p), batch).total)(params)
    assert value == 0
    assert not any(g.any() for g in jax.tree.leaves(gradient))


def test_large_logits_do_not_overflow() -> None:
    params, batch = make_params(scale=1e4), make_batch()
    value, gradient = jax.value_and_grad(lambda p: NextToken().loss(LinearModel(p), batch).total)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_gradients_have_their_parameters_type_and_follow_float32(dtype: Any) -> None:
    params, batch = make_params(dtype), make_batch()
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def gradient(p: dict[str, jax.Array]) -> Any:
        return jax.grad(lambda p: NextToken(chunk=3).loss(LinearModel(p), batch).total)(p)

    found, expected = gradient(params), gradient(wide)
    for name in params:
        assert found[name].dtype == dtype
        error = np.linalg.norm(np.asarray(found[name], np.float32) - expected[name])
        # a rounding of each logit and each product: 2^-8 in bfloat16, 2^-11 in float16
        assert error < 2 * float(jnp.finfo(dtype).eps) * np.linalg.norm(expected[name])


def test_float16_gradients_survive_a_large_vocabulary() -> None:
    # Each wrong token has probability 1/V = 8e-6: as it is, a subnormal float16 with 7 significant bits.
    vocab, scale = 120_000, 2.0**12
    head = jax.random.normal(jax.random.key(1), (4, vocab)).astype(jnp.float16)
    hidden = 0.1 * jax.random.normal(jax.random.key(2), (1, 2, 4)).astype(jnp.float16)
    labels = jnp.asarray([[5, 7]], jnp.int32)

    def gradient(head: jax.Array) -> jax.Array:
        def loss(h: jax.Array) -> jax.Array:
            return scale * chunked_cross_entropy(hidden.astype(h.dtype), lambda x: x @ h, labels).total

        return jax.grad(loss)(head)

    found, expected = np.asarray(gradient(head), np.float64), np.asarray(gradient(head.astype(jnp.float32)), np.float64)
    wrong = np.delete(np.arange(vocab), labels[0])  # the targets' columns are large and would hide the others
    error = np.linalg.norm((found - expected)[:, wrong]) / np.linalg.norm(expected[:, wrong])
    assert error < 2 * float(jnp.finfo(jnp.float16).eps)


def test_full_logits_are_never_held() -> None:
    length, dim, vocab = 512, 16, 4096
    labels = jnp.zeros((2, length), jnp.int32)
    shapes = jax.ShapeDtypeStruct((2, length, dim), jnp.float32), jax.ShapeDtypeStruct((dim, vocab), jnp.float32)

    def memory(chunk: int) -> int:
        def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return chunked_cross_entropy(hidden, lambda x: x @ head, labels, chunk=chunk).total

        analysis = compiled(jax.value_and_grad(total, argnums=(0, 1)), *shapes).memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    logits = 2 * length * vocab * 4
    assert memory(length) >= logits
    assert memory(length // 16) < logits / 4  # two arrays of a sixteenth of the logits, and the head's gradient


def test_settings_out_of_range_are_refused_with_the_value() -> None:
    for settings in ({"label_smoothing": 1.0}, {"z_loss": -1.0}, {"chunk": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            NextToken(**settings)  # pyright: ignore[reportArgumentType]  the values are what is tested


@pytest.mark.parametrize("tokens", [4, 256, 4096])
def test_float16_gradients_of_the_head_do_not_overflow_where_many_tokens_have_one_label(tokens: int) -> None:
    # All of them pull one column of the head in one direction: its gradient is a sum of as many terms of size one.
    head = 0.1 * jax.random.normal(jax.random.key(1), (8, 512))
    hidden = 1.0 + jax.random.normal(jax.random.key(2), (4, tokens // 4, 8))
    labels = jnp.full((4, tokens // 4), 7, jnp.int32)

    def gradients(dtype: Any) -> Any:
        def mean(h: jax.Array, w: jax.Array) -> jax.Array:
            low = w.astype(dtype)
            return chunked_cross_entropy(h.astype(dtype), lambda x: x @ low, labels).total / tokens

        return jax.grad(mean, (0, 1))(hidden, head)

    for found, expected in zip(gradients(jnp.float16), gradients(jnp.float32), strict=True):
        error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
        # Divided by the number of tokens they are near 2e-4 at 4,096: float16 has 8 bits left there.
        assert error < 0.01
