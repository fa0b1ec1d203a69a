"""`llmlab info`: what a model is made of, array by array, without reading its weights."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.models.config import ModelConfig

DESCRIPTION = """\
Print the layer table of a run, a checkpoint, a converted model or a Hugging Face directory:
    llmlab info runs/quickstart-1a2b3c4d
    llmlab info models/gpt2 --length 1024 --json

Every parameter with its path, its shape, the logical name of each dimension (which the mesh splits by), how many
numbers it holds, and the FLOPs that it costs a token in the forward pass: two for each number of a matrix that the
token is multiplied with. Layers are stored stacked: a first dimension "layers" counts them. Below the table are the
totals by the model's own formula, which adds attention scores, a tied head and the like.
Configs and file headers are read, weights never, so that a model of any size is described at once.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    parameters: int
    flops_per_token: int
    """Of the forward pass; 0 for what no token is multiplied with."""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab info`."""
    parser = argparse.ArgumentParser(
        prog="llmlab info",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a run, a checkpoint or a Hugging Face directory")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens of a sequence, for its FLOPs (512, or what the model can)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    if arguments.length is not None and arguments.length < 1:
        raise ValueError(f"--length {arguments.length} is not positive")

    from llmlab.runs import load_config

    config = load_config(arguments.path)
    longest = config.max_length
    if arguments.length is not None and longest is not None and arguments.length > longest:
        raise ValueError(
            f"--length {arguments.length} is beyond the {longest} positions of this model; use at most that"
        )
    length = arguments.length or min(512, longest or 512)
    rows = table(config)
    record = {
        "path": str(arguments.path),
        "kind": kind(arguments.path),
        "model": type(config).__name__,
        "num_parameters": config.num_parameters(),
        "flops_per_token": {"length": length, **flops_per_token(config, length)},
        "weights": weights(arguments.path),
        "parameters": [asdict(row) for row in rows],
    }
    if arguments.json:
        print(json.dumps(record, indent=2))
    else:
        _print(record, rows)
    return 0


def kind(path: Path) -> str:
    """What the path is."""
    from llmlab.commands.runs import is_run
    from llmlab.runs import is_hugging_face, locate

    directory, step = locate(path)
    if is_hugging_face(directory):
        return "Hugging Face directory"
    if step is not None:
        return "checkpoint"
    return "run" if is_run(directory) else "model"


def table(config: "ModelConfig") -> list[Row]:
    """Every parameter of a model, in the order of its modules."""
    from llmlab.models.weights import flatten

    _, shapes, axes = config.abstract()
    names = flatten(axes)
    return [_row(path, tuple(leaf.shape), names[path], config) for path, leaf in flatten(shapes).items()]


def flops_per_token(config: "ModelConfig", length: int) -> dict[str, float]:
    """FLOPs of a sequence of this length for each of its tokens, forward and in training."""
    shapes = config.batch_shapes(1, length)
    num_tokens = config.num_tokens(shapes)
    return {
        name: config.flops(shapes, training=training) / num_tokens
        for name, training in (("forward", False), ("training", True))
    }


def weights(path: Path) -> dict[str, Any]:
    """What the headers of the files tell: number of tensors, bytes and number types, or why there are none."""
    from llmlab.runs import is_hugging_face, locate

    directory, step = locate(path)
    if is_hugging_face(directory):
        return _headers(directory)
    from llmlab.training.checkpoint import saved_steps

    steps = saved_steps(directory / "checkpoints") if step is None else [step]
    return {"checkpoints": steps} if steps else {"problem": "no checkpoint yet"}


def _headers(directory: Path) -> dict[str, Any]:
    from llmlab.models.safetensors_io import Checkpoint

    try:
        with Checkpoint(directory) as checkpoint:
            tensors = dict(checkpoint.tensors)
    except (FileNotFoundError, ValueError) as error:
        return {"problem": str(error)}
    types: dict[str, int] = {}
    for info in tensors.values():
        types[info.dtype] = types.get(info.dtype, 0) + math.prod(info.shape)
    return {"tensors": len(tensors), "numbers": types}


def _row(path: str, shape: tuple[int, ...], axes: tuple[str, ...], config: "ModelConfig") -> Row:
    size = math.prod(shape)
    flops = 2 * size if path.rpartition(".")[2] == "kernel" else 0
    if "experts" in axes:
        flops = round(flops * _met(config))
    return Row(path=path, shape=shape, axes=axes, parameters=size, flops_per_token=flops)


def _met(config: Any) -> float:
    """The share of the experts' matrices that a token meets."""
    from llmlab.models.weights import flatten

    _, shapes, axes = config.abstract()
    names = flatten(axes)
    kernels = {path: leaf for path, leaf in flatten(shapes).items() if path.endswith(".kernel")}
    experts = sum(leaf.size for path, leaf in kernels.items() if "experts" in names[path])
    idle = sum(block.ffn.idle_parameters(config.embed_dim) for block in config.layers())
    return 1 - idle / experts


def _print(record: Mapping[str, Any], rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmlab.display.numbers import count

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    listing = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    listing.add_column("parameter", style="bold", overflow="fold")
    listing.add_column("shape", no_wrap=True)
    listing.add_column("axes", overflow="fold", style="cyan")
    listing.add_column("params", justify="right", no_wrap=True)
    listing.add_column("FLOPs/token", justify="right", no_wrap=True)
    for row in rows:
        flops = Text("-", style="dim") if row.flops_per_token == 0 else Text(count(row.flops_per_token))
        listing.add_row(
            row.path, " x ".join(map(str, row.shape)) or "()", ", ".join(row.axes), count(row.parameters), flops
        )
    console.print(Text.assemble((record["path"], "bold"), f": {record['kind']}, {record['model']}"))
    console.print(listing)
    flops = record["flops_per_token"]
    console.print(
        f"{record['num_parameters']:,} parameters, {count(4 * record['num_parameters'])}B in float32; "
        f"at {flops['length']:,} tokens {count(flops['forward'])} FLOPs a token forward, "
        f"{count(flops['training'])} in training"
    )
    console.print(Text(_on_disk(record["weights"]), style="dim"))


def _on_disk(found: Mapping[str, Any]) -> str:
    if "problem" in found:
        return f"weights: {found['problem']}"
    if "checkpoints" in found:
        return f"checkpoints: {', '.join(map(str, found['checkpoints']))}"
    numbers = ", ".join(f"{size:,} {name}" for name, size in found["numbers"].items())
    return f"weights: {found['tensors']} tensors, {numbers}"
