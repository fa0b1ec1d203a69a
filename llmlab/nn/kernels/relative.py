"""Flash attention on TPUs with a bias that is a function of the distance between query and key: T5's, ALiBi's.

Such a bias is a Toeplitz matrix: S + T - 1 numbers a head instead of S x T. The kernel gets the numbers. What a block
of logits needs is a window of them, laid out along the block's diagonals; the gradient of the window is the sums along
the diagonals of the block's gradient. Masks that are a matter of distance (causal, windows) are part of the same
numbers, -inf where a query may not see, and blocks that would be all -inf are neither fetched nor computed. Segments
and padding are segment ids.

The recurrence is that of FlashAttention-2 (Dao 2023, 2307.08691), in three kernels: the output; the gradients of keys
and values; those of queries and bias. In all of them keys are rows of a block and queries its columns, so that what a
query has one of (its maximum, its sum) is a row of the block's own width. Memory O(S + T), forward and backward.

XLA cannot split a Pallas kernel over devices by itself, so under an active mesh it runs in `shard_map`, each device on
its own rows and heads. A sequence that is sharded is gathered for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llmlab.nn.kernels.heads import join_heads, split_heads
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.kernels.tiles import LANES, block, foreign_mask, padded, reach, segments
from llmlab.sharding.rules import active_placement

# Rows of a TPU's registers: that many are shifted together.
_SUBLANES = 8
# The maximum of a query that has seen no key yet: finite, for -inf minus -inf is NaN.
_EMPTY = -1e30


def relative(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> Float[Array, "B S N H"]:
    """As `reference`, where `relative_lacks` finds nothing.

    Args:
        q_BSNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        scoring: how logits become weights; its bias, if any, knows `by_distance`.
        interpret: runs the kernel in Python, on any platform, for tests.
    """
    batch, num_queries, num_heads, _ = q_BSNH.shape
    q_BKGSH = padded(split_heads(q_BSNH, k_BTKH.shape[2]), 3)
    k_BKTH, v_BKTH = padded(k_BTKH.swapaxes(1, 2), 2), padded(v_BTKH.swapaxes(1, 2), 2)
    left, right = reach(scoring.mask)
    grid = _Grid(
        queries=q_BKGSH.shape[3],
        keys=k_BKTH.shape[2],
        left=left,
        right=right,
        scale=scoring.scale,
        interpret=interpret,
    )
    bias_KGR = jnp.broadcast_to(_numbers(scoring, grid), (num_heads, grid.queries + grid.keys))
    bias_KGR = bias_KGR.reshape(*q_BKGSH.shape[1:3], -1)
    ids = segments(scoring.mask, batch, num_queries, k_BTKH.shape[1])
    if ids is None:
        ids = jnp.zeros((batch, grid.queries), jnp.int32), jnp.zeros((batch, grid.keys), jnp.int32)
    run = partial(_on_one_device, grid)
    # Groups of heads are split over devices where there are too few key/value heads.
    placement = active_placement()
    if placement is not None:
        spec = placement.spec(("batch", "kv_heads", "heads", None, None), q_BKGSH.shape)
        kv, heads, rows = PartitionSpec(*spec[:2]), PartitionSpec(*spec[1:3]), PartitionSpec(spec[0])
        run = placement.shard_map(run, in_specs=(spec, kv, kv, heads, rows), out_specs=spec)
    return join_heads(run(q_BKGSH, k_BKTH, v_BKTH, bias_KGR, ids)[:, :, :, :num_queries])


def relative_lacks(scoring: Scoring, platform: str) -> str | None:
    """Why this kernel cannot compute this, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this program is for {platform}"
    if scoring.bias is not None and scoring.bias.by_distance(1, 1) is None:
        return "its biases are functions of distance"
    if scoring.dropout > 0.0:
        return "it has no dropout"
    if scoring.softcap is not None:
        return "it has no soft cap"
    if scoring.indexed:
        return "queries or keys have an index of their own (cached decoding)"
    return foreign_mask(scoring.mask)


