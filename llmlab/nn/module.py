"""The boundary between declared modules and pure functions.

A module is built once and never mutated. At the boundary it is split into a graph definition (static, hashable) and
its parameters as a plain nested dict of arrays; inside, `merge(graphdef, params)(...)` is an ordinary pure function
that `jax.jit`, `jax.grad` and `jax.lax.scan` transform. Plain dicts are what optax, orbax and safetensors like best.
"""

from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]
"""Nested dict of arrays with string keys."""
Axes = dict[str, Any]
"""Nested dict of the same structure as Params; each leaf is a tuple of logical axis names."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters of a module."""
    graphdef, state = nnx.split(module)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters; the inverse of `split`, cheap enough for every trace."""
    return nnx.merge(graphdef, native_keys(params))


def logical_axes(module: nnx.Module) -> Axes:
    """The logical axis names of every parameter, in the structure of `split(module)[1]`."""
    state = nnx.split(module)[1]
    axes = jax.tree.map(lambda p: _Leaf(p.get_metadata("axes")), state, is_leaf=_is_variable)
    return jax.tree.map(lambda leaf: leaf.axes, _string_keys(nnx.to_pure_dict(axes)), is_leaf=_is_leaf)


def stack_axes(state: Any) -> Any:
    """Record on parameters that were stacked by `jax.vmap` that their first dimension counts layers."""

    def one(param: nnx.Variable) -> nnx.Variable:
        return param.replace(axes=("layers", *param.get_metadata("axes")))

    return jax.tree.map(one, state, is_leaf=_is_variable)


def num_parameters(params: Params) -> int:
    """How many numbers a tree of arrays (or of shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class _Leaf:
    """Keeps a tuple of names from being taken for a tree."""

    def __init__(self, axes: tuple[str, ...]) -> None:
        self.axes = axes


def _is_leaf(node: Any) -> bool:
    return isinstance(node, _Leaf)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _string_keys(tree: Any) -> Any:
    # nnx.List numbers its children with ints; checkpoints and dotted paths want strings.
    return {str(key): _string_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def native_keys(tree: Any) -> Any:
    """A tree of parameters with the keys that nnx gives them: ints for the items of a list."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: native_keys(value) for key, value in tree.items()}
