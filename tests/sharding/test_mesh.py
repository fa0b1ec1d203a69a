"""The mesh and the rules, against hand-made answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llmlab.sharding import DEFAULT_RULES, Mesh, activate, shard, spec
from llmlab.sharding.mesh import AXES


def test_minus_one_takes_the_devices_that_are_left():
    assert Mesh(fsdp=2).resolve(8)["data"] == 4
    assert Mesh(data=2, fsdp=-1).resolve(8)["fsdp"] == 4
    assert Mesh(data=1).resolve(1) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"fsdp": 3}, 8, r"must be one of \[1, 2, 4, 8\]"),
        ({"data": 2, "fsdp": 2}, 8, "needs 4 devices and there are 8"),
    ],
)
def test_impossible_mesh_says_what_would_work(mesh, devices, message):
    with pytest.raises(ValueError, match=message):
        Mesh(**mesh).resolve(devices)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_meaningless_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        Mesh(**sizes)


SIZES = {"pipeline": 2, "data": 2, "fsdp": 4, "expert": 4, "sequence": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "heads", "head_dim"), (8, 4, 5), (("fsdp", "pipeline"), "tensor", None)),
        (("layers", "embed", "heads", "head_dim"), (6, 8, 4, 5), ("pipeline", "fsdp", "tensor", None)),
        (("layers", "embed", "mlp"), (7, 8, 4), (None, ("fsdp", "pipeline"), "tensor")),  # 2 stages, 7 layers
        (("embed", "vocab"), (8, 16), ("fsdp", ("tensor", "pipeline"))),
        (("vocab", "embed"), (16, 8), (("tensor", "pipeline"), "fsdp")),
        (("experts", "batch", "embed"), (8, 16, 8), ("expert", ("data", "fsdp"), "pipeline")),
        (("batch", "kv_heads", "heads"), (32, 2, 4), (("data", "fsdp", "expert"), "tensor", None)),
        (("batch", "kv_heads", "heads"), (32, 1, 4), (("data", "fsdp", "expert"), None, "tensor")),
        # batch takes fsdp first, so embed would not be split again
        (("batch", "sequence", "embed"), (32, 8, 8), (("data", "fsdp", "expert"), "sequence", "pipeline")),
    ],
)
def test_parameters_and_activations_get_the_specs_of_the_table(names, shape, expected):
    assert spec(names, DEFAULT_RULES, shape=shape, sizes=SIZES) == PartitionSpec(*expected)


def test_a_dimension_that_does_not_divide_is_replicated():
    assert spec(("embed",), DEFAULT_RULES, shape=(6,), sizes=SIZES) == PartitionSpec("pipeline")
    assert spec(("embed",), DEFAULT_RULES, shape=(7,), sizes=SIZES) == PartitionSpec(None)
    assert spec(("batch",), DEFAULT_RULES, shape=(2,), sizes=SIZES) == PartitionSpec("data")


def test_a_mesh_axis_is_used_once_by_the_row_that_comes_first():
    assert spec(("a", "b"), {"b": ("data", "fsdp"), "a": ("fsdp", "tensor")}) == PartitionSpec(
        "tensor", ("data", "fsdp")
    )


def test_shard_places_an_activation_and_keeps_its_values():
    mesh = Mesh(data=2, fsdp=4).build(jax.devices()[:8])
    x = jnp.arange(64.0).reshape(8, 2, 4)
    with activate(mesh):
        y = jax.jit(lambda x: shard(x * 1, "batch", "sequence", "embed"))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), *y.sharding.spec[1:])
    np.testing.assert_array_equal(y, x)


def test_an_activation_is_whole_along_its_width():
    mesh = Mesh(data=4, pipeline=2).build(jax.devices()[:8])
    with activate(mesh):
        y = jax.jit(lambda x: shard(x * 1, "batch", "embed"))(jnp.ones((8, 4)))
    assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh.mesh, PartitionSpec("data")), 2)


def test_shard_outside_a_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert shard(x, "batch", "embed") is x


def test_shardings_follow_the_tree_of_names():
    mesh = Mesh(fsdp=8, data=1).build(jax.devices()[:8])
    tree = mesh.shardings({"a": {"kernel": ("embed", "mlp")}}, {"a": {"kernel": jnp.zeros((16, 3))}})
    assert tree["a"]["kernel"].spec == PartitionSpec("fsdp", None)
