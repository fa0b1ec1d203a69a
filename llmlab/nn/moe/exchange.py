"""Exchange of rows between devices that each own some of the experts (expert parallelism; GShard, 2006.16668).

    home   own choices, sorted by expert    [ e0 | e1 | e2 | e3 ]        a slice for every expert, of any size
                                               |   \\    /   |
    owner  rows of its experts, e0 and e1   [ e0 of 0 | e0 of 1 | e1 of 0 | e1 of 1 | empty ]

Every device first tells all others how many rows it has for each expert (n E integers); then all know where every slice
starts, here and there. A slice goes to where its expert's rows are gathered, so rows arrive sorted by expert, and by
device within an expert: the order in which one device would have them. The way back is the same with the ends swapped,
and the gradient of one way is the other.

Shapes are static, but nobody knows how many rows will come: all the tokens of all devices may choose one expert. Room
for that would be n times what even use needs, in every activation. So there is room for `ROOM` times the even share,
and what does not fit comes in a second round, a third, ..., as many as the fullest device needs: nothing is dropped,
uneven use takes time instead of memory. Of these further rounds nothing is kept for the gradient: it computes them
again.

    travels         K D numbers a token out and K D back, and the same for the gradients, less the 1/n that stays
    room            ROOM A rows of D and of the hidden width on each device, with A = T K choices of its own
    computed        the rows there are in matmuls, the room there is elementwise

TPUs and GPUs send the slices as they are (`ragged_all_to_all`). XLA has no such operation for CPUs: there every pair of
devices exchanges as many rows as the largest slice could have.

Shapes: n devices, E experts, A rows at home, C rows of room, D width, N slices (E: of each expert at home, of each
device and own expert at the owner), M rows between two devices at most.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.platform import platform

ROOM = 1.5
"""Rows that a round has room for, over those that even use needs."""


class Slices(NamedTuple):
    """Slices of a device's rows that it exchanges, in the order of the devices at the other end."""

    start_N: Int[Array, "N"]
    """Where each starts here."""
    size_N: Int[Array, "N"]
    """Its rows."""
    there_N: Int[Array, "N"]
    """Where it starts at the other end."""


class Plan(NamedTuple):
    """Who has which rows, as one device sees it."""

    home: Slices
    """Of the own choices."""
    owned: Slices
    """Of the rows of the own experts."""
    ends_E: Int[Array, "E"]
    """Row after the last one of each own expert."""
    fullest: Int[Array, ""]
    """Rows that the device with the most has."""

    def round(self, first: jax.Array, room: int) -> "Plan":
        """The same for those rows alone that the owners have from `first` on, `room` of them."""
        start_N, size_N, there_N = self.home
        skipped_N, size_N, there_N = _cut(there_N, size_N, first, room)
        home = Slices(start_N + skipped_N, size_N, there_N)
        start_N, size_N, there_N = self.owned
        skipped_N, size_N, start_N = _cut(start_N, size_N, first, room)
        owned = Slices(start_N, size_N, there_N + skipped_N)
        return Plan(home, owned, jnp.clip(self.ends_E - first, 0, room), self.fullest)


class Lane(NamedTuple):
    """What of an exchange is known before it runs."""

    axes: tuple[str, ...]
    """Mesh axes that the experts are split over."""
    home: int
    """A."""
    room: int
    """C."""
    pair: int
    """M."""


