"""The process that compiles for `llmlab plan`: one request on stdin, one answer on stdout, both JSON.

It is a process of its own because libtpu must not meet the caller's backend, because what the compiler prints is part
of the answer, and because several compile at once. A request is an experiment's config with its file, never a pickle.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.training.program import Program

MARK = "@plan "
"""Begins the lines of stdout that are for the caller; the compiler may print there too."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compile."""

    config: str
    """The experiment, as `llmlab.config.to_json` writes it."""
    file: str | None
    """The experiment's file, for classes that are defined there."""
    topology: str


def main() -> int:
    """Answers the request on stdin. Exit code 2 for the user's error, whose message is the answer."""
    from llmlab.cli import is_users_error

    request = Request(**json.loads(sys.stdin.read()))
    try:
        answer = compiled(request)
    except Exception as error:
        if not is_users_error(error):
            raise
        tell({"error": str(error)})
        return 2
    tell({"plan": answer})
    return 0


def tell(message: dict[str, Any]) -> None:
    """A line for the caller."""
    print(MARK + json.dumps(message), flush=True)


def compiled(request: Request) -> dict[str, Any]:
    """The plan, as plain data."""
    tell({"stage": "load"})
    from llmlab.config import from_json, load_experiment_file
    from llmlab.experiment import Experiment
    from llmlab.plan.compile import plan
    from llmlab.plan.topology import Topology

    module = None if request.file is None else load_experiment_file(Path(request.file))
    experiment = from_json(request.config, Experiment, experiment=module)
    topology = Topology.parse(request.topology, experiment.mesh.slices)
    devices = topology.devices()
    tell({"stage": "build"})
    return plan(program_of(experiment, devices), topology, stage=lambda name: tell({"stage": name})).to_json()


def program_of(experiment: "Experiment", devices: Any) -> "Program":
    """The experiment's program on these devices; no data is read."""
    from llmlab.training.program import Program

    model, batch = settled(experiment)
    placement = experiment.mesh.build(devices)
    return Program.build(model, experiment.objective, experiment.optimizer, placement, experiment.train, batch)


def settled(experiment: "Experiment") -> tuple[Any, dict[str, Any]]:
    """The model with its vocabulary, and a batch of the right names, shapes and types (its numbers are made up)."""
    from llmlab.data.config import PackedText
    from llmlab.data.specimen import specimen
    from llmlab.tokenizers import ByteLevelBPE, Bytes, SentencePiece, WordPiece

    train = experiment.train
    match experiment.tokenizer:
        case SentencePiece(path=None) | ByteLevelBPE() | WordPiece():
            # One that is trained on the run's data: its size is in the config, and bytes take its place.
            tokenizer, size = Bytes(special=experiment.tokenizer.special).build(), experiment.tokenizer.vocab_size
        case other:
            tokenizer = other.build()
            size = tokenizer.vocab_size
    model = experiment.model.with_vocabulary(size)
    if isinstance(experiment.data, PackedText):
        if found := experiment.data.problems(tokenizer.special, train.sequence_length):
            raise ValueError("; ".join(found))
        assert train.sequence_length is not None
        length, rows = train.sequence_length, train.batch_size
        return model, specimen(experiment.data, tokenizer, sequence_length=length, batch_size=rows)
    return model, plain_batch(model, train.batch_size, train.sequence_length or model.max_length or 512)


def plain_batch(model: Any, batch_size: int, length: int) -> dict[str, Any]:
    """What the model is called with at least, and as many labels as it gives scores."""
    import jax
    import numpy as np

    from llmlab.nn.module import merge

    def array(name: str, shape: tuple[int, ...]) -> Any:
        dtype = np.int32 if name.endswith(("ids", "mask")) else np.float32
        return np.broadcast_to(np.zeros((), dtype), shape)

    batch = {name: array(name, shape) for name, shape in model.batch_shapes(batch_size, length).items()}
    graphdef, params, _ = model.abstract()
    output = jax.eval_shape(lambda params, batch: merge(graphdef, params)(**batch), params, batch)
    logits = vars(output).get("logits")
    if logits is not None:
        batch["labels"] = np.broadcast_to(np.zeros((), np.int32), logits.shape[:-1])
    return batch


if __name__ == "__main__":
    sys.exit(main())
