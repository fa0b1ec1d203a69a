"""The update rules: gradients in, directions out, before weight decay and learning rate.

Each is a pair of pure functions on nested dicts of arrays, most of them optax's. What looks at a whole matrix (LAMB's
trust ratio, Adafactor's statistics, Muon's orthogonalisation) looks at each of the stacked layers alone, so stacked and
separate layers get the same update. States are plain nested dicts, where optax has NamedTuples: those are tuples, and
tuples are the leaves of trees of axis names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

from llmlab.optim.parameters import Parameter, flatten, merge, select

Tree = Mapping[str, Any]
Step = Callable[[Tree, Tree], Tree]
"""A stateless step of a rule: (updates, params) -> updates."""


@dataclass(frozen=True)
class Rule:
    """How gradients become directions; like an optax.GradientTransformation, on nested dicts only."""

    init: Callable[[Tree], dict[str, Any]]
    """params -> state, a nested dict of arrays. What mirrors parameters has their names, below one name of its own."""
    update: Callable[[Tree, dict[str, Any], Tree], tuple[Tree, dict[str, Any]]]
    """(updates, state, params) -> (updates, state)."""


# Jordan et al. 2024: a quintic whose iteration drives singular values into about [0.7, 1.2] fastest.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def sgd() -> Rule:
    """The gradient itself."""
    return Rule(lambda params: {}, lambda updates, state, params: (updates, state))


def momentum(beta: float, *, nesterov: bool) -> Rule:
    """v = beta v + g; the direction is v, or g + beta v with Nesterov's look-ahead (Sutskever et al. 2013)."""
    return from_optax(optax.trace(beta, nesterov), optax.TraceState)


def adam(beta1: float, beta2: float, epsilon: float) -> Rule:
    """m^ / (sqrt(v^) + epsilon) with bias-corrected moments (Kingma and Ba 2015, algorithm 1)."""
    return from_optax(optax.scale_by_adam(beta1, beta2, epsilon), optax.ScaleByAdamState)


def lion(beta1: float, beta2: float) -> Rule:
    """sign(beta1 m + (1 - beta1) g), then m = beta2 m + (1 - beta2) g (Chen et al. 2023, algorithm 2)."""
    return from_optax(optax.scale_by_lion(beta1, beta2), optax.ScaleByLionState)


def trust_ratio(parameters: Tree) -> Step:
    """Scale each layer's update to the norm of its parameters: |x| / |u|, 1 where either is zero (LAMB, You et al.)."""
    ratio: Any = optax.scale_by_trust_ratio()

    def one(update: jax.Array, param: jax.Array) -> jax.Array:
        return ratio.update(update, optax.EmptyState(), param)[0]

    def step(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda p, u, x: per_layer(one, p)(u, x), parameters, updates, params)

    return step


