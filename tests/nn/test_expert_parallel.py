"""Experts spread over devices against one device: the same losses, outputs, statistics and gradients, for every mesh,
with tokens that are padding, dropout inside the experts and noise on the router."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from llmlab.nn.config import Context
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.masks import Full
from llmlab.nn.module import logical_axes, merge, split
from llmlab.nn.moe import Capacity, ExpertChoice, MixtureOfExperts, TopK, exchange
from llmlab.plan.cost import count
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding
from tests import tpu_compiler
from tests.drawing import drawn

pytestmark = pytest.mark.scale

DIM, EXPERTS, BATCH, LENGTH = 12, 8, 8, 12
VALID = np.arange(LENGTH) < np.array([12, 12, 9, 12, 5, 12, 12, 8])[:, None]
GATED = GatedMLP(hidden_dim=10, dropout=0.3)
PLAIN = MLP(hidden_dim=10, activation="gelu", bias=True, dropout=0.3)
ROUTERS = {"dropless": TopK(), "capacity": TopK(capacity=Capacity(factor=0.8)), "expert choice": ExpertChoice()}


def mixture(router: str, expert: Any = GATED, **options: Any) -> MixtureOfExperts:
    settings = {"num_experts": EXPERTS, "experts_per_token": 2, "z_loss": 0.1, "jitter": 0.2} | options
    return MixtureOfExperts(expert=expert, router=ROUTERS[router], **settings)


def built(config: MixtureOfExperts, dim: int = DIM) -> tuple[Any, Any]:
    return split(drawn(lambda: config.build(dim, rngs=nnx.Rngs(params=0)), std=0.5))


def inputs(batch: int = BATCH) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (batch, LENGTH, DIM))


def loss(graphdef: Any, config: MixtureOfExperts, params: Any, x: jax.Array, key: Any) -> tuple[jax.Array, Any]:
    valid = jnp.asarray(VALID[: len(x)])
    context = Context(mask=Full(), position_ids=jnp.zeros(valid.shape, jnp.int32), valid=valid)
    y, report = merge(graphdef, params)(x, context, key)
    terms = config.losses({name: statistic[None] for name, statistic in report.items()})
    return jnp.sum(jnp.sin(y)) + sum(terms.values()), (y, report)


def gradient(config: MixtureOfExperts, graphdef: Any) -> Any:
    """Loss, outputs, statistics, gradients of the parameters and the inputs."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, graphdef, config), argnums=(0, 1), has_aux=True))


def on_mesh(mesh: Mesh, graphdef: Any, params: Any, x: Any, function: Any) -> Any:
    """`function(params, x)` with both placed on the mesh, of as many devices as it has."""
    placement = mesh.build(jax.devices()[: math.prod(mesh.sizes().values())])
    with activate(placement):
        where = placement.shardings(logical_axes(merge(graphdef, params)), params)
        return function(
            jax.device_put(params, where), jax.device_put(x, active_sharding(x.shape, "batch", "sequence", None))
        )


def assert_a_mesh_computes_what_one_device_does(
    mesh: Mesh, config: MixtureOfExperts, params: Any = None, x: Any = None
) -> Any:
    """The statistics, for a look at what was tested."""
    graphdef, first = built(config)
    params, x = first if params is None else params, inputs() if x is None else x
    key = jax.random.key(5)
    want = gradient(config, graphdef)(params, x, key)
    got = on_mesh(mesh, graphdef, params, x, lambda params, x: gradient(config, graphdef)(params, x, key))
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    return want[0][1][1]


OVER_TENSOR: dict[str, tuple[str, ...]] = {"experts": ("tensor",), "mlp": ()}


