"""The programs of generation: prefill in chunks, the first token, and a loop on the device for all that follow.

    prefill   the tokens that are given, `CHUNK` positions at a time: however long the prompt, no program is longer
    first     the first new token, from the last hidden state of every row
    decode    a loop of steps, each: the last token in, scores, the next token out; it ends when its steps are done or,
              but on GPUs, no row is left

Python only sees a token after the loop has given it back, a handful of steps at a time, and by then the next handful is
under way (`one_ahead`).

Shapes are static and few: the number of rows is a power of two, prompts are right-padded to a power of two (or to full
chunks and a power of two), caches have room for one of four lengths from each power of two to the next. So a program is
compiled once for each pair of such buckets, however many prompts follow; what requests ask for is data (see
`llmlab.infer.sampling`).

A row that has ended stays in its place: the loop goes on writing its last position again and again, which nobody looks
at. Rows that fill up a batch have ended from the beginning.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmlab.infer.sampling import Choice, Counts, Logprobs, Needs, SamplingRows, choose, logprobs_of
from llmlab.infer.steps import State, Steps
from llmlab.nn.module import Params
from llmlab.nn.platform import platform

CHUNK = 512
"""Positions of a prompt in one program."""
_SMALLEST_BUCKET = 64
_NO_ID = -1

Result = TypeVar("Result")


def bucket(length: int, limit: int | None, smallest: int = _SMALLEST_BUCKET) -> int:
    """The static length that `length` is padded to: a power of two, at most `limit`."""
    size = max(smallest, 1 << (length - 1).bit_length())
    return size if limit is None else min(size, limit)


def room(length: int, limit: int | None) -> int:
    """The static length of caches that hold `length` positions: four for each doubling, not one, for every step reads
    them to their end."""
    step = max(_SMALLEST_BUCKET // 2, bucket(length, None) // 8)
    size = max(_SMALLEST_BUCKET, -(-length // step) * step)
    return size if limit is None else min(size, limit)


def chunks(length: int, limit: int | None) -> tuple[int, ...]:
    """Lengths of the pieces that a prompt is given in: whole chunks, and a bucket for what is left."""
    if length == 1:  # nothing but a token to start from, as of every encoder-decoder
        return (1,)
    whole, rest = divmod(length, CHUNK)
    sizes = [CHUNK] * whole
    if rest:
        sizes.append(bucket(rest, CHUNK if limit is None else min(CHUNK, limit - whole * CHUNK)))
    return tuple(sizes)


def one_ahead(calls: Iterable[Result]) -> Iterator[Result]:
    """The same, but always with the next one begun: a device works on it while the last result is looked at."""
    calls = iter(calls)
    current = next(calls, None)
    while current is not None:
        following = next(calls, None)
        yield current
        current = following


@dataclass(frozen=True)
class Shape:
    """The static lengths of a batch, besides the number of its rows."""

    chunks: tuple[int, ...]
    """In which the prompts are given."""
    cache: int
    """Positions that the caches have room for."""

    @classmethod
    def of(cls, prompt: int, new: int, limit: int | None, *, whole: bool = False) -> "Shape":
        """For prompts of at most `prompt` tokens, given at once or in chunks, and at most `new` more."""
        pieces = (bucket(prompt, limit),) if whole else chunks(prompt, limit)
        return cls(pieces, room(max(prompt + new, sum(pieces)), limit))


@dataclass(frozen=True)
class Program:
    """What the programs of a batch are compiled for: static, hashable."""

    steps: Steps
    needs: Needs
    num_tokens: int | None
    """Ids from here on are never drawn: a model's vocabulary is rounded up, and its last rows are no tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """Where the rows of a batch are."""

    token_B: Int[Array, "B"]
    """The last token, not yet given to the model."""
    position_B: Int[Array, "B"]
    """Its position."""
    done_B: Bool[Array, "B"]
    counts: Counts | None
    state: State


