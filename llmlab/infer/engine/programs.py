"""What the engine runs on the device: a few programs with static shapes, compiled once for each bucket.

    prefill   a chunk of one prompt: stores its positions, gives its hidden states
    score     log-probabilities of a prompt's tokens, from those states
    decode    the last token of every row in, the next one out, for several steps: copies the rows that are new into
              the windows, loops on the device, puts the new positions into the blocks
    copy      blocks to other blocks (samples of one prompt part); read and write: blocks to the host and back

What requests ask of sampling is data. Stages that cost much run under a condition, and only if some row needs them
(`LEVELS`): each row gets what its own level chose, computed for the whole batch. So one program serves every mixture of
requests, and what a row gets does not depend on what the others ask for.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llmlab.infer.engine.paged import PagedCache, new_windows, refill, scatter, slots
from llmlab.infer.sampling import Choice, Counts, Logprobs, Needs, SamplingRows, choose, logprobs_of
from llmlab.infer.steps import State, Steps
from llmlab.nn.cache import KVCache
from llmlab.nn.module import Params

Pools = tuple[KVCache, ...]
Windows = tuple[KVCache, ...]


def levels(max_logprobs: int) -> tuple[Needs, ...]:
    """Kinds of rows, by what choosing their tokens takes: the first that covers a row's needs is its own."""
    max_logprobs = 1 << (max_logprobs - 1).bit_length() if max_logprobs else 0  # as Needs.of rounds
    return (
        Needs(),
        Needs(draw=True),
        Needs(draw=True, rank=True, min_p=True),
        Needs(draw=True, logprobs=max_logprobs),
        Needs(
            draw=True, rank=True, min_p=True, counts=True, bias=True, forced=True, allowed=True, logprobs=max_logprobs
        ),
    )


def covers(level: Needs, needs: Needs) -> bool:
    """Whether all stages that are needed are in the level."""
    flags = ("draw", "rank", "min_p", "counts", "bias", "forced", "allowed")
    listed = needs.logprobs is None or (level.logprobs is not None and level.logprobs >= needs.logprobs)
    return listed and all(getattr(level, flag) or not getattr(needs, flag) for flag in flags)


@dataclass(frozen=True)
class Program:
    """What all programs of an engine are compiled for; static."""

    steps: Steps
    num_tokens: int
    """Ids from here on are never drawn."""
    max_steps: int
    """Of a decoding call."""
    levels: tuple[Needs, ...]
    mesh: tuple[Any, ...] = ()
    """What tracing is told of the mesh, which is no argument: a program for another one is another program."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of a decoding call."""

    token_B: Int[Array, "B"] | np.ndarray
    """The last token of each, not stored yet."""
    position_B: Int[Array, "B"] | np.ndarray
    """Its position."""
    room_B: Int[Array, "B"] | np.ndarray
    """Tokens that the call may draw; 0 for a row that fills up the bucket."""
    stop_BE: Int[Array, "B E"] | np.ndarray
    """Tokens that end the row, padded with -1."""
    table_BW: Int[Array, "B W"] | np.ndarray
    """Its blocks."""
    level_B: Int[Array, "B"] | np.ndarray
    """Number of its level."""
    sampling: SamplingRows
    counts: Counts
    allowed_BW: Int[Array, "B M"] | UInt32[Array, "B M"] | np.ndarray | Any
    """Bitmask of the tokens that the row may draw."""
    stale_B: Int[Array, "B"] | np.ndarray
    """First those rows whose window is not that of their blocks; then anything."""
    num_stale: Int[Array, ""] | np.ndarray | np.integer
    """How many these are."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What a decoding call drew; S steps."""

    token_SB: Int[Array, "S B"]
    count_B: Int[Array, "B"]
    """How many of a row's tokens are meant."""
    finite_B: Bool[Array, "B"]
    """Whether the row's scores were numbers."""
    logprobs: Logprobs
    """(S, B, ...): zeros in rows that did not ask."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    program: Program,
    params: Params,
    pools: Pools,
    token_BS: Int[Array, "B S"],
    position_BS: Int[Array, "B S"],
    table_BW: Int[Array, "B W"],
) -> tuple[Float[Array, "B S D"], Pools]:
    """Hidden states of prompts' tokens, which are stored; position -1 is padding."""
    caches = tuple(PagedCache(pool, table_BW) for pool in pools)
    hidden_BSD, state = program.steps.step(params, State(caches), token_BS, position_BS)
    return hidden_BSD, tuple(cache.pool for cache in state.caches)


