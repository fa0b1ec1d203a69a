"""`llmlab train` as a user runs it: messages and exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmlab.cli import main
from llmlab.training import host_memory
from llmlab.training.checkpoint import saved_steps

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
    mixer=Attention(num_heads=2), ffn=MLP(hidden_dim=16, activation="relu"), norm=RMSNorm(), wiring=PreNorm()
)


def config() -> Experiment:
    return Experiment(
        model=Transformer(embed_dim=8, num_layers=1, pattern=(BLOCK,)),
        data=Packed(TextFiles("corpus.txt", separator="\\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2),
        train=Train(steps=1_000_000, batch_size=8, sequence_length=8, evaluate_every=100, checkpoint_every=100),
    )
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.py").write_text(EXPERIMENT, encoding="utf-8")
    lines = [f"{i} is half of {2 * i} and a third of {3 * i}" for i in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmlab", "train", "tiny.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no line with {text!r}; {process.communicate()[1]}")


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
@pytest.mark.scale
def test_a_signal_saves_says_how_to_resume_and_the_same_command_does(
    number: int, exit_code: int, directory: Path
) -> None:
    process = start("--out", "run")
    wait_for_line(process, " 20/1000000 ")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    saved = saved_steps(directory / "run" / "checkpoints")[-1]
    assert f"step {saved} is saved in run. To go on:\n  llmlab train tiny.py --out run" in errors
    again = start("--out", "run")
    wait_for_line(again, f"resumed at step {saved}")
    again.kill()
    again.communicate()


def test_a_signal_while_compiling_does_not_wait_for_the_compiler(directory: Path) -> None:
    process = start()
    wait_for_line(process, "compile:")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "nothing was trained yet" in errors
    assert time.monotonic() - began < 5
    assert [path.name[:5] for path in (directory / "runs").iterdir()] == ["tiny-"]


def test_a_loss_that_is_not_finite_is_a_failure(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optimizer.peak-lr", "1e38", "--train.steps", "100"]
    assert main(["train", "tiny.py", "--quiet", *flags]) == 1
    assert "try a lower peak learning rate" in capsys.readouterr().err.lower()


def test_on_a_cpu_malloc_is_told_to_keep_what_a_step_frees(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(host_memory, "keep", asked.append)
    assert main(["train", "tiny.py", "--quiet", "--train.steps", "2"]) == 0
    assert asked == [os.environ]


def test_users_errors_come_before_any_work(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        ("missing.py",): "no file",
        ("tiny.py", "--train.step", "3"): "--train.steps",
        ("tiny.py", "--train.batch-size", "7"): "batch_size=7 is not divisible",
        ("--train.steps", "3", "tiny.py"): "give the experiment file before the flags",
        ("runs",): "runs",
    }
    for arguments, message in wrong.items():
        assert main(["train", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir() if path.name != "__pycache__") == ["corpus.txt", "tiny.py"]


def test_help_lists_the_commands_own_flags_and_the_experiments(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--help"]) == 0
    assert "--allow-config-change" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny.py", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert "--allow-config-change" in output
    assert "--optimizer.peak-lr" in output
