"""A sequence split over devices: who holds which tokens, and how tokens, keys or heads change hands.

    contiguous shares      device i of n holds chunk i of n                       what layers see
    zig-zag shares         device i holds chunks i and 2n - 1 - i of 2n           for causal work

Under a causal mask a late token has more keys than an early one. With contiguous shares the last device would compute
while the first has nothing left to do; an early and a late chunk together are the same work on every device (the
zig-zag order of ring attention's implementations; striped attention, Brandon et al. 2023, 2311.09431, balances by
single tokens). Going from one order to the other moves each half share once, device to device.

Everything here runs inside a `shard_map`; `axes` are the mesh axes that split the sequence, together `size` devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Axes = tuple[str, ...]
"""Mesh axes that split one dimension, the slowest first."""


def chunks(size: int, zigzag: bool) -> Int[np.ndarray, "n C"]:
    """Which chunks of the sequence each of `size` devices holds, in ascending order."""
    device = np.arange(size, dtype=np.int32)
    return np.stack([device, 2 * size - 1 - device], axis=1) if zigzag else device[:, None]


def number(axes: Axes) -> Int[Array, ""]:
    """This device's place along the axes; 0 where there are none."""
    return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def passed_on(x: jax.Array, axes: Axes, size: int, by: int = 1) -> jax.Array:
    """What the device `by` places before this one held."""
    return jax.lax.ppermute(x, axes, [(device, (device + by) % size) for device in range(size)])


def zigzag(x: Float[Array, "B S *rest"], axes: Axes, size: int) -> Float[Array, "B S *rest"]:
    """From this device's contiguous share to its zig-zag share: an early chunk and a late one.

    A contiguous share is an even chunk, 2i, and an odd one. Of the chunks i and 2n - 1 - i one is even and one is odd,
    so one permutation of the devices takes the even chunks home and another the odd ones.
    """
    even, odd = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(even, axes, _homes(size, 0))
    odd = jax.lax.ppermute(odd, axes, _homes(size, 1))
    return jnp.concatenate(_by_parity(even, odd, axes), axis=1)


def contiguous(x: Float[Array, "B S *rest"], axes: Axes, size: int) -> Float[Array, "B S *rest"]:
    """The inverse of `zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    even, odd = _by_parity(early, late, axes)
    even = jax.lax.ppermute(even, axes, [(home, device) for device, home in _homes(size, 0)])
    odd = jax.lax.ppermute(odd, axes, [(home, device) for device, home in _homes(size, 1)])
    return jnp.concatenate([even, odd], axis=1)


def _homes(size: int, parity: int) -> list[tuple[int, int]]:
    """(device, who holds its even or odd chunk in zig-zag order) for all devices."""
    return [(d, min(2 * d + parity, 2 * size - 1 - (2 * d + parity))) for d in range(size)]


def _by_parity(one: jax.Array, other: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Both on even devices, both in exchanged order on odd ones."""
    even = jax.lax.axis_index(axes) % 2 == 0
    return jnp.where(even, one, other), jnp.where(even, other, one)


def tokens_to_heads(x_BSNH: Float[Array, "B S N H"], axes: Axes) -> Float[Array, "B T M H"]:
    """From some tokens of all heads to all tokens of some heads; the devices must divide the heads."""
    return jax.lax.all_to_all(x_BSNH, axes, split_axis=2, concat_axis=1, tiled=True)


def heads_to_tokens(x_BTMH: Float[Array, "B T M H"], axes: Axes) -> Float[Array, "B S N H"]:
    """The inverse of `tokens_to_heads`."""
    return jax.lax.all_to_all(x_BTMH, axes, split_axis=1, concat_axis=2, tiled=True)
