import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue] - made at run time

from llmlab.training.metrics import MetricsLog, read_metrics


def record(step: int) -> dict[str, float]:
    return {"step": step, "tokens": 64 * step, "train/loss": 1 / (3 * step), "learning_rate": 1e-3}


def tensorboard_events(directory: Path) -> list[Event]:
    """The events of a directory, by the format's definition: length, its checksum, the message, its checksum."""
    events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(record(step))
    assert read_metrics(tmp_path) == [record(1), record(2), record(3)]


def test_a_float32_loss_comes_back_bitwise(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(3, 1, 100).astype(np.float32)
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, loss in enumerate(losses):
            log.write({"step": step, "train/loss": float(loss)})
    assert [np.float32(r["train/loss"]) for r in read_metrics(tmp_path)] == list(losses)


def test_a_number_that_is_not_finite_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (back,) = read_metrics(tmp_path)
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


def test_every_line_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(record(1))
    assert read_metrics(tmp_path) == [record(1)]
    log.close()


@pytest.mark.parametrize("step", [None, 1.5, True])
def test_a_record_without_a_whole_step_is_refused(tmp_path: Path, step: float | None) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="whole number as its step"):
        log.write({"train/loss": 1.0} | ({} if step is None else {"step": step}))


def test_a_file_cut_back_and_continued_equals_one_never_interrupted(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "straight") as log:
        for step in range(1, 9):
            log.write(record(step))
    with MetricsLog(tmp_path / "resumed") as log:
        for step in range(1, 7):
            log.write(record(step))
    with MetricsLog(tmp_path / "resumed") as log:
        assert log.cut_back(4) == 2
        for step in range(5, 9):
            log.write(record(step))
    straight, resumed = (tmp_path / name / "metrics.jsonl" for name in ("straight", "resumed"))
    assert straight.read_bytes() == resumed.read_bytes()
    assert not list((tmp_path / "resumed").glob(".*"))  # no temporary file stays


def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(record(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tra')
    assert read_metrics(tmp_path) == [record(1)]
    with MetricsLog(tmp_path, tensorboard=False) as log:
        assert log.cut_back(1) == 0
        log.write(record(2))
    assert read_metrics(tmp_path) == [record(1), record(2)]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 is no record.*garbage"):
        read_metrics(tmp_path)


def test_a_directory_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2):
            log.write(record(step))
    points = {(v.tag, e.step): v.simple_value for e in tensorboard_events(tmp_path) for v in e.summary.value}
    expected = {(key, step): value for step in (1, 2) for key, value in record(step).items() if key != "step"}
    assert points.keys() == expected.keys()
    for point, value in expected.items():
        assert points[point] == np.float32(value), point


def test_tensorboard_is_told_to_drop_what_was_cut_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.write(record(step))
        log.cut_back(2)
        log.write(record(3))
    events = tensorboard_events(tmp_path)
    (mark,) = [i for i, event in enumerate(events) if event.HasField("session_log")]
    # TensorBoard drops points at or after the step of a START mark.
    assert (events[mark].session_log.status, events[mark].step) == (events[mark].session_log.START, 3)
    assert {event.step for event in events[mark + 1 :]} == {3}


class Bucket:
    """A mounted bucket, as far as one file goes: what is written to it is there when the file is closed, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.path, self.stored = path, b""
        opens = Path.open

        def open_and_note(target: Path, *arguments: Any, **settings: Any) -> Any:
            file = opens(target, *arguments, **settings)
            if target == path and file.writable():
                closes = file.close

                def close() -> None:
                    closes()
                    self.stored = path.read_bytes()

                file.close = close
            return file

        monkeypatch.setattr(Path, "open", open_and_note)

    def lose_the_machine(self) -> None:
        self.path.write_bytes(self.stored)


def test_records_before_a_sync_survive_a_lost_machine_whose_files_were_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(monkeypatch, tmp_path / "metrics.jsonl")
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (1, 2):
        log.write(record(step))
    assert bucket.stored == b""
    log.sync()
    log.write(record(3))
    bucket.lose_the_machine()
    assert read_metrics(tmp_path) == [record(1), record(2)]
    log.close()
