"""Layers whose weights wait in the host's memory: for a model that is larger than the device's.

    device   embedding, head, keys and values, the layers that stay       | a place for one layer
    host     the weights of the last layers, pinned  ---- over the bus, when a layer is applied ---->

`offload` takes a model out of its stacks (see `llmlab.infer.unstacked`) and leaves the arrays of N layers in memory of
the host that the device can read. What comes out is a model like any other, for `llmlab.generate`, the engine and the
rest: each of these layers fetches its weights where it is applied, and they are given up after. The arithmetic is that
of the same layer, and so is the result: in float32 to the bit where the matmuls are the same. In bfloat16 compilers
leave unrounded what goes from one operation straight to the next, which the edge of a fetched layer prevents: the last
bit may differ, unless XLA is told to round as written (xla_allow_excess_precision).

The price: every step, and every piece of a prompt, moves all bytes of the N layers over the bus, whatever the number of
rows. A bus gives 25 to 60 GB/s where the device's memory gives 1,000 to 4,000, so a step takes at least

    bytes of N layers / speed of the bus        (0.4 GB a layer of 8 billion bfloat16 parameters in 32: 8 to 16 ms)

and many rows share it: throughput suffers less than one row's speed. Offload no more layers than have to go. It is
faster than the alternative only where the alternative is not to run at all; bfloat16 weights halve the model first.

A layer's transfer is tied to the layer's input. Without that the compiler could fetch all layers at once, or once
before a loop of steps instead of in it, and then all weights would be on the device after all. For the same reason none
is fetched ahead: next to its transfer the arithmetic of a layer takes no time that would be worth hiding.

On GPUs XLA pins 64 GB of the host's memory at most, or as many as XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says.

What an encoder or a vision tower reads is read once for a text, so their layers are the last: they are the first to go.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from llmlab.infer.joined import laid_out
from llmlab.nn.config import Auxiliary, Context, LayerCache
from llmlab.nn.module import merge, split, unstack_axes
from llmlab.nn.reversible import ReversibleStack
from llmlab.nn.stack import Stack
from llmlab.sharding.memory import DEVICE, HOST, check_host_memory

# Parts of a model that read what is given, once, before the first step.
_READERS = ("encoder", "vision")


class OffloadedLayer(nnx.Module):
    """A layer of a stack that fetches its weights when it is applied, inside a compiled program.

    Args:
        layer: with its parameters in the host's memory.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | None, Auxiliary]:
        graphdef, params = split(self.layer)
        # The barrier: no transfer begins before the layer's input is there, and none can leave a loop that changes it.
        params, x_BSD = jax.lax.optimization_barrier((params, x_BSD))
        return merge(graphdef, jax.device_put(params, jax.memory.Space.Device))(x_BSD, context, key, cache)


def offload(model: nnx.Module, num_layers: int, *, setting: str = "num_layers") -> Any:
    """The model with the weights of its last layers in the host's memory, and all others on the device.

    Layers are placed one by one: no more of the model is ever on the device than stays there, and one layer twice. So a
    model that the device has no room for is loaded to the host's memory first: `llmlab.load(path, host=True)`.

    Args:
        model: with layers in stacks, its parameters in NumPy arrays or on one device. It is left as it is; drop it to
            free its own arrays.
        num_layers: how many layers' weights wait in the host's memory, 0 to all. Counted from the end: of an encoder or
            a vision tower first, then of what writes.
        setting: what the number is called, for messages.

    Raises:
        ValueError: the model has not so many layers, or has them in no stack; it is on several devices; or its device
            does not reach the host's memory.
    """
    device = _device(model, setting)
    check_offload(model, num_layers, setting=setting)
    if num_layers:
        check_host_memory([device], f"{setting}={num_layers}")
    here, host = (jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in (DEVICE, HOST))
    rest = merge(*split(model))  # modules of its own, the same arrays
    waiting = sum(stack.num_layers for stack in _stacks(rest)) - num_layers
    of_stacks: list[list[nnx.Module]] = []
    for stack in _stacks(rest):
        layers: list[nnx.Module] = []
        for layer in _layers(stack):
            stays, waiting = waiting > 0, waiting - 1
            layers.append(_placed(layer, here) if stays else OffloadedLayer(_placed(layer, here, host)))
        of_stacks.append(layers)
        stack.blocks, stack.remainder = nnx.List([]), nnx.List([])
    rest = _placed(rest, here)
    for stack, layers in zip(_stacks(rest), of_stacks, strict=True):
        stack.remainder = nnx.List(layers)
    return rest


def check_offload(model: nnx.Module, num_layers: int, *, setting: str = "num_layers") -> None:
    """Raises ValueError where `offload` would for what the model is; its parameters may be shapes."""
    stacks = _stacks(model)
    if not stacks or any(isinstance(stack, ReversibleStack) for stack in stacks):
        why = "has two streams, and its layers are applied by halves" if stacks else "has no stack of layers"
        raise ValueError(f"{setting}={num_layers}: a {type(model).__name__} {why}; leave it out for this model")
    if any(isinstance(layer, OffloadedLayer) for stack in stacks for layer in stack.remainder):
        raise ValueError(
            f"{setting}={num_layers}: the model has layers in the host's memory already; give the original"
        )
    total = sum(stack.num_layers for stack in stacks)
    if not 0 <= num_layers <= total:
        raise ValueError(f"{setting}={num_layers} is not between 0 and the {total} layers of the model")


def offloaded_bytes(model: nnx.Module) -> Sequence[int]:
    """Bytes of every layer that waits in the host's memory; the largest is what the device needs room for."""
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, OffloadedLayer)]
    return [sum(leaf.nbytes for leaf in jax.tree.leaves(split(layer)[1])) for layer in layers]


def _device(model: nnx.Module, setting: str) -> Any:
    """The one that the model is on, or will be."""
    leaves = jax.tree.leaves(split(model)[1])
    devices = {device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
    if len(devices) > 1:
        raise ValueError(
            f"{setting}: the model's weights are on {len(devices)} devices, and layers are offloaded from one; spread "
            "them over devices or offload them, not both"
        )
    return devices.pop() if devices else jax.local_devices()[0]


def _stacks(model: nnx.Module) -> list[Stack]:
    """Those that every step applies, then those that read what is given."""
    found = [(path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    return [stack for _, stack in sorted(found, key=lambda one: any(part in _READERS for part in one[0]))]


def _layers(stack: Stack) -> Iterator[nnx.Module]:
    """Every layer, first to last, in slices of the stacked arrays; of NumPy arrays these are views."""
    blocks = [nnx.split(block) for block in stack.blocks]
    for repeat in range(stack.repeats.num):
        for graphdef, stacked in blocks:
            state = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], stacked)
            yield nnx.merge(graphdef, unstack_axes(state))
    yield from stack.remainder


def _placed(module: Any, *places: jax.sharding.Sharding) -> Any:
    """A module with its parameters in the last of these places; they are laid out in the first."""
    graphdef, params = split(module)
    graphdef, params = split(laid_out(merge(graphdef, jax.device_put(params, places[0]))))
    params = jax.device_put(params, places[-1])
    return merge(graphdef, jax.block_until_ready(params))  # else many layers could be on their way at once
