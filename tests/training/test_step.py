"""The train step against an independent one, and against itself cut up in every way that must not matter."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmlab.nn.module import logical_axes, merge, split
from llmlab.objectives import NextToken
from llmlab.optim import SGD, AdamW, Linear, Optimizer
from llmlab.sharding import Mesh
from llmlab.sharding.memory import check_host_memory
from llmlab.training.state import Layout, LossScale, TrainState, new_state
from llmlab.training.step import batch_shardings, make_evaluate_step, make_train_step

Batch = dict[str, np.ndarray]

# Float32 sums in another order: a few units in the last place (6e-8 each).
SAME = {"rtol": 1e-5, "atol": 1e-7}


def assert_equal_trees(found: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=rtol, atol=atol), found, expected)


def plain_loss(graphdef: Any, params: Any, batch: Batch) -> jax.Array:
    """Mean of the cross-entropy over the counted tokens, by jax.nn.log_softmax on full logits."""
    model = merge(graphdef, params)
    logits = model.project(model.hidden_states(batch["input_ids"]).states)
    counted = batch["labels"] != -100
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.where(counted, batch["labels"], 0)[..., None], -1)
    return -jnp.sum(picked[..., 0] * counted) / counted.sum()


def train(
    model: Any,
    batches: list[Batch],
    *,
    mesh: Mesh | None = None,
    optimizer: Optimizer | None = None,
    offload: bool = False,
    **settings: Any,
) -> tuple[TrainState, list[dict[str, float]]]:
    """The state and metrics after a step on each batch."""
    graphdef, params = split(model)
    transformation = (optimizer or AdamW(peak_lr=1e-2)).build(logical_axes(model), total_steps=10)
    precision, ema = settings.get("precision", "float32"), "ema_decay" in settings
    state = new_state(params, transformation, precision=precision, ema=ema)
    if mesh is not None:
        built = mesh.build(jax.devices())
        layout = Layout.of(state, logical_axes(model), built, offload_optimizer=offload)
        state = jax.device_put(state, layout.state)
        where = batch_shardings(batches[0], built)
        batches = [jax.device_put(batch, where) for batch in batches]
        settings |= {"placement": built, "layout": layout, "where": where}
    step = make_train_step(graphdef, NextToken(), transformation, **settings)
    metrics = []
    for batch in batches:
        state, numbers = step(state, batch)
        metrics.append({name: float(value) for name, value in numbers.items()})
    return state, metrics


def test_a_step_equals_plain_gradient_descent_on_the_mean_over_counted_tokens(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch()
    graphdef, params = split(make_model())
    loss, gradient = jax.value_and_grad(lambda p: plain_loss(graphdef, p, batch))(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    state, (metrics,) = train(make_model(), [batch], optimizer=SGD(peak_lr=0.1, clip_norm=None))
    assert_equal_trees(state.params, expected, **SAME)
    np.testing.assert_allclose([metrics["train/loss"], metrics["gradient_norm"]], [loss, norm], rtol=1e-6)
    assert metrics["learning_rate"] == np.float32(0.1)
    assert int(state.step) == 1


@pytest.mark.parametrize("accumulation", [2, 4, 16])
def test_accumulated_gradient_equals_full_batch_when_rows_count_different_numbers_of_tokens(
    accumulation: int, make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    sgd = SGD(
        peak_lr=0.5, clip_norm=None
    )  # not Adam, whose first update is the gradient's sign and would hide a wrong scale
    whole, metrics = train(make_model(), batches, optimizer=sgd)
    parts, metrics_of_parts = train(make_model(), batches, optimizer=sgd, accumulation=accumulation)
    assert_equal_trees(parts.params, whole.params, **SAME)
    assert_equal_trees(metrics_of_parts, metrics, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sharded_training_equals_one_device_averages_and_dropout_included(
    accumulation: int, make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    settings = {"accumulation": accumulation, "ema_decay": 0.9, "seed": 3}
    sharded, metrics = train(make_model(0.2), batches, mesh=Mesh(data=4, fsdp=2), **settings)
    single, expected = train(make_model(0.2), batches, **settings)
    assert_equal_trees(metrics, expected, rtol=1e-5)
    assert_equal_trees(sharded, single, **SAME)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_an_offloaded_optimizer_state_waits_in_the_hosts_memory_and_gives_the_same_bits(
    precision: str, make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    settings: dict[str, Any] = {"mesh": Mesh(data=2, fsdp=4), "precision": precision}
    here, metrics = train(make_model(), batches, **settings)
    there, metrics_there = train(make_model(), batches, offload=True, **settings)
    assert metrics_there == metrics
    jax.tree.map(np.testing.assert_array_equal, there, here)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.optimizer_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there.params)} == {"device"}


def test_offloading_where_there_is_no_memory_for_it_is_the_users_error() -> None:
    class Device:
        device_kind = "abacus"

        def addressable_memories(self) -> list[Any]:
            return []

    with pytest.raises(ValueError, match=r"offload_optimizer needs memory of kind 'pinned_host', which abacus.* none"):
        check_host_memory([Device()], "train.offload_optimizer")


def test_dropout_is_active_and_differs_between_steps_and_seeds(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch()
    still = SGD(peak_lr=1e-30)  # the parameters stay, so that only dropout can change the loss

    def losses(rate: float, seed: int) -> list[float]:
        return [m["train/loss"] for m in train(make_model(rate), [batch, batch], optimizer=still, seed=seed)[1]]

    assert len({*losses(0.2, 0), *losses(0.2, 1)}) == 4
    assert len({*losses(0.0, 0), *losses(0.0, 1)}) == 1


def test_parameters_and_their_moments_are_split_over_fsdp(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mesh = Mesh(fsdp=8, data=1).build(jax.devices())
    state = new_state(split(model)[1], AdamW(peak_lr=1e-2).build(logical_axes(model), 10), ema=True)
    state = jax.device_put(state, Layout.of(state, logical_axes(model), mesh).state)
    assert state.ema is not None
    moments = [tree for tree in state.optimizer_state.values() if isinstance(tree, dict)]
    assert len(moments) == 2
    for tree in (state.params, state.ema, *moments):
        assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in jax.tree.leaves(tree))
    assert state.optimizer_state["step"].sharding.is_fully_replicated


def test_averaged_parameters_follow_their_definition(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    average = split(make_model())[1]
    for count in range(3):
        params = train(make_model(), batches[: count + 1])[0].params
        decay = min(0.15, (1 + count) / (10 + count))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    assert_equal_trees(train(make_model(), batches, ema_decay=0.15)[0].ema, average, **SAME)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_keeps_float32_parameters_and_follows_float32_training(
    precision: str, make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    sgd = SGD(peak_lr=0.1, clip_norm=None)
    low, metrics = train(make_model(), batches, precision=precision, optimizer=sgd)
    full, expected = train(make_model(), batches, optimizer=sgd)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype("float32")}
    # a handful of roundings of 2^-8 (bfloat16) or 2^-11 each in a loss of about 3.5
    tolerance = 4 * float(jnp.finfo(precision).eps)
    for found, wanted in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(found["train/loss"], wanted["train/loss"], rtol=tolerance)
        np.testing.assert_allclose(found["gradient_norm"], wanted["gradient_norm"], rtol=tolerance)
    moved = jax.tree.map(lambda new, old: new - old, full.params, split(make_model())[1])
    error = optax.tree.norm(jax.tree.map(lambda a, b: a - b, low.params, full.params))
    assert error < 2 * tolerance * optax.tree.norm(moved)


def test_float16_skips_steps_that_overflow_and_halves_the_scale(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    graphdef, params = split(make_model())
    warmup = AdamW(peak_lr=1e-2, schedule=Linear(warmup_steps=5))
    optimizer = warmup.build(logical_axes(make_model()), 50)
    state = new_state(params, optimizer, precision="float16")
    assert state.loss_scale is not None
    # 2^40 overflows float16 whatever the gradient; 2^9 does not.
    state = replace(state, loss_scale=replace(state.loss_scale, scale=jnp.asarray(2.0**40, jnp.float32)))
    before = jax.tree.map(np.asarray, (state.params, state.optimizer_state))
    step = make_train_step(graphdef, NextToken(), optimizer, precision="float16")
    skipped = 0
    state, metrics = step(state, make_batch())
    while metrics["skipped"]:
        skipped += 1
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer_state), before)
        assert float(state.loss_scale.scale) == 2.0 ** (40 - skipped)
        state, metrics = step(state, make_batch(skipped))
    assert 5 < skipped < 40
    assert metrics["learning_rate"] == warmup.learning_rate(50)(0)  # skipped steps do not advance the schedule
    assert int(state.optimizer_state["step"]) == 1
    assert not np.array_equal(state.params["head"], before[0]["head"])


def test_float16_without_loss_scaling_loses_the_gradients_that_are_below_its_smallest_number(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    """Tiny's last two factors are made so small that what flows back through both is below 6e-8, but not what flows
    back times 2^15; each alone is a normal float16, so that nothing but the gradient is rounded."""
    graphdef, params = split(make_model())
    params["head"] = params["head"] * 1e-3
    params["scale"] = params["scale"] * 1e-4

    def moved(precision: str, **kind: Any) -> tuple[Any, TrainState]:
        optimizer = SGD(peak_lr=1e6, clip_norm=None).build(logical_axes(make_model()), 10)
        state = new_state(jax.tree.map(jnp.copy, params), optimizer, precision=precision, **kind)
        step = make_train_step(graphdef, NextToken(), optimizer, precision=precision)
        after, metrics = step(state, make_batch())
        assert ("loss_scale" in metrics) == (precision == "float16" and kind.get("loss_scaling") != "none")
        return jax.tree.map(lambda new, old: np.asarray(new - old), after.params, params), after

    full, _ = moved("float32")
    scaled, state = moved("float16")
    unscaled, without = moved("float16", loss_scaling="none")
    assert state.loss_scale is not None
    assert without.loss_scale is None
    assert np.abs(full["up"]).max() > 0
    np.testing.assert_array_equal(unscaled["up"], 0)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, scaled["up"], full["up"])) < 0.1 * optax.tree.norm(full["up"])


def test_loss_scale_doubles_after_enough_good_steps_and_never_falls_below_its_minimum() -> None:
    good, bad = jnp.asarray(True), jnp.asarray(False)
    scale = LossScale.initial()
    for _ in range(LossScale.GROWTH_INTERVAL - 1):
        scale = scale.after(good)
    assert float(scale.scale) == LossScale.INITIAL
    assert float(scale.after(good).scale) == 2 * LossScale.INITIAL
    assert int(scale.after(good).good_steps) == 0
    assert int(scale.after(bad).good_steps) == 0
    for _ in range(30):
        scale = scale.after(bad)
    assert float(scale.scale) == LossScale.MINIMUM


@pytest.mark.parametrize("accumulation", [1, 4])
def test_evaluation_sums_over_counted_tokens_without_dropout(
    accumulation: int, make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch()
    graphdef, params = split(make_model(0.5))
    parts = make_evaluate_step(graphdef, NextToken(), accumulation=accumulation)(params, batch)
    count = (batch["labels"] != -100).sum()
    assert parts.count == count
    np.testing.assert_allclose(parts.metrics["loss"], plain_loss(graphdef, params, batch) * count, rtol=1e-6)


def test_without_accumulation_there_is_no_loop(
    make_model: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    graphdef, params = split(make_model())
    optimizer = AdamW(peak_lr=1e-2).build(logical_axes(make_model()), 10)
    state = new_state(params, optimizer)
    step = make_train_step(graphdef, NextToken(), optimizer)
    assert "scan" not in str(jax.make_jaxpr(step)(state, make_batch()))
    assert "while" not in str(jax.make_jaxpr(step)(state, make_batch()))