@functools.partial(jax.jit, static_argnums=0)
def score(program: Program, params: Params, hidden_BSD: Float[Array, "B S D"], next_BS: Int[Array, "B S"]) -> Logprobs:
    """Log-probabilities of the token after each position, (S, B, ...)."""

    def one(position: tuple[jax.Array, jax.Array]) -> Logprobs:  # one at a time: scores of all would not fit memory
        hidden_BD, next_B = position
        return logprobs_of(_scores(program, params, hidden_BD), next_B, _most(program))

    return jax.lax.map(one, (jnp.moveaxis(hidden_BSD, 1, 0), next_BS.T))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def windows(program: Program, num_rows: int, length: int, dtype: Any) -> Windows:
    """Windows for decoding, nothing in them."""
    return new_windows(program.steps.config, num_rows, length, dtype)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(
    program: Program,
    params: Params,
    pools: Pools,
    windows: Windows,
    rows: Rows,
    num_steps: Int[Array, ""] | np.ndarray | np.integer,
) -> tuple[Drawn, Pools, Windows]:
    """The next tokens of every row: `num_steps` at most, fewer where all rows have ended."""
    steps, num_rows = program.max_steps, len(rows.token_B)
    table_BW, start_B = jnp.asarray(rows.table_BW), jnp.asarray(rows.position_B)
    stale_B, num_stale = jnp.asarray(rows.stale_B), jnp.asarray(rows.num_stale)
    windows = refill(pools, windows, table_BW, start_B, stale_B, num_stale)

    def unfinished(loop: Any) -> jax.Array:
        step, done_B = loop[0], loop[1]
        return (step < num_steps) & ~jnp.all(done_B)

    def body(loop: Any) -> Any:
        step, done_B, token_B, counts, state, drawn = loop
        position_B = start_B + drawn.count_B
        at_B = jnp.where(done_B, -1, position_B)  # what has ended is stored nowhere and sees nothing
        hidden_BSD, state = program.steps.step(params, state, token_B[:, None], at_B[:, None])
        logits_BV = jax.lax.optimization_barrier(_scores(program, params, hidden_BSD[:, 0]))
        choice = _choose(program, rows, logits_BV, position_B + 1, counts)
        finite_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
        drawn = _noted(drawn, step, choice, finite_B, ~done_B)
        ended_B = jnp.any(choice.token_B[:, None] == rows.stop_BE, axis=1) | (drawn.count_B >= rows.room_B)
        token_B = jnp.where(done_B, token_B, choice.token_B)
        return step + 1, done_B | ended_B | ~finite_B, token_B, counts.add(choice.token_B, ~done_B), state, drawn

    most = _most(program)
    nothing = Drawn(
        token_SB=jnp.zeros((steps, num_rows), jnp.int32),
        count_B=jnp.zeros(num_rows, jnp.int32),
        finite_B=jnp.ones(num_rows, bool),
        logprobs=Logprobs(
            jnp.zeros((steps, num_rows)),
            jnp.zeros((steps, num_rows, most), jnp.int32),
            jnp.zeros((steps, num_rows, most)),
        ),
    )
    start = (jnp.int32(0), rows.room_B <= 0, rows.token_B, rows.counts, State(windows), nothing)
    *_, state, drawn = jax.lax.while_loop(unfinished, body, start)
    step_S = jnp.arange(steps)
    position_BS = jnp.where(step_S < drawn.count_B[:, None], start_B[:, None] + step_S, -1)
    pools = tuple(
        scatter(pool, slots(window, position_BS), table_BW, position_BS)
        for pool, window in zip(pools, state.caches, strict=True)
    )
    return drawn, pools, state.caches


