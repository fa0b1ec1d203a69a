"""What becomes a line, and what stops a run."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from llmlab.training.config import Train
from llmlab.training.faults import NonFiniteError
from llmlab.training.metrics import MetricsLog
from llmlab.training.recorder import Recorder
from llmlab.training.report import NullReport
from llmlab.training.throughput import Throughput

CONFIG = Train(steps=10, batch_size=2, sequence_length=4, log_every=4)


@pytest.fixture
def make() -> Iterator[Callable[..., Recorder]]:
    logs: list[MetricsLog] = []

    def make(directory: Path, config: Train = CONFIG) -> Recorder:
        speed = Throughput(flops_per_token=1, tokens_per_step=8, total_steps=10, peak=None)
        logs.append(MetricsLog(directory, tensorboard=False))
        return Recorder(logs[-1], NullReport(), speed, config, lambda: 7)

    yield make
    for log in logs:
        log.close()


def lines(tmp_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_lines_are_written_for_the_first_every_nth_and_the_last_step(
    make: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make(tmp_path)
    for step in range(1, 11):
        recorder.step(step, {"train/loss": jnp.asarray(1.0 / step)})
    recorder.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 8, 10]
    assert [line["tokens"] for line in lines(tmp_path)] == [8, 32, 64, 80]
    assert [line["train/loss"] for line in lines(tmp_path)] == [float(jnp.float32(1 / s)) for s in (1, 4, 8, 10)]


def test_a_step_does_not_depend_on_where_recording_began(make: Callable[..., Recorder], tmp_path: Path) -> None:
    # A resumed run starts between two lines.
    for name, start in (("whole", 1), ("resumed", 3)):
        recorder = make(tmp_path / name)
        for step in range(start, 11):
            recorder.step(step, {"train/loss": jnp.asarray(1.0 / step)})
        recorder.flush()
    whole, resumed = (
        [{key: line[key] for key in ("step", "tokens", "train/loss")} for line in lines(tmp_path / name)]
        for name in ("whole", "resumed")
    )
    assert resumed == whole[1:]


@pytest.mark.parametrize("name", ["train/loss", "gradient_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_and_is_on_record(
    name: str, value: float, make: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make(tmp_path)
    metrics = {"train/loss": jnp.asarray(2.0), "gradient_norm": jnp.asarray(1.0)} | {name: jnp.asarray(value)}
    recorder.step(3, metrics)
    with pytest.raises(NonFiniteError, match=rf"{name}={value} at step 3; the last good checkpoint is of step 7"):
        recorder.flush()
    assert lines(tmp_path)[-1]["step"] == 3


def test_a_skipped_float16_step_goes_on_until_the_scale_is_at_its_minimum(
    make: Callable[..., Recorder], tmp_path: Path
) -> None:
    recorder = make(tmp_path, replace(CONFIG, precision="float16"))
    overflow = {"train/loss": jnp.asarray(2.0), "gradient_norm": jnp.asarray(jnp.inf), "skipped": jnp.asarray(1.0)}
    recorder.step(1, overflow | {"loss_scale": jnp.asarray(1024.0)})
    recorder.flush()
    recorder.step(2, overflow | {"loss_scale": jnp.asarray(1.0)})
    with pytest.raises(NonFiniteError):
        recorder.flush()
