"""Learning rates under muP: the table's, on the parameters that it means, and the decay as in the base model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.optim import LAMB, SGD, Adafactor, Adam, AdamW, Group, Lion, Momentum, Muon, Nesterov, Optimizer
from llmlab.optim.config import Optimizer as Base
from llmlab.optim.parameters import Parameter, flatten
from llmlab.optim.width import Fans

GROWTH = {"embed": 4.0, "mlp": 4.0, "heads": 2.0, "kv_heads": 2.0, "head_dim": 2.0}
AXES: dict[str, Any] = {
    "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "expert": {"kernel": ("experts", "mlp", "embed")},
    "query": {"kernel": ("embed", "heads", "head_dim")},
    "output": {"kernel": ("heads", "head_dim", "embed")},
    "norm": {"scale": ("embed",)},
    "qk_norm": {"scale": ("head_dim",)},
    "gain": {"scale": ()},
    "embedding": {"table": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab"), "bias": ("vocab",)},
    "router": {"kernel": ("embed", "router")},
}
HIDDEN = ("up.kernel", "expert.kernel", "query.kernel", "output.kernel")
SIZES = {"layers": 2, "experts": 2, "embed": 8, "mlp": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "vocab": 6,
         "router": 2}  # fmt: skip


def drawn(seed: int) -> Any:
    random = np.random.default_rng(seed)

    def one(axes: tuple[str, ...]) -> jax.Array:
        return jnp.asarray(random.normal(size=[SIZES[name] for name in axes]), jnp.float32)

    return jax.tree.map(one, AXES, is_leaf=lambda node: isinstance(node, tuple))


def ratios(optimizer: Optimizer) -> dict[str, float]:
    """Length of each parameter's step under muP over that in the standard parametrisation."""
    params, gradient = drawn(0), drawn(1)
    steps = []
    for growth in (GROWTH, None):
        transformation = optimizer.build(AXES, 10, growth=growth)
        updates: Any = transformation.update(gradient, transformation.init(params), params)[0]
        steps.append(dict(flatten(updates)))
    wide, standard = steps
    found = {}
    for path, step in wide.items():
        ratio = np.asarray(step) / np.asarray(standard[path])
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
        found[path] = float(ratio.mean())
    return found


# By hand from Table 8 (Adam, SGD), and for the others from a change of constant size of what a layer puts out.
EXPECTED = {
    "adam": (Adam(peak_lr=0.1, epsilon=1e-15), dict.fromkeys(HIDDEN, 1 / 4)),
    "lion": (Lion(peak_lr=0.1, weight_decay=0.0), dict.fromkeys(HIDDEN, 1 / 4)),
    "sgd": (
        SGD(peak_lr=0.1),
        {"up.bias": 4.0, "norm.scale": 4.0, "qk_norm.scale": 2.0, "embedding.table": 4.0, "head.kernel": 4.0,
         "router.kernel": 4.0},
    ),
    "nesterov": (
        Nesterov(peak_lr=0.1),
        {"up.bias": 4.0, "norm.scale": 4.0, "qk_norm.scale": 2.0, "embedding.table": 4.0, "head.kernel": 4.0,
         "router.kernel": 4.0},
    ),
    "muon": (Muon(peak_lr=0.1, weight_decay=0.0), dict.fromkeys(HIDDEN, 1 / 2)),
    "muon by jordan": (Muon(peak_lr=0.1, weight_decay=0.0, update_rms=None), {"router.kernel": 2.0}),
    "muon, adamw's part": (
        Muon(peak_lr=0.1, weight_decay=0.0, adamw_match=("up",)),
        {**dict.fromkeys(HIDDEN[1:], 1 / 2), "up.kernel": 1 / 4},
    ),
    "lamb": (LAMB(peak_lr=0.1, weight_decay=0.0, epsilon=1e-15), dict.fromkeys(HIDDEN, 1 / 2)),
    "adafactor": (Adafactor(peak_lr=0.1, min_dim_to_factor=4), dict.fromkeys(HIDDEN, 1 / 2)),
    "adafactor, absolute": (Adafactor(peak_lr=0.1, scale_by_parameter=False), dict.fromkeys(HIDDEN, 1 / 4)),
    "groups": (
        Adam(peak_lr=0.1, epsilon=1e-15, groups=(Group(match="query", lr_multiplier=3.0),)),
        dict.fromkeys(HIDDEN, 1 / 4),
    ),
}  # fmt: skip


