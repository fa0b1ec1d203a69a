"""How an engine is set up, and what it counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Preemption = Literal["recompute", "swap"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much the engine does at once, and where it keeps what it knows."""

    block_size: int = 16
    """Positions of a block; a power of two."""
    num_blocks: int | None = None
    """Blocks of keys and values; None for as many as `memory_fraction` has room for."""
    memory_fraction: float = 0.8
    """Of the device's memory that weights, blocks and working space may take together."""
    cache_dtype: Any = None
    """Storage of keys and values; None for the dtype of the parameters."""
    max_rows: int = 16
    """Samples that are decoded at once."""
    max_length: int | None = None
    """Positions of one sample, prompt included; None for the model's own limit, or 2,048 where it has none."""
    prefill_chunk: int = 256
    """Tokens of a prompt that one call takes; a multiple of `block_size`."""
    prefill_budget: int | None = None
    """Tokens of prompts between two decoding calls, about; None for two chunks. More fills rows sooner, and makes those
    that are being decoded wait longer."""
    steps_per_call: int = 8
    """Tokens of every row that one decoding call draws at most."""
    deterministic: bool = False
    """Each reply is, to the bit, what the request would get alone; see `llmlab.infer.engine.engine`. Slower."""
    prefix_caching: bool = True
    """Whether blocks of finished requests are kept for others that start alike."""
    preemption: Preemption | None = None
    """What becomes of a sample that has to make room: its keys and values are computed again later (recompute), or
    copied to the host's memory and back (swap). None for swap in deterministic mode and recompute otherwise."""
    max_waiting: int = 1024
    """Requests that may wait; more are refused."""
    max_logprobs: int = 32
    """Most probable tokens that a request may ask to have reported."""

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} is not a power of two; 16 is usual")
        if self.prefill_chunk < 1 or self.prefill_chunk % self.block_size:
            raise ValueError(
                f"prefill_chunk={self.prefill_chunk} is not a multiple of block_size={self.block_size}; "
                f"use {max(1, round(self.prefill_chunk / self.block_size)) * self.block_size}"
            )
        for name in ("max_rows", "steps_per_call", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        for name in ("num_blocks", "max_length", "prefill_budget"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive; None chooses it")
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs={self.max_logprobs} is negative; 0 reports the tokens' own alone")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction={self.memory_fraction} is not in (0, 1]; 0.8 leaves room for others")
        if self.deterministic and self.preemption == "recompute":
            raise ValueError(
                "deterministic=True with preemption='recompute': keys and values that are computed again, many "
                "positions at a time, differ in their last bits; use preemption='swap'"
            )

    @property
    def swaps(self) -> bool:
        """Whether samples that make room are swapped."""
        return self.deterministic if self.preemption is None else self.preemption == "swap"


@dataclass(frozen=True)
class Stats:
    """The engine at one moment; counts are since it was made."""

    running: int
    """Samples that have a row."""
    waiting: int
    """Requests that were not admitted yet, and samples that were preempted."""
    blocks_total: int
    blocks_free: int
    """Blocks that nobody uses; `blocks_cached` of them hold prefixes."""
    blocks_cached: int
    prefix_hit_tokens: int
    """Prompt tokens whose keys and values were found."""
    preemptions: int
    prompt_tokens: int
    """Of admitted requests."""
    generated_tokens: int
    finished: Mapping[str, int]
    """Samples that finished, by reason."""
    compilations: int
    """Programs that were compiled."""
