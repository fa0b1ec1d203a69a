"""Mixtures of experts against a dense reference: decisions by loops over tokens, then every expert on every token."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.config import Context
from llmlab.nn.feed_forward import MLP, FeedForward, GatedMLP
from llmlab.nn.masks import Full
from llmlab.nn.module import logical_axes, merge, split
from llmlab.nn.moe import Capacity, ExpertChoice, LoadBalance, MixtureOfExperts, TopK
from llmlab.nn.moe.dispatch import Dropless
from llmlab.plan.cost import count
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding
from tests import optimised
from tests.drawing import drawn

DIM, WIDTH, EXPERTS, BATCH, LENGTH = 12, 10, 5, 3, 14
# Where tokens are real: all, padding right, padding left.
VALID = np.arange(LENGTH) < np.array([[LENGTH], [9], [LENGTH]])
VALID[2, :5] = False

GATED = GatedMLP(hidden_dim=WIDTH)
PLAIN = MLP(hidden_dim=WIDTH, activation="gelu", bias=True)


def mixture(router: Any, k: int = 2, expert: FeedForward = GATED, **options: Any) -> MixtureOfExperts:
    return MixtureOfExperts(num_experts=EXPERTS, experts_per_token=k, expert=expert, router=router, **options)


MIXTURES = {
    "switch": mixture(TopK(renormalise=False), k=1),
    "switch with capacity": mixture(TopK(renormalise=False, capacity=Capacity(factor=1.0)), k=1, expert=PLAIN),
    "top 2": mixture(TopK(), z_loss=0.1),
    "top 2 with biases": mixture(TopK(), expert=PLAIN),
    "top 3 of sigmoids": mixture(TopK(score="sigmoid", balance=LoadBalance(weight=0.5, over="model")), k=3),
    "all": mixture(TopK(renormalise=False), k=EXPERTS),
    "capacity by position": mixture(TopK(capacity=Capacity(factor=0.7))),
    "capacity by probability": mixture(TopK(capacity=Capacity(factor=0.7, priority="probability")), k=3),
    "ample capacity": mixture(TopK(capacity=Capacity(factor=9.0))),
    "expert choice": mixture(ExpertChoice(), expert=PLAIN),
    "shared": mixture(TopK(), shared=PLAIN),
}
mixtures = pytest.mark.parametrize("name", MIXTURES)


def built(config: MixtureOfExperts, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Graph definition and parameters, every one drawn: biases of zero would hide mistakes."""
    graphdef, params = split(drawn(lambda: config.build(DIM, rngs=nnx.Rngs(params=0)), std=0.5))
    return graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def inputs(seed: int = 2, shape: tuple[int, ...] = (BATCH, LENGTH, DIM)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def context(valid: Any) -> Context:
    return Context(mask=Full(), position_ids=jnp.zeros(valid.shape, jnp.int32), valid=jnp.asarray(valid))


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef: Any, params: Any, x: jax.Array, valid: Any, key: Any = None) -> Any:
    return merge(graphdef, params)(x, context(valid), key)


def losses(config: MixtureOfExperts, *layers: Any) -> dict[str, jax.Array]:
    return config.losses({name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]})


# --- the reference ---------------------------------------------------------------------------------------------------