@pytest.mark.parametrize(
    ("router", "expert", "mesh"),
    [
        ("dropless", GATED, Mesh(data=1, expert=2)),
        ("dropless", PLAIN, Mesh(data=1, expert=4)),
        ("dropless", GATED, Mesh(data=1, expert=8)),
        ("dropless", PLAIN, Mesh(data=2, expert=2, tensor=2)),
        ("dropless", GATED, Mesh(data=1, expert=2, tensor=2, sequence=2)),
        ("dropless", GATED, Mesh(data=2, fsdp=2, expert=2)),
        ("dropless", PLAIN, Mesh(data=1, fsdp=2, sequence=2, expert=2)),
        ("dropless", PLAIN, Mesh(data=1, sequence=2, expert=4)),
        ("dropless", GATED, Mesh(data=4, tensor=2, rules=OVER_TENSOR)),
        ("capacity", PLAIN, Mesh(data=1, expert=8)),
        ("capacity", GATED, Mesh(data=1, fsdp=2, expert=4)),
        ("capacity", PLAIN, Mesh(data=1, expert=2, tensor=2, sequence=2)),
        ("capacity", GATED, Mesh(data=2, expert=4)),
        ("expert choice", PLAIN, Mesh(data=1, expert=4, tensor=2)),
        ("expert choice", GATED, Mesh(data=2, sequence=2, expert=2)),
        ("expert choice", GATED, Mesh(data=1, fsdp=4, expert=2)),
    ],
    ids=lambda part: str([*part.sizes().values()]) if isinstance(part, Mesh) else getattr(part, "activation", part),
)
def test_a_mesh_computes_what_one_device_computes(router: str, expert: Any, mesh: Mesh) -> None:
    assert_a_mesh_computes_what_one_device_does(mesh, mixture(router, expert))


def test_a_batch_that_the_devices_of_the_experts_cannot_share_is_seen_by_all() -> None:
    mesh = Mesh(data=1, expert=4, tensor=2)
    assert_a_mesh_computes_what_one_device_does(mesh, mixture("dropless", PLAIN), x=inputs(batch=3))


def biased(params: Any, x: jax.Array, of_expert: Any) -> tuple[Any, jax.Array]:
    """Parameters and inputs for which the router's logits have so much added."""
    kernel = 0.2 * params["router"]["kernel"]
    return params | {"router": {"kernel": kernel.at[0].set(jnp.asarray(of_expert))}}, x.at[..., 0].set(1.0)


