"""An optimizer config made into one optax.GradientTransformation, and the axes of its state."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from llmlab.optim.config import Group, Optimizer
from llmlab.optim.parameters import Parameter, describe, flatten, matches, select
from llmlab.optim.width import Fans, Growth

Tree = Mapping[str, Any]

# What every optimizer's state holds besides its rule's own.
_SHARED = {"step": jnp.int32, "learning_rate": jnp.float32, "gradient_norm": jnp.float32}


def assemble(
    optimizer: Optimizer, params_axes: dict[str, Any], total_steps: int, growth: Growth
) -> optax.GradientTransformation:
    """See `Optimizer.build`."""
    parameters = dict(flatten(describe(params_axes)))
    groups = _assign(optimizer.groups, list(parameters))
    frozen = {path for path, group in groups.items() if group.frozen}
    trained = select(describe(params_axes), lambda path: path not in frozen)
    wider = jax.tree.map(lambda p: _width_multiplier(optimizer, p, growth), trained)
    decays = jax.tree.map(lambda p, wide: _weight_decay(optimizer, p, groups.get(p.path)) / wide, trained, wider)
    factors = jax.tree.map(
        lambda p, wide: optimizer.lr_multiplier(p) * wide * (groups[p.path].lr_multiplier if p.path in groups else 1.0),
        trained,
        wider,
    )
    learning_rate = optimizer.learning_rate(total_steps)

    def decay(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, x, rate: u if _is_zero(rate) else u + rate * x, updates, params, decays)

    rule = optimizer.at_width(growth.get("embed", 1.0)).rule(trained, decay)

    def trainable(tree: Tree) -> dict[str, Any]:
        _check_paths(tree, parameters)
        return select(tree, lambda path: path not in frozen)

    def init(params: Any) -> dict[str, Any]:
        # An array for each name: one buffer under two names could not be donated.
        return {name: jnp.zeros((), dtype) for name, dtype in _SHARED.items()} | rule.init(trainable(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if params is None:
            raise ValueError("the update needs the parameters: call update(grads, state, params)")
        grads, values = trainable(updates), trainable(params)
        norm = optax.tree.norm(grads)
        if optimizer.clip_norm is not None:
            scale = optimizer.clip_norm / jnp.maximum(norm, optimizer.clip_norm)  # exactly 1 for a short gradient
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        own = {name: value for name, value in state.items() if name not in _SHARED}
        directions, own = rule.update(grads, own, values)
        rate = learning_rate(state["step"])
        steps = dict(flatten(jax.tree.map(lambda u, factor: (-rate * factor * u).astype(u.dtype), directions, factors)))
        shared = {"step": state["step"] + 1, "learning_rate": rate, "gradient_norm": norm.astype(jnp.float32)}
        return _filled(params, steps), shared | own

    return optax.GradientTransformation(init, update)


def state_axes(optimizer_state: Any, params_axes: Tree) -> dict[str, Any]:
    """Logical axis names of every array of an optimizer's state, so that it is split over devices as its parameters.

    Args:
        optimizer_state: what `init` returned, arrays or shapes (jax.eval_shape).
        params_axes: as given to `Optimizer.build`.

    Returns:
        nested dict of the structure of the state; its leaves are tuples of names. Moments have their parameter's
        names; Adafactor's rows and columns have those of the dimensions that they keep; scalars have none.
    """
    known = dict(flatten(describe(params_axes)))

    def walk(node: Tree, name: str) -> dict[str, Any]:
        if node and all(path in known for path, _ in flatten(node)):
            leaves = {path: _names(known[path], name) for path, _ in flatten(node)}
            return _filled(node, leaves)
        return {key: walk(value, key) if isinstance(value, Mapping) else () for key, value in node.items()}

    return walk(optimizer_state, "")


def ema_update(average: Tree, params: Tree, decay: float, step: Any) -> dict[str, Any]:
    """Exponential moving average of the weights after an update: d average + (1 - d) params.

    The decay d rises as (1 + step) / (10 + step) to its final value, so that the initial weights are soon forgotten.

    Args:
        average: the average so far; the initial parameters at first.
        params: the parameters after the update.
        decay: final decay, such as 0.999.
        step: number of updates before this one, 0 first; int or int32 scalar.
    """
    k = jnp.asarray(step).astype(jnp.float32)
    d = jnp.minimum(decay, (1 + k) / (10 + k))
    # a + (1 - d)(x - a): exactly a where the two agree
    return jax.tree.map(lambda a, x: a + ((1 - d) * (x - a)).astype(a.dtype), average, params)


def metrics(optimizer_state: Any) -> dict[str, Float[Array, ""]]:
    """`learning_rate` and `gradient_norm` (of all trained parameters, before clipping) of the latest update."""
    return {name: optimizer_state[name] for name in ("learning_rate", "gradient_norm")}


def _is_zero(rate: Any) -> bool:
    return not isinstance(rate, jax.Array) and rate == 0


def _width_multiplier(optimizer: Optimizer, parameter: Parameter, growth: Growth) -> float:
    return optimizer.width_multiplier(parameter, Fans.of(parameter, growth)) if growth else 1.0


def _weight_decay(optimizer: Optimizer, parameter: Parameter, group: Group | None) -> Any:
    """A number, traced where the optimizer's is."""
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return 0.0 if parameter.kind in optimizer.decay_exclude else optimizer.weight_decay


def _assign(groups: tuple[Group, ...], paths: list[str]) -> dict[str, Group]:
    """The group of every path that has one; the first that matches."""
    assigned: dict[str, Group] = {}
    for group in groups:
        matched = [path for path in paths if matches(path, group.match)]
        if not matched:
            raise ValueError(f"group {group.match!r} matches no parameter; {_nearest(group.match, paths)}")
        mine = [path for path in matched if path not in assigned]
        if not mine:
            raise ValueError(f"group {group.match!r} matches only what groups before it match; put it before them")
        assigned |= dict.fromkeys(mine, group)
    return assigned


def _nearest(pattern: str, paths: list[str]) -> str:
    """What the pattern may have meant: whole paths and what holds them."""
    parts = [path.split(".") for path in paths]
    names = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}
    near = difflib.get_close_matches(pattern, sorted(names), n=5, cutoff=0.5)
    return f"near are {', '.join(near)}" if near else f"there are {', '.join(paths)}"


def _check_paths(tree: Tree, parameters: Mapping[str, Parameter]) -> None:
    have = {path for path, _ in flatten(tree)}
    if have != parameters.keys():
        missing, unknown = sorted(parameters.keys() - have), sorted(have - parameters.keys())
        raise ValueError(f"parameters are not those the optimizer was built for: missing {missing}, unknown {unknown}")


def _filled(tree: Tree, leaves: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts of the structure of `tree` with the given leaves, zeros where there is none."""
    filled: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            filled[name] = _filled(value, leaves, f"{path}.")
        else:
            filled[name] = leaves[path] if path in leaves else jnp.zeros_like(value)
    return filled


def _names(parameter: Parameter, field: str) -> tuple[str, ...]:
    """Names of the dimensions of a state array in `field` that belongs to a parameter."""
    dims = parameter.matrix_dims
    gone = dims[1] if dims and field == "rows" else dims[0] if dims and field == "columns" else ()
    return tuple(name for i, name in enumerate(parameter.axes) if i not in gone)
