"""Reading and writing safetensors files: one, or several with an index, one tensor at a time.

    model.safetensors                       everything, or
    model-00001-of-00003.safetensors ...    shards, and
    model.safetensors.index.json            which tensor is in which shard

A safetensors file is a header of names, types, shapes and byte ranges, then the bytes. Unlike a pickled
`pytorch_model.bin`, reading it runs no code of its author.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmlab.models.transforms import Shape
from llmlab.models.weights import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of a Hugging Face directory; a context manager, which closes its files.

    Headers are read and checked (byte ranges against the file's size) when it is opened, tensors when asked for.

    Raises:
        FileNotFoundError: no directory, no weights in it, or a shard is missing.
        ValueError: only pickled weights, a damaged file, or an index that contradicts its shards.
    """

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._tensors: dict[str, TensorInfo] = {}
        try:
            self._open(directory)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Header of every tensor."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the file's own number type."""
        return self._files[name].get_tensor(name)

    def _open(self, directory: Path) -> None:
        if (directory / SINGLE).is_file():  # what transformers prefers when both are there
            self._add(directory / SINGLE)
            return
        if not (directory / INDEX).is_file():
            raise _no_weights(directory)
        shards = read_index(directory / INDEX)
        absent = sorted({shard for shard in shards.values() if not (directory / shard).is_file()})
        if absent:
            raise FileNotFoundError(f"{directory / INDEX} names files that are not there: {', '.join(absent)}")
        found = {name: shard for shard in sorted(set(shards.values())) for name in self._add(directory / shard)}
        problems = [f"{name}: the index says {shard}" for name, shard in shards.items() if found.get(name) != shard]
        problems += [f"{name}: in {shard}, not in the index" for name, shard in found.items() if name not in shards]
        if problems:
            raise ValueError(f"{directory / INDEX} contradicts the files it names:\n  " + "\n  ".join(problems))

    def _add(self, path: Path) -> list[str]:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no intact safetensors file ({error}); fetch or export it again") from error
        names = list(file.keys())
        for name in names:
            view = file.get_slice(name)
            self._tensors[name] = TensorInfo(tuple(view.get_shape()), view.get_dtype())
            self._files[name] = file
        return names


def write_checkpoint(
    directory: Path, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int
) -> None:
    """Write float32 tensors to one file, or to shards with an index when they exceed `max_shard_bytes`.

    Args:
        directory: an existing directory.
        shapes: what `tensors` yields, in its order.
        tensors: pairs of name and float32 array; at most one shard of them is held in memory.
        max_shard_bytes: size of a shard; a larger tensor gets a shard of its own.
    """
    shards = _plan(shapes, max_shard_bytes)
    stream = iter(tensors)
    shard_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard_of.update(dict.fromkeys(names, file))
        # transformers refuses a file without this metadata
        save_file(dict(_take(stream, names)), directory / file, metadata={"format": "pt"})
        _sync(directory / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": shard_of}
        write_json(directory / INDEX, index)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A readable JSON file, on disk when this returns."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def read_index(path: Path) -> dict[str, str]:
    """Shard of every tensor."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{path} has no weight_map from tensor names to files")
    outside = sorted({str(file) for file in shards.values() if not isinstance(file, str) or Path(file).name != file})
    if outside:
        raise ValueError(f"{path} names files outside its directory: {', '.join(outside)}")
    return shards


def _no_weights(directory: Path) -> Exception:
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        return ValueError(
            f"{directory} has its weights in {', '.join(pickled)} only: a pickle, which can run any code when it is "
            "opened, so llmlab does not; convert it where you trust it, with transformers' "
            "save_pretrained(directory, safe_serialization=True), or fetch the safetensors version"
        )
    return FileNotFoundError(f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there")


def _plan(shapes: Mapping[str, Shape], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = _bytes(shape)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _take(stream: Iterator[tuple[str, np.ndarray]], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        found, tensor = next(stream)
        assert found == name
        yield name, tensor


def _bytes(shape: Shape) -> int:
    return 4 * int(np.prod(shape, dtype=np.int64))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
