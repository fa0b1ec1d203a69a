"""Checkpoints come back bit for bit, or are set aside."""

import dataclasses
import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.module import logical_axes, split
from llmlab.objectives import NextToken
from llmlab.optim import AdamW
from llmlab.sharding import Mesh
from llmlab.training.checkpoint import Checkpoints, restore_params, saved_steps, verify
from llmlab.training.state import Layout, TrainState, abstract, new_state
from llmlab.training.step import make_train_step
from tests.selection import at_scale_but


@pytest.fixture
def state(make_model: Callable[..., Any]) -> TrainState:
    model = make_model()
    return new_state(split(model)[1], AdamW(peak_lr=1e-2).build(logical_axes(model), 10), precision="float16", ema=True)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def open_checkpoints(tmp_path: Path, told: list[str]) -> Iterator[Callable[..., Checkpoints]]:
    opened = []

    def make(keep_last: int = 10, keep_best: int = 0) -> Checkpoints:
        directory = tmp_path / "checkpoints"
        settings: dict[str, Any] = {"keep_last": keep_last, "keep_best": keep_best, "tell": told.append}
        opened.append(Checkpoints(directory, tmp_path / "quarantine", **settings))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def numbered(state: TrainState, step: int) -> TrainState:
    """A state that differs from that of every other step, in every array."""
    moved = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)
    return dataclasses.replace(moved, step=jnp.asarray(step, jnp.int32))


def assert_identical(found: Any, expected: Any) -> None:
    def check(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, found, expected)


def test_what_is_saved_is_restored_bit_for_bit(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState, told: list[str]
) -> None:
    checkpoints = open_checkpoints()
    for step in (3, 7):
        checkpoints.save(numbered(state, step), step, {"validation/loss": 1.0 / step})
    checkpoints.close()
    restored = open_checkpoints().restore(abstract(state, None))
    assert restored is not None
    assert_identical(restored[0], numbered(state, 7))
    assert restored[1] == {"validation/loss": 1.0 / 7}
    assert not told


def test_a_directory_without_checkpoints_restores_nothing(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState
) -> None:
    assert open_checkpoints().restore(abstract(state, None)) is None


def test_training_on_while_a_checkpoint_is_written_does_not_change_it(
    open_checkpoints: Callable[..., Checkpoints],
    make_model: Callable[..., Any],
    make_batch: Callable[..., Any],
) -> None:
    # The step is given the very buffers that are being written, and may reuse them.
    graphdef, params = split(make_model())
    optimizer = AdamW(peak_lr=1e-1).build(logical_axes(make_model()), 100)
    state = new_state(params, optimizer)
    step = make_train_step(graphdef, NextToken(), optimizer)
    state, _ = step(state, make_batch())
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    shapes = abstract(state, None)
    checkpoints = open_checkpoints()
    checkpoints.save(state, 1, {})
    for _ in range(50):
        state, _ = step(state, make_batch())
    checkpoints.wait()
    restored = checkpoints.restore(shapes)
    assert restored is not None
    assert_identical(restored[0], expected)


def test_a_state_is_restored_onto_another_layout(
    open_checkpoints: Callable[..., Checkpoints], make_model: Callable[..., Any], state: TrainState
) -> None:
    axes = logical_axes(make_model())
    sharded = jax.device_put(state, Layout.of(state, axes, Mesh(fsdp=8, data=1).build(jax.devices())).state)
    checkpoints = open_checkpoints()
    checkpoints.save(sharded, 1, {})
    checkpoints.wait()
    layout = Layout.of(state, axes, Mesh(data=2, fsdp=2).build(jax.devices()[:4])).state
    restored = checkpoints.restore(abstract(state, layout))
    assert restored is not None
    assert_identical(restored[0], state)
    assert jax.tree.map(lambda x: x.sharding, restored[0]) == layout


