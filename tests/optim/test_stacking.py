"""Layers stored stacked get the update that they get stored apart; the state is split over devices like parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from llmlab.optim import LAMB, SGD, Adafactor, Adam, AdamW, Cosine, Group, Lion, Momentum, Muon, Nesterov, Optimizer
from llmlab.optim.parameters import Parameter
from llmlab.optim.transformation import state_axes
from tests.selection import at_scale_but

LAYERS, STEPS = 3, 5
SIZES = {"layers": LAYERS, "vocab": 20, "embed": 8, "heads": 2, "kv_heads": 1, "head_dim": 6, "mlp": 10, "experts": 2}
LAYER: dict[str, Any] = {
    "mixer": {
        "query": {"kernel": ("embed", "heads", "head_dim"), "bias": ("heads", "head_dim")},
        "key": {"kernel": ("embed", "kv_heads", "head_dim")},
        "output": {"kernel": ("heads", "head_dim", "embed")},
    },
    "ffn": {"up": {"kernel": ("embed", "mlp")}, "down": {"kernel": ("mlp", "embed")}},
    "experts": {"kernel": ("experts", "embed", "mlp")},
    "norm": {"scale": ("embed",)},
    "gain": {"scale": ()},
}
OUTSIDE: dict[str, Any] = {
    "embedding": {"table": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab")},
}

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(peak_lr=0.1, weight_decay=0.1),
    "momentum": Momentum(peak_lr=0.1),
    "nesterov": Nesterov(peak_lr=0.1),
    "adam": Adam(peak_lr=0.1),
    "adamw": AdamW(peak_lr=0.1, schedule=Cosine(warmup_steps=2)),
    "lamb": LAMB(peak_lr=0.1),
    "lion": Lion(peak_lr=0.1),
    "adafactor": Adafactor(peak_lr=0.1, min_dim_to_factor=4, clip_threshold=0.5),
    "adafactor with momentum": Adafactor(peak_lr=0.1, min_dim_to_factor=8, beta=0.9, weight_decay=0.1),
    "muon": Muon(peak_lr=0.1),
    "muon as by jordan": Muon(peak_lr=0.1, update_rms=None, nesterov=False, adamw_lr=0.1),
    "groups": AdamW(
        peak_lr=0.1,
        groups=(Group(match="*.ffn", frozen=True), Group(match="*.query.kernel", lr_multiplier=2.0, weight_decay=0.0)),
    ),
}


def is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


STACKED_AXES = {"layers": jax.tree.map(lambda axes: ("layers", *axes), LAYER, is_leaf=is_axes), **OUTSIDE}
SEPARATE_AXES = {**{f"layer_{i}": LAYER for i in range(LAYERS)}, **OUTSIDE}


def draw(seed: int) -> dict[str, Any]:
    """Random stacked arrays; each layer at a scale of its own, so that a norm over all layers would differ."""
    random = np.random.default_rng(seed)

    def one(axes: tuple[str, ...]) -> jax.Array:
        x = random.normal(size=[SIZES[name] for name in axes])
        if axes[:1] == ("layers",):
            x = x * np.geomspace(0.1, 10, LAYERS).reshape(-1, *(1 for _ in axes[1:]))
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(one, STACKED_AXES, is_leaf=is_axes)


def apart(stacked: dict[str, Any]) -> dict[str, Any]:
    """The same numbers with one subtree per layer."""
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], stacked["layers"]) for i in range(LAYERS)}
    return {**layers, **{name: stacked[name] for name in OUTSIDE}}


def assert_close(left: Any, right: Any, name: str) -> None:
    """Equal but for the order in which sums over a matrix, a batch of matrices, or devices are added."""
    # Newton-Schulz enlarges an ulp in a small singular value up to 3.4^5 times.
    tolerance = 2e-5 if "muon" in name else 1e-6

    def one(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))

    jax.tree.map(one, left, right)


@pytest.mark.parametrize("name", at_scale_but(("adamw", "lamb", "adafactor", "muon", "groups"), OPTIMIZERS))
def test_stacked_layers_are_updated_as_separate_layers(name: str) -> None:
    results = []
    for axes, arrange in ((STACKED_AXES, lambda tree: tree), (SEPARATE_AXES, apart)):
        transformation = OPTIMIZERS[name].build(axes, STEPS)
        params = arrange(draw(0))
        state = transformation.init(params)
        update = jax.jit(transformation.update)
        steps = []
        for k in range(STEPS):
            updates, state = update(arrange(draw(k + 1)), state, params)
            params = optax.apply_updates(params, updates)
            steps.append(params)
        results.append(steps)
    for stacked, separate in zip(*results, strict=True):
        assert_close(apart(stacked), separate, name)


@pytest.mark.scale
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "groups"])
def test_stacked_experts_are_updated_as_separate_matrices(name: str) -> None:
    """(layers, experts, embed, mlp) as layers x experts matrices (embed, mlp)."""
    stacked: dict[str, Any] = {"up": {"kernel": ("layers", "experts", "embed", "mlp")}}
    separate = {f"{i}": {"kernel": ("embed", "mlp")} for i in range(LAYERS * SIZES["experts"])}
    shape = [SIZES[axis] for axis in stacked["up"]["kernel"]]

    def draw(seed: int) -> jax.Array:
        scales = np.geomspace(0.1, 10, LAYERS * SIZES["experts"]).reshape(LAYERS, -1, 1, 1)
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scales, jnp.float32)

    def apart(x: jax.Array) -> dict[str, Any]:
        return {f"{i}": {"kernel": matrix} for i, matrix in enumerate(x.reshape(-1, *shape[2:]))}

    results = []
    for axes, arrange in ((stacked, lambda x: {"up": {"kernel": x}}), (separate, apart)):
        transformation = OPTIMIZERS[name].build(axes, STEPS)
        params = arrange(draw(0))
        state, update = transformation.init(params), jax.jit(transformation.update)
        for k in range(STEPS):
            updates, state = update(arrange(draw(k + 1)), state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    assert_close(apart(results[0]["up"]["kernel"]), results[1], name)


def test_layers_change_the_update_where_they_are_taken_for_one_matrix() -> None:
    """The test above can fail: without the name, LAMB and Adafactor mix layers."""
    unnamed = jax.tree.map(lambda axes: tuple(a.replace("layers", "mlp") for a in axes), STACKED_AXES, is_leaf=is_axes)
    for name in ("lamb", "adafactor"):
        updates = []
        for axes in (STACKED_AXES, unnamed):
            transformation = OPTIMIZERS[name].build(axes, STEPS)
            updates.append(jax.jit(transformation.update)(draw(1), transformation.init(draw(0)), draw(0))[0])
        up = [np.asarray(tree["layers"]["ffn"]["up"]["kernel"]) for tree in updates]
        assert np.abs(up[0] - up[1]).max() > 0.1 * np.abs(up[0]).max()


@pytest.mark.parametrize(
    ("axes", "dims"),
    [
        (("embed", "mlp"), ((0,), (1,))),
        (("layers", "mlp", "embed"), ((1,), (2,))),
        (("layers", "embed", "heads", "head_dim"), ((1,), (2, 3))),
        (("layers", "heads", "head_dim", "embed"), ((1, 2), (3,))),
        (("layers", "experts", "embed", "mlp"), ((2,), (3,))),
        (("latent", "kv_heads", "head_dim"), ((0,), (1, 2))),
        (("heads", "head_dim", "latent"), ((0, 1), (2,))),
        (("layers", "embed"), None),
        (("width", "inner", "outer"), None),
    ],
)
def test_names_tell_rows_from_columns(axes: tuple[str, ...], dims: Any) -> None:
    assert Parameter("a.kernel", axes).matrix_dims == dims


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_array_is_named_like_the_parameter_it_belongs_to(name: str) -> None:
    params = draw(0)
    state: Any = OPTIMIZERS[name].build(STACKED_AXES, STEPS).init(params)
    names = state_axes(state, STACKED_AXES)
    arrays = jax.tree_util.tree_leaves_with_path(state)
    named = jax.tree_util.tree_leaves_with_path(names, is_leaf=is_axes)
    assert [path for path, _ in arrays] == [path for path, _ in named]
    for (path, array), (_, axes) in zip(arrays, named, strict=True):
        assert array.shape == tuple(SIZES[axis] for axis in axes), path
    # Nothing but the counters and the two metrics is left without names, besides the scalar gains.
    scalars = {path[-1].key for path, axes in named if axes == ()}
    assert scalars <= {"step", "count", "learning_rate", "gradient_norm"}


def test_adafactor_keeps_rows_and_columns_of_each_layer() -> None:
    state: Any = OPTIMIZERS["adafactor"].build(STACKED_AXES, STEPS).init(draw(0))
    names = state_axes(state, STACKED_AXES)
    query = ("layers", "mixer", "query", "kernel")
    for field, axes in (("rows", ("layers", "embed")), ("columns", ("layers", "heads", "head_dim"))):
        array, name = state[field], names[field]
        for key in query:
            array, name = array[key], name[key]
        assert name == axes
        assert array.shape == tuple(SIZES[axis] for axis in axes)


def test_frozen_parameters_have_no_state() -> None:
    state: Any = OPTIMIZERS["groups"].build(STACKED_AXES, STEPS).init(draw(0))
    assert "ffn" not in state["mu"]["layers"]
    assert "mixer" in state["mu"]["layers"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.scale
def test_an_update_is_the_same_on_sharded_parameters(name: str) -> None:
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}

    def place(tree: Any, axes: Any) -> Any:
        def one(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
            spec = jax.sharding.PartitionSpec(*(rules.get(name) for name in names))
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

        return jax.tree.map(one, tree, axes)

    transformation = OPTIMIZERS[name].build(STACKED_AXES, STEPS)
    params, grads = draw(0), draw(1)
    state = transformation.init(params)
    alone = jax.jit(transformation.update)(grads, state, params)
    placed = place(grads, STACKED_AXES), place(state, state_axes(state, STACKED_AXES)), place(params, STACKED_AXES)
    together = jax.jit(transformation.update)(*placed)
    assert_close(alone, together, name)


@pytest.mark.scale
@pytest.mark.parametrize("name", ["sgd", "adafactor", "muon"])
def test_a_state_survives_a_checkpoint_bitwise(name: str, tmp_path: Any) -> None:
    transformation = OPTIMIZERS[name].build(STACKED_AXES, STEPS)
    params = draw(0)
    state: Any = transformation.update(draw(1), transformation.init(params), params)[1]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_state_can_be_donated(name: str) -> None:
    transformation = OPTIMIZERS[name].build(STACKED_AXES, STEPS)
    state: Any = transformation.init(draw(0))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_one_update_is_one_compiled_program_without_host_transfers() -> None:
    """The whole update traces: nothing in it needs a value."""
    for optimizer in OPTIMIZERS.values():
        transformation = optimizer.build(STACKED_AXES, STEPS)
        params = jax.eval_shape(lambda: draw(0))
        state = jax.eval_shape(transformation.init, params)
        updates, new_state = jax.eval_shape(transformation.update, params, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