def scores(config: MixtureOfExperts, logits: Any, numpy: Any = np) -> Any:
    if isinstance(config.router, TopK) and config.router.score == "sigmoid":
        return 1 / (1 + numpy.exp(-logits))
    powers = numpy.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def decide(config: MixtureOfExperts, score_BSE: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which experts a token chose, and which of them see it; one row, one token at a time."""
    chosen, seen = np.zeros(score_BSE.shape, bool), np.zeros(score_BSE.shape, bool)
    router, k = config.router, config.experts_per_token
    for row, (score_SE, real) in enumerate(zip(score_BSE, valid, strict=True)):
        tokens = [s for s in range(len(score_SE)) if real[s]]
        if isinstance(router, ExpertChoice):
            places = math.ceil(len(tokens) * k / EXPERTS)
            for e in range(EXPERTS):
                for s in sorted(tokens, key=lambda s: -score_SE[s, e])[:places]:
                    chosen[row, s, e] = seen[row, s, e] = True
            continue
        assert isinstance(router, TopK)
        ranked = np.argsort(-score_SE, axis=-1, kind="stable")
        if router.capacity is None:
            places = 10**9
        else:
            places = math.ceil(router.capacity.factor * len(tokens) * k / EXPERTS)
            if router.capacity.priority == "probability":
                tokens.sort(key=lambda s: -score_SE[s].max())
        taken = np.zeros(EXPERTS, int)
        for choice in range(k):
            for s in tokens:
                e = ranked[s, choice]
                chosen[row, s, e] = True
                seen[row, s, e] = taken[e] < places
                taken[e] += 1
    return chosen, seen


def dense(params: Any, config: FeedForward, x: jax.Array) -> jax.Array:
    """An MLP, written out."""
    out = {
        name: jnp.einsum("...i,io->...o", x, layer["kernel"]) + layer.get("bias", 0.0)
        for name, layer in params.items()
        if name != "down"
    }
    if isinstance(config, GatedMLP):
        h = out["gate"] / (1 + jnp.exp(-out["gate"])) * out["up"]
    else:
        h = 0.5 * out["up"] * (1 + jax.scipy.special.erf(out["up"] / math.sqrt(2)))
    return h @ params["down"]["kernel"] + params["down"].get("bias", 0.0)


def reference(config: MixtureOfExperts, params: Any, x: jax.Array, chosen: Any, seen: Any) -> jax.Array:
    """Every expert on every token, weighted by the router where the token is seen."""
    weight = scores(config, x @ params["router"]["kernel"], jnp)
    if isinstance(config.router, TopK) and config.router.renormalise:
        weight = weight / jnp.where(chosen.any(-1), jnp.sum(weight * chosen, axis=-1), 1.0)[..., None]
    y = jnp.zeros_like(x)
    for e in range(EXPERTS):
        expert = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
        y += jnp.where(seen[..., e, None], weight[..., e, None] * dense(expert, config.expert, x), 0.0)
    return y + (dense(params["shared"], config.shared, x) if config.shared is not None else 0.0)


def decided(config: MixtureOfExperts, params: Any, x: jax.Array, valid: np.ndarray) -> tuple[np.ndarray, ...]:
    """Chosen, seen, scores, logits; in float64."""
    logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    score = scores(config, logits)
    return *decide(config, score, valid), score, logits


@mixtures
def test_outputs_and_gradients_equal_every_expert_on_every_token(name: str) -> None:
    config = MIXTURES[name]
    graphdef, params = built(config)
    x, direction = inputs(), inputs(seed=3)
    chosen, seen, *_ = decided(config, params, x, VALID)

    def ours(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, _ = merge(graphdef, params)(x, context(VALID))
        return jnp.sum(y * direction), y

    def theirs(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = reference(config, params, x, chosen, seen)
        return jnp.sum(y * direction), y

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x) for f in (ours, theirs))
    for mine, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@mixtures
def test_statistics_and_losses_are_those_of_the_real_tokens(name: str) -> None:
    config = MIXTURES[name]
    graphdef, params = built(config)
    layers, expected = [], {"f": [], "P": [], "z": []}
    for seed in (2, 3):
        x = inputs(seed)
        chosen, seen, score, logits = decided(config, params, x, VALID)
        _, report = apply(graphdef, params, x, VALID)
        layers.append(report)
        score = score / score.sum(-1, keepdims=True)
        np.testing.assert_array_equal(report["router_assigned"], chosen.sum((0, 1)))
        np.testing.assert_allclose(report["router_score"], score[VALID].sum(0), rtol=1e-5)
        if isinstance(config.router, ExpertChoice):
            assert report["router_dropped"] == (VALID & ~seen.any(-1)).sum()
        else:
            assert report["router_dropped"] == (chosen & ~seen).sum()
        expected["f"].append(chosen[VALID].mean(0))
        expected["P"].append(score[VALID].mean(0))
        expected["z"].append(np.square(np.log(np.exp(logits[VALID]).sum(-1))).mean())
    found, router = losses(config, *layers), config.router
    f, p = np.array(expected["f"]), np.array(expected["P"])
    wanted = {}
    if isinstance(router, TopK) and router.balance is not None:
        of_layers = EXPERTS * (f * p).sum() if router.balance.over == "layer" else EXPERTS * f.mean(0) @ p.mean(0)
        wanted["load_balance"] = router.balance.weight * of_layers
    if config.z_loss:
        wanted["router_z"] = config.z_loss * np.sum(expected["z"])
    assert found.keys() == wanted.keys()
    for loss, value in wanted.items():
        np.testing.assert_allclose(found[loss], value, rtol=1e-5)


def test_capacities_above_drop_something() -> None:
    for name in ("switch with capacity", "capacity by position", "capacity by probability"):
        graphdef, params = built(MIXTURES[name])
        assert apply(graphdef, params, inputs(), VALID)[1]["router_dropped"] > 0, name


def test_renormalised_softmax_is_a_softmax_over_the_chosen_logits() -> None:
    logits = inputs(shape=(2, 6, EXPERTS))
    assignment, _ = TopK().route(logits, 3, jnp.ones((2, 6), bool))
    assert isinstance(assignment, Dropless)
    np.testing.assert_allclose(assignment.gate_BSK, jax.nn.softmax(jax.lax.top_k(logits, 3)[0]), rtol=1e-6)


def test_even_use_has_the_least_balance_loss_k() -> None:
    even = {"router_assigned": jnp.full((1, 4), 20.0), "router_score": jnp.full((1, 4), 10.0)}
    for over in ("layer", "model"):
        loss = LoadBalance(weight=1.0, over=over)(even | {"router_tokens": jnp.array([40.0])})
        np.testing.assert_allclose(loss, 2.0)  # 80 choices of 40 tokens


@mixtures
def test_a_row_is_what_it_is_alone_and_without_its_padding(name: str) -> None:
    config = MIXTURES[name]
    graphdef, params = built(config)
    x = inputs()
    together, _ = apply(graphdef, params, x, VALID)
    for row in range(BATCH):
        real = VALID[row]
        alone, _ = apply(graphdef, params, x[row : row + 1, real], np.ones((1, real.sum()), bool))
        np.testing.assert_allclose(together[row, real], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MIXTURES if "capacity by" not in name and "switch with" not in name])
def test_the_order_of_tokens_does_not_matter_where_none_is_dropped_by_position(name: str) -> None:
    graphdef, params = built(MIXTURES[name])
    x, order = inputs(), np.random.default_rng(0).permutation(LENGTH)
    y, _ = apply(graphdef, params, x, VALID)
    permuted, _ = apply(graphdef, params, x[:, order], VALID[:, order])
    np.testing.assert_allclose(permuted, y[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["top 2 with biases", "capacity by position", "expert choice"])
def test_bfloat16_decides_as_float32_and_computes_nearly_so(name: str) -> None:
    graphdef, params = built(MIXTURES[name], jnp.bfloat16)
    x = inputs().astype(jnp.bfloat16)
    rounded, report = apply(graphdef, params, x, VALID)
    exact, wanted = apply(graphdef, jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32), VALID)
    assert rounded.dtype == jnp.bfloat16
    for statistic, value in wanted.items():
        assert report[statistic].dtype == jnp.float32
        np.testing.assert_array_equal(report[statistic], value, err_msg=statistic)
    # hidden activations and results are rounded to 8 places, a few times
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_jitter_moves_the_routers_input_in_training_only() -> None:
    config = mixture(TopK(), k=EXPERTS, jitter=0.3)
    graphdef, params = built(config)
    x = inputs()
    calm = apply(graphdef, params, x, VALID)[0]
    first, same, other = (apply(graphdef, params, x, VALID, jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, calm)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(calm, apply(built(mixture(TopK(), k=EXPERTS))[0], params, x, VALID)[0])


@pytest.mark.parametrize("router", [TopK(), ExpertChoice()], ids=["rows by expert", "places"])
def test_dropout_inside_experts_keeps_the_mean(router: Any) -> None:
    config = mixture(router, expert=dataclasses.replace(PLAIN, dropout=0.4))
    graphdef, params = built(config)
    x = inputs(shape=(1, 6, DIM))
    valid = np.ones((1, 6), bool)
    plain = apply(graphdef, params, x, valid)[0]
    drawn = jax.vmap(lambda key: apply(graphdef, params, x, valid, key)[0])(jax.random.split(jax.random.key(0), 1000))
    assert not np.allclose(drawn[0], plain)
    # the mean of 1,000 draws is within 5 of its standard errors
    error = np.abs(drawn.mean(0) - plain) / (drawn.std(0) / math.sqrt(1000))
    assert error.max() < 5


# --- on a mesh -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dropless", Mesh(data=8)),
        ("dropless", Mesh(data=1, fsdp=2, tensor=2, expert=2)),
        ("dropless", Mesh(data=1, sequence=4, expert=2)),
        ("capacity", Mesh(data=2, fsdp=4)),
        ("capacity", Mesh(data=1, fsdp=2, tensor=2, expert=2)),
        ("expert choice", Mesh(data=2, fsdp=2, expert=2)),
    ],
    ids=lambda part: part if isinstance(part, str) else str([*part.resolve(8).values()]),
)
@pytest.mark.scale
def test_a_mesh_computes_what_one_device_computes(name: str, mesh: Mesh) -> None:
    routers = {"dropless": TopK(), "capacity": TopK(capacity=Capacity(factor=0.8)), "expert choice": ExpertChoice()}
    expert = PLAIN if name == "dropless" else GATED
    config = MixtureOfExperts(num_experts=8, experts_per_token=2, expert=expert, router=routers[name], z_loss=0.1)
    graphdef, params = built(config)
    x = inputs(shape=(8, 12, DIM))
    valid = np.arange(12) < np.arange(5, 13)[:, None]

    def solve(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            y, report = merge(graphdef, params)(x, context(valid))
            terms = losses(config, report)
            return jnp.sum(jnp.sin(y)) + sum(terms.values()), (y, report)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    want = jax.jit(solve)(params, x)
    with activate(mesh.build(jax.devices())):
        axes = logical_axes(merge(graphdef, params))
        placed = jax.device_put(params, mesh.build(jax.devices()).shardings(axes, params))
        x = jax.device_put(x, active_sharding(x.shape, "batch", "sequence", None))
        got = jax.jit(solve)(placed, x)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


# --- cost ------------------------------------------------------------------------------------------------------------


def gradient(config: MixtureOfExperts, dim: int) -> tuple[Any, Any]:
    graphdef, params = split(drawn(lambda: config.build(dim, rngs=nnx.Rngs(params=0)), std=0.05))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, report = merge(graphdef, params)(x)
        return jnp.sum(jnp.square(y)) + sum(losses(config, report).values())

    return jax.grad(loss, argnums=(0, 1)), params


@pytest.mark.parametrize(
    "router", [TopK(), TopK(capacity=Capacity()), ExpertChoice()], ids=["dropless", "capacity", "expert choice"]
)
@pytest.mark.scale
def test_time_and_flops_grow_with_the_experts_per_token_and_not_with_the_experts(router: Any) -> None:
    dim, x = 128, inputs(shape=(8, 512, 128))
    flops, compiled = {}, {}
    for num_experts, k in ((4, 2), (32, 2), (4, 4)):
        config = MixtureOfExperts(
            num_experts=num_experts, experts_per_token=k, expert=GatedMLP(hidden_dim=256), router=router
        )
        function, params = gradient(config, dim)
        flops[num_experts, k] = count(function, params, x).flops
        compiled[num_experts, k] = functools.partial(optimised.compiled(function, params, x), params, x)
    assert flops[32, 2] <= 1.3 * flops[4, 2]
    assert 1.5 * flops[4, 2] <= flops[4, 4]
    best = dict.fromkeys(compiled, math.inf)
    for _ in range(30):  # interleaved: other work on the machine must not hit one of them alone
        for key, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[key] = min(best[key], time.perf_counter() - start)
        if best[32, 2] <= 1.3 * best[4, 2]:
            break
    assert best[32, 2] <= 1.3 * best[4, 2], best


def test_impossible_configs_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="experts_per_token=6 is not from 1 to num_experts=5"):
        mixture(TopK(), k=6)
    with pytest.raises(ValueError, match="cannot be stacked; use MLP or GatedMLP"):
        mixture(TopK(), expert=MIXTURES["all"])
    with pytest.raises(ValueError, match=r"factor=0\.0 leaves no places"):
        Capacity(factor=0.0)
