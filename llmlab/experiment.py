"""The experiment: everything that determines a run, in one frozen tree.

def config() -> Experiment:
    return Experiment(
        model=llama.preset("nano"),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=3e-3, schedule=Cosine(warmup_steps=50)),
        train=Train(steps=600, batch_size=16, sequence_length=128),
    )
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmlab import buckets
from llmlab.config import load, load_experiment_file, own_errors
from llmlab.data import Data
from llmlab.data.tasks import WAYS
from llmlab.flags import concrete
from llmlab.models.config import ModelConfig
from llmlab.nn.moe import MixtureOfExperts
from llmlab.objectives import NextToken, Objective
from llmlab.optim import Optimizer
from llmlab.sharding.mesh import Mesh
from llmlab.sharding.pipeline import Schedule
from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, SpecialTokens, TokenizerConfig, WordPiece
from llmlab.training.config import Train

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One claim: the model, what it learns from, how, and for how long. Equal experiments give equal results."""

    model: ModelConfig
    """The network."""
    data: Data
    """What it reads, and how that is cut into sequences."""
    tokenizer: TokenizerConfig = Bytes()
    """How text becomes numbers: trained on the run's own data, opened from a path, or bytes."""
    objective: Objective = NextToken()
    """What training minimises."""
    optimizer: Optimizer
    """How parameters follow the gradient, with the learning rate over the run."""
    mesh: Mesh = Mesh()
    """Devices for each kind of parallelism."""
    train: Train
    """Length, batch, precision, and the rhythm of evaluations and checkpoints."""
    initialize_from: str | None = None
    """Run or Hugging Face directory, also one in a bucket (gs://...), whose weights the model starts from, but for a
    head of its own; None for fresh ones."""

    def validate(self, *, num_devices: int | None = None) -> None:
        """Checks what no part can check alone, before any work; the parts have checked themselves when built.

        With `num_devices`, also that mesh and batch fit that many devices. Raises ValueError listing every problem.
        """
        problems = [
            *self._task_problems(),
            *self._length_problems(),
            *self._vocabulary_problems(),
            *self._schedule_problems(),
            *self._batch_problems(num_devices),
            *self._mesh_problems(num_devices),
            *(f"objective: {text}" for text in self.objective.problems(self.model, self.tokenizer)),
        ]
        origin = self.initialize_from
        if origin is not None and buckets.address(origin) is None and not Path(origin).is_dir():
            problems.append(f"initialize_from={self.initialize_from} is not a directory")
        if problems:
            raise ValueError("\n  ".join(["this experiment cannot run:", *problems]))

    def _task_problems(self) -> list[str]:
        """Whether data, objective and model are for each other. What is not llmlab's own is trusted."""
        special, objective, task = _known_special(self.tokenizer), self.objective.plain, self.data.task
        problems = [f"data: {text}" for text in self.data.problems(special, self.train.sequence_length)]
        name, data = type(objective).__name__, type(self.data).__name__
        if objective.tasks and task in WAYS and task not in objective.tasks:
            fitting = " or ".join(kind.__name__ for kind in concrete(Objective) if task in kind.tasks)
            ways = "; ".join(WAYS[wanted] for wanted in objective.tasks if wanted in WAYS)
            problems.append(
                f"objective={name} learns from {' or '.join(objective.tasks)}, and data={data} gives {task}; use "
                f"objective={fitting} for this data, or for this objective data={ways}"
            )
        known = self.model.objectives
        own = type(objective).__module__.startswith("llmlab.")
        if (
            known
            and own
            and objective.asks_the_head
            and not {kind.__name__ for kind in type(objective).__mro__} & {*known}
        ):
            head = " with the head that it has" if "head" in {field.name for field in fields(self.model)} else ""
            problems.append(
                f"objective={name} cannot train model={type(self.model).__name__}{head}; it is trained by "
                f"{' or '.join(known)}"
            )
        return problems

    def _length_problems(self) -> list[str]:
        length, longest = self.train.sequence_length, self.model.max_length
        if longest is not None and length is not None and length > longest:
            return [
                f"train.sequence_length={length} is beyond the position table's max_length={longest}; shorten the "
                f"sequence to {longest}, or set --model.position.max-length {length}"
            ]
        return []

    def _vocabulary_problems(self) -> list[str]:
        rows, size = self.model.vocab_size, known_size(self.tokenizer)
        if rows is not None and size is not None and rows < size:
            return [
                f"model.vocab_size={rows} is less than the tokenizer's {size} tokens; use at least {size}, or None for "
                "the tokenizer's size rounded up to a multiple of 128"
            ]
        return []

    def _schedule_problems(self) -> list[str]:
        try:
            self.optimizer.schedule.check(self.train.steps)
        except ValueError as error:
            return [f"optimizer.schedule: {error}"]
        return []

    def _batch_problems(self, num_devices: int | None) -> list[str]:
        batch, parts, shared = self.train.batch_size, self.train.accumulation, {}
        if num_devices is not None:
            try:
                sizes = self.mesh.resolve(num_devices)
            except ValueError as error:
                return [str(error)]
            shared = {axis: sizes[axis] for axis in self.mesh.table["batch"] if sizes[axis] > 1}
        rows = math.prod(shared.values())
        multiple = parts * rows
        if batch % multiple == 0:
            return []
        factors = f"train.accumulation={parts}"
        if rows > 1:
            shape = " x ".join(f"{axis}={size}" for axis, size in shared.items())
            factors += f" x {rows} devices that share the batch (mesh {shape})"
        below = batch // multiple * multiple
        sizes_that_work = f"{below} or {below + multiple}" if below else f"{multiple} or {2 * multiple}"
        return [f"train.batch_size={batch} is not divisible by {factors}; use {sizes_that_work}"]

    def _mesh_problems(self, num_devices: int | None) -> list[str]:
        """What a mesh asks of the length of a row."""
        if num_devices is None:
            return []
        try:
            sizes = self.mesh.resolve(num_devices)
        except ValueError:
            return []  # told already
        problems = []
        length, parts = self.train.sequence_length, math.prod(sizes[axis] for axis in self.mesh.table["sequence"])
        if length is not None and length % parts:
            below = length // parts * parts
            problems.append(
                f"train.sequence_length={length} is not divisible by mesh.sequence={parts}; use "
                f"{f'{below} or ' if below else ''}{below + parts}, or another mesh"
            )
        if sizes["pipeline"] > 1:
            problems += self._pipeline_problems(sizes["pipeline"])
        shares = math.prod(sizes[axis] for axis in self.mesh.table["experts"])
        counts = sorted({part.num_experts for part in parts_of(self.model, MixtureOfExperts)})
        if sizes["expert"] > 1 and not counts:
            problems.append(
                f"mesh.expert={sizes['expert']} has nothing to split: the model has no mixture of experts; use "
                "mesh.data or mesh.fsdp"
            )
        for experts in counts:
            if experts % shares:
                divisors = [n for n in range(1, experts + 1) if experts % n == 0]
                problems.append(f"mesh.expert={shares} does not divide num_experts={experts}; use one of {divisors}")
        return problems

    def _pipeline_problems(self, stages: int) -> list[str]:
        repeats, chunks = self.model.pipeline_repeats, stages * self.mesh.interleave
        if repeats == 0:
            return [
                f"mesh.pipeline={stages} cannot split model={type(self.model).__name__}, whose layers are no plain "
                "stack; use mesh.pipeline=1 and another axis, fsdp for instance"
            ]
        if chunks > repeats:
            times = f" x mesh.interleave={self.mesh.interleave}" if self.mesh.interleave > 1 else ""
            return [
                f"mesh.pipeline={stages}{times} is more than the {repeats} repeats of the model's layers; use at most "
                f"{repeats} in all"
            ]
        try:
            Schedule(stages=stages, parts=self.train.accumulation, interleave=self.mesh.interleave)
        except ValueError as error:
            return [str(error)]
        return []


