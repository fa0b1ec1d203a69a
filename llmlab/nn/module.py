"""The boundary between declared modules and pure functions.

A module is built once and never mutated. At the boundary it is split into a graph definition (static, hashable) and
its parameters as a plain nested dict of arrays; inside, `merge(graphdef, params)(...)` is an ordinary pure function
that `jax.jit`, `jax.grad` and `jax.lax.scan` transform. Plain dicts are what optax, orbax and safetensors like best.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from flax import nnx
from flax.nnx.rnglib import RngStream

Params = dict[str, Any]
"""Nested dict of arrays with string keys."""
Axes = dict[str, Any]
"""Nested dict of the same structure as Params; each leaf is a tuple of logical axis names, None for a dimension of
none."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters of a module."""
    graphdef, state = nnx.split(module)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters; the inverse of `split`, cheap enough for every trace."""
    return nnx.merge(graphdef, native_keys(params))


class OneKey(nnx.Rngs):
    """Gives the same key to whoever asks: for `draw`, where of each build of a module one parameter is kept."""

    def __init__(self, params: jax.Array) -> None:
        super().__init__()
        self.params = _OneKeyStream(params, tag="params")


class _OneKeyStream(RngStream):
    def __call__(self) -> jax.Array:
        return self.key[...]


class NoNumbers(OneKey):
    """For who asks for shapes alone: `normal` draws nothing from it."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers, which parameters start as a multiple of.

    Zeros where only shapes are asked for: tracing generators of numbers is half of what it takes to build a model.
    """
    return jnp.zeros(shape) if isinstance(rngs, NoNumbers) else jax.random.normal(rngs.params(), shape)


def draw(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    """Freshly drawn parameters of a module, each from a key of its own that is made of `key` and its path.

    So a parameter's first value depends on what it is called and on its shape, not on what else the model has: two
    models that differ in one part start equal in all others, and layers that are added do not change those before.
    To be traced: what is computed in the end is each parameter once.

    Args:
        build: the module, drawing from the streams that it is given.
        key: of the whole.
    """
    traced, shapes = jax.make_jaxpr(lambda key: split(build(OneKey(key)))[1], return_shape=True)(key)
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for number, (path, _) in enumerate(paths):
        name = "/".join(str(entry.key) for entry in path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        leaves.append(jex.jaxpr_as_fun(_only(traced, number))(own)[0])
    return jax.tree.unflatten(treedef, leaves)


def _only(traced: jex.ClosedJaxpr, number: int) -> jex.ClosedJaxpr:
    """The part of a traced function that one of its results needs."""
    jaxpr = traced.jaxpr
    result = jaxpr.outvars[number]
    needed, equations = ({result} if isinstance(result, jex.Var) else set()), []  # a constant needs nothing
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            equations.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, jex.Var))
    part = jaxpr.replace(eqns=equations[::-1], outvars=[result])
    return jex.ClosedJaxpr(part, traced.consts)


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


def unstack_axes(state: Any) -> Any:
    """The inverse of `stack_axes`: for parameters of one layer, sliced out of a stack."""

    def one(param: nnx.Variable) -> nnx.Variable:
        first, *axes = param.get_metadata("axes")
        assert first == "layers", f"a parameter with the axes {(first, *axes)} is out of no stack"
        return param.replace(axes=tuple(axes))

    return jax.tree.map(one, state, is_leaf=_is_variable)


def num_parameters(params: Params) -> int:
    """How many numbers a tree of arrays (or of shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class _Leaf:
    """Keeps a tuple of names from being taken for a tree."""

    def __init__(self, axes: tuple[str | None, ...]) -> None:
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
