"""How long, how much at a time, how exactly, and how often to look and to save."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Train:
    """One training run: its length, batch, precision, and the rhythm of evaluations and checkpoints."""

    steps: int
    """Number of optimizer updates."""
    batch_size: int
    """Rows (sequences, images, pairs) in one update, over all devices, hosts and accumulation steps together."""
    sequence_length: int | None = None
    """Tokens in one sequence; None where the data has none (images), or brings its own lengths."""
    accumulation: int = 1
    """Parts that the batch is computed in, one after the other: less memory, the same gradient."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the arithmetic. Parameters, norms, softmax and loss stay float32."""
    loss_scaling: Literal["dynamic", "none"] = "dynamic"
    """How float16 keeps small gradients: the loss multiplied by as much as is possible, or not at all, to see what
    that costs. Nothing to the other types."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory between updates, where the devices reach it (TPU, GPU)."""
    evaluate_every: int = 200
    """Steps between evaluations on the validation split; 0 for the last step only."""
    evaluate_batches: int | None = None
    """Batches in one evaluation; None for the whole validation split."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 for the last step only."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss to keep besides; every checkpoint is then evaluated. 0 for none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    log_gradients: Literal["global", "layers"] = "global"
    """Whether metrics have the norm of the whole gradient only, or that of every layer's too."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "sequence_length", "accumulation", "keep_last", "log_every")
        not_negative = ("evaluate_every", "checkpoint_every", "keep_best", "seed")
        given = {name: getattr(self, name) for name in at_least_one if getattr(self, name) is not None}
        problems = [f"{name}={value} must be at least 1" for name, value in given.items() if value < 1]
        problems += [
            f"{name}={getattr(self, name)} must not be negative" for name in not_negative if getattr(self, name) < 0
        ]
        if self.evaluate_batches is not None and self.evaluate_batches < 1:
            problems.append(f"evaluate_batches={self.evaluate_batches} must be at least 1, or None for all")
        if problems:
            raise ValueError("; ".join(problems))
