"""Dispatch: bringing tokens to their experts and the results back, weighted.

    Dropless   rows sorted by expert, groups of any size          grouped matmul, nothing dropped
    Places     a fixed number of rows for every expert            batched matmul, overflow dropped
    Picks      the same, the experts having picked the tokens     batched matmul

The two directions are inverse gathers: row r of the buffer holds the token of one choice, and that choice knows its
row. So the gradient of one is the other, and nothing is ever scattered (slow on CPUs and TPUs alike), except by Picks,
where a token can be in as many rows as there are experts.

On a mesh the devices that share the experts out share the tokens too (GShard). What every device has gathered for the
experts of others goes to them, and the results come back: two exchanges (all-to-all) in the forward pass, two in the
backward one, of K D numbers a token each, less the share that stays. Places and Picks exchange buffers of a fixed size,
E C rows for every row of the batch, whatever is in them; XLA makes the exchange of the change of sharding. Dropless
exchanges the rows there are, in rounds with room for half as many again as even use needs (see exchange.py). Where the
devices of the experts have no tokens of their own (a batch that does not divide, or experts split over another axis),
each looks at all tokens with its own experts and the results are summed.

The hidden width may be split as well (tensor): every part makes a partial sum of each token, and these are summed over
the parts once they are back home, T D numbers instead of the K T D that came.

Shapes: B batch, S sequence, D embed, E experts, K experts per token, C places of an expert, T = B S tokens,
A = T K (or S K) choices, R rows of a buffer.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llmlab.nn.module import Params, logical_axes, merge, split
from llmlab.nn.moe.exchange import Lane, Plan, even_rows, further_rounds, lane, move, plan, to_homes, to_owners
from llmlab.nn.moe.experts import Experts
from llmlab.nn.moe.mlp import Draw
from llmlab.sharding import shard
from llmlab.sharding.rules import Placement, active_placement, active_sharding


class Assignment(abc.ABC):
    """Which experts see which tokens, with what weight."""

    @abc.abstractmethod
    def apply(self, experts: Experts, x_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S D"]:
        """Weighted sum of what its experts make of each token; dropout inside experts is active with a key."""


@dataclass(frozen=True)
class Dropless(Assignment):
    """Every token is seen by all experts that it chose."""

    expert_BSK: Int[Array, "B S K"]
    """The choices; the number of experts for none."""
    gate_BSK: Float[Array, "B S K"]
    """Weights of the choices."""

    def apply(self, experts: Experts, x_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S D"]:
        placement = active_placement()
        draw = experts.draw(key, jnp.arange(self.expert_BSK.size).reshape(self.expert_BSK.shape))
        if placement is None:
            return _sorted(experts.grouped, experts.num_experts, x_BSD, self.expert_BSK, self.gate_BSK, draw)
        return _sorted_by_each_device(experts, x_BSD, self.expert_BSK, self.gate_BSK, draw, placement)


@dataclass(frozen=True)
class Places(Assignment):
    """Every expert has the same number of places for a row's tokens."""

    choice_BEC: Int[Array, "B E C"]
    """The choice, token s's k-th being s K + k, that has a place; S K for none."""
    place_BSK: Int[Array, "B S K"]
    """The place, expert e's c-th being e C + c, that a choice has; E C for none."""
    gate_BSK: Float[Array, "B S K"]
    """Weights of the choices."""

    def apply(self, experts: Experts, x_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S D"]:
        batch, num_experts, num_places = self.choice_BEC.shape
        k = self.place_BSK.shape[-1]
        choice_BR = self.choice_BEC.reshape(batch, -1)
        draw = experts.draw(key, _in_batch(self.choice_BEC, self.place_BSK[0].size))
        rows_BRD = jax.vmap(gather_rows)(x_BSD, choice_BR // k, self.place_BSK)
        y_BRD = _batched(experts, rows_BRD.reshape(batch, num_experts, num_places, -1), draw).reshape(rows_BRD.shape)
        y_BAD = jax.vmap(gather_rows)(y_BRD, self.place_BSK.reshape(batch, -1), choice_BR[..., None])
        return _weighted(y_BAD.reshape(*self.place_BSK.shape, -1), self.gate_BSK)


@dataclass(frozen=True)
class Picks(Assignment):
    """Every expert has picked tokens of each row."""

    token_BEC: Int[Array, "B E C"]
    """The tokens; S for none."""
    gate_BEC: Float[Array, "B E C"]
    """Their weights."""

    def apply(self, experts: Experts, x_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S D"]:
        def gathered(x_SD: jax.Array, token_EC: jax.Array) -> jax.Array:
            return jnp.take(x_SD, token_EC, axis=0, mode="fill", fill_value=0)

        def scattered(x_SD: jax.Array, token_EC: jax.Array, y_ECD: jax.Array) -> jax.Array:
            return jnp.zeros(x_SD.shape, jnp.float32).at[token_EC].add(y_ECD, mode="drop")

        num_experts = experts.num_experts
        choice_BEC = self.token_BEC * num_experts + jnp.arange(num_experts)[:, None]
        draw = experts.draw(key, _in_batch(choice_BEC, x_BSD.shape[1] * num_experts))
        y_BECD = _batched(experts, jax.vmap(gathered)(x_BSD, self.token_BEC), draw)
        y_BECD = y_BECD.astype(jnp.float32) * self.gate_BEC[..., None]
        return jax.vmap(scattered)(x_BSD, self.token_BEC, y_BECD).astype(x_BSD.dtype)


Grouped = Callable[[jax.Array, jax.Array, Draw | None], jax.Array]
"""What experts make of rows sorted by expert, given how many rows each has."""


def _sorted(
    grouped: Grouped,
    num_experts: int,
    x_BSD: Float[Array, "B S D"],
    expert_BSK: Int[Array, "B S K"],
    gate_BSK: Float[Array, "B S K"],
    draw: Draw | None,
) -> Float[Array, "B S D"]:
    k = expert_BSK.shape[-1]
    groups = group(expert_BSK.reshape(-1), num_experts)
    x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
    rows_AD = gather_rows(x_TD, groups.order_A // k, groups.inverse_A.reshape(-1, k), "promise_in_bounds")
    draw = None if draw is None else draw._replace(choice=draw.choice.reshape(-1)[groups.order_A])
    y_AD = grouped(rows_AD, groups.sizes_E, draw)
    y_AD = gather_rows(y_AD, groups.inverse_A, groups.order_A[:, None], "promise_in_bounds")
    return _weighted(y_AD.reshape(*expert_BSK.shape, -1), gate_BSK)


def _sorted_by_each_device(
    experts: Experts,
    x_BSD: Float[Array, "B S D"],
    expert_BSK: Int[Array, "B S K"],
    gate_BSK: Float[Array, "B S K"],
    draw: Draw | None,
    placement: Placement,
) -> Float[Array, "B S D"]:
    """As `_sorted`, on a mesh: every device sorts its own tokens (XLA would sort those of all devices together)."""
    graphdef, params = split(experts)
    axes = logical_axes(experts)
    specs = {
        layer: {name: _spec(leaf, axes[layer][name]) for name, leaf in leaves.items()}
        for layer, leaves in params.items()
    }
    by_expert, _, by_width = (_mesh_axes(entry) for entry in specs["up"]["kernel"])
    tokens = placement.spec(("batch", "sequence", None), x_BSD.shape)
    by_token = sum((_mesh_axes(entry) for entry in tokens), ())
    exchanged = bool(by_expert) and set(by_expert) <= set(by_token)
    if not exchanged:
        tokens = _without(tokens, by_expert)
    num_experts = experts.num_experts

    def run(params: Params, x: jax.Array, expert: jax.Array, gate: jax.Array, draw: Any) -> jax.Array:
        if "bias" in params["down"]:  # every part of the width would add it
            down = params["down"] | {"bias": params["down"]["bias"] / jax.lax.axis_size(by_width)}
            params = params | {"down": down}
        draw = None if draw is None else Draw(*draw)
        if exchanged:
            there = partial(_exchanged, graphdef, params, by_expert, by_token, expert.shape)
            return _total(_sorted(there, num_experts, x, expert, gate, draw), by_width)
        mine = merge(graphdef, params)
        first = jax.lax.axis_index(by_expert) * mine.num_experts if by_expert else 0
        is_mine = (expert >= first) & (expert < first + mine.num_experts)
        expert = jnp.where(is_mine, expert - first, mine.num_experts)
        with even_rows(expert.size // jax.lax.axis_size(by_expert), expert.size):
            y = _sorted(mine.grouped, mine.num_experts, x, expert, gate, draw)
        return _total(y, (*by_expert, *by_width))

    of_draw = None if draw is None else (PartitionSpec(), tokens, PartitionSpec(by_width))
    return placement.shard_map(run, in_specs=(specs, tokens, tokens, tokens, of_draw), out_specs=tokens)(
        params, x_BSD, expert_BSK, gate_BSK, None if draw is None else tuple(draw)
    )


def _exchanged(
    graphdef: Any,
    params: Params,
    by_expert: tuple[str, ...],
    by_token: tuple[str, ...],
    shape_BSK: tuple[int, ...],
    rows_AD: Float[Array, "A D"],
    sizes_E: Int[Array, "E"],
    draw: Draw | None,
) -> Float[Array, "A D"]:
    """What the owners of the experts make of a device's rows, inside a `shard_map`."""
    (*tokens, k), num_devices = shape_BSK, jax.lax.axis_size(by_expert)
    way = lane(by_expert, num_devices, sizes_E.shape[0], math.prod(tokens), k)
    who = plan(sizes_E, by_expert)
    one = partial(_round, graphdef, way)
    with even_rows(way.home, way.room):
        y_AD = one(jnp.zeros((), jnp.int32), (params, rows_AD), (draw, who))
    if way.room < num_devices * way.pair:
        # Groups of devices that exchange nothing with each other have the same number of rounds all the same: a
        # collective in a loop that others have left may wait for them on some networks.
        num_rounds = -(-jax.lax.pmax(who.fullest, by_token) // way.room)
        y_AD = jnp.add(y_AD, further_rounds(one, num_rounds, (params, rows_AD), (draw, who)))
    return y_AD


def _round(graphdef: Any, way: Lane, number: jax.Array, numbers: Any, rest: Any) -> Float[Array, "A D"]:
    """The results of the choices whose rows the owners have room for in this round, zeros for the others."""
    (params, rows_AD), (draw, who) = numbers, rest
    now: Plan = who.round(number * way.room, way.room)
    if draw is not None:
        draw = draw._replace(choice=move(way, way.room, draw.choice[:, None], now.home, now.owned)[:, 0])
    rows_CD = to_owners(way, rows_AD, now.home, now.owned)
    y_CD = merge(graphdef, params).grouped(rows_CD, jnp.diff(now.ends_E, prepend=0), draw)
    return to_homes(way, y_CD, now.home, now.owned)


def _total(y_BSD: Float[Array, "B S D"], axes: tuple[str, ...]) -> Float[Array, "B S D"]:
    """Sum of the parts of several devices, in float32: in bfloat16 it would depend on their number."""
    return jax.lax.psum(y_BSD.astype(jnp.float32), axes).astype(y_BSD.dtype)


def _spec(leaf: jax.Array, names: tuple[str, ...]) -> PartitionSpec:
    """How a parameter comes to a device: the residual stream's width whole, gathered where fsdp splits it."""
    own = names[-leaf.ndim :]  # without "layers", which a slice of stacked parameters keeps in its names
    sharding = active_sharding(leaf.shape, *(None if name == "embed" else name for name in own))
    assert sharding is not None
    return sharding.spec


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in _mesh_axes(entry) if axis not in axes) for entry in spec))


def _batched(experts: Experts, rows_BECD: Float[Array, "B E C D"], draw: Draw | None) -> Float[Array, "B E C D"]:
    # Both ends of the exchange are named, or XLA adds up parts of all rows instead. The devices that share the tokens
    # of a row share the places.
    rows_BECD = shard(rows_BECD, "batch", None, "sequence", None)
    x_EBCD = shard(rows_BECD.swapaxes(0, 1), "experts", "batch", "sequence", None)
    draw = None if draw is None else draw._replace(choice=draw.choice.swapaxes(0, 1))
    y_EBCD = shard(experts.batched(x_EBCD, draw), "experts", "batch", "sequence", None)
    return shard(y_EBCD.swapaxes(0, 1), "batch", None, "sequence", None)


def _in_batch(choice_BEC: Int[Array, "B E C"], per_row: int) -> Int[Array, "B E C"]:
    """Numbers in the batch of choices that are numbered in their row, of which each has so many."""
    return choice_BEC + per_row * jnp.arange(choice_BEC.shape[0])[:, None, None]


def _weighted(y_BSKD: Float[Array, "B S K D"], gate_BSK: Float[Array, "B S K"]) -> Float[Array, "B S D"]:
    return jnp.sum(y_BSKD * gate_BSK[..., None], axis=2).astype(y_BSKD.dtype)


def place(
    expert_SK: Int[Array, "S K"],
    order_S: Int[Array, "S"],
    limit: Int[Array, ""],
    num_experts: int,
    num_places: int,
) -> tuple[Int[Array, "E C"], Int[Array, "S K"]]:
    """`choice_EC` and `place_SK` of a row (see Places).

    Args:
        expert_SK: the choices; the number of experts for none.
        order_S: tokens in the order in which they get places: first choices of all, then second ones, ...
        limit: places that an expert gives in this row, of the `num_places` that its buffer has.
        num_experts: E.
        num_places: C.
    """
    length, k = expert_SK.shape
    queue_A = (order_S * k + jnp.arange(k)[:, None]).reshape(-1)  # choices in the order in which they get places
    groups = group(expert_SK.reshape(-1)[queue_A], num_experts)
    number_C = jnp.arange(num_places)
    given_EC = number_C < jnp.minimum(groups.sizes_E, limit)[:, None]
    position_EC = jnp.where(given_EC, groups.starts_E[:, None] + number_C, 0)
    choice_EC = jnp.where(given_EC, queue_A[groups.order_A[position_EC]], length * k)
    queued_A = (jnp.arange(k) * length + jnp.argsort(order_S)[:, None]).reshape(-1)  # where in the queue a choice is
    expert_A = expert_SK.reshape(-1)
    number_A = groups.inverse_A[queued_A] - groups.starts_E[jnp.minimum(expert_A, num_experts - 1)]
    has_A = (expert_A < num_experts) & (number_A < limit)
    place_A = jnp.where(has_A, expert_A * num_places + number_A, num_experts * num_places)
    return choice_EC, place_A.reshape(length, k)


class Groups(NamedTuple):
    """Choices sorted by expert, stably; those of no expert last."""

    order_A: Int[Array, "A"]
    """The choice at every position of the sorted sequence."""
    inverse_A: Int[Array, "A"]
    """The position of every choice."""
    starts_E: Int[Array, "E"]
    """First position of every expert."""
    sizes_E: Int[Array, "E"]
    """How many choices fell on every expert."""


def group(expert_A: Int[Array, "A"], num_experts: int) -> Groups:
    """Sort choices by expert; numbers from `num_experts` on are none."""
    order_A = jnp.argsort(expert_A, stable=True)
    bounds = jnp.searchsorted(expert_A[order_A], jnp.arange(num_experts + 1))
    return Groups(order_A, jnp.argsort(order_A), bounds[:-1], jnp.diff(bounds))


Absent = Literal["fill", "promise_in_bounds"]
"""What an index beyond the rows gives: zeros, or there is none."""


def gather_rows(
    x_ND: Float[Array, "N D"], index_M: Int[Array, "M"], inverse_NJ: Int[Array, "N J"], absent: Absent = "fill"
) -> Float[Array, "M D"]:
    """x_ND[index_M].

    Args:
        x_ND: rows.
        index_M: the row that each result is; N for none, which gives zeros.
        inverse_NJ: all the results that each row is, M for none: where its gradient comes from.
        absent: "promise_in_bounds" where none is none, which is faster.
    """
    return _gathered(absent, x_ND, index_M, inverse_NJ)


def _gather(absent: Absent, x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array) -> jax.Array:
    return x_ND.at[index_M].get(mode=absent, fill_value=0)


def _gather_forward(
    absent: Absent, x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _gather(absent, x_ND, index_M, inverse_NJ), inverse_NJ


def _gather_backward(absent: Absent, inverse_NJ: jax.Array, dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    dx_NJD = dy_MD.at[inverse_NJ].get(mode=absent, fill_value=0)
    return jnp.sum(dx_NJD, axis=1, dtype=jnp.float32).astype(dy_MD.dtype), None, None


_gathered = jax.custom_vjp(_gather, nondiff_argnums=(0,))
_gathered.defvjp(_gather_forward, _gather_backward)