@functools.partial(jax.jit, donate_argnums=0)
def copy(pools: Pools, source_C: Int[Array, "C"], target_C: Int[Array, "C"]) -> Pools:
    """Blocks copied to other blocks; a target that is no block is left out."""
    return jax.tree.map(lambda leaf: leaf.at[target_C].set(leaf[source_C], mode="drop"), pools)


@jax.jit
def read(pools: Pools, block_W: Int[Array, "W"]) -> Pools:
    """The content of blocks."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, block_W, axis=0, mode="clip"), pools)


@functools.partial(jax.jit, donate_argnums=0)
def write(pools: Pools, block_W: Int[Array, "W"], content: Pools) -> Pools:
    """Blocks with this content; what is no block is left out."""
    return jax.tree.map(lambda leaf, new: leaf.at[block_W].set(new, mode="drop"), pools, content)


def columns(drawn: Drawn, column_B: Sequence[int]) -> Drawn:
    """What was drawn for these rows, in host memory."""
    of_S = np.asarray(column_B, np.int64)
    return Drawn(
        drawn.token_SB[:, of_S],
        drawn.count_B[of_S],
        drawn.finite_B[of_S],
        jax.tree.map(lambda leaf: leaf[:, of_S], drawn.logprobs),
    )


def _scores(program: Program, params: Params, hidden_BD: jax.Array) -> jax.Array:
    return program.steps.project(params, hidden_BD)[:, : program.num_tokens]


def _most(program: Program) -> int:
    """Most probable tokens that are listed at most."""
    return min(max(level.logprobs or 0 for level in program.levels), program.num_tokens)


def _choose(program: Program, rows: Rows, logits_BV: jax.Array, position_B: jax.Array, counts: Counts) -> Choice:
    """The next token of every row, by its level."""
    num_rows, most = len(logits_BV), _most(program)

    def nothing() -> Choice:
        zeros_B, zeros_BN = jnp.zeros(num_rows), jnp.zeros((num_rows, most))
        return Choice(jnp.zeros(num_rows, jnp.int32), Logprobs(zeros_B, zeros_BN.astype(jnp.int32), zeros_BN))

    def by(needs: Needs) -> Choice:
        choice = choose(
            logits_BV,
            rows.sampling,
            needs,
            position_B,
            counts if needs.counts else None,
            jnp.asarray(rows.allowed_BW) if needs.allowed else None,
        )
        return choice if choice.logprobs is not None else Choice(choice.token_B, nothing().logprobs)

    def mixed() -> Choice:
        result = nothing()
        for number, needs in enumerate(program.levels):
            own_B = rows.level_B == number
            choice = jax.lax.cond(jnp.any(own_B), functools.partial(by, needs), nothing)
            result = jax.tree.map(
                lambda new, old, own_B=own_B: jnp.where(own_B.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                choice,
                result,
            )
        return result

    # Greedy rows alone, the most frequent case, ask one condition instead of one for each level.
    return jax.lax.cond(jnp.all(rows.level_B == 0), functools.partial(by, program.levels[0]), mixed)


def _noted(drawn: Drawn, step: jax.Array, choice: Choice, finite_B: jax.Array, live_B: jax.Array) -> Drawn:
    """With one more step written down."""
    assert choice.logprobs is not None
    return Drawn(
        token_SB=drawn.token_SB.at[step].set(choice.token_B),
        count_B=drawn.count_B + live_B,
        finite_B=drawn.finite_B & (finite_B | ~live_B),
        logprobs=jax.tree.map(lambda all_S, one: all_S.at[step].set(one), drawn.logprobs, choice.logprobs),
    )
