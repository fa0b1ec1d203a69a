"""Where a run's numbers come from: provenance.json, enough to repeat the run or to find out why it cannot be repeated.

    {
      "format": 1,
      "name": ..., "config_hash": ..., "config": {...}        the resolved experiment, as in config.json
      "fingerprints": {"data": ..., "tokenizer": ...}         hashes of what it learnt from
      "experiment_file": {"path": ..., "sha256": ..., "text": ...}
      "environments": [{git, packages, python, platform, devices, jax, variables}, ...]
      "sessions": [{"environment": 0, "command": [...], "started": ..., "finished": ..., "seconds": ...,
                    "status": "finished", "first_step": 0, "last_step": 600}, ...]
    }

A run that was resumed has several sessions; as long as nothing changed they share one environment, so a second entry
under "environments" is the first thing to look at when a curve has a kink. The uncommitted changes of the experiment's
repository are stored as a diff: `git checkout <commit>; git apply` gives the code back. Files that git does not track
are named and not copied, since nobody chose to share them; the experiment file itself is kept.

Secrets stay out: of the environment's variables only those that change what jax and llmlab compute are kept, and of
these none whose name speaks of a key or token.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from llmlab.training.directory import write_json
from llmlab.training.faults import Interrupted, NonFiniteError, Pruned

FILE_NAME = "provenance.json"
MAX_DIFF_BYTES = 256 * 1024
MAX_UNTRACKED = 200

Status = Literal["running", "finished", "interrupted", "preempted", "pruned", "failed"]

_PACKAGES = (
    *("llmlab", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "numpy"),
    *("orbax-checkpoint", "sentencepiece", "tokenizers", "tensorflow-datasets", "grain", "safetensors"),
)
# Options of jax that change numbers or compiled programs.
_JAX_OPTIONS = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_numpy_dtype_promotion", "jax_disable_jit", "jax_debug_nans"),
)
_VARIABLES = re.compile(r"XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_\w+|LLMLAB_\w+|NVIDIA_TF32_OVERRIDE|OMP_NUM_THREADS")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


class Provenance:
    """The provenance.json of a run while a session of it is under way. Every change is on disk when the call returns.

    provenance = Provenance.begin(directory, name=..., config=..., config_hash=..., experiment_file=path)
    provenance.fingerprints(data=dataset.fingerprint, tokenizer=tokenizer.fingerprint)
    ...
    provenance.finish("finished", last_step=600)
    """

    def __init__(self, path: Path, content: dict[str, Any], began: float) -> None:
        self.path = path
        self.content = content
        self._began = began

    @classmethod
    def begin(
        cls,
        directory: Path | str,
        *,
        name: str,
        config: Mapping[str, Any],
        config_hash: str,
        experiment_file: Path | str | None = None,
        first_step: int = 0,
        command: Sequence[str] | None = None,
    ) -> "Provenance":
        """Opens a session: the first of a new run, or one more where the directory has a provenance.json.

        Args:
            directory: of the run.
            name: of the experiment.
            config: the resolved experiment, as JSON has it.
            config_hash: of the experiment.
            experiment_file: the Python file, where there is one; its repository is the one that is recorded.
            first_step: steps that were done before this session.
            command: the command line; None for the process's own.
        """
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _empty() | (read_provenance(directory) if path.exists() else {})
        here = environment(None if experiment_file is None else Path(experiment_file).parent)
        if here not in content["environments"]:
            content["environments"].append(here)
        content |= {"name": name, "config_hash": config_hash, "config": dict(config)}
        content["experiment_file"] = None if experiment_file is None else _file(Path(experiment_file))
        content["sessions"].append(
            {
                "environment": content["environments"].index(here),
                "command": list(sys.argv if command is None else command),
                "started": _now(),
                "finished": None,
                "seconds": None,
                "status": "running",
                "first_step": first_step,
                "last_step": None,
            }
        )
        provenance = cls(path, content, time.perf_counter())
        provenance._write()
        return provenance

    def fingerprints(self, **hashes: str) -> None:
        """Records hashes of what the run learns from: `data=`, `tokenizer=`, ..."""
        self.content["fingerprints"] = {**self.content["fingerprints"], **hashes}
        self._write()

    def resumes_at(self, first_step: int) -> None:
        """Records how many steps were done before this session, where that is known only after `begin`."""
        self.content["sessions"][-1]["first_step"] = first_step
        self._write()

    def finish(self, status: Status, *, last_step: int) -> None:
        """Closes the session: how it ended, after how many steps of the run, and how long it took."""
        seconds = round(time.perf_counter() - self._began, 3)
        self.content["sessions"][-1] |= {
            "finished": _now(),
            "seconds": seconds,
            "status": status,
            "last_step": last_step,
        }
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content)


class Account:
    """A session's part of a run's provenance, from its first step to its end.

    Args:
        begin: `Provenance.begin` with all but the first step.
        writes: whether this process is the one that writes.
    """

    def __init__(self, begin: Callable[..., Provenance], *, writes: bool = True) -> None:
        self._begin, self._writes = begin, writes
        self._provenance: Provenance | None = None
        self._first_step = 0

    def started(self, step: int, fingerprints: Mapping[str, str]) -> None:
        """Everything is ready; so many steps are done."""
        if self._writes:
            self._first_step = step
            self._provenance = self._begin(first_step=step)
            self._provenance.fingerprints(**fingerprints)

    def finish(self, status: Status, step: int | None) -> None:
        """How it ended, after how many steps where that is known; nothing is written of what never started."""
        if self._provenance is not None:
            self._provenance.finish(status, last_step=self._first_step if step is None else step)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Writes down what ends the session early."""
        try:
            yield
        except Interrupted as error:
            self.finish("preempted" if error.signal == signal.SIGTERM else "interrupted", error.step)
            raise
        except NonFiniteError as error:
            self.finish("failed", error.step)
            raise
        except Pruned as error:
            self.finish("pruned", error.step)
            raise
        except BaseException:
            self.finish("failed", None)
            raise