def adafactor(
    parameters: Tree,
    *,
    decay_exponent: float,
    epsilon: float,
    clip_threshold: float | None,
    min_scale: float | None,
    min_dim_to_factor: int,
    beta: float | None,
) -> Rule:
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5) without its learning rate.

    Args:
        decay_exponent: c of beta2_t = 1 - t^-c.
        epsilon: added to squared gradients.
        clip_threshold: d, the largest root mean square of an update; None for no clipping.
        min_scale: the update is multiplied by max(min_scale, RMS(x)); None for not at all.
        min_dim_to_factor: smaller matrices keep all their statistics.
        beta: decay of the mean of updates; None for no momentum.
    """

    def factored(p: Parameter, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        dims = p.matrix_dims
        sizes = [_product(shape, side) for side in dims] if dims is not None else [0]
        return dims if min(sizes) >= min_dim_to_factor else None

    def init(params: Tree) -> dict[str, Any]:
        known = dict(flatten(parameters))
        matrices = {path for path, x in flatten(params) if factored(known[path], x.shape)}

        def zeros(without: int | None) -> Callable[[Parameter, jax.Array], jax.Array]:
            def one(p: Parameter, x: jax.Array) -> jax.Array:
                dims = factored(p, x.shape)
                gone = dims[without] if dims and without is not None else ()
                return jnp.zeros([size for i, size in enumerate(x.shape) if i not in gone], x.dtype)

            return one

        split = [select(tree, lambda path: path in matrices) for tree in (parameters, params)]
        whole = [select(tree, lambda path: path not in matrices) for tree in (parameters, params)]
        state = {
            "count": jnp.zeros((), jnp.int32),
            "rows": jax.tree.map(zeros(1), *split),
            "columns": jax.tree.map(zeros(0), *split),
            "full": jax.tree.map(zeros(None), *whole),
        }
        return state if beta is None else state | {"momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(updates: Tree, state: dict[str, Any], params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        count = state["count"] + 1
        keep = 1 - count.astype(jnp.float32) ** -decay_exponent
        known, values = dict(flatten(parameters)), dict(flatten(params))
        rows, columns, full = (dict(flatten(state[name])) for name in ("rows", "columns", "full"))
        directions: dict[str, jax.Array] = {}
        for path, g in flatten(updates):
            squared = jnp.square(g) + epsilon
            dims = factored(known[path], g.shape)
            if dims is None:
                full[path] = _mean(keep, full[path], squared)
                u = g * jax.lax.rsqrt(full[path])
            else:
                rows[path] = _mean(keep, rows[path], jnp.mean(squared, dims[1]))
                columns[path] = _mean(keep, columns[path], jnp.mean(squared, dims[0]))
                u = g * _factored_rsqrt(rows[path], columns[path], dims)
            finish = per_layer(lambda u, x: _clip_and_scale(u, x, clip_threshold, min_scale), known[path])
            directions[path] = finish(u, values[path])
        new_state = {"count": count}
        new_state |= {
            name: _like(state[name], leaves) for name, leaves in (("rows", rows), ("columns", columns), ("full", full))
        }
        result = _like(updates, directions)
        if beta is not None:
            result = jax.tree.map(partial(_mean, beta), state["momentum"], result)
            new_state["momentum"] = result
        return result, new_state

    return Rule(init, update)


def muon(
    parameters: Tree,
    is_matrix: Callable[[str], bool],
    *,
    beta: float,
    nesterov: bool,
    iterations: int,
    epsilon: float,
    update_rms: float | None,
    adamw: Rule,
) -> Rule:
    """Momentum, orthogonalised by Newton-Schulz iteration; what is no matrix goes to `adamw`.

    Args:
        is_matrix: which paths are orthogonalised.
        update_rms: scale the update by this times sqrt(max(rows, columns)), which gives it this root mean square
            (Liu et al. 2025, 2502.16982, eq. 4); None for sqrt(max(1, columns / rows)) (Jordan et al. 2024).
    """
    dimensions = {
        path: optax.contrib.MuonDimensionNumbers(*p.matrix_dims) for path, p in flatten(parameters) if is_matrix(path)
    }
    numbers = _like(select(parameters, is_matrix), dimensions)
    orthogonal: Any = optax.contrib.scale_by_muon(
        _NEWTON_SCHULZ, iterations, beta, epsilon, nesterov=nesterov, weight_dimension_numbers=numbers
    )

    def scaled(update: jax.Array, dims: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
        rows, columns = (_product(update.shape, side) for side in dims)
        if update_rms is None:
            return update * max(1.0, columns / rows) ** 0.5
        return update * (update_rms * max(rows, columns) ** 0.5)

    def apart(tree: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        return select(tree, is_matrix), select(tree, lambda path: not is_matrix(path))

    def init(params: Tree) -> dict[str, Any]:
        matrices, others = apart(params)
        state = orthogonal.init(matrices)
        return {"muon": {"count": state.count, "mu": state.mu}, "adamw": adamw.init(others)}

    def update(updates: Tree, state: dict[str, Any], params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
        matrices, others = apart(updates)
        before = optax.contrib.MuonState(ns_coeffs=jnp.asarray(_NEWTON_SCHULZ), **state["muon"])
        directions, after = orthogonal.update(matrices, before)
        directions = jax.tree.map(scaled, directions, numbers)
        rest, adamw_state = adamw.update(others, state["adamw"], apart(params)[1])
        return merge(directions, rest), {"muon": {"count": after.count, "mu": after.mu}, "adamw": adamw_state}

    return Rule(init, update)


def per_layer(function: Callable[..., jax.Array], parameter: Parameter) -> Callable[..., jax.Array]:
    """A function of one layer's arrays as a function of stacked arrays."""
    for _ in range(parameter.num_stacked):
        function = jax.vmap(function)
    return function


def then(rule: Rule, *steps: Step) -> Rule:
    """A rule followed by stateless steps."""

    def update(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        updates, state = rule.update(updates, state, params)
        for step in steps:
            updates = step(updates, params)
        return updates, state

    return Rule(rule.init, update)


def from_optax(transformation: Any, state_type: type[Any]) -> Rule:
    """An optax.GradientTransformation whose state is a `state_type` (a NamedTuple) as a rule."""

    def update(updates: Tree, state: dict[str, Any], params: Tree) -> tuple[Tree, dict[str, Any]]:
        updates, new_state = transformation.update(updates, state_type(**state), params)
        return updates, new_state._asdict()

    return Rule(lambda params: transformation.init(params)._asdict(), update)


def _factored_rsqrt(
    rows: Float[Array, "..."], columns: Float[Array, "..."], dims: tuple[tuple[int, ...], tuple[int, ...]]
) -> Float[Array, "..."]:
    """1 / sqrt(V) of the rank-one estimate V = rows columns / mean(rows), in the shape of the parameter.

    The dimensions before the matrix's are the stacked ones. The product is never formed: it could underflow.
    """
    first, second = (tuple(range(len(side))) for side in dims)
    stacked = min(dims[0])
    of_rows = tuple(i + stacked for i in first)
    r = rows / jnp.mean(rows, of_rows, keepdims=True)
    r = r.reshape(*r.shape, *(1 for _ in second))
    c = columns.reshape(*columns.shape[:stacked], *(1 for _ in first), *columns.shape[stacked:])
    return jax.lax.rsqrt(r) * jax.lax.rsqrt(c)


def _clip_and_scale(
    u: Float[Array, "..."], x: Float[Array, "..."], threshold: float | None, min_scale: float | None
) -> Float[Array, "..."]:
    if threshold is not None:
        u = u / jnp.maximum(1.0, _rms(u) / threshold)
    return u if min_scale is None else u * jnp.maximum(min_scale, _rms(x))


def _mean(keep: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    return keep * old + (1 - keep) * new


def _rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _product(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    product = 1
    for dim in dims:
        product *= shape[dim]
    return product


def _like(tree: Tree, leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts of the structure of `tree` with the leaves that dotted paths name."""
    return {
        name: _like(value, leaves, f"{prefix}{name}.") if isinstance(value, Mapping) else leaves[f"{prefix}{name}"]
        for name, value in tree.items()
    }