@dataclass(frozen=True)
class _Grid:
    """How the kernels cut queries and keys into blocks, and which blocks they visit."""

    queries: int
    keys: int
    left: int | None
    """Keys before its own index that a query sees; None for all."""
    right: int | None
    """Keys after."""
    scale: float
    interpret: bool

    @property
    def rows(self) -> int:
        """Keys of a block."""
        return block(self.keys)

    @property
    def columns(self) -> int:
        """Queries of a block."""
        return block(self.queries)

    @property
    def window(self) -> int:
        """Distances that a block needs, one more than there are."""
        return self.rows + self.columns

    @property
    def num_key_blocks(self) -> int:
        return self.keys // self.rows

    @property
    def num_query_blocks(self) -> int:
        return self.queries // self.columns

    def start(self, i: Any, j: Any) -> Any:
        """First number of the window of query block i and key block j."""
        return pl.multiple_of(i * self.columns + (self.num_key_blocks - 1 - j) * self.rows, LANES)

    def keys_of(self, i: Any) -> tuple[Any, Any]:
        """First and last key block that query block i sees."""
        first = 0 if self.left is None else _div(jnp.maximum(i * self.columns - self.left, 0), self.rows)
        last = self.num_key_blocks - 1
        if self.right is not None:
            last = jnp.minimum(_div((i + 1) * self.columns - 1 + self.right, self.rows), last)
        return first, last

    def queries_of(self, j: Any) -> tuple[Any, Any]:
        """First and last query block that sees key block j."""
        first = 0 if self.right is None else _div(jnp.maximum(j * self.rows - self.right, 0), self.columns)
        last = self.num_query_blocks - 1
        if self.left is not None:
            last = jnp.minimum(_div((j + 1) * self.rows - 1 + self.left, self.columns), last)
        return first, last


def _numbers(scoring: Scoring, grid: _Grid) -> Float[Array, "#N R"]:
    """What is added to the logits, by query index minus key index from 1 - keys on, lengthened by one."""
    bias_NR = None if scoring.bias is None else scoring.bias.by_distance(grid.queries, grid.keys)
    distance = jnp.arange(1 - grid.queries, grid.keys)  # of the key from the query
    seen = jnp.ones(distance.shape, bool)
    if grid.left is not None:
        seen &= distance >= -grid.left
    if grid.right is not None:
        seen &= distance <= grid.right
    numbers_NR = jnp.where(seen, jnp.zeros((1, 1)) if bias_NR is None else bias_NR, -jnp.inf)
    return jnp.pad(numbers_NR[:, ::-1], ((0, 0), (0, 1)))


