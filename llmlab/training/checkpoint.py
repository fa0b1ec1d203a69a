"""Checkpoints: the state of a run on disk, written beside the training, read back bit for bit.

    checkpoints/<step>/params/     parameters, which is all that using the model needs
                       ema/        their average, where one is kept
                       training/   step, optimizer state, loss scale
                       meta/       a few numbers: the validation loss at this step, ...
                       digests.json

orbax writes them: asynchronously (the copy to the host blocks, the disk does not) and atomically (a directory gets its
name when everything in it is on disk; what a killed process leaves has another name and is removed at the next
start). Its own checksums do not cover the payload, so every file's SHA-256 is written beside it and verified before
anything is restored. What fails is moved to `quarantine/`, never deleted, and the newest good checkpoint is used.
Later ones go there as well: a run that went back must not find steps of its former future. A checkpoint without
digests (the process was killed between its completion and theirs) is used if it can be read.

Where several processes train, all take part in a save and in a restore, each with what its devices hold; the directory
must be one that all of them see. The first process alone lists it, verifies, writes digests, sets aside and deletes,
and the others follow its decisions: two that chose different steps would train two different models as one.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmlab.nn.module import Params
from llmlab.objectives.companion import LEARNED, apart
from llmlab.sharding import cluster
from llmlab.sharding.cluster import Cluster
from llmlab.training.directory import check_renames, write_json
from llmlab.training.state import TrainState

DIGESTS = "digests.json"
NO_DIGESTS = f"it has no {DIGESTS}, as when a process is killed while they are computed"
_DELETED = ".deleted-"
_ITEMS = ("params", "ema", "training", "meta")


class Checkpoints:
    """The checkpoints of one run that is being trained.

    Args:
        directory: where they are; made where it is missing.
        quarantine: where damaged ones go.
        keep_last: how many of the newest stay.
        keep_best: how many of those with the lowest validation loss stay besides.
        tell: called with a sentence about anything that is not as it should be.
        processes: that train together.

    Raises:
        ValueError: directories cannot be renamed there.
    """

    def __init__(
        self,
        directory: Path,
        quarantine: Path,
        *,
        keep_last: int,
        keep_best: int,
        tell: Callable[[str], None],
        processes: Cluster = cluster.ALONE,
    ) -> None:
        import orbax.checkpoint as ocp

        self.directory = directory.absolute()
        self._quarantine = quarantine
        self._keep_last, self._keep_best, self._tell = keep_last, keep_best, tell
        self._processes = processes
        self._writing: _Writing | None = None
        found = processes.lead("checkpoints", self._open)
        # Which checkpoints to keep is decided here: orbax counts a checkpoint before its digests are written.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, save_root_metadata=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
        self._losses: dict[int, float | None] = dict(found)
        """Of every checkpoint on disk; the same in all processes, at the same points of the run."""

    def _open(self) -> list[tuple[int, float | None]]:
        """Makes the directory, removes what killed saves left, and lists steps and losses of what is there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in [*self.directory.glob(f"{_DELETED}*"), *self.directory.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        check_renames(self.directory, _DELETED)
        return [(step, _validation_loss(self._path(step))) for step in saved_steps(self.directory)]

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        writing = None if self._writing is None else self._writing.step
        return sorted(step for step in self._losses if step != writing)

    def save(self, state: TrainState, step: int, meta: Mapping[str, float]) -> None:
        """Begins to save the state after `step` steps; returns when the state may be given up.

        A step that is saved already stays as it is.

        Raises:
            RuntimeError: orbax declined. Errors of the disk show here, at the next `save`, `poll` or `close`.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in self._losses:
            return
        training = {"step": state.step, "optimizer_state": state.optimizer_state, "loss_scale": state.loss_scale}
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "training": ocp.args.StandardSave(training),
            "meta": ocp.args.JsonSave(dict(meta)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        # force: without it orbax declines, silently, whatever is not later than all it has seen.
        if not self._manager.save(step, args=ocp.args.Composite(**items), force=True):
            raise RuntimeError(f"the checkpoint of step {step} was not saved: orbax declined")
        self._losses[step] = meta.get("validation/loss")
        self._writing = _Writing(step, functools.partial(self._complete, step))

    def poll(self) -> int | None:
        """The step of a save that has finished since the last call, if one has. Costs nothing."""
        return self.wait() if self._writing is not None and self._writing.finished else None

    def wait(self) -> int | None:
        """Waits for the save that is under way, and returns its step."""
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        writing.join()
        self._prune()
        return writing.step

    def newest(self) -> int | None:
        """Step of the newest checkpoint, once the one under way is written; None where there is none."""
        self.wait()
        return max(self.steps(), default=None)

    def close(self) -> None:
        """Waits for everything to be on disk. Errors of a save that is still under way show here."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest good checkpoint's state, and its meta; None where there is none.

        Args:
            abstract: shapes, types and shardings of the state.

        Raises:
            ValueError: the checkpoint is whole but is not of this model or optimizer.
        """
        for step in reversed(self.steps()):
            problem = self._processes.lead("verify", lambda step=step: verify(self._path(step)))
            if problem is None:
                return self._restore(step, abstract)
            if problem == NO_DIGESTS:
                restored, error = self._try_to_restore(step, abstract)
                if restored is not None:
                    self._processes.lead("digests", functools.partial(_write_digests, self._path(step)))
                    self._tell(f"the checkpoint of step {step} could be read but not verified: {problem}")
                    return restored
                problem = f"{problem}, and it cannot be read: {error}"
            place = self._set_aside(step)
            self._tell(f"the checkpoint of step {step} is damaged ({problem}); it was moved to {place}")
        return None

    def _try_to_restore(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """The state and its meta; None, and why, where a process could not read its part."""
        restored, error = None, ""
        try:
            restored = self._restore(step, abstract)
        except Exception as problem:  # whatever orbax and its libraries raise for broken files
            error = str(problem).splitlines()[0]
        errors = [text for text in self._processes.gather("restored", error) if text]
        return (None, errors[0]) if errors else (restored, "")

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        import orbax.checkpoint as ocp

        training = {
            "step": abstract.step,
            "optimizer_state": abstract.optimizer_state,
            "loss_scale": abstract.loss_scale,
        }
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(abstract.params),
            "training": ocp.args.StandardRestore(training),
            "meta": ocp.args.JsonRestore(),
        }
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        self._manager.reload()
        stored = self._manager.item_metadata(step)
        try:
            for name, item in (("params", abstract.params), ("training", training)):
                _check_shapes(stored[name], item)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:  # its digests are right, so the question was wrong
            raise ValueError(
                f"the checkpoint of step {step} does not fit this experiment's model, optimizer or precision, so the "
                f"run cannot go on from it; start another one with --out. ({str(error).splitlines()[0]})"
            ) from error
        state = TrainState(
            params=restored["params"], ema=restored["ema"] if abstract.ema is not None else None, **restored["training"]
        )
        return state, dict(restored["meta"])

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _complete(self, step: int) -> None:
        """Waits, in a thread, for the save to be on disk with its digests; errors are those of all processes."""
        self._manager.wait_until_finished()
        self._processes.lead("saved", functools.partial(_write_digests, self._path(step)))

    def _set_aside(self, step: int) -> Path:
        place = self._quarantine / self._processes.lead("quarantine", lambda: self._move_to_quarantine(step))
        self._losses.pop(step, None)
        self._manager.reload()
        return place

    def _move_to_quarantine(self, step: int) -> str:
        self._quarantine.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in self._quarantine.iterdir()}
        names = (f"checkpoint-{step}" + (f"-{i}" if i else "") for i in range(len(taken) + 1))
        name = next(name for name in names if name not in taken)
        self._path(step).rename(self._quarantine / name)
        return name

    def _prune(self) -> None:
        """Removes what is neither among the newest nor among the best."""
        steps = self.steps()
        scored = sorted((loss, step) for step in steps if (loss := self._losses.get(step)) is not None)
        keep = {*steps[-self._keep_last :], *(step for _, step in scored[: self._keep_best])}
        for step in steps:
            if step not in keep:
                self._losses.pop(step)
                if self._processes.is_first:
                    # Renamed first: a half-deleted directory would look like a checkpoint.
                    doomed = self.directory / f"{_DELETED}{step}"
                    self._path(step).rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
        self._manager.reload()


class _Writing:
    """A save under way: a thread that waits for it to be complete."""

    def __init__(self, step: int, complete: Callable[[], None]) -> None:
        self.step = step
        self._error: BaseException | None = None

        def run() -> None:
            try:
                complete()
            except BaseException as error:  # raised by join, in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=run, name="llmlab-checkpoint")
        self._thread.start()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise OSError(f"the checkpoint of step {self.step} could not be written: {self._error}") from self._error


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, in ascending order."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit() and path.is_dir())


def digests(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a directory, by relative path."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.relative_to(path).parts != (DIGESTS,):
            with file.open("rb") as content:
                found[file.relative_to(path).as_posix()] = {
                    "size": os.fstat(content.fileno()).st_size,
                    "sha256": hashlib.file_digest(content, "sha256").hexdigest(),
                }
    return found


def verify(path: Path, item: str | None = None) -> str | None:
    """What is wrong with a checkpoint, or None where every file (of one item: params, ema) is what was written."""
    try:
        expected = json.loads((path / DIGESTS).read_bytes())["files"]
    except FileNotFoundError:
        return NO_DIGESTS
    except (ValueError, KeyError, TypeError):
        return f"{DIGESTS} cannot be read"
    found = digests(path) if item is None else {f"{item}/{name}": f for name, f in digests(path / item).items()}
    for name, entry in expected.items():
        if item is not None and not name.startswith(f"{item}/"):
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name]["size"] != entry["size"]:
            return f"{name} has {found[name]['size']} bytes, not {entry['size']}"
        if found[name] != entry:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


def restore_params(checkpoints: Path, abstract: Params, *, step: int | None = None, ema: bool = False) -> Params:
    """Parameters of a run's checkpoint, without touching the run: it may be training at this moment.

    Args:
        checkpoints: the run's checkpoint directory.
        abstract: shapes, types and shardings.
        step: which checkpoint; None for the newest good one.
        ema: the average instead of the parameters themselves.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or not of these shapes.
    """
    import orbax.checkpoint as ocp

    steps = saved_steps(checkpoints)
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{checkpoints} has no checkpoint of step {step}; there are {steps or 'none'}")
    name = "ema" if ema else "params"
    problems = {c: verify(checkpoints / str(c), name) for c in (steps if step is None else [step])}
    # Without digests only where nothing better is there: they may be under way.
    good = [c for c, problem in problems.items() if problem is None] or [
        c for c, problem in problems.items() if problem == NO_DIGESTS
    ]
    if not good and problems:
        listed = "; ".join(f"step {candidate}: {problem}" for candidate, problem in problems.items())
        raise ValueError(f"no checkpoint in {checkpoints} is whole: {listed}")
    if not good:
        raise FileNotFoundError(f"{checkpoints} holds no checkpoint yet: the run has not saved one")
    item = (checkpoints / str(max(good)) / name).absolute()
    if not item.is_dir():
        raise ValueError(f"{item.parent} holds no average of the weights: the run was trained without (optimizer.ema)")
    with _without_remarks(), contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        stored = checkpointer.metadata(item).item_metadata
        _check_shapes(stored, abstract)
        return apart(checkpointer.restore(item, abstract | _brought(stored, abstract)))[0]


def _brought(stored: Any, abstract: Params) -> Params:
    """Shapes of the parameters that the objective brought along to training: orbax reads all of a tree or nothing, and
    these are small."""
    if stored is None or LEARNED not in stored.tree:
        return {}
    here = jax.tree.leaves(abstract)[0].sharding
    if isinstance(here, NamedSharding):  # that of a parameter may not divide these
        here = NamedSharding(here.mesh, PartitionSpec())
    return {
        LEARNED: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=here), stored.tree[LEARNED]
        )
    }


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """orbax warns that an item has no metadata beside its arrays; it needs none, and nobody could do anything."""

    def tells(record: logging.LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(tells)
    try:
        yield
    finally:
        logger.removeFilter(tells)


def save_params(checkpoints: Path, params: Params, *, step: int) -> Path:
    """Write parameters alone as the checkpoint of a step, which must not exist; returns its directory."""
    import orbax.checkpoint as ocp

    path = (checkpoints / str(step)).absolute()
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        checkpointer.save(path / "params", params)
    _write_digests(path)
    return path


def _write_digests(path: Path) -> None:
    write_json(path / DIGESTS, {"files": digests(path)})


def _check_shapes(stored: Any, abstract: Any) -> None:
    """Raise ValueError where an array on disk has another shape than the one asked for.

    Asked before reading: orbax reads all arrays at once, and one that fails leaves the others' readers behind, which
    complain whenever they are collected.
    """
    shapes = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(stored.tree)} if stored is not None else {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if shapes.get(name, leaf.shape) != leaf.shape:
            raise ValueError(f"{name} is {shapes[name]} in the checkpoint and {leaf.shape} in the experiment")


def _validation_loss(path: Path) -> float | None:
    try:
        return json.loads((path / "meta" / "metadata").read_bytes()).get("validation/loss")
    except (OSError, ValueError):
        return None  # damaged: found out, and dealt with, if it is ever restored
