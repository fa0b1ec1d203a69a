"""What the scheduler keeps of requests, and what it tells the engine to do."""

from dataclasses import dataclass, field
from enum import Enum

from llmlab.infer.engine.blocks import Copy, Table
from llmlab.infer.engine.request import Request


class Phase(Enum):
    """Where a sample stands."""

    WAITING = "not admitted, or admitted with the first sample of its request, whose prefill it shares"
    PREFILL = "has a row and blocks for what is not stored yet"
    DECODE = "has a row; all tokens but the last are stored"
    PREEMPTED = "has lost its row and blocks"
    SWAPPED = "has lost its row; what was stored is in the host's memory"
    DONE = "has ended"


@dataclass(eq=False)
class Job:
    """A request that was submitted."""

    request: Request
    arrival: int
    samples: list["Sample"] = field(default_factory=list)
    queued: bool = True

    @property
    def priority(self) -> int:
        """The request's."""
        return self.request.priority

    @property
    def user(self) -> str | None:
        """The request's."""
        return self.request.user

    @property
    def done(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.phase is Phase.DONE for sample in self.samples)


@dataclass(eq=False)
class Sample:
    """One continuation of a request's prompt."""

    job: Job
    number: int
    table: Table
    ids: list[int]
    """Prompt and new tokens; all but the last are stored, once the prompt is."""
    phase: Phase = Phase.WAITING
    swapped_length: int = 0
    """Positions that were swapped out."""

    @property
    def num_new(self) -> int:
        """New tokens so far."""
        return len(self.ids) - len(self.job.request.prompt_ids)

    @property
    def importance(self) -> tuple[int, int, int]:
        """Smaller is more important."""
        return -self.job.priority, self.job.arrival, self.number


@dataclass(frozen=True)
class SwapOut:
    """Copy a sample's blocks to the host, before they are used for something else."""

    sample: Sample
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class SwapIn:
    """Copy a sample's blocks back, to these places."""

    sample: Sample
    blocks: tuple[int, ...]


Move = Copy | SwapOut | SwapIn


@dataclass(frozen=True)
class Chunk:
    """Positions start ... stop - 1 of a sample, to be stored."""

    sample: Sample
    start: int
    stop: int
    blocks: tuple[int, ...]
    """The sample's blocks, up to the one of the last position."""


@dataclass(frozen=True)
class Plan:
    """One step: `moves` in their order, the chunks in theirs, `copies`, and one decoding call."""

    moves: tuple[Move, ...]
    chunks: tuple[Chunk, ...]
    copies: tuple[Copy, ...]
    """Of blocks that the chunks wrote and samples share."""
    decode: tuple[Sample, ...]
    steps: int
    """Tokens that the decoding call may draw of each row; their positions have blocks."""

    def __bool__(self) -> bool:
        return bool(self.moves or self.chunks or self.decode)
