"""The engine's side of the device: parameters, pools of blocks, and plans turned into calls of compiled programs.

Buckets keep the programs few. A decoding call has a power of two of rows and a power of two of blocks a row; a chunk of
a prompt has a power of two of tokens, at most `prefill_chunk`, and as many blocks. In deterministic mode there is one
bucket of each kind, the largest.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from llmlab.infer.engine import programs
from llmlab.infer.engine.blocks import Copy
from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.jobs import Chunk, Move, Phase, Sample, SwapIn, SwapOut
from llmlab.infer.engine.paged import check_layers, new_pools
from llmlab.infer.engine.programs import Drawn, Program, levels
from llmlab.infer.engine.request import Request, RequestRefused
from llmlab.infer.engine.rows import MAX_BIASED, MAX_FORCED, DecodeRow, RowArrays, Seats
from llmlab.infer.steps import DecoderSteps, prepare
from llmlab.sharding.rules import Placement, activate

_SMALLEST_CHUNK = 16
_SMALLEST_WINDOW = 128  # positions
_DEFAULT_LENGTH = 2048
# Blocks beyond so many full batches would only hold prefixes, which few workloads meet again.
_FULL_BATCHES = 4


class Device:
    """See the module's docstring.

    Args:
        model: a decoder, its parameters where they are to stay.
        num_tokens: ids from here on are never drawn.
        config: of the engine; what is None in it is chosen here, see `config`.
        placement: the mesh that the parameters are on; None for one device.

    Raises:
        ValueError: the model cannot be served from blocks, or there is no memory for them.
    """

    def __init__(
        self, model: nnx.Module, num_tokens: int, config: EngineConfig, placement: Placement | None = None
    ) -> None:
        steps, self.params = prepare(model)
        if type(steps) is not DecoderSteps:
            raise ValueError(
                f"the engine serves decoders, which are given tokens alone; a {type(model).__name__} is not one: use "
                "llmlab.generate"
            )
        check_layers(steps.config)
        self.placement = placement
        self.config = self._chosen(config, steps)
        self.program = Program(
            steps=steps,
            num_tokens=num_tokens,
            max_steps=self.config.steps_per_call,
            levels=levels(self.config.max_logprobs),
            mesh=() if placement is None else (placement.mesh, *sorted(placement.rules.items())),
        )
        self.host: dict[Sample, Any] = {}
        """Blocks that were swapped out."""
        self._dtype = self.config.cache_dtype
        self.pools = self._new_pools()
        length, size, chunk = self.config.max_length, self.config.block_size, self.config.prefill_chunk
        assert length is not None
        widest = -(-length // size)
        self.widths = _powers(min(-(-_SMALLEST_WINDOW // size), widest), widest)
        self.row_counts = _powers(1, self.config.max_rows)
        self.chunk_sizes = _powers(min(_SMALLEST_CHUNK, chunk), chunk)
        if self.config.deterministic:
            self.widths, self.row_counts, self.chunk_sizes = [widest], [self.config.max_rows], [chunk]
        self._arrays = RowArrays(self.program, self.row_counts, self._padded)
        self._windows: programs.Windows = ()
        self._seats = Seats(0, 0)
        self._compiled = _compilations()

    @property
    def compilations(self) -> int:
        """Programs compiled in this process since the engine was made."""
        return _compilations() - self._compiled

    # --- memory ---

    def _chosen(self, config: EngineConfig, steps: DecoderSteps) -> EngineConfig:
        """The configuration with nothing left to choose."""
        limit = steps.max_length
        length = config.max_length or (_DEFAULT_LENGTH if limit is None else limit)
        if limit is not None and length > limit:
            raise ValueError(f"max_length={length} is more than the {limit} positions of the model")
        dtype = jax.tree.leaves(self.params)[0].dtype if config.cache_dtype is None else config.cache_dtype
        config = replace(config, max_length=length, cache_dtype=np.dtype(dtype))
        if config.num_blocks is not None:
            return config
        of_row = -(-length // config.block_size)
        pools = jax.eval_shape(lambda: new_pools(steps.config, 1, config.block_size, config.cache_dtype))
        block_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pools))
        windows = config.max_rows * of_row  # a decoding call takes copies of its rows' blocks
        free = self._free_bytes(config.memory_fraction) // block_bytes - windows
        if free < of_row:
            raise ValueError(
                f"memory_fraction={config.memory_fraction} leaves room for {max(free, 0)} blocks of {block_bytes:,} "
                f"bytes besides the weights and the working space of max_rows={config.max_rows}, and one row of "
                f"max_length={length} needs {of_row}; lower max_rows or max_length, or store keys and values in a "
                "smaller cache_dtype"
            )
        return replace(config, num_blocks=int(min(free, _FULL_BATCHES * windows)))

    def _free_bytes(self, fraction: float) -> int:
        """Bytes of a device that blocks may take; on a mesh, what all devices have together."""
        devices = list(jax.local_devices()[:1] if self.placement is None else self.placement.mesh.devices.flat)
        stats = devices[0].memory_stats()
        if stats and "bytes_limit" in stats:
            return int(len(devices) * (fraction * stats["bytes_limit"] - stats["bytes_in_use"]))
        return int(fraction * _host_bytes_available())  # a CPU's memory is the host's, weights gone already

    def _new_pools(self) -> programs.Pools:
        assert self.config.num_blocks is not None
        blocks, size, dtype = self.config.num_blocks, self.config.block_size, self._dtype
        with self._active():
            return jax.jit(lambda: new_pools(self.program.steps.config, blocks, size, dtype))()

    def reset(self) -> None:
        """Empty pools, after a failure that may have taken the old ones."""
        self._windows, self._seats = (), Seats(0, 0)
        self.pools = self._new_pools()

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with activate(self.placement):
            yield

    # --- what requests may ask ---

    def check(self, request: Request) -> None:
        """Raises RequestRefused for what the programs have no room for."""
        sampling = request.sampling
        for name, count, most in (
            ("logit_bias and banned_ids", len(sampling.logit_bias) + len(sampling.banned_ids), MAX_BIASED),
            ("forced_ids", len(sampling.forced_ids), MAX_FORCED),
            ("logprobs", sampling.logprobs or 0, self.config.max_logprobs),
        ):
            if count > most:
                raise RequestRefused(f"{name} ask for {count}, and the engine has room for {most}")

    # --- what a plan asks ---

    def move(self, moves: Sequence[Move]) -> None:
        """Copies and swaps, in their order."""
        copies: list[Copy] = []
        for move in moves:
            if isinstance(move, Copy):
                copies.append(move)
                continue
            self.copy(copies)
            copies = []
            if move.sample.phase is Phase.DONE:
                continue  # its request has ended since
            if isinstance(move, SwapOut):
                self._swap_out(move)
            else:
                self._swap_in(move)
        self.copy(copies)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Blocks copied to other blocks."""
        size = self.config.max_rows
        for first in range(0, len(copies), size):
            some = copies[first : first + size]
            source_C = self._padded([one.source for one in some], size)
            target_C = self._padded([one.target for one in some], size)
            with self._active():
                self.pools = programs.copy(self.pools, source_C, target_C)

    def _swap_out(self, move: SwapOut) -> None:
        block_W = self._padded(move.blocks, _bucket(self.widths, len(move.blocks)))
        with self._active():
            self.host[move.sample] = jax.device_get(programs.read(self.pools, block_W))

    def _swap_in(self, move: SwapIn) -> None:
        content = self.host.pop(move.sample)
        width = len(jax.tree.leaves(content)[0])
        with self._active():
            self.pools = programs.write(self.pools, self._padded(move.blocks[:width], width), content)

    def prefill(self, chunk: Chunk) -> jax.Array:
        """Stores a chunk's positions; their hidden states (1, bucket, width), on the device."""
        ids = chunk.sample.ids[chunk.start : chunk.stop]
        size = _bucket(self.chunk_sizes, len(ids))
        token_BS, position_BS = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
        token_BS[0, : len(ids)] = ids
        position_BS[0, : len(ids)] = np.arange(chunk.start, chunk.stop)
        table_BW = self._padded(chunk.blocks, _bucket(self.widths, len(chunk.blocks)))[None]
        with self._active():
            hidden_BSD, self.pools = programs.prefill(
                self.program, self.params, self.pools, token_BS, position_BS, table_BW
            )
        return hidden_BSD

    def score(self, hidden_BSD: jax.Array, next_ids: Sequence[int]) -> programs.Logprobs:
        """Log-probabilities of the token after each position of a chunk, in host memory."""
        next_BS = np.zeros(hidden_BSD.shape[:2], np.int32)
        next_BS[0, : len(next_ids)] = next_ids
        with self._active():
            return jax.device_get(programs.score(self.program, self.params, hidden_BSD, next_BS))

    def decode(self, rows: Sequence[DecodeRow], steps: int) -> Drawn:
        """The next tokens of rows, in host memory, a column for each row."""
        count = _bucket(self.row_counts, len(rows))
        width = _bucket(self.widths, max(len(row.sample.table.blocks) for row in rows))
        if (count, width) != self._seats.shape:
            self._new_windows(count, width)
        seat_of = self._seats.take(rows)
        seated: list[DecodeRow | None] = [None] * count
        for seat, row in zip(seat_of, rows, strict=True):
            seated[seat] = row
        arrays = self._arrays.rows(seated, width, self._seats.stale)
        with self._active():
            drawn, self.pools, self._windows = programs.decode(
                self.program, self.params, self.pools, self._windows, arrays, np.int32(steps)
            )
        return programs.columns(jax.device_get(drawn), seat_of)

    def _new_windows(self, count: int, width: int) -> None:
        self._windows, self._seats = (), Seats(count, width)  # the old ones go first
        with self._active():
            length = width * self.config.block_size
            self._windows = programs.windows(self.program, count, length, self._dtype)

    def _padded(self, blocks: Sequence[int], width: int) -> np.ndarray:
        assert self.config.num_blocks is not None
        block_W = np.full(width, self.config.num_blocks, np.int32)  # that number is no block
        block_W[: len(blocks)] = blocks
        return block_W

    # --- compilation ---

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compiles every program that serving will need, by running it on rows that are not there."""
        say = progress or (lambda _: None)
        hidden = None
        for width in self.widths:
            for size in self.chunk_sizes:
                say(f"prefill of {size} tokens, {width} blocks")
                token_BS, nowhere_BS = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
                with self._active():
                    hidden, self.pools = programs.prefill(
                        self.program, self.params, self.pools, token_BS, nowhere_BS, self._padded([], width)[None]
                    )
                if width == self.widths[0]:
                    self.score(hidden, [])
            for count in self.row_counts:
                say(f"decoding of {count} rows, {width} blocks")
                self._warm_decode(count, width)
            with self._active():
                content = jax.device_get(programs.read(self.pools, self._padded([], width)))
                self.pools = programs.write(self.pools, self._padded([], width), content)
        nowhere_C = self._padded([], self.config.max_rows)
        with self._active():
            self.pools = programs.copy(self.pools, nowhere_C, nowhere_C)
        jax.block_until_ready(self.pools)

    def _warm_decode(self, count: int, width: int) -> None:
        self._new_windows(count, width)
        for arrays in self._arrays.nobody(count, width):
            with self._active():
                _, self.pools, self._windows = programs.decode(
                    self.program, self.params, self.pools, self._windows, arrays, np.int32(1)
                )


def _powers(first: int, last: int) -> list[int]:
    """`first`, twice that and so on, and `last`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes


def _bucket(sizes: Sequence[int], count: int) -> int:
    return next(size for size in sizes if size >= count)


def _compilations() -> int:
    p = programs
    jitted = (p.prefill, p.score, p.windows, p.decode, p.copy, p.read, p.write)
    return sum(cast(Any, function)._cache_size() for function in jitted)  # jax's stubs do not know _cache_size


def _host_bytes_available() -> int:
    """What the host could give without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 * 2**30  # not Linux: a laptop's worth
