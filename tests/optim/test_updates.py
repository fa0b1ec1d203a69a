"""Every optimizer against the equations of its paper, written again in NumPy with float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmlab.optim import LAMB, SGD, Adafactor, Adam, AdamW, Cosine, Group, Lion, Momentum, Muon, Nesterov, Optimizer
from llmlab.optim.transformation import ema_update, metrics

STEPS = 6
AXES: dict[str, Any] = {
    "embedding": {"table": ("vocab", "embed")},
    "query": {"kernel": ("embed", "heads", "head_dim"), "bias": ("heads", "head_dim")},
    "output": {"kernel": ("heads", "head_dim", "embed")},
    "norm": {"scale": ("embed",)},
}
SHAPES = {"vocab": 11, "embed": 8, "heads": 2, "head_dim": 3}

Numbers = dict[str, np.ndarray]


def draw(seed: int) -> dict[str, Any]:
    """Random arrays of those axes, deterministic in the seed."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda axes: jnp.asarray(random.normal(size=[SHAPES[a] for a in axes]), jnp.float32),
        AXES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def flat(tree: Any) -> Numbers:
    return {
        ".".join(str(k.key) for k in path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def run(optimizer: Optimizer) -> list[Numbers]:
    """Parameters after each of STEPS updates with random gradients."""
    transformation = optimizer.build(AXES, STEPS)
    params = draw(0)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    trajectory = []
    for k in range(STEPS):
        updates, state = update(draw(k + 1), state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(flat(params))
    return trajectory


def check(optimizer: Optimizer, direction: Callable[[str, int, np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Compares with x - rate (direction(path, k, g, x) + decay x), decay without norms and biases.

    A direction keeps its own state by path; here layers are not stacked, and gradients are not clipped.
    """
    x = flat(draw(0))
    for k, actual in enumerate(run(optimizer)):
        rate = float(optimizer.learning_rate(STEPS)(k))
        grads = flat(draw(k + 1))
        for path in x:
            decay = 0.0 if path.endswith(("scale", "bias")) else optimizer.weight_decay
            own_decay = 0.0 if isinstance(optimizer, LAMB) else decay  # LAMB's is inside
            u = direction(path, k, grads[path], x[path])
            x[path] = x[path] - rate * (u + own_decay * x[path])
            # float32 over six updates; Newton-Schulz multiplies rounding errors of small singular values
            np.testing.assert_allclose(actual[path], x[path], rtol=2e-5, atol=2e-5, err_msg=f"{path} step {k}")


def fresh(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {} for name in names}


SCHEDULE = Cosine(warmup_steps=2)


def test_sgd_steps_along_the_gradient() -> None:
    check(SGD(peak_lr=0.1, schedule=SCHEDULE, clip_norm=None, weight_decay=0.2), lambda path, k, g, x: g)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_the_heavy_ball_and_nesterov_its_look_ahead(nesterov: bool) -> None:
    state = fresh("v")

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        v = 0.8 * state["v"].get(path, 0) + g
        state["v"][path] = v
        return g + 0.8 * v if nesterov else v

    make = Nesterov if nesterov else Momentum
    check(make(peak_lr=0.1, beta=0.8, clip_norm=None, weight_decay=0.1), direction)


def adam_direction(beta1: float, beta2: float, epsilon: float) -> Callable[..., np.ndarray]:
    state = fresh("m", "v")

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        m = beta1 * state["m"].get(path, 0) + (1 - beta1) * g
        v = beta2 * state["v"].get(path, 0) + (1 - beta2) * g**2
        state["m"][path], state["v"][path] = m, v
        return m / (1 - beta1 ** (k + 1)) / (np.sqrt(v / (1 - beta2 ** (k + 1))) + epsilon)

    return direction


def test_adam_equals_algorithm_1_of_kingma_and_ba() -> None:
    check(Adam(peak_lr=0.1, schedule=SCHEDULE, clip_norm=None, epsilon=1e-3), adam_direction(0.9, 0.999, 1e-3))


def test_adamw_equals_algorithm_2_of_loshchilov_and_hutter() -> None:
    check(AdamW(peak_lr=0.1, schedule=SCHEDULE, clip_norm=None, weight_decay=0.3), adam_direction(0.9, 0.95, 1e-8))


def test_lamb_equals_algorithm_2_of_you_et_al() -> None:
    adam = adam_direction(0.9, 0.999, 1e-6)

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        decay = 0.0 if path.endswith(("scale", "bias")) else 0.3
        r = adam(path, k, g, x) + decay * x
        return r * np.linalg.norm(x) / np.linalg.norm(r)

    check(LAMB(peak_lr=0.1, schedule=SCHEDULE, clip_norm=None, weight_decay=0.3), direction)


def test_lion_equals_algorithm_2_of_chen_et_al() -> None:
    state = fresh("m")

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        m = state["m"].get(path, 0)
        state["m"][path] = 0.99 * m + 0.01 * g
        return np.sign(0.9 * m + 0.1 * g)

    check(Lion(peak_lr=0.1, schedule=SCHEDULE, clip_norm=None, weight_decay=0.3), direction)


ROWS = {"embedding.table": 11, "query.kernel": 8, "output.kernel": 6}  # of each parameter seen as a matrix


def rms(x: np.ndarray) -> float:
    return np.sqrt(np.mean(x**2))


@pytest.mark.parametrize("beta", [None, 0.9])
def test_adafactor_equals_algorithms_4_and_5_of_shazeer_and_stern(beta: float | None) -> None:
    state = fresh("rows", "columns", "full", "m")

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        keep = 1 - (k + 1) ** -0.8
        squared = g**2 + 1e-30
        if path in ROWS:
            squared = squared.reshape(ROWS[path], -1)
            r = keep * state["rows"].get(path, 0) + (1 - keep) * squared.sum(axis=1)
            c = keep * state["columns"].get(path, 0) + (1 - keep) * squared.sum(axis=0)
            state["rows"][path], state["columns"][path] = r, c
            v = (np.outer(r, c) / r.sum()).reshape(g.shape)
        else:
            v = keep * state["full"].get(path, 0) + (1 - keep) * squared
            state["full"][path] = v
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u) / 0.7)
        u = u * max(1e-3, rms(x))
        if beta is None:
            return u
        state["m"][path] = beta * state["m"].get(path, 0) + (1 - beta) * u
        return state["m"][path]

    check(
        Adafactor(
            peak_lr=0.1,
            schedule=SCHEDULE,
            clip_norm=None,
            clip_threshold=0.7,
            min_dim_to_factor=4,
            beta=beta,
            weight_decay=0.1,
        ),
        direction,
    )


def test_adafactor_keeps_all_statistics_of_small_matrices() -> None:
    state = fresh("v")

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        keep = 1 - (k + 1) ** -0.8
        state["v"][path] = keep * state["v"].get(path, 0) + (1 - keep) * (g**2 + 1e-30)
        return g / np.sqrt(state["v"][path])

    check(
        Adafactor(peak_lr=0.1, clip_norm=None, clip_threshold=None, scale_by_parameter=False, min_dim_to_factor=100),
        direction,
    )


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five iterations of the quintic, always on the wide orientation."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("update_rms", [0.2, None])
def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw(nesterov: bool, update_rms: float | None) -> None:
    state = fresh("m")
    adam = adam_direction(0.9, 0.95, 1e-8)

    def direction(path: str, k: int, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        if path not in ("query.kernel", "output.kernel"):
            return adam(path, k, g, x)
        m = 0.95 * state["m"].get(path, 0) + 0.05 * g
        state["m"][path] = m
        if nesterov:  # Dozat's form, as in optax: what m^ will be if the next gradient is this one
            u = 0.95 * m / (1 - 0.95 ** (k + 2)) + 0.05 * g / (1 - 0.95 ** (k + 1))
        else:
            u = m / (1 - 0.95 ** (k + 1))
        rows, columns = ROWS[path], g.size // ROWS[path]
        u = newton_schulz(u.reshape(rows, columns)).reshape(g.shape)
        return u * (update_rms * np.sqrt(max(rows, columns)) if update_rms else np.sqrt(max(1, columns / rows)))

    optimizer = Muon(
        peak_lr=0.05, schedule=SCHEDULE, clip_norm=None, nesterov=nesterov, update_rms=update_rms, weight_decay=0.3
    )
    check(optimizer, direction)


def test_muon_gives_adamw_its_own_learning_rate() -> None:
    half, whole = run(Muon(peak_lr=0.1, adamw_lr=0.5))[0], run(Muon(peak_lr=0.1))[0]
    start = flat(draw(0))
    for path in start:
        factor = 1.0 if path in ("query.kernel", "output.kernel") else 0.5
        np.testing.assert_allclose(half[path] - start[path], factor * (whole[path] - start[path]), atol=1e-6)


@pytest.mark.parametrize("norm", [0.5, 5.0, 1e6])
def test_clipping_is_by_the_norm_over_all_parameters_together(norm: float) -> None:
    optimizer = SGD(peak_lr=1.0, clip_norm=norm)
    grads, start, after = flat(draw(1)), flat(draw(0)), run(optimizer)[0]
    length = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    for path, g in grads.items():
        np.testing.assert_allclose(start[path] - after[path], g * min(1.0, norm / length), atol=1e-6)


def test_the_state_tells_learning_rate_and_gradient_norm_of_the_latest_update() -> None:
    optimizer = AdamW(peak_lr=0.1, schedule=SCHEDULE)
    transformation = optimizer.build(AXES, STEPS)
    params = draw(0)
    state: Any = transformation.init(params)
    for k in range(3):
        _, state = transformation.update(draw(k + 1), state, params)
        told = metrics(state)
        assert told["learning_rate"] == optimizer.learning_rate(STEPS)(k)
        length = np.sqrt(sum(np.sum(g**2) for g in flat(draw(k + 1)).values()))
        np.testing.assert_allclose(told["gradient_norm"], length, rtol=1e-6)
        assert state["step"] == k + 1


def test_decay_exclusions_choose_norms_biases_and_embeddings() -> None:
    zero = jax.tree.map(jnp.zeros_like, draw(0))
    base = SGD(peak_lr=0.5, weight_decay=0.1)
    for optimizer, kept in (
        (replace(base, decay_exclude=()), ()),
        (base, ("norm.scale", "query.bias")),
        (replace(base, decay_exclude=("embedding",)), ("embedding.table",)),
    ):
        transformation = optimizer.build(AXES, STEPS)
        updates: Any = transformation.update(zero, transformation.init(draw(0)), draw(0))[0]
        for path, update in flat(updates).items():
            expected = 0.0 if path in kept else -0.5 * 0.1 * flat(draw(0))[path]
            np.testing.assert_allclose(update, expected * np.ones_like(update), rtol=1e-6)


def test_groups_scale_rates_set_decays_and_freeze() -> None:
    groups = (
        Group(match="embedding", frozen=True),
        Group(match="*.bias", weight_decay=0.4),
        Group(match="query", lr_multiplier=0.25),
    )
    optimizer = SGD(peak_lr=0.5, weight_decay=0.1, clip_norm=1.0, groups=groups)
    x, g, after = flat(draw(0)), flat(draw(1)), run(optimizer)[0]
    length = np.sqrt(sum(np.sum(value**2) for path, value in g.items() if path != "embedding.table"))
    expected = {
        "embedding.table": x["embedding.table"],
        "query.bias": x["query.bias"] - 0.5 * (g["query.bias"] / length + 0.4 * x["query.bias"]),
        "query.kernel": x["query.kernel"] - 0.125 * (g["query.kernel"] / length + 0.1 * x["query.kernel"]),
        "output.kernel": x["output.kernel"] - 0.5 * (g["output.kernel"] / length + 0.1 * x["output.kernel"]),
        "norm.scale": x["norm.scale"] - 0.5 * g["norm.scale"] / length,
    }
    for path in x:
        np.testing.assert_allclose(after[path], expected[path], atol=1e-6, err_msg=path)


def test_ema_equals_its_recurrence_with_a_rising_decay() -> None:
    average = draw(0)
    expected = flat(average)
    update = jax.jit(lambda a, x, k: ema_update(a, x, 0.4, k))
    for k in range(STEPS):
        average = update(average, draw(k + 1), jnp.int32(k))
        d = min(0.4, (1 + k) / (10 + k))
        expected = {path: d * expected[path] + (1 - d) * x for path, x in flat(draw(k + 1)).items()}
    for path, x in flat(average).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(peak_lr=0.1), optax.sgd(0.1)),
        (Momentum(peak_lr=0.1), optax.sgd(0.1, 0.9)),
        (Nesterov(peak_lr=0.1), optax.sgd(0.1, 0.9, nesterov=True)),
        (Adam(peak_lr=0.1), optax.adam(0.1)),
        (LAMB(peak_lr=0.1, weight_decay=0.0), optax.lamb(0.1)),
        (Lion(peak_lr=0.1, weight_decay=0.0), optax.lion(0.1, weight_decay=0.0)),
        (Adafactor(peak_lr=0.1, min_dim_to_factor=100), optax.adafactor(0.1, min_dim_size_to_factor=100)),
    ],
)
def test_unstacked_parameters_get_the_update_of_optax(ours: Optimizer, theirs: optax.GradientTransformation) -> None:
    transformation = optax.chain(optax.clip_by_global_norm(1.0), theirs)
    params = draw(0)
    state = transformation.init(params)
    for k, actual in enumerate(run(ours)):
        updates, state = transformation.update(draw(k + 1), state, params)
        params = optax.apply_updates(params, updates)
        for path, x in flat(params).items():
            np.testing.assert_allclose(actual[path], x, rtol=1e-5, atol=1e-6, err_msg=f"{path} step {k}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(peak_lr=0.0), "peak_lr=0.0 must be a positive number"),
        (lambda: AdamW(peak_lr=1.0, weight_decay=-1.0), "weight_decay=-1.0 must be zero or a positive number"),
        (lambda: AdamW(peak_lr=1.0, beta1=1.0), r"beta1=1.0 is the decay rate of a moving average and must lie in"),
        (lambda: AdamW(peak_lr=1.0, clip_norm=0.0), "clip_norm=0.0 must be a positive number"),
        (lambda: AdamW(peak_lr=1.0, ema=1.0), "ema=1.0 must lie between 0 and 1"),
        (lambda: Muon(peak_lr=1.0, iterations=0), "iterations=0 must be at least 1"),
        (lambda: Group(match="x", lr_multiplier=-1.0), "lr_multiplier=-1.0 of group 'x' must be at least 0"),
        (lambda: SGD(peak_lr=1.0, schedule=Cosine(warmup_steps=9)).build(AXES, 9), "use at most 8"),
        (
            lambda: SGD(peak_lr=1.0, groups=(Group(match="embeding"),)).build(AXES, 9),
            "group 'embeding' matches no parameter; near are embedding",
        ),
        (
            lambda: SGD(peak_lr=1.0, groups=(Group(match="zzz*"),)).build(AXES, 9),
            "group 'zzz.' matches no parameter; there are embedding.table, query.kernel",
        ),
        (
            lambda: SGD(peak_lr=1.0, groups=(Group(match="*"), Group(match="norm"))).build(AXES, 9),
            "group 'norm' matches only what groups before it match",
        ),
        (
            lambda: Muon(peak_lr=1.0).build({"conv": {"kernel": ("width", "inner", "outer")}}, 9),
            r"cannot tell rows from columns of conv.kernel \('width', 'inner', 'outer'\)",
        ),
        (lambda: SGD(peak_lr=1.0).build(AXES, 9).init({"x": jnp.zeros(3)}), r"missing \['embedding.table'.*'x'"),
    ],
)
def test_an_impossible_optimizer_says_what_would_be_possible(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