def _empty() -> dict[str, Any]:
    """No session yet; keys in the order in which a reader wants them."""
    about = {"format": 1, "name": None, "config_hash": None, "config": None, "fingerprints": {}}
    return about | {"experiment_file": None, "environments": [], "sessions": []}


def read_provenance(directory: Path | str) -> dict[str, Any]:
    """The content of a run's provenance.json.

    Raises:
        FileNotFoundError: the directory has none.
        ValueError: the file is damaged.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        content = error
    if not isinstance(content, dict) or not isinstance(content.get("sessions"), list):
        raise ValueError(f"{path} is damaged ({content!r:.80}); move it away, and the next session starts a new one")
    return content


def environment(source: Path | None) -> dict[str, Any]:
    """Everything around the config that can change the numbers; `source` is the directory of the experiment's file."""
    experiment = {"absent": "no experiment file"} if source is None else git_state(source)
    own = _own_git_state()
    return {
        "git": {"experiment": experiment, "llmlab": {"same_as": "experiment"} if own == experiment else own},
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": {"system": platform.platform(), "machine": platform.machine(), "num_cpus": os.cpu_count()},
        "devices": _devices(),
        "jax": _jax_options(),
        "variables": environment_variables(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that take part in the numbers."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an accelerator's plugin on a machine without it
    return versions


def environment_variables() -> dict[str, str]:
    """The variables that change what is computed: XLA_FLAGS, LIBTPU_INIT_ARGS, JAX_*, LLMLAB_* and two more."""
    return {
        name: "(not recorded)" if _SECRET.search(name) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name)
    }


def git_state(directory: Path) -> dict[str, Any]:
    """Commit, branch, uncommitted changes and untracked names of the repository around a directory.

    Outside a repository, without git, or where git refuses: {"absent": why}. Never raises for any of these.
    """
    try:
        top = _git(directory, "rev-parse", "--show-toplevel").strip()
        commit = _git(directory, "rev-parse", "--verify", "HEAD", may_fail=True).strip()
        diff, cut = _bounded(_git(Path(top), *_DIFF, commit or _EMPTY_TREE), MAX_DIFF_BYTES)
        untracked = _git(Path(top), *_UNTRACKED).split("\0")[:-1]
        return {
            "commit": commit or None,
            "branch": _git(directory, "symbolic-ref", "--short", "HEAD", may_fail=True).strip() or None,
            "dirty": bool(diff or untracked),
            "diff": diff,
            "diff_truncated": cut,
            "untracked": untracked[:MAX_UNTRACKED],
            "num_untracked": len(untracked),
        }
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        return {"absent": str(reason).strip()[:300]}


# No colours, no external diff programs, no filters: the plain patch, whatever the user's git settings.
_DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
# A directory without a tracked file is one name: runs/ would otherwise be thousands, and others at every resume.
_UNTRACKED = ("ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory", "-z")
_EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git's name for nothing: what a first commit is compared with


def _git(directory: Path, *arguments: str, may_fail: bool = False) -> str:
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", "-C", str(directory), *arguments]
    settings = {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}  # never wait for, or disturb, the user's own git
    done = subprocess.run(command, capture_output=True, check=not may_fail, timeout=20, env=os.environ | settings)
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _own_git_state() -> dict[str, Any]:
    """The repository that llmlab itself runs from, where it is one: an installed package has its version instead."""
    import llmlab

    source = Path(llmlab.__file__).resolve()
    try:
        _git(source.parent, "ls-files", "--error-unmatch", source.name)
    except (OSError, subprocess.SubprocessError):
        return {"absent": "installed as a package"}
    return git_state(source.parent)


def _bounded(text: str, limit: int) -> tuple[str, bool]:
    """The text, cut to whole lines within `limit` bytes, and whether something was cut."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text, False
    return encoded[: encoded.rfind(b"\n", 0, limit) + 1].decode(), True


def _file(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    text, cut = _bounded(content.decode(errors="replace"), MAX_DIFF_BYTES)
    return {"path": str(path), "sha256": hashlib.sha256(content).hexdigest(), "text": text, "truncated": cut}


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def _jax_options() -> dict[str, Any]:
    import jax

    values = {name: getattr(jax.config, name) for name in _JAX_OPTIONS}
    return {name: value if isinstance(value, (bool, int, str)) else str(value) for name, value in values.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