def _on_one_device(
    grid: _Grid,
    q_BKGSH: Float[Array, "B K G S H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTH: Float[Array, "B K T H"],
    bias_KGR: Float[Array, "K G R"],
    ids: tuple[Int[Array, "B S"], Int[Array, "B T"]],
) -> Float[Array, "B K G S H"]:
    """The kernels on one device's rows and heads."""
    batch, kv_heads, group, length, dim = q_BKGSH.shape
    q_BNSH = q_BKGSH.reshape(batch, kv_heads * group, length, dim)
    bias_N1R = bias_KGR.reshape(kv_heads * group, 1, -1)
    o_BNSH = _attend(grid, q_BNSH, k_BKTH, v_BKTH, bias_N1R, ids[0][:, None], ids[1][:, None])
    assert isinstance(o_BNSH, jax.Array)  # custom_vjp does not say so
    return o_BNSH.reshape(q_BKGSH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    grid: _Grid,
    q_BNSH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    bias_N1R: jax.Array,
    query_B1S: jax.Array,
    kv_B1T: jax.Array,
) -> jax.Array:
    return _forward(grid, q_BNSH, k_BKTH, v_BKTH, bias_N1R, query_B1S, kv_B1T)[0]


def _forward(grid: _Grid, *inputs: jax.Array) -> tuple[jax.Array, Any]:
    """The output, and what the gradient needs."""
    (batch, heads, _, dim), kv_heads = inputs[0].shape, inputs[1].shape[1]

    def at(b: Any, n: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n, i, jnp.clip(j, *grid.keys_of(i))

    specs = _specs(grid, dim, heads // kv_heads, at)
    o_BNHS, lse_BN1S = pl.pallas_call(
        partial(_output_kernel, grid),
        grid=(batch, heads, grid.num_query_blocks, grid.num_key_blocks),
        in_specs=[specs[name] for name in _INPUTS],
        out_specs=[specs["o"], specs["lse"]],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, dim, grid.queries), inputs[0].dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, grid.queries), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((size, grid.columns), jnp.float32) for size in (1, 1, dim)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=grid.interpret,
        name="relative_fwd",
    )(*inputs)
    o_BNSH = o_BNHS.swapaxes(2, 3)
    return o_BNSH, (inputs, o_BNSH, lse_BN1S)


def _backward(grid: _Grid, saved: Any, do_BNSH: jax.Array) -> tuple[jax.Array | None, ...]:
    """The gradients of all inputs; ids have none."""
    inputs, o_BNSH, lse_BN1S = saved
    q_BNSH, k_BKTH, v_BKTH, bias_N1R, _, _ = inputs
    (batch, heads, _, dim), kv_heads = q_BNSH.shape, k_BKTH.shape[1]
    group = heads // kv_heads
    # What the softmax takes off the gradient of a query's weights: their mean under the weights, which is do . o.
    mean_BN1S = jnp.sum(do_BNSH.astype(jnp.float32) * o_BNSH.astype(jnp.float32), axis=-1)[:, :, None]
    operands = (*inputs, do_BNSH, lse_BN1S, mean_BN1S)
    names = (*_INPUTS, "do", "lse", "mean")

    def by_key(b: Any, m: Any, j: Any, x: Any) -> tuple[Any, ...]:
        n, i = m * group + _div(x, grid.num_query_blocks), jax.lax.rem(x, grid.num_query_blocks)
        return b, n, jnp.clip(i, *grid.queries_of(j)), j

    specs = _specs(grid, dim, group, by_key)
    dk_BKTH, dv_BKTH = pl.pallas_call(
        partial(_keys_kernel, grid),
        grid=(batch, kv_heads, grid.num_key_blocks, group * grid.num_query_blocks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs["k"], specs["v"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKTH, v_BKTH)],
        scratch_shapes=[pltpu.VMEM((grid.rows, dim), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=grid.interpret,
        name="relative_dkv",
    )(*operands)

    def by_query(n: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return b, n, i, jnp.clip(j, *grid.keys_of(i))

    specs = _specs(grid, dim, group, by_query)
    dq_BNHS, dbias_N1R = pl.pallas_call(
        partial(_queries_kernel, grid),
        grid=(heads, batch, grid.num_query_blocks, grid.num_key_blocks),
        in_specs=[specs[name] for name in names],
        out_specs=[specs["o"], specs["bias"]],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, dim, grid.queries), q_BNSH.dtype),
            jax.ShapeDtypeStruct(bias_N1R.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((dim, grid.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")),
        interpret=grid.interpret,
        name="relative_dq",
    )(*operands)
    return dq_BNHS.swapaxes(2, 3), dk_BKTH, dv_BKTH, dbias_N1R, None, None


_attend.defvjp(_forward, _backward)

_INPUTS = ("q", "k", "v", "bias", "query_ids", "kv_ids")


def _specs(grid: _Grid, dim: int, group: int, at: Callable[..., tuple[Any, ...]]) -> dict[str, pl.BlockSpec]:
    """The block of every array in a step of a kernel.

    Args:
        grid: sizes of blocks.
        dim: width of a head.
        group: query heads that read one key/value head.
        at: from a step's place in the kernel's grid to row, query head, query block and key block.
    """

    def spec(shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: place(*at(*step)))

    rows, columns, numbers = grid.rows, grid.columns, grid.queries + grid.keys
    of_query = spec((None, None, columns, dim), lambda b, n, i, j: (b, n, i, 0))
    of_key = spec((None, None, rows, dim), lambda b, n, i, j: (b, _div(n, group), j, 0))
    number = spec((None, None, 1, columns), lambda b, n, i, j: (b, n, 0, i))
    return {
        "q": of_query,
        "k": of_key,
        "v": of_key,
        "bias": spec((None, 1, numbers), lambda b, n, i, j: (n, 0, 0)),
        "query_ids": spec((None, 1, columns), lambda b, n, i, j: (b, 0, i)),
        "kv_ids": spec((None, 1, rows), lambda b, n, i, j: (b, 0, j)),
        "o": spec((None, None, dim, columns), lambda b, n, i, j: (b, n, 0, i)),
        "do": of_query,
        "lse": number,
        "mean": number,
    }


def _output_kernel(
    grid: _Grid, q: Any, k: Any, v: Any, bias: Any, query_ids: Any, kv_ids: Any, o: Any, lse: Any, *scratch: Any
) -> None:
    """Output and logarithm of the sum of exponentials of a block of queries, one block of keys after the other."""
    top, total, mix = scratch  # of what was seen so far: maximum, sum of exp(logit - maximum), the same times values
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, _EMPTY, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mix[...] = jnp.zeros(mix.shape, jnp.float32)

    @pl.when(_within(j, *grid.keys_of(i)))
    def _() -> None:
        logits_TS = _logits(grid, i, j, q, k, bias, query_ids, kv_ids)
        old = top[...]
        top[...] = jnp.maximum(old, logits_TS.max(0, keepdims=True))
        shrink, weights_TS = jnp.exp(old - top[...]), jnp.exp(logits_TS - top[...])
        total[...] = shrink * total[...] + weights_TS.sum(0, keepdims=True)
        mix[...] = shrink * mix[...] + _product(v[...], weights_TS.astype(v.dtype), 0, 0)

    @pl.when(j == grid.num_key_blocks - 1)
    def _() -> None:
        some = jnp.where(total[...] == 0.0, 1.0, total[...])  # a query that sees no key has zeros
        o[...] = (mix[...] / some).astype(o.dtype)
        lse[...] = top[...] + jnp.log(some)


def _keys_kernel(
    grid: _Grid,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    query_ids: Any,
    kv_ids: Any,
    do: Any,
    lse: Any,
    mean: Any,
    dk: Any,
    dv: Any,
    *scratch: Any,
) -> None:
    """Gradients of a block of keys and values, one block of queries after the other, for all heads that read them."""
    of_keys, of_values = scratch
    j, x = pl.program_id(2), pl.program_id(3)
    i = jax.lax.rem(x, grid.num_query_blocks)

    @pl.when(x == 0)
    def _() -> None:
        of_keys[...] = jnp.zeros(of_keys.shape, jnp.float32)
        of_values[...] = jnp.zeros(of_values.shape, jnp.float32)

    @pl.when(_within(i, *grid.queries_of(j)))
    def _() -> None:
        weights_TS, change_TS = _weights_and_change(grid, i, j, q, k, v, bias, query_ids, kv_ids, do, lse, mean)
        of_values[...] += _product(weights_TS.astype(do.dtype), do[...], 1, 0)
        of_keys[...] += _product(change_TS.astype(q.dtype), q[...], 1, 0)

    @pl.when(x == pl.num_programs(3) - 1)
    def _() -> None:
        dk[...] = (of_keys[...] * grid.scale).astype(dk.dtype)
        dv[...] = of_values[...].astype(dv.dtype)


def _queries_kernel(
    grid: _Grid,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    query_ids: Any,
    kv_ids: Any,
    do: Any,
    lse: Any,
    mean: Any,
    dq: Any,
    dbias: Any,
    of_queries: Any,
) -> None:
    """Gradients of a block of queries, one block of keys after the other; of the bias, one sum for all of a head."""
    b, i, j = (pl.program_id(dim) for dim in (1, 2, 3))

    @pl.when((b == 0) & (i == 0) & (j == 0))
    def _() -> None:
        dbias[...] = jnp.zeros(dbias.shape, jnp.float32)

    @pl.when(j == 0)
    def _() -> None:
        of_queries[...] = jnp.zeros(of_queries.shape, jnp.float32)

    @pl.when(_within(j, *grid.keys_of(i)))
    def _() -> None:
        _, change_TS = _weights_and_change(grid, i, j, q, k, v, bias, query_ids, kv_ids, do, lse, mean)
        of_queries[...] += _product(k[...], change_TS.astype(k.dtype), 0, 0)
        dbias[:, pl.ds(grid.start(i, j), grid.window)] += _diagonal_sums(change_TS)

    @pl.when(j == grid.num_key_blocks - 1)
    def _() -> None:
        dq[...] = (of_queries[...] * grid.scale).astype(dq.dtype)


def _div(x: Any, size: int) -> Any:
    """x // size for what is not negative; of others TPU kernels would have to know for which chip they are compiled."""
    return jax.lax.div(x, size)


def _within(x: Any, first: Any, last: Any) -> Any:
    return (x >= first) & (x <= last)


def _product(a: jax.Array, b: jax.Array, dim_a: int, dim_b: int) -> jax.Array:
    """Products summed over these dimensions, in float32."""
    return jax.lax.dot_general(a, b, (((dim_a,), (dim_b,)), ((), ())), preferred_element_type=jnp.float32)


def _logits(grid: _Grid, i: Any, j: Any, q: Any, k: Any, bias: Any, query_ids: Any, kv_ids: Any) -> Float[Array, "T S"]:
    """Logits of query block i and key block j, -inf where a query may not see a key."""
    numbers = bias[:, pl.ds(grid.start(i, j), grid.window)]
    logits_TS = _product(k[...], q[...], 1, 1) * grid.scale + _on_diagonals(numbers, grid.rows, grid.columns)
    kv_T1 = jnp.broadcast_to(kv_ids[...], (LANES, grid.rows)).T[:, :1]
    return jnp.where(kv_T1 == query_ids[...], logits_TS, -jnp.inf)


def _weights_and_change(
    grid: _Grid, i: Any, j: Any, q: Any, k: Any, v: Any, bias: Any, query_ids: Any, kv_ids: Any, *saved: Any
) -> tuple[Float[Array, "T S"], Float[Array, "T S"]]:
    """Weights of query block i and key block j, and the gradient of their logits."""
    do, lse, mean = saved
    weights_TS = jnp.exp(_logits(grid, i, j, q, k, bias, query_ids, kv_ids) - lse[...])
    return weights_TS, weights_TS * (_product(v[...], do[...], 1, 1) - mean[...])


def _on_diagonals(numbers_1W: Float[Array, "1 W"], rows: int, columns: int) -> Float[Array, "T S"]:
    """The block whose row t and column s hold number s - t + rows - 1."""
    width = numbers_1W.shape[1]
    base = _sheared(jnp.broadcast_to(numbers_1W, (_SUBLANES, width)))
    parts = [pltpu.roll(base, (first + 1 - rows) % width, 1)[:, :columns] for first in range(0, rows, _SUBLANES)]
    return jnp.concatenate(parts, axis=0)


def _diagonal_sums(x_TS: Float[Array, "T S"]) -> Float[Array, "1 W"]:
    """The transpose of `_on_diagonals`: number s - t + rows - 1 is the sum over all such rows t and columns s."""
    rows, columns = x_TS.shape
    total = jnp.zeros((_SUBLANES, rows + columns), jnp.float32)
    for first in range(0, rows, _SUBLANES):
        part = jnp.pad(x_TS[first : first + _SUBLANES], ((0, 0), (0, rows)))
        total += pltpu.roll(part, rows - _SUBLANES - first, 1)
    return _sheared(total, reverse=True).sum(0, keepdims=True)


def _sheared(x_8W: Float[Array, "8 W"], reverse: bool = False) -> Float[Array, "8 W"]:
    """Row r shifted right by r, or in reverse the last row by 0 and the first by 7."""
    shift = jax.lax.broadcasted_iota(jnp.int32, x_8W.shape, 0)
    shift = _SUBLANES - 1 - shift if reverse else shift
    for bit in (1, 2, 4):
        x_8W = jnp.where(shift & bit != 0, pltpu.roll(x_8W, bit, 1), x_8W)
    return x_8W
