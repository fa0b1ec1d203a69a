"""A model with its layers out of their stacks: the same model, whose every weight is an array of its own.

A stack holds the weights of all layers in one array per name, which is what training wants. Decoding applies the layers
one by one, thousands of times, and a layer that is a slice of an array is copied out of it before a matmul reads it: a
step that should read every weight once, and does little else, would read it twice and write it once. Taken out before
the loop, once for a model, weights are read where they lie. With 17 million float32 parameters on 2 CPU cores that made
a step of one row 2.6 times as fast.

Matrices are laid out anew on this occasion, and joined (see `llmlab.infer.joined`).

The price is a second copy of the stacked weights, on a CPU of every matrix, for as long as the model lives. A model of
which a second copy would take more than half of the memory that its device has left keeps its stacks, and so does one
whose weights are spread over several devices.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from llmlab.infer.joined import laid_out
from llmlab.nn.module import Params, merge, split, unstack_axes
from llmlab.nn.stack import Stack


@dataclass(frozen=True)
class _Copy:
    """What was made of a model, and of which arrays."""

    graphdef: nnx.GraphDef
    params: Params
    sources: tuple["weakref.ref[jax.Array]", ...]

    def is_of(self, leaves: list[jax.Array]) -> bool:
        return len(leaves) == len(self.sources) and all(
            ref() is leaf for ref, leaf in zip(self.sources, leaves, strict=True)
        )


# Made again where a model's arrays are not those it had.
_copies: "weakref.WeakKeyDictionary[nnx.Module, _Copy]" = weakref.WeakKeyDictionary()


def unstacked(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters of a model that computes the same without stacks of parameters; the model's own
    where there is no room for a copy."""
    graphdef, params = split(model)
    leaves = jax.tree.leaves(params)
    if not _fits(model, leaves):
        return graphdef, params
    copy = _copies.get(model)
    if copy is None or not copy.is_of(leaves):
        new_graphdef = split(nnx.eval_shape(lambda: _taken_apart(merge(graphdef, params))))[0]
        with jax.ensure_compile_time_eval():  # a trace around this call ends, and the copy stays
            new_params = jax.jit(lambda params: split(_taken_apart(merge(graphdef, params)))[1])(params)
        copy = _copies[model] = _Copy(new_graphdef, new_params, tuple(weakref.ref(leaf) for leaf in leaves))
    return copy.graphdef, copy.params


def _fits(model: nnx.Module, leaves: list[Any]) -> bool:
    """Whether there are stacks, in concrete arrays on one device that has room for what is in them once more."""
    if not all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        return False
    devices = {device for leaf in leaves for device in leaf.devices()}
    stacked = sum(leaf.nbytes for stack in _stacks(model) for leaf in jax.tree.leaves(nnx.split(stack.blocks)[1]))
    if len(devices) != 1 or stacked == 0:
        return False
    stats = devices.pop().memory_stats()
    if stats is None or "bytes_limit" not in stats:  # a CPU, whose memory is the host's
        return True
    return stacked <= (stats["bytes_limit"] - stats["bytes_in_use"]) / 2


def _stacks(model: nnx.Module) -> list[Stack]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]


def _taken_apart(model: Any) -> Any:
    """The model, with all layers of every stack as what they are beyond its last whole repeat."""
    for stack in _stacks(model):
        params = [nnx.split(block)[1] for block in stack.blocks]
        layers = [_alone(layer) for layer in stack.repeats.layers(params)]
        stack.blocks, stack.remainder = nnx.List([]), nnx.List([*layers, *stack.remainder])
    return laid_out(model)


def _alone(layer: nnx.Module) -> nnx.Module:
    """A layer out of a stack, whose parameters say so."""
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, unstack_axes(state))
