"""Buckets: what gs:// and other addresses name is copied to this machine, once, and then read like any file.

    llmlab.load("gs://bucket/runs/mine")            config, tokenizer and the parameters of the newest checkpoint
    TextFiles("gs://bucket/corpus/*.txt")           the files

Copies are kept in the cache ($LLMLAB_CACHE, ~/.cache/llmlab) under a name made from the address. A file is copied again
when the bucket has another version of it. Of a run nothing is copied that opening its model does not take: neither
optimizer state (two thirds of a checkpoint) nor older checkpoints.

fsspec does the talking; it needs a package for every kind of bucket (gs: gcsfs, which the `gcs` extra brings).
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub", "memory": "fsspec"}
# One slash too: that is what pathlib makes of two.
_ADDRESS = re.compile(rf"({'|'.join(_PACKAGES)}):/+(.*)", re.DOTALL)
# Weights of other frameworks, which a Hugging Face directory may hold besides: never read here.
_FOREIGN = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")


def default_cache_dir() -> Path:
    """Where copies, token stores and compiled programs are kept: $LLMLAB_CACHE, or ~/.cache/llmlab."""
    return Path(os.environ.get("LLMLAB_CACHE") or "~/.cache/llmlab").expanduser()


def address(path: str | Path) -> str | None:
    """The address that a path is, with both slashes (Path("gs://a/b") prints as gs:/a/b); None for a local path."""
    match = _ADDRESS.fullmatch(str(path))
    return None if match is None else f"{match[1]}://{match[2].strip('/')}"


def check_local(path: str | Path, what: str) -> None:
    """Raises ValueError for an address, where only a directory will do."""
    if (url := address(path)) is not None:
        raise ValueError(
            f"{what} {url} is an address, and a run is written to a directory: files grow, and locks are held, which "
            "buckets do not have. Mount the bucket (gcsfuse does it for gs://) and give its directory"
        )


def local(path: str | Path, *, weights: bool = True) -> Path:
    """The path itself; of a run, a checkpoint or a Hugging Face directory in a bucket, a copy.

    Args:
        path: a directory, or an address.
        weights: whether the parameters are wanted too.

    Raises:
        FileNotFoundError: the bucket has nothing there.
        ValueError: the package that reads such addresses is not installed.
    """
    url = address(path)
    if url is None:
        return Path(path)
    parent, _, name = url.rpartition("/")
    step = int(name) if name.isdigit() and parent.endswith("/checkpoints") else None
    root = parent.removesuffix("/checkpoints") if step is not None else url
    names = _names(root)
    steps = {int(parts[1]) for n in names if (parts := n.split("/"))[0] == "checkpoints" and parts[1].isdigit()}
    if step is not None and step not in steps:
        raise FileNotFoundError(f"there is no checkpoint {url}; there are those of steps {sorted(steps) or 'none'}")
    newest = step if step is not None else max(steps, default=None)
    copy = _copy(root, [name for name in names if _wanted(name, newest if weights else None, weights)])
    return copy if step is None else copy / "checkpoints" / str(step)


def _wanted(name: str, step: int | None, weights: bool) -> bool:
    """Whether opening the model takes this file of a run or of a Hugging Face directory."""
    parts = PurePosixPath(name).parts
    if parts[0] == "checkpoints":
        return step is not None and parts[1] == str(step) and parts[2] in ("params", "ema", "meta", "digests.json")
    if parts[0] in ("tensorboard", "quarantine"):
        return False
    return not name.endswith(_FOREIGN) and (weights or not name.endswith(".safetensors"))


def files(pattern: str) -> list[Path]:
    """Copies of the files that an address with a pattern names, sorted by address; none where it names none."""
    url = address(pattern)
    assert url is not None, pattern
    system, inside = _system(url)
    scheme = url.partition("://")[0]
    found = sorted(str(name) for name in system.glob(inside) if system.isfile(name))
    places = [f"{scheme}://{name.strip('/')}".rpartition("/") for name in found]
    copies = {parent: _copy(parent, [n for p, _, n in places if p == parent]) for parent, _, _ in places}
    return [copies[parent] / name for parent, _, name in places]


def _names(root: str) -> list[str]:
    """Relative paths of all files below an address."""
    system, inside = _system(root)
    names = [str(name)[len(inside.rstrip("/")) + 1 :] for name in system.find(inside)]
    if not names or names == [""]:
        raise FileNotFoundError(f"there is nothing at {root}")
    return names


def _copy(root: str, names: list[str]) -> Path:
    """Brings files below an address to this machine, those of them that are not here in this version."""
    system, inside = _system(root)
    copy = default_cache_dir() / "copies" / hashlib.sha256(root.encode()).hexdigest()[:32]
    record = copy.with_name(f"{copy.name}.json")
    versions = _read_record(record)
    for name in names:
        if ".." in PurePosixPath(name).parts:
            raise ValueError(f"{root} holds a file of the name {name!r}, which leads out of it")
        remote, place = f"{inside.rstrip('/')}/{name}", copy / name
        version = str(system.ukey(remote))
        if versions.get(name) != version or not place.is_file():
            _replace(place, lambda temporary, remote=remote: system.get_file(remote, str(temporary)))
            versions[name] = version
    _replace(record, lambda temporary: temporary.write_text(json.dumps(versions), encoding="utf-8"))
    return copy


def _read_record(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_bytes()))
    except (OSError, ValueError):
        return {}  # everything is copied again


def _replace(place: Path, write: Callable[[Path], Any]) -> None:
    """Gives a file its name when it is complete: several processes may copy the same one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise ValueError(f"{url} cannot be read without the package {_PACKAGES[scheme]}; install it") from error
