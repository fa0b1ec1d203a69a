"""The run directory: what is in it, who may write to it, and what is never done to it.

    config.json        the resolved experiment, written before anything else: its presence makes a directory a run
    provenance.json    what code, machine and data made the run
    metrics.jsonl      one JSON object a line, the truth about the run
    summary.json       final metrics, written when the run is complete: its presence makes a run finished
    tensorboard/       the metrics again, for TensorBoard
    tokenizer/         the tokenizer
    checkpoints/       the state after some of the steps
    quarantine/        damaged checkpoints, kept for whoever wants to look
    run.lock           held by the process that trains

Files are replaced by renaming a complete new one over the old, so a crash leaves one or the other, never a torn one.

The directory may be in a mounted bucket (gcsfuse). What that does not give: the lock keeps out processes of the same
machine only, so whoever starts runs on several must start one of a name; a file is in the bucket when it is closed,
not before; and directories can be renamed in buckets with a hierarchical namespace alone (`check_renames`).
"""

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Held(ValueError):
    """Another live process trains in a run directory."""


class RunDirectory:
    """Paths of a run, and the lock on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.tensorboard = path / "tensorboard"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.quarantine = path / "quarantine"
        self.lock_file = path / "run.lock"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory and keeps other processes out until the end, however this process ends.

        Raises:
            Held: another live process trains here.
            ValueError: the directory holds something that is not a run.
        """
        self._check_ours()
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a+", encoding="utf-8") as file:
            if not _try_lock(file.fileno()):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise Held(
                    f"{self.path} is held by {holder}, which is training in it; wait for it, stop it, or choose "
                    "another directory with --out"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def is_held(self) -> bool:
        """Whether a process of this machine holds the directory at this moment."""
        try:
            with self.lock_file.open("rb") as file:
                return not _try_lock(file.fileno(), shared=True)
        except FileNotFoundError:
            return False

    def _check_ours(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another directory with --out")
        if self.config.exists() or all(entry.name == self.lock_file.name for entry in self.path.iterdir()):
            return
        raise ValueError(
            f"{self.path} exists, is not empty and is not a run (it has no config.json); it is left as it is: choose "
            "another directory with --out"
        )


def check_renames(directory: Path, prefix: str) -> None:
    """Renames a directory with a file in it, as checkpoints are, before hours of work depend on it.

    Args:
        directory: where to try; must exist.
        prefix: of the names to try with, which are gone afterwards.

    Raises:
        ValueError: it cannot be done. gcsfuse refuses it in buckets without a hierarchical namespace, where it would
            have to copy and delete file by file.
    """
    before, after = directory / f"{prefix}probe", directory / f"{prefix}probe-renamed"
    try:
        before.mkdir(exist_ok=True)
        (before / "file").write_text("renamed with its directory", encoding="utf-8")
        before.rename(after)
    except OSError as error:
        raise ValueError(
            f"a directory in {directory} cannot be renamed ({error}), and that is how a checkpoint becomes "
            "complete; choose another directory with --out. In a mounted Cloud Storage bucket it works if the bucket "
            "was made for it: gcloud storage buckets create gs://NAME --location REGION --uniform-bucket-level-access "
            "--enable-hierarchical-namespace"
        ) from error
    finally:
        for path in (before, after):
            shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by one with this text, completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces a file by one with this value as JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _try_lock(descriptor: int, *, shared: bool = False) -> bool:
    if sys.platform == "win32":
        return True  # no flock there
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