# Added to the router's logits: no more than decides, for what two layouts differ by, in parts of the largest gradient,
# grows with it (below 1.5e-6 without, 4e-6 at 10, 1.3e-5 at 30: a large logit has fewer digits behind the point).
UNEVEN = {
    "all to one device": [10.0, 10.0, 0, 0, 0, 0, 0, 0],
    "all to one expert": [0, 0, 0, 0, 0, 10.0, 0, 0],
    "none to one device": [0, 0, -10.0, -10.0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_use_drops_nothing(case: str) -> None:
    config = mixture("dropless", PLAIN)
    params, x = biased(built(config)[1], inputs(), UNEVEN[case])
    report = assert_a_mesh_computes_what_one_device_does(Mesh(data=1, expert=4, tensor=2), config, params, x)
    by_device = np.asarray(report["router_assigned"]).reshape(4, 2).sum(1)
    room = exchange.lane(("expert",), 4, EXPERTS, BATCH * LENGTH // 4, 2).room
    if case == "all to one device":
        assert by_device[0] == by_device.sum() > 2 * room  # three rounds
    elif case == "all to one expert":
        assert report["router_assigned"][5] == VALID.sum()
    else:
        assert by_device[1] == 0


def documented(operand: Any, output: Any, starts: Any, sizes: Any, there: Any, received: Any, *, axis_name: Any) -> Any:
    """jax.lax.ragged_all_to_all as its documentation says, which XLA has not for CPUs: every device sees all operands
    and takes the slices that are for it, one by one. NaN where the sizes received are not those sent."""
    operands, starts, sizes, there = (jax.lax.all_gather(part, axis_name) for part in (operand, starts, sizes, there))
    per_device, me = starts.shape[1] // starts.shape[0], jax.lax.axis_index(axis_name)
    row = jnp.arange(output.shape[0])
    for source in range(starts.shape[0]):
        for number in range(per_device):
            mine = me * per_device + number
            offset = row - there[source, mine]
            inside = (offset >= 0) & (offset < sizes[source, mine])
            taken = jnp.take(operands[source], starts[source, mine] + offset, axis=0, mode="clip")
            output = jnp.where(inside[:, None], taken, output)
            agreed = received[source * per_device + number] == sizes[source, mine]
            output = jnp.where(agreed, output, jnp.nan if output.dtype == jnp.float32 else -1)
    return output


@pytest.mark.parametrize("bias", [np.zeros(EXPERTS), UNEVEN["all to one device"]], ids=["even", "uneven"])
def test_slices_sent_as_they_are_arrive_where_they_belong(monkeypatch: pytest.MonkeyPatch, bias: Any) -> None:
    calls = []
    monkeypatch.setattr(exchange, "platform", lambda: "tpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", lambda *a, **k: calls.append(a) or documented(*a, **k))
    config = mixture("dropless")
    params, x = biased(built(config)[1], inputs(), bias)
    assert_a_mesh_computes_what_one_device_does(Mesh(data=1, expert=4, sequence=2), config, params, x)
    assert calls


def test_every_dispatch_drops_the_same_hidden_units() -> None:
    config = mixture("dropless")
    ample = dataclasses.replace(config, router=TopK(capacity=Capacity(factor=9.0)))
    key, x = jax.random.key(5), inputs()
    (_, (sorted_y, _)), sorted_gradient = gradient(config, built(config)[0])(built(config)[1], x, key)
    (_, (placed_y, _)), placed_gradient = gradient(ample, built(ample)[0])(built(ample)[1], x, key)
    for mine, exact in zip(
        jax.tree.leaves((sorted_y, sorted_gradient)), jax.tree.leaves((placed_y, placed_gradient)), strict=True
    ):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_it_works_inside_a_stage_of_a_pipeline() -> None:
    """Two stages, each with a layer of its own, on two devices of the experts each."""
    config, key = mixture("dropless", PLAIN), jax.random.key(5)
    graphdef = built(config)[0]
    layers = [split(drawn(lambda: config.build(DIM, rngs=nnx.Rngs(params=0)), seed=s, std=0.5))[1] for s in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = inputs()

    def each(params: Any, x: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf[0], params)
        return loss(graphdef, config, own, x, key)[1][0][None]

    placement = Mesh(data=1, expert=2, pipeline=2, tensor=2).build(jax.devices())

    @jax.jit
    def found(params: Any, x: jax.Array) -> Any:
        stages = jax.shard_map(
            each,
            mesh=placement.mesh,
            in_specs=(PartitionSpec("pipeline"), PartitionSpec()),
            out_specs=PartitionSpec("pipeline"),
            axis_names={"pipeline"},
            check_vma=False,  # as Placement.shard_map
        )
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(stages(params, x))), argnums=(0, 1))(params, x)

    @jax.jit
    def expected(params: Any, x: jax.Array) -> Any:
        def both(params: Any, x: jax.Array) -> jax.Array:
            own = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params) for i in (0, 1)]
            return jnp.sum(jnp.sin(each(own[0], x))) + jnp.sum(jnp.sin(each(own[1], x)))

        return jax.value_and_grad(both, argnums=(0, 1))(params, x)

    want = expected(stacked, x)
    with activate(placement):
        got = found(stacked, x)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def collectives(router: str, mesh: Mesh) -> list[tuple[str, str]]:
    """Operation and type of all collectives of a gradient, as compiled."""
    config = mixture(router, dataclasses.replace(GATED, dropout=0.0))
    graphdef, params = built(config)

    def compiled(params: Any, x: jax.Array) -> str:
        return gradient(config, graphdef).lower(params, x, None).compile().as_text()

    text = on_mesh(mesh, graphdef, params, inputs(), compiled)
    return re.findall(r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-to-all|all-reduce|collective-permute)\(", text)


def test_dropless_exchanges_rows_and_gathers_only_how_many_there_are() -> None:
    found = collectives("dropless", Mesh(data=1, expert=4))
    # two forward, two backward; in further rounds two, and two with the rows again
    assert sum(kind == "all-to-all" and shape.startswith("f32") for shape, kind in found) == 4 + 2 + 3
    assert {shape for shape, kind in found if kind == "all-gather"} == {f"s32[4,{EXPERTS}]"}


@pytest.mark.parametrize("router", ["capacity", "expert choice"])
def test_places_are_exchanged_four_times_and_nothing_is_gathered(router: str) -> None:
    found = collectives(router, Mesh(data=2, expert=4))
    assert sum(kind == "all-to-all" and shape.startswith("f32") for shape, kind in found) == 4
    assert not [kind for _, kind in found if kind == "all-gather"]


def test_experts_that_the_devices_cannot_share_are_an_error_that_says_what_can() -> None:
    config = mixture("dropless", num_experts=6)
    graphdef, params = built(config)
    message = "num_experts=6 is not divisible by the 4 devices of mesh axis expert; use 1, 2, 3, 6 devices, or 4 or 8 "
    with pytest.raises(ValueError, match=message), activate(Mesh(data=1, expert=4).build(jax.devices()[:4])):
        gradient(config, graphdef)(params, inputs(), None)


def test_flops_are_those_of_the_room_for_rows() -> None:
    dim = 64
    config = mixture("dropless", GatedMLP(hidden_dim=128))
    graphdef, params = built(config, dim)
    x = jax.ShapeDtypeStruct((16, 512, dim), jnp.float32)

    def counted(params: Any, x: Any) -> int:
        function = jax.grad(lambda params, x: jnp.sum(merge(graphdef, params)(x)[0]), argnums=(0, 1))
        return count(function, params, x).matmul_flops

    one = counted(params, x)
    placement = Mesh(data=2, expert=2, tensor=2).build(jax.devices())
    with activate(placement):
        spread = counted(params, x)
    # Room for half as many rows again, and the blocks that a device's four experts do not fill.
    assert 1.45 * one < spread < 1.55 * one


PROGRAM = """
import json
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.module import logical_axes, merge, split
from llmlab.nn.moe import MixtureOfExperts, TopK
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
placement = Mesh(data=1, expert=8).build(devices)
config = MixtureOfExperts(num_experts=16, experts_per_token=2, expert=GatedMLP(hidden_dim=512, dropout=0.1))
graphdef, params = split(nnx.eval_shape(lambda: config.build(256, rngs=nnx.Rngs(params=0))))


def gradient(params, x):
    def loss(params, x):
        y, auxiliary = merge(graphdef, params)(x, None, jax.random.key(0))
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + auxiliary["router_z"]

    return jax.grad(loss, argnums=(0, 1))(params, x)


with activate(placement):
    where = placement.shardings(logical_axes(merge(graphdef, params)), params)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=s), params, where)
    shape = (8, 2048, 256)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=active_sharding(shape, "batch", "sequence", None))
    compiled = jax.jit(gradient).lower(params, x).compile()
text = compiled.as_text()
print(json.dumps({
    "kernels": text.count("tpu_custom_call"),
    "exchanges": text.count(" ragged-all-to-all("),
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
}))
"""


def test_it_compiles_for_tpu_in_the_memory_of_even_use() -> None:
    result = tpu_compiler.run(PROGRAM)
    # Gate, up, down: forward, gradients of the rows and of the matrices. In further rounds all but the last product of
    # the forward pass once more.
    assert result["kernels"] == 9 + 3 + 8
    # Numbers of the choices (for dropout), rows, results; gradients of the two. In further rounds the same, and numbers
    # and rows once more.
    assert result["exchanges"] == 3 + 2 + 3 + 4
    # 59 MB: a round has 6,144 rows, 6 MB of hidden units, and about ten such arrays live at once. With room for the
    # choices of all devices it is 181 MB.
    assert result["temporary"] < 80e6