@pytest.mark.scale
@pytest.mark.parametrize("name", EXPECTED)
def test_each_parameter_has_the_learning_rate_of_the_table(name: str) -> None:
    optimizer, expected = EXPECTED[name]
    found = ratios(optimizer)
    assert found == pytest.approx({path: expected.get(path, 1.0) for path in found}, rel=1e-4)


@pytest.mark.scale
@pytest.mark.parametrize("optimizer", [AdamW(peak_lr=0.1), Momentum(peak_lr=0.1, weight_decay=0.2), Muon(peak_lr=0.1)])
def test_rate_times_weight_decay_is_that_of_the_base_model(optimizer: Optimizer) -> None:
    params = drawn(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed = []
    for growth in (GROWTH, None):
        transformation = optimizer.build(AXES, 10, growth=growth)
        decayed.append(transformation.update(zero, transformation.init(params), params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *decayed)
    assert float(jnp.abs(decayed[0]["up"]["kernel"]).max()) > 0


@pytest.mark.scale
@pytest.mark.parametrize(("kind", "name"), [(Adam, "adam"), (LAMB, "lamb")])
def test_epsilon_shrinks_with_the_gradients(kind: type[Adam], name: str) -> None:
    """A model four times as wide has gradients a quarter as large: its directions are the base model's."""
    optimizer = kind(peak_lr=0.1, epsilon=0.3, weight_decay=0.0, clip_norm=None)
    params, gradient = drawn(0), drawn(1)
    wide, base = optimizer.build(AXES, 10, growth=GROWTH), optimizer.build(AXES, 10)
    small = jax.tree.map(lambda g: g / 4, gradient)
    updates: tuple[Any, Any] = (
        wide.update(small, wide.init(params), params)[0],
        base.update(gradient, base.init(params), params)[0],
    )
    of_wide, of_base = (dict(flatten(each)) for each in updates)
    for path, step in of_wide.items():
        np.testing.assert_allclose(step, of_base[path] * EXPECTED[name][1].get(path, 1.0), rtol=1e-5)


@pytest.mark.scale
def test_growth_of_one_is_the_standard_parametrisation_bit_for_bit() -> None:
    params, gradient = drawn(0), drawn(1)
    for optimizer, _ in EXPECTED.values():
        results = []
        for growth in (dict.fromkeys(GROWTH, 1.0), None):
            transformation = optimizer.build(AXES, 10, growth=growth)
            results.append(transformation.update(gradient, transformation.init(params), params)[0])
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_fans_are_of_each_stacked_matrix() -> None:
    assert Fans.of(Parameter("a.kernel", ("layers", "experts", "embed", "mlp")), GROWTH) == Fans(4.0, 4.0)
    heads = Parameter("a.kernel", ("heads", "head_dim", "embed"))
    assert Fans.of(heads, {"heads": 3.0, "embed": 5.0}) == Fans(3.0, 5.0)
    assert Fans.of(Parameter("a.bias", ("layers", "heads", "head_dim")), GROWTH) == Fans(1.0, 4.0)
    with pytest.raises(ValueError, match=r"cannot tell inputs from outputs of a.kernel .*; put embed first or last"):
        Fans.of(Parameter("a.kernel", ("mlp", "embed", "heads")), GROWTH)


def test_a_rule_without_known_rates_is_refused() -> None:
    class Sign(SGD):
        width_multiplier = Base.width_multiplier

    with pytest.raises(ValueError, match=r"not known for Sign; give it a width_multiplier, use another"):
        Sign(peak_lr=0.1).build(AXES, 10, growth=GROWTH)