@dataclass
class Batch:
    """Rows that are decoded together, from their prompts on.

    Rows of one prompt (its samples) share its prefill: `prompt_of` tells which prompt each row continues.
    """

    program: Program
    params: Params
    prompts: Sequence[Sequence[int]]
    """What is given, per prompt, at least one token."""
    prompt_of: Sequence[int]
    """Per row, the number of its prompt."""
    rows: SamplingRows
    """As many as the number of rows is padded to."""
    shape: Shape
    num_prompts: int
    """What the number of prompts is padded to."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row."""
    inputs: Mapping[str, Any] | None = None
    """What the model is given besides, `num_prompts` rows each."""
    dtype: Any = jnp.float32
    """Of keys and values."""
    prompt_logprobs: int | None = None
    """Keep the log-probabilities of the prompts' own tokens, and of this many alternatives; None for none."""
    given: list[Logprobs] = field(default_factory=list)
    """Those, per chunk: of the token after each position."""
    _carry: Carry | None = None

    def first(self, allowed: np.ndarray | None = None) -> Choice:
        """The first new token of every row; `allowed` as in `choose`."""
        last_BD, state = self._prefill()
        rows_R = np.zeros(len(self.rows.start_B), np.int32)
        rows_R[: len(self.prompt_of)] = self.prompt_of
        last_BD, state = _spread(last_BD, state, rows_R)
        counts = None
        if self.program.needs.counts:
            num_scores = self.program.steps.num_scores
            num_tokens = min(self.program.num_tokens or num_scores, num_scores)
            counts = Counts.of([self.prompts[int(prompt)] for prompt in rows_R], num_tokens)
        real_B = np.arange(len(rows_R)) < len(self.prompt_of)
        choice, self._carry = _first(
            self.program, self.params, last_BD, state, self.rows, self._stop(), counts, real_B, allowed
        )
        return choice

    def more(self, num_steps: int, done: np.ndarray, allowed: np.ndarray | None = None) -> tuple[Choice, jax.Array]:
        """Up to `num_steps` further tokens of every row, and how many there are: less where all rows have ended.

        `done` are rows that ended for reasons of the caller's. Of a row that has ended, further tokens mean nothing.
        Both are on the device and may not be computed yet: see `one_ahead`.
        """
        assert self._carry is not None
        choices, count, self._carry = _decode(
            self.program, num_steps, self.params, self._carry, self.rows, self._stop(), done, allowed
        )
        return choices, count

    def _stop(self) -> np.ndarray:
        stop_E = np.full(max(4, 1 << max(0, len(self.stop_ids) - 1).bit_length()), _NO_ID, np.int32)
        stop_E[: len(self.stop_ids)] = self.stop_ids
        return stop_E

    def _prefill(self) -> tuple[jax.Array, State]:
        """The last hidden state of every prompt, and the state with all prompts in it."""
        token_BS = np.zeros((self.num_prompts, sum(self.shape.chunks) + 1), np.int32)
        length_B = np.ones(self.num_prompts, np.int32)
        for number, prompt in enumerate(self.prompts):
            token_BS[number, : len(prompt)] = prompt
            length_B[number] = len(prompt)
        inputs = dict(self.inputs) if self.inputs else None
        state: Any = _new_state(self.program.steps, self.num_prompts, self.shape.cache, self.dtype, inputs)
        last_BD, start = None, 0
        for size in self.shape.chunks:
            last_BD, state, given = _prefill(
                self.program.steps,
                self.program.num_tokens,
                self.prompt_logprobs,
                self.params,
                state,
                token_BS[:, start : start + size + 1],
                np.int32(start),
                length_B,
                last_BD,
                inputs if start == 0 else None,
            )
            if given is not None:
                self.given.append(jax.device_get(given))
            start += size
        assert last_BD is not None
        return last_BD, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _new_state(steps: Steps, num_rows: int, length: int, dtype: Any, inputs: Any) -> State:
    return steps.new_state(num_rows, length, dtype, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _prefill(
    steps: Steps,
    num_tokens: int | None,
    top: int | None,
    params: Params,
    state: State,
    token_BS: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
    last_BD: jax.Array | None,
    inputs: Any,
) -> tuple[jax.Array, State, Logprobs | None]:
    """A chunk of the prompts and the token after it; `last_BD` is None, and inputs are given, for the first."""
    num_rows, size = token_BS.shape[0], token_BS.shape[1] - 1
    position_BS = jnp.broadcast_to(start + jnp.arange(size), (num_rows, size))
    position_BS = jnp.where(position_BS < length_B[:, None], position_BS, -1)  # padding is remembered by no cache
    if last_BD is None:
        hidden_BSD, state = steps.prefill(params, state, token_BS[:, :-1], position_BS, inputs)
    else:
        hidden_BSD, state = steps.step(params, state, token_BS[:, :-1], position_BS)
    at_B = length_B - 1 - start
    inside_B = (at_B >= 0) & (at_B < size)
    here_BD = jnp.take_along_axis(hidden_BSD, jnp.clip(at_B, 0, size - 1)[:, None, None], axis=1)[:, 0]
    last_BD = here_BD if last_BD is None else jnp.where(inside_B[:, None], here_BD, last_BD)
    if top is None:
        return last_BD, state, None

    def after(position: tuple[jax.Array, jax.Array]) -> Logprobs:  # one at a time: scores of all would not fit memory
        hidden_BD, next_B = position
        return logprobs_of(steps.project(params, hidden_BD)[:, :num_tokens], next_B, top)

    return last_BD, state, jax.lax.map(after, (jnp.moveaxis(hidden_BSD, 1, 0), token_BS[:, 1:].T))


@jax.jit
def _spread(last_BD: jax.Array, state: State, row_R: jax.Array) -> tuple[jax.Array, State]:
    """The rows that the samples of a prompt begin with."""
    return jnp.take(last_BD, row_R, axis=0), state.take(row_R)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _first(
    program: Program,
    params: Params,
    last_BD: Float[Array, "B D"],
    state: State,
    rows: SamplingRows,
    stop_E: jax.Array,
    counts: Counts | None,
    real_B: jax.Array,
    allowed_BW: jax.Array | None,
) -> tuple[Choice, Carry]:
    """The first new token of every row; rows that are not real have ended."""
    start_B = jnp.asarray(rows.start_B)
    before = Carry(jnp.zeros_like(start_B), start_B - 1, ~real_B, counts, state)
    return _chosen(program, params, last_BD, before, rows, stop_E, allowed_BW)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(
    program: Program,
    num_steps: int,
    params: Params,
    carry: Carry,
    rows: SamplingRows,
    stop_E: jax.Array,
    done_B: jax.Array,
    allowed_BW: jax.Array | None,
) -> tuple[Choice, jax.Array, Carry]:
    """Choices with the steps in front, how many there are, and where the rows are then."""
    carry = replace(carry, done_B=carry.done_B | done_B)

    def step(carry: Carry) -> tuple[Choice, Carry]:
        positions = carry.position_B[:, None]
        hidden_BSD, state = program.steps.step(params, carry.state, carry.token_B[:, None], positions)
        return _chosen(program, params, hidden_BSD[:, 0], replace(carry, state=state), rows, stop_E, allowed_BW)

    def unfinished(loop: tuple[jax.Array, Choice, Carry]) -> jax.Array:
        count, _, carry = loop
        return (count < num_steps) & ~jnp.all(carry.done_B)

    def body(loop: tuple[jax.Array, Choice, Carry]) -> tuple[jax.Array, Choice, Carry]:
        count, written, carry = loop
        choice, carry = step(carry)
        written = jax.tree.map(lambda all_N, one: all_N.at[count].set(one), written, choice)
        return count + 1, written, carry

    if platform() == "gpu":  # before every step of another loop the host would wait to hear whether to go on

        def one_more(carry: Carry, _: None) -> tuple[Carry, Choice]:
            choice, carry = step(carry)
            return carry, choice

        carry, written = jax.lax.scan(one_more, carry, length=num_steps)
        return written, jnp.int32(num_steps), carry

    one = jax.eval_shape(step, carry)[0]
    written = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), one)
    count, written, carry = jax.lax.while_loop(unfinished, body, (jnp.int32(0), written, carry))
    return written, count, carry


def _chosen(
    program: Program,
    params: Params,
    hidden_BD: jax.Array,
    carry: Carry,
    rows: SamplingRows,
    stop_E: jax.Array,
    allowed_BW: jax.Array | None,
) -> tuple[Choice, Carry]:
    """The next token of every row from its hidden state, and where the rows are with it."""
    # The barrier keeps the model's arithmetic out of what sampling is fused to: scores do not depend on what is asked.
    logits_BV = jax.lax.optimization_barrier(program.steps.project(params, hidden_BD)[:, : program.num_tokens])
    position_B = carry.position_B + 1
    choice = choose(logits_BV, rows, program.needs, position_B, carry.counts, allowed_BW)
    token_B, done_B = choice.token_B, carry.done_B
    ended_B = jnp.any(token_B[:, None] == stop_E, axis=1) | (position_B >= rows.last_B)
    counts = None if carry.counts is None else carry.counts.add(token_B, ~done_B)
    return choice, Carry(
        token_B=jnp.where(done_B, carry.token_B, token_B),
        position_B=jnp.where(done_B, carry.position_B, position_B),
        done_B=done_B | ended_B,
        counts=counts,
        state=carry.state,
    )
