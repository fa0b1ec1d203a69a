"""Sparse attention by lists of keys: each block of queries meets a few blocks of keys, and no other product exists.

    keys of query block i  =  shared          |  near: blocks i-m ... i+m    |  scattered
                              the same for       its neighbours in the          R blocks from anywhere, a list
                              all blocks         sequence, itself included      of its own for each head

Longformer is near + shared (Beltagy et al. 2020, 2004.05150), BigBird near + shared + scattered (Zaheer et al. 2020,
2007.14062). The parts stand side by side in one softmax; what is listed twice counts twice.

With T keys in a list the time is O(S T), whatever the length S of the sequence. Memory is O(S): a loop runs over the
blocks of queries and keeps the output and log-sum-exp of each query, and the backward pass computes the weights of
every block from them again (as in Dao et al. 2022, 2205.14135), one more matmul in seven. A whole list is in hand at
once, so no running softmax has to be corrected.

Arrays inside have the block in front, (C, B, K, tokens of the block, H): a block is then one stretch of memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.kernels.heads import products, weighted
from llmlab.nn.kernels.scoring import FORBIDDEN, Scoring, row_max
from llmlab.nn.masks import Mask
from llmlab.nn.platform import platform
from llmlab.sharding.rules import active_mesh

# Bytes of a device's logits in one step of the loop: on CPU they should stay in the cache, elsewhere fill the machine.
_STEP_BYTES, _CPU_STEP_BYTES = 2**28, 2**20


class Grid(NamedTuple):
    """How a sequence is cut into blocks; known when tracing."""

    length: int
    """Tokens of the sequence."""
    block: int
    """Tokens per block."""
    side: int
    """Near blocks on each side of a block."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the sequence, the last one perhaps partly beyond its end."""
        return -(-self.length // self.block)

    @property
    def near(self) -> int:
        """Keys in the neighbourhood of a block."""
        return (2 * self.side + 1) * self.block


def grid(length: int, block: int, reach: int) -> Grid:
    """The grid in which near blocks hold all keys up to `reach` tokens away."""
    block = min(block, length)
    return Grid(length, block, min(-(-reach // block), -(-length // block) - 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Shared:
    """Keys that the queries of every block meet."""

    k_BGKH: Float[Array, "B G K H"]
    v_BGKH: Float[Array, "B G K H"]
    index_BG: Int[Array, "B G"]
    """Their indices into the sequence."""
    real_BG: Bool[Array, "B G"]
    """False where there is none."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Rules:
    """What decides the weights besides queries and keys; nothing here has a gradient."""

    scoring: Scoring
    near: Mask
    index_BG: Int[Array, "B G"]
    real_BG: Bool[Array, "B G"]
    scattered_CKR: Int[Array, "C K R"]


class _Plan(NamedTuple):
    """Sizes known when tracing."""

    grid: Grid
    first: int
    """First block of queries that is computed."""
    together: int
    """Blocks of queries per step of the loop."""


def sparse(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    cut: Grid,
    near: Mask,
    shared: Shared | None = None,
    scattered_CKR: Int[Array, "C K R"] | None = None,
    first: int = 0,
) -> Float[Array, "B S N H"]:
    """Softmax over the list of each query, times the values; a query that may see no key of its list gets zeros.

    Args:
        q_BSNH: queries of the blocks from `first` on; the last may be partial.
        k_BTKH: keys of the whole sequence.
        v_BTKH: values.
        scoring: how logits become weights; its mask holds for all parts of a list. It has no bias.
        cut: the blocks.
        near: what else holds for near keys: the exact window, or that they are not among the shared ones.
        shared: keys for all blocks.
        scattered_CKR: for each of these blocks of queries and key/value head, R blocks of keys.
        first: the block that the first query begins.
    """
    assert scoring.bias is None and not scoring.indexed
    batch, num_queries, heads, dim = q_BSNH.shape
    kv_heads = k_BTKH.shape[2]
    count = -(-num_queries // cut.block)
    if shared is None:
        none, index = jnp.zeros((batch, 0, kv_heads, dim), k_BTKH.dtype), jnp.zeros((batch, 0), jnp.int32)
        shared = Shared(k_BGKH=none, v_BGKH=none, index_BG=index, real_BG=index > 0)
    if scattered_CKR is None:
        scattered_CKR = jnp.zeros((count, kv_heads, 0), jnp.int32)
    keys = shared.index_BG.shape[1] + cut.near + scattered_CKR.shape[2] * cut.block
    plan = _Plan(cut, first, _together(count, 4 * batch * heads * cut.block * keys))

    q = _blocks(q_BSNH.reshape(batch, num_queries, kv_heads, -1, dim), cut.block, 0).transpose(0, 1, 3, 4, 2, 5)
    k, v = (_blocks(x, cut.block, cut.side).swapaxes(2, 3) for x in (k_BTKH, v_BTKH))
    rules = _Rules(
        scoring=scoring,
        near=near,
        index_BG=shared.index_BG,
        real_BG=shared.real_BG,
        scattered_CKR=scattered_CKR,
    )
    o: jax.Array = _attend(plan, q, k, v, _across(shared.k_BGKH), _across(shared.v_BGKH), rules)
    return o.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, dim)[:, :num_queries]


def _blocks(x: jax.Array, block: int, margin: int) -> jax.Array:
    """(B, S, ...) as (C, B, block, ...), with so many empty blocks before and after."""
    batch, length, *rest = x.shape
    missing = -length % block
    x = jnp.pad(x, [(0, 0), (margin * block, margin * block + missing), *((0, 0) for _ in rest)])
    return x.reshape(batch, -1, block, *rest).swapaxes(0, 1)


def _together(count: int, step_bytes: int) -> int:
    """Of `count` blocks, how many at once: the most whose logits fit, so that all steps are of one size."""
    mesh = active_mesh()
    each = _CPU_STEP_BYTES if platform() == "cpu" else _STEP_BYTES
    limit = each * (1 if mesh is None else mesh.size) // step_bytes
    return max((n for n in range(1, count + 1) if count % n == 0 and n <= limit), default=1)


def _across(x_BGKH: jax.Array) -> jax.Array:
    return x_BGKH.swapaxes(1, 2)


class _Lists:
    """One turn of the loop: P consecutive blocks of queries and their lists of T keys."""

    def __init__(self, plan: _Plan, rules: _Rules, number: jax.Array) -> None:
        self.plan, self.rules = plan, rules
        start = number * plan.together
        self.first = plan.first + start
        self.scattered_PKR = jax.lax.dynamic_slice_in_dim(rules.scattered_CKR, start, plan.together)
        self.num_shared, self.num_scattered = rules.index_BG.shape[1], rules.scattered_CKR.shape[2]

    def take(self, x: jax.Array, shared: jax.Array) -> jax.Array:
        """Keys or values of all lists, (P, B, K, T, H)."""
        together, side = self.plan.together, self.plan.grid.side
        around = jax.lax.dynamic_slice_in_dim(x, self.first, together + 2 * side)
        parts = [jnp.broadcast_to(shared, (together, *shared.shape))] if self.num_shared else []
        parts += [around[o : o + together] for o in range(2 * side + 1)]
        if self.num_scattered:
            # vmap and not an index for the heads: a mesh can then split them
            far = jax.vmap(lambda x, blocks: x[blocks], in_axes=(2, 1), out_axes=3)(x, self.scattered_PKR + side)
            parts += list(far.swapaxes(0, 1))  # (R, P, B, K, block, H)
        return jnp.concatenate(parts, axis=3)

    def give(self, sums: tuple[jax.Array, jax.Array], lists: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds the shared and near keys of the lists to x and shared, which they were taken from.

        With `scatter` this is the transpose of `take`. H comes before the tokens.
        """
        x, shared = sums
        together, block, side = self.plan.together, self.plan.grid.block, self.plan.grid.side
        end = self.num_shared
        if self.num_shared:
            shared = shared + lists[..., :end].sum(0)
        around = jax.lax.dynamic_slice_in_dim(x, self.first, together + 2 * side)
        for o in range(2 * side + 1):
            around = around.at[o : o + together].add(lists[..., end : end + block])
            end += block
        return jax.lax.dynamic_update_slice_in_dim(x, around, self.first, 0), shared

    def rest(self, lists: jax.Array) -> jax.Array:
        """The scattered keys of the lists, (P, R, B, K, H, block)."""
        num, block = self.num_scattered, self.plan.grid.block
        far = lists[..., lists.shape[-1] - num * block :]
        return far.reshape(*lists.shape[:4], num, block).transpose(0, 4, 1, 2, 3, 5)

    def map(self, function: Callable[..., Any], *args: jax.Array) -> Any:
        """function(place, *args of one block) for all P blocks."""

        def one(block: jax.Array, scattered_KR: jax.Array, *args: jax.Array) -> Any:
            return function(_Place(self.plan.grid, self.rules, block, scattered_KR), *args)

        args = (self.first + jnp.arange(self.plan.together), self.scattered_PKR, *args)
        if self.plan.together == 1:  # matmuls with one batch dimension less
            return jax.tree.map(lambda x: x[None], one(*(x[0] for x in args)))
        return jax.vmap(one)(*args)


class _Place:
    """Where one block of queries and its list of keys stand in the sequence."""

    def __init__(self, grid: Grid, rules: _Rules, block: jax.Array, scattered_KR: jax.Array) -> None:
        tokens = jnp.arange(grid.block, dtype=jnp.int32)
        self.grid, self.rules = grid, rules
        self.query = block * grid.block + tokens
        self.near = (block - grid.side) * grid.block + jnp.arange(grid.near, dtype=jnp.int32)
        self.far_KT = (scattered_KR[:, :, None] * grid.block + tokens).reshape(scattered_KR.shape[0], -1)

    def logits(self, products_BNST: jax.Array) -> jax.Array:
        """Logits, whatever the masks say."""
        return self.rules.scoring.logits(products_BNST, self.query, self.near)

    def masked(self, logits_BNST: jax.Array) -> jax.Array:
        """Logits with FORBIDDEN where a query may not see a key, or there is none."""
        mask, (batch, heads, _, _) = self.rules.scoring.mask, logits_BNST.shape

        def all_rows(allowed_BST: jax.Array) -> jax.Array:
            return jnp.broadcast_to(allowed_BST, (batch, *allowed_BST.shape[1:]))[:, None]

        inside = (self.near >= 0) & (self.near < self.grid.length)
        parts = [all_rows((mask & self.rules.near).allowed(self.query, self.near) & inside)]
        if self.rules.index_BG.size:
            shared = mask.allowed(self.query, self.rules.index_BG) & self.rules.real_BG[:, None]
            parts.insert(0, all_rows(shared))
        if self.far_KT.size:
            far = jax.vmap(lambda kv: all_rows(mask.allowed(self.query, kv) & (kv < self.grid.length)), out_axes=1)
            parts = [jnp.broadcast_to(part, (batch, heads, *part.shape[2:])) for part in parts]
            parts.append(jnp.repeat(far(self.far_KT)[:, :, 0], heads // self.far_KT.shape[0], axis=1))
        return jnp.where(jnp.concatenate(parts, axis=-1), logits_BNST, FORBIDDEN)

    def dropped(self, weights_BNST: jax.Array) -> jax.Array:
        """Weights, or their gradient, times dropout's factor."""
        scoring, (batch, heads, _, _) = self.rules.scoring, weights_BNST.shape
        if scoring.dropout == 0.0:
            return weights_BNST
        far_NT = jnp.repeat(self.far_KT, heads // self.far_KT.shape[0], axis=0)
        parts = self.rules.index_BG[:, None], self.near[None, None], far_NT[None]
        kv = jnp.concatenate([jnp.broadcast_to(x, (batch, heads, x.shape[-1])) for x in parts], axis=-1)
        return weights_BNST * scoring.kept(self.grid.length, weights_BNST.shape, self.query, kv[:, :, None])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, shared_k: jax.Array, shared_v: jax.Array, rules: _Rules
) -> jax.Array:
    return _forward(plan, q, k, v, shared_k, shared_v, rules)[0]


def _forward(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, shared_k: jax.Array, shared_v: jax.Array, rules: _Rules
) -> tuple[jax.Array, tuple[Any, ...]]:
    def block(place: _Place, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = place.masked(place.logits(products(q, k)))
        highest = row_max(logits)
        weights = jnp.exp(logits - highest)
        mass = weights.sum(-1, keepdims=True)
        some = jnp.where(mass == 0.0, 1.0, mass)  # a query that sees no key gets zeros
        o = weighted(place.dropped(weights), v)
        return (o / some.reshape(*o.shape[:-1], 1)).astype(q.dtype), highest + jnp.log(some)

    def step(_: None, turn: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        number, q = turn
        lists = _Lists(plan, rules, number)
        return None, lists.map(block, q, lists.take(k, shared_k), lists.take(v, shared_v))

    _, (o, lse) = jax.lax.scan(step, None, _turns(plan, q))
    return o.reshape(q.shape), (q, k, v, shared_k, shared_v, rules, o, lse)


def _backward(plan: _Plan, residuals: tuple[Any, ...], do: jax.Array) -> tuple[Any, ...]:
    """With weights p and dropout's factor D: dv = (p D)^T do, dlogits = p (D (do v^T) - sum(do o))."""
    q, k, v, shared_k, shared_v, rules, o, lse = residuals
    do = do.reshape(o.shape)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).reshape(lse.shape)

    def block(place: _Place, *args: jax.Array) -> tuple[jax.Array, ...]:
        q, do, qT, doT, lse, delta, k, v = args
        logits, pull_back = jax.vjp(place.logits, products(q, k))
        weights = jnp.exp(place.masked(logits) - lse)
        (dproducts,) = pull_back(weights * (place.dropped(products(do, v)) - delta))
        return weighted(dproducts, k).astype(q.dtype), _gathered(qT, dproducts), _gathered(doT, place.dropped(weights))

    def step(sums: Any, turn: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
        number, q, *rest = turn
        lists = _Lists(plan, rules, number)
        dq, dk, dv = lists.map(block, q, *rest, lists.take(k, shared_k), lists.take(v, shared_v))
        return (lists.give(sums[0], dk), lists.give(sums[1], dv)), (dq, lists.rest(dk), lists.rest(dv))

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.swapaxes(-1, -2).shape, jnp.float32)

    number, q = _turns(plan, q)
    start = ((zeros(k), zeros(shared_k)), (zeros(v), zeros(shared_v)))
    sums, (dq, far_k, far_v) = jax.lax.scan(step, start, (number, q, do, _rows_last(q), _rows_last(do), lse, delta))
    ((dk, dshared_k), (dv, dshared_v)) = sums
    if rules.scattered_CKR.size:
        # Once for all: inside the loop, XLA copies the array that is scattered into at every turn.
        dk, dv = (_scattered(x, far, rules.scattered_CKR + plan.grid.side) for x, far in ((dk, far_k), (dv, far_v)))
    dk, dv, dshared_k, dshared_v = (x.swapaxes(-1, -2).astype(q.dtype) for x in (dk, dv, dshared_k, dshared_v))
    return dq.reshape(-1, *dq.shape[2:]), dk, dv, dshared_k, dshared_v, None


def _scattered(x: jax.Array, far: jax.Array, blocks_CKR: jax.Array) -> jax.Array:
    """x (C, B, K, H, block) with `far` (turns, P, R, B, K, H, block) added at these blocks of each head."""
    add = jax.vmap(lambda x, blocks, far: x.at[blocks].add(far), in_axes=(2, 1, 3), out_axes=2)
    return add(x, blocks_CKR, far.reshape(-1, *far.shape[2:]))


def _rows_last(x: jax.Array) -> jax.Array:
    """(..., G, S, H) as (..., H, G S)."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1]).swapaxes(-1, -2)


def _gathered(x_BKHS: jax.Array, w_BNST: jax.Array) -> jax.Array:
    batch, heads, _, rows = x_BKHS.shape
    w = w_BNST.astype(x_BKHS.dtype).reshape(batch, heads, rows, -1)
    return jax.lax.dot_general(x_BKHS, w, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)


def _turns(plan: _Plan, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Number of each turn of the loop, and its queries (P, B, K, G, S, H)."""
    turns = q.reshape(-1, plan.together, *q.shape[1:])
    return jnp.arange(turns.shape[0], dtype=jnp.int32), turns