def test_the_newest_and_the_best_stay(open_checkpoints: Callable[..., Checkpoints], state: TrainState) -> None:
    checkpoints = open_checkpoints(keep_last=2, keep_best=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0), (6, 6.0)):
        checkpoints.save(state, step, {"validation/loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3, 5, 6]
    again = open_checkpoints(keep_last=1, keep_best=1)
    again.save(state, 7, {})  # not evaluated at this step
    again.wait()
    assert again.steps() == [2, 7]


def test_poll_tells_once_when_a_save_is_on_disk(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState
) -> None:
    checkpoints = open_checkpoints()
    assert checkpoints.poll() is None
    checkpoints.save(state, 5, {})
    deadline = time.monotonic() + 30
    while (step := checkpoints.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert step == 5
    assert checkpoints.poll() is None
    assert verify(checkpoints.directory / "5") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize(
    "file", at_scale_but(("params", "digests.json"), ["params", "training", "meta", "digests.json"])
)
def test_a_damaged_checkpoint_is_set_aside_and_the_newest_good_one_used(
    damage: Callable[[Path], None],
    file: str,
    open_checkpoints: Callable[..., Checkpoints],
    state: TrainState,
    told: list[str],
    tmp_path: Path,
) -> None:
    checkpoints = open_checkpoints()
    for step in (1, 2, 3, 4):
        checkpoints.save(numbered(state, step), step, {})
    checkpoints.close()
    for step in (3, 4):
        place = tmp_path / "checkpoints" / str(step) / file
        if file == "digests.json" and damage is Path.unlink:
            pytest.skip("a checkpoint without digests has a test of its own")
        # the largest file of an item holds the numbers
        damage(max(place.rglob("*"), key=lambda p: p.stat().st_size * p.is_file()) if place.is_dir() else place)
    again = open_checkpoints()
    restored = again.restore(abstract(state, None))
    assert restored is not None
    assert_identical(restored[0], numbered(state, 2))
    assert [("step 4" in t or "step 3" in t) and "damaged" in t and "quarantine" in t for t in told] == [True, True]
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    # and saving goes on, at steps that a future that is gone had saved before
    again.save(numbered(state, 3), 3, {})
    again.wait()
    assert again.steps() == [1, 2, 3]
    assert verify(tmp_path / "checkpoints" / "3") is None


def test_checkpoints_that_are_all_damaged_restore_nothing_and_are_kept_aside_under_names_of_their_own(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState, told: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        checkpoints = open_checkpoints()
        checkpoints.save(state, 1, {})
        checkpoints.close()
        truncate(tmp_path / "checkpoints" / "1" / "digests.json")
        assert open_checkpoints().restore(abstract(state, None)) is None
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["checkpoint-1", "checkpoint-1-1"]
    assert len(told) == 2


@pytest.mark.parametrize("readable", [True, False])
def test_a_checkpoint_without_digests_is_used_if_it_can_be_read(
    readable: bool, open_checkpoints: Callable[..., Checkpoints], state: TrainState, told: list[str], tmp_path: Path
) -> None:
    # The process was killed after the checkpoint was complete and before its digests were.
    checkpoints = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(numbered(state, step), step, {})
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "2"
    (newest / "digests.json").unlink()
    if not readable:
        (newest / "params" / "manifest.ocdbt").unlink()
    restored = open_checkpoints().restore(abstract(state, None))
    assert restored is not None
    assert_identical(restored[0], numbered(state, 2 if readable else 1))
    assert len(told) == 1
    assert ("could be read but not verified" if readable else "cannot be read") in told[0]
    assert not readable or verify(newest) is None


def test_what_killed_saves_and_deletions_leave_is_removed(
    open_checkpoints: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    leftovers = [tmp_path / "checkpoints" / name for name in ("12.orbax-checkpoint-tmp", ".deleted-3")]
    for leftover in leftovers:
        (leftover / "params").mkdir(parents=True)
    assert open_checkpoints().steps() == []
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_place_that_renames_no_directories_is_refused_before_anything_is_trained(
    open_checkpoints: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renames = Path.rename

    def rename_in_a_flat_bucket(path: Path, target: Path) -> Path:
        if path.is_dir() and any(path.iterdir()):
            raise OSError(errno.EMFILE, "Too many open files")  # gcsfuse, for directories above --rename-dir-limit
        return renames(path, target)

    open_checkpoints()
    assert list((tmp_path / "checkpoints").iterdir()) == []  # the trial leaves nothing
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_in_a_flat_bucket)
        with pytest.raises(ValueError, match=r"Too many open files.*--enable-hierarchical-namespace"):
            open_checkpoints()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_whole_checkpoint_of_another_model_is_an_error_and_stays_where_it_is(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState, told: list[str]
) -> None:
    checkpoints = open_checkpoints()
    checkpoints.save(state, 1, {})
    checkpoints.wait()
    other = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2), x.dtype), state)
    with pytest.raises(ValueError, match=r"step 1 does not fit this experiment.*in the checkpoint and .* 2\) in the"):
        checkpoints.restore(abstract(other, None))
    with pytest.raises(ValueError, match=r"in the checkpoint and .* 2\) in the experiment"):
        restore_params(checkpoints.directory, abstract(other, None).params)
    assert checkpoints.steps() == [1]
    assert not told


def test_an_error_while_writing_is_raised_where_the_run_looks(
    open_checkpoints: Callable[..., Checkpoints], state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    checkpoints = open_checkpoints()
    monkeypatch.setattr("llmlab.training.checkpoint.write_json", full)
    checkpoints.save(state, 1, {})
    with pytest.raises(OSError, match="step 1 could not be written: no space left"):
        checkpoints.wait()


def test_parameters_alone_are_read_without_touching_the_run_or_a_word(
    open_checkpoints: Callable[..., Checkpoints],
    state: TrainState,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoints = open_checkpoints()
    for step in (1, 2, 3):
        checkpoints.save(numbered(state, step), step, {})
    checkpoints.wait()
    directory = tmp_path / "checkpoints"
    (directory / "3" / "digests.json").unlink()  # as while it is being written
    shapes = abstract(state, None)
    assert_identical(restore_params(directory, shapes.params), numbered(state, 2).params)
    assert_identical(restore_params(directory, shapes.params, step=1), numbered(state, 1).params)
    assert_identical(restore_params(directory, shapes.params, ema=True), numbered(state, 2).ema)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 9; there are \[1, 2, 3\]"):
        restore_params(directory, shapes.params, step=9)
    assert_identical(restore_params(directory, shapes.params, step=3), numbered(state, 3).params)
    truncate(directory / "2" / "digests.json")
    with pytest.raises(ValueError, match=r"step 2: digests.json cannot be read"):
        restore_params(directory, shapes.params, step=2)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        restore_params(tmp_path, shapes.params)
    assert saved_steps(directory) == [1, 2, 3]


def test_a_process_killed_while_it_saves_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import jax.numpy as jnp
        from llmlab.training.checkpoint import Checkpoints
        from llmlab.training.state import TrainState

        run = Path(sys.argv[1])
        checkpoints = Checkpoints(run / "checkpoints", run / "quarantine", keep_last=2, keep_best=0, tell=print)
        for step in range(1, 10_000):
            params = {str(i): jnp.full(20_000, float(step)) for i in range(8)}
            state = TrainState(step=jnp.int32(step), params=params, optimizer_state={}, ema=None, loss_scale=None)
            checkpoints.save(state, step, {"step": step})
            print(step, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(6):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    told: list[str] = []
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", tmp_path / "quarantine", keep_last=2, keep_best=0, tell=told.append
    )
    shapes = {str(i): jax.ShapeDtypeStruct((20_000,), jnp.float32) for i in range(8)}
    whole = [step for step in checkpoints.steps() if verify(tmp_path / "checkpoints" / str(step)) is None]
    assert whole
    assert all(path.name.isdigit() for path in checkpoints.directory.iterdir())  # nothing half-written is left
    for step in whole:
        params = restore_params(tmp_path / "checkpoints", shapes, step=step)
        assert all((leaf == step).all() for leaf in params.values())
        assert json.loads((tmp_path / "checkpoints" / str(step) / "meta" / "metadata").read_text()) == {"step": step}
    checkpoints.close()