def lane(axes: tuple[str, ...], num_devices: int, num_experts: int, num_tokens: int, k: int) -> Lane:
    """The exchange of `num_tokens` tokens of each device, which choose k different experts each."""
    pair = num_tokens * min(k, num_experts // num_devices)
    return Lane(axes, num_tokens * k, min(num_devices * pair, math.ceil(ROOM * num_tokens * k)), pair)


def even_rows(used: int, room: int) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations are named for how many of `room` rows there are if all experts are used alike: products do
    only the rows there are, so whoever counts FLOPs in a compiled program needs to know (llmlab.plan.work)."""
    return jax.named_scope(f"even_rows_{used}_of_{room}")


def plan(sizes_E: Int[Array, "E"], axes: tuple[str, ...]) -> Plan:
    """Where all slices start, from the number of rows that each device has for each expert; inside a `shard_map`."""
    count_nE = jax.lax.all_gather(sizes_E, axes)
    num_devices, num_experts = count_nE.shape
    me, own = jax.lax.axis_index(axes), num_experts // num_devices
    total_nE = jnp.sum(count_nE, axis=0).reshape(num_devices, own)  # of every owner's experts
    first_E = (jnp.cumsum(total_nE, axis=1) - total_nE).reshape(-1)
    at_owner_nE = first_E + jnp.cumsum(count_nE, axis=0) - count_nE
    at_home_nE = jnp.cumsum(count_nE, axis=1) - count_nE

    def of_mine(x_nE: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_nE, me * own, own, axis=1).reshape(-1)

    return Plan(
        Slices(at_home_nE[me], sizes_E, at_owner_nE[me]),
        Slices(of_mine(at_owner_nE), of_mine(count_nE), of_mine(at_home_nE)),
        jnp.cumsum(total_nE[me]),
        jnp.max(jnp.sum(total_nE, axis=1)),
    )


def _cut(at_N: jax.Array, size_N: jax.Array, first: jax.Array, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Slices of rows cut to a window: rows before it, rows in it, and where these start in it."""
    start_N, end_N = (jnp.clip(x - first, 0, room) for x in (at_N, at_N + size_N))
    return jnp.minimum(jnp.maximum(first - at_N, 0), size_N), end_N - start_N, start_N


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_owners(lane: Lane, rows_AD: Float[Array, "A D"], home: Slices, owned: Slices) -> Float[Array, "C D"]:
    """The rows of the own experts; zeros beyond them."""
    return move(lane, lane.room, rows_AD, home, owned)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_homes(lane: Lane, rows_CD: Float[Array, "C D"], home: Slices, owned: Slices) -> Float[Array, "A D"]:
    """The way back; zeros for choices whose rows are not among those that came."""
    return move(lane, lane.home, rows_CD, owned, home)


to_owners.defvjp(
    lambda lane, rows, home, owned: (to_owners(lane, rows, home, owned), (home, owned)),
    lambda lane, ends, dy: (to_homes(lane, dy, *ends), None, None),
)
to_homes.defvjp(
    lambda lane, rows, home, owned: (to_homes(lane, rows, home, owned), (home, owned)),
    lambda lane, ends, dy: (to_owners(lane, dy, *ends), None, None),
)


def move(lane: Lane, num_rows: int, rows_RD: jax.Array, here: Slices, there: Slices) -> jax.Array:
    """`num_rows` rows: the slices `there` that others sent, for the slices `here` that were sent to them."""
    if platform() == "cpu":
        return _padded(lane, num_rows, rows_RD, here, there)
    room = jnp.zeros((num_rows, rows_RD.shape[1]), rows_RD.dtype)
    return jax.lax.ragged_all_to_all(
        rows_RD, room, here.start_N, here.size_N, here.there_N, there.size_N, axis_name=lane.axes
    )


def _padded(lane: Lane, num_rows: int, rows_RD: jax.Array, here: Slices, there: Slices) -> jax.Array:
    """The same with slices of equal sizes, that of the largest there can be."""
    pair = min(lane.pair, lane.room)
    sent_nMD = jnp.take(rows_RD, _places(lane, pair, here, rows_RD.shape[0]), axis=0, mode="fill", fill_value=0)
    received_nMD = jax.lax.all_to_all(sent_nMD, lane.axes, 0, 0)
    room = jnp.zeros((num_rows, rows_RD.shape[1]), rows_RD.dtype)
    return room.at[_places(lane, pair, there, num_rows)].set(received_nMD, mode="drop")


def _places(lane: Lane, pair: int, slices: Slices, none: int) -> Int[Array, "n M"]:
    """Where here each of the rows is that are exchanged with a device; `none` for the empty ones."""
    start_nJ, size_nJ = (x_N.reshape(jax.lax.axis_size(lane.axes), -1) for x_N in slices[:2])
    end_nJ = jnp.cumsum(size_nJ, axis=1)
    number_M = jnp.arange(pair)
    slice_nM = jax.vmap(lambda end_J: jnp.searchsorted(end_J, number_M, side="right"))(end_nJ)
    shift_nM = jnp.take_along_axis(start_nJ - end_nJ + size_nJ, jnp.minimum(slice_nM, size_nJ.shape[1] - 1), axis=1)
    return jnp.where(number_M < end_nJ[:, -1:], shift_nM + number_M, none)


Round = Callable[[jax.Array, Any, Any], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def further_rounds(one: Round, num_rounds: Int[Array, ""], numbers: Any, rest: Any) -> jax.Array:
    """one(1, numbers, rest) + ... + one(num_rounds - 1, numbers, rest), of which nothing is kept for the gradient.

    Args:
        one: a round; may not close over arrays.
        num_rounds: how many there are, the one before these included; the same on all devices that meet in a round.
        numbers: what is differentiated.
        rest: what is not.
    """
    return sum_of_further_rounds(one, num_rounds, numbers, rest)


# Jitted for its name, as in blocked.py: how often it runs depends on data.
@partial(jax.jit, static_argnums=0)
def sum_of_further_rounds(one: Callable[..., Any], num_rounds: jax.Array, *operands: Any) -> Any:
    """See further_rounds; the results may be trees."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, num_rounds, *operands))
    return jax.lax.fori_loop(1, num_rounds, lambda i, total: jax.tree.map(jnp.add, total, one(i, *operands)), zeros)


def _further_backward(one: Round, residuals: Any, dy: jax.Array) -> tuple[None, Any, None]:
    def gradient(i: jax.Array, numbers: Any, rest: Any, dy: jax.Array) -> Any:
        return jax.vjp(lambda numbers: one(i, numbers, rest), numbers)[1](dy)[0]

    return None, sum_of_further_rounds(gradient, *residuals, dy), None


further_rounds.defvjp(lambda one, *operands: (further_rounds(one, *operands), operands), _further_backward)
