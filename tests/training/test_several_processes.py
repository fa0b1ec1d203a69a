"""Processes that train together on this host, over gloo, against one process that trains alone.

One story, told once: two processes begin a run, SIGTERM reaches one of them, both save and leave; from what they saved
one process goes on with 1, 2, 4 and 8 devices, and four processes with two devices each finish on another mesh.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmlab import runs
from llmlab.experiment import Experiment, read_experiment
from llmlab.sharding import Mesh, cluster
from llmlab.tokenizers import load_tokenizer
from llmlab.training.checkpoint import Checkpoints, saved_steps, verify
from llmlab.training.program import Program
from llmlab.training.provenance import read_provenance

pytestmark = pytest.mark.scale

EXPERIMENT = """
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW
from llmlab.sharding.mesh import Mesh
from llmlab.training.config import Train

BLOCK = Block(
    mixer=Attention(num_heads=2), ffn=MLP(hidden_dim=16, activation="relu"), norm=RMSNorm(), wiring=PreNorm(),
    dropout=0.1,
)


def config() -> Experiment:
    return Experiment(
        model=Transformer(embed_dim=8, num_layers=1, pattern=(BLOCK,)),
        data=Packed(TextFiles("CORPUS", separator="\\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-3, ema=0.9),
        mesh=Mesh(data=1, fsdp=-1),
        train=Train(
            steps=60, batch_size=16, sequence_length=8, evaluate_every=30, checkpoint_every=0, log_every=1
        ),
    )
"""
# Sums over devices in another order, over 60 steps; the same order of tokens, or the losses would differ in the
# second digit.
SAME = 1e-5


def start(directory: Path, process: int, num_processes: int, port: int, *flags: str, devices: int = 1) -> Any:
    """`llmlab train tiny.py` as one of several processes."""
    placed = ["--coordinator", f"localhost:{port}", "--num-processes", str(num_processes), "--process-id", str(process)]
    xla = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return subprocess.Popen(
        [sys.executable, "-m", "llmlab", "train", "tiny.py", *placed, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=os.environ | {"XLA_FLAGS": xla},
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finish(processes: list[Any]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, standard outputs and standard errors; no process outlives the test."""
    try:
        outputs = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [o for o, _ in outputs], [e for _, e in outputs]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("step", "tokens", "train/loss", "validation/loss", "validation/ema_loss", "learning_rate")
    return [{name: record[name] for name in names if name in record} for record in map(json.loads, lines)]


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [list(record) for record in found] == [list(record) for record in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=SAME)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("several")
    lines = [f"{i} is half of {2 * i} and a third of {3 * i}" for i in range(300)]
    (directory / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    text = EXPERIMENT.replace("CORPUS", str(directory / "corpus.txt"))
    (directory / "tiny.py").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def experiment(directory: Path) -> Experiment:
    return read_experiment(directory / "tiny.py")


@pytest.fixture(scope="module")
def alone(experiment: Experiment, directory: Path) -> list[dict[str, Any]]:
    """Metrics of one process with eight devices that nothing interrupted."""
    runs.train(experiment, directory / "alone")
    return metrics(directory / "alone")


@pytest.fixture(scope="module")
def preempted(directory: Path) -> dict[str, Any]:
    """What two processes left when SIGTERM reached the second: exit codes, messages, and their run."""
    port, run = free_port(), directory / "preempted"
    processes = [start(directory, i, 2, port, "--out", str(run)) for i in range(2)]
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes().splitlines()) < 6:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes), finish(processes)
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
    finally:
        codes, outputs, errors = finish(processes)
    return {"run": run, "codes": codes, "outputs": outputs, "errors": errors}


def test_a_signal_to_one_process_saves_and_stops_all(preempted: dict[str, Any]) -> None:
    assert preempted["codes"] == [42, 42], preempted["errors"]
    (step,) = saved_steps(preempted["run"] / "checkpoints")
    assert 6 <= step < 60
    assert f"stopped by SIGTERM; step {step} is saved in" in preempted["errors"][0]
    (session,) = read_provenance(preempted["run"])["sessions"]
    assert (session["status"], session["last_step"]) == ("preempted", step)


def test_two_processes_train_like_one_and_the_first_alone_writes(
    preempted: dict[str, Any], alone: list[dict[str, Any]]
) -> None:
    (step,) = saved_steps(preempted["run"] / "checkpoints")
    assert_same_metrics(metrics(preempted["run"]), [record for record in alone if record["step"] <= step])
    assert " 1/60 " in preempted["outputs"][0]
    assert " 1/60 " not in preempted["outputs"][1]
    assert len(list((preempted["run"] / "tensorboard").iterdir())) == 1
    assert read_provenance(preempted["run"])["environments"][0]["devices"]["processes"] == 2


def test_the_checkpoint_of_two_processes_is_whole(preempted: dict[str, Any]) -> None:
    (step,) = saved_steps(preempted["run"] / "checkpoints")
    assert verify(preempted["run"] / "checkpoints" / str(step)) is None
    assert runs.load(preempted["run"]) is not None


@pytest.mark.parametrize(
    ("num_devices", "mesh"),
    [(1, Mesh()), (2, Mesh(data=2)), (4, Mesh(data=2, tensor=2)), (8, Mesh(fsdp=2, data=2, tensor=2))],
)
def test_it_restores_on_any_number_of_devices_and_goes_on_with_the_next_tokens(
    num_devices: int,
    mesh: Mesh,
    preempted: dict[str, Any],
    experiment: Experiment,
    alone: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    run = Path(shutil.copytree(preempted["run"], tmp_path / "run"))
    tokenizer, train = load_tokenizer(run), experiment.train
    dataset = experiment.data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    program = Program.build(
        experiment.model.with_vocabulary(tokenizer.vocab_size),
        experiment.objective,
        experiment.optimizer,
        mesh.build(jax.devices()[:num_devices]),
        train,
        dataset.validation.batch(0),
    )
    checkpoints = Checkpoints(
        run / "checkpoints", run / "quarantine", keep_last=1, keep_best=0, tell=lambda text: pytest.fail(text)
    )
    restored = checkpoints.restore(program.state)
    checkpoints.close()
    assert restored is not None
    step = int(restored[0].step)
    expected = {record["step"]: record["train/loss"] for record in alone if "train/loss" in record}
    for number in (step, step + 1):
        batch = program.place(dataset.train.part(number, program.places))
        state, numbers = program.train_step(restored[0], batch)
        restored = (state, {})
        np.testing.assert_allclose(numbers["train/loss"], expected[number + 1], rtol=SAME)


def test_four_processes_finish_it_on_another_mesh(
    preempted: dict[str, Any], alone: list[dict[str, Any]], directory: Path
) -> None:
    run, port = Path(shutil.copytree(preempted["run"], directory / "four")), free_port()
    # Every row's matrices are shared by two processes, so that each row is needed by both.
    flags = ("--mesh.fsdp", "1", "--mesh.data", "2", "--mesh.tensor", "2", "--allow-config-change", "--out", str(run))
    processes = [start(directory, i, 4, port, *flags) for i in range(4)]
    codes, outputs, errors = finish(processes)
    assert codes == [0, 0, 0, 0], errors
    (step,) = saved_steps(preempted["run"] / "checkpoints")
    assert f"resumed at step {step}" in outputs[0]
    assert_same_metrics(metrics(run), alone)
    summary = json.loads((run / "summary.json").read_bytes())
    np.testing.assert_allclose(summary["validation/loss"], alone[-1]["validation/loss"], rtol=SAME)


def test_what_stops_one_process_before_training_stops_all(directory: Path) -> None:
    port, run = free_port(), directory / "refused"
    processes = [start(directory, i, 2, port, "--out", str(run), "--train.seed", str(i)) for i in range(2)]
    codes, _, errors = finish(processes)
    assert codes == [2, 2], errors
    assert all("the config of process 1 is not that of process 0" in error for error in errors)
    assert not run.exists()


def test_a_process_that_is_alone_has_nobody_to_ask() -> None:
    assert cluster.here() is cluster.ALONE
    assert cluster.ALONE.lead("name", lambda: {1: 2}) == {1: 2}
    assert cluster.ALONE.gather("name", "value") == ["value"]
    assert cluster.ALONE.votes() is None
