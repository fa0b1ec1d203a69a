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


def test_parameters_and_activations_get_the_specs_of_the_table():
    assert spec(("embed", "heads", "head_dim"), DEFAULT_RULES) == PartitionSpec("fsdp", "tensor", None)
    # batch takes fsdp first, so embed is not split again
    assert spec(("batch", "sequence", "embed"), DEFAULT_RULES) == PartitionSpec(
        ("data", "fsdp", "expert"), "sequence", None
    )


def test_a_dimension_that_does_not_divide_is_replicated():
    sizes = {"fsdp": 4, "data": 2, "expert": 1}
    assert spec(("embed",), DEFAULT_RULES, shape=(6,), sizes=sizes) == PartitionSpec(None)
    assert spec(("batch",), DEFAULT_RULES, shape=(2,), sizes=sizes) == PartitionSpec("data")


def test_shard_places_an_activation_and_keeps_its_values():
    mesh = Mesh(data=2, fsdp=4).build(jax.devices()[:8])
    x = jnp.arange(64.0).reshape(8, 2, 4)
    with activate(mesh):
        y = jax.jit(lambda x: shard(x * 1, "batch", "sequence", "embed"))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), *y.sharding.spec[1:])
    np.testing.assert_array_equal(y, x)


def test_shard_outside_a_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert shard(x, "batch", "embed") is x


def test_shardings_follow_the_tree_of_names():
    mesh = Mesh(fsdp=8, data=1).build(jax.devices()[:8])
    tree = mesh.shardings({"a": {"kernel": ("embed", "mlp")}}, {"a": {"kernel": jnp.zeros((16, 3))}})
    assert tree["a"]["kernel"].spec == PartitionSpec("fsdp", None)