def known_size(tokenizer: TokenizerConfig) -> int | None:
    """Size of the vocabulary where the config alone tells it; training checks the others once they are built."""
    match tokenizer:
        case Bytes():
            return tokenizer.build().vocab_size
        case SentencePiece(path=None) | ByteLevelBPE() | WordPiece():
            return tokenizer.vocab_size
    return None


def _known_special(tokenizer: TokenizerConfig) -> SpecialTokens | None:
    """The special tokens where the config alone tells them; data checks the others once they are known."""
    match tokenizer:
        case Bytes() | SentencePiece(path=None) | ByteLevelBPE() | WordPiece():
            return tokenizer.special
    return None


def parts_of(config: Any, kind: type[T]) -> Iterator[T]:
    """All parts of a kind in a tree of configs."""
    if isinstance(config, kind):
        yield config
    if is_dataclass(config):
        for field in fields(config):
            yield from parts_of(getattr(config, field.name), kind)
    elif isinstance(config, tuple):
        for item in config:
            yield from parts_of(item, kind)


def read_experiment(path: Path) -> Experiment:
    """The experiment that a Python file's `config()` returns, or that a run directory holds."""
    if path.is_dir():
        return load(path, Experiment)
    module = load_experiment_file(path)
    with own_errors(path.resolve()):
        experiment = module.config()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path}: config() returned {experiment!r:.100}, which is no Experiment")
    return experiment
