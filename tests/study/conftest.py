"""An experiment that trains in two seconds, most of which is compilation, and a PostgreSQL server of the tests' own."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmlab.experiment import Experiment, read_experiment

EXPERIMENT = '''
"""The smallest experiment: one layer of width 8 on bytes."""

from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW
from llmlab.training.config import Train

BLOCK = Block(
    mixer=Attention(num_heads=2), ffn=MLP(hidden_dim=16, activation="relu"), norm=RMSNorm(), wiring=PreNorm()
)


def config() -> Experiment:
    return Experiment(
        model=Transformer(embed_dim=8, num_layers=1, pattern=(BLOCK,)),
        data=Packed(TextFiles("corpus.txt", separator="\\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2),
        train=Train(steps=6, batch_size=8, sequence_length=8, evaluate_every=2, checkpoint_every=2, log_every=1),
    )
'''


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the experiment file tiny.py and its corpus."""
    (tmp_path / "tiny.py").write_text(EXPERIMENT, encoding="utf-8")
    lines = [f"{i} is half of {2 * i} and a third of {3 * i}" for i in range(200)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(directory: Path) -> Experiment:
    """The experiment of tiny.py."""
    return read_experiment(directory / "tiny.py")


def postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    on_path = shutil.which("initdb")
    candidates = [*found, *([Path(on_path)] if on_path else [])]
    return next((path.parent for path in candidates if (path.parent / "pg_ctl").exists()), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of a fresh database of a PostgreSQL server that lives as long as the tests."""
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (initdb, pg_ctl)")
    # Not below pytest's own directory, which only its user can enter; and the path of a socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="llmlab-postgres-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        directory.chmod(0o777)
        if shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and setpriv, which changes the user, is not installed")
        as_user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = directory / "data"
    environment = os.environ | {"LC_ALL": "C.UTF-8"}

    def run(*command: str) -> None:
        done = subprocess.run([*as_user, *command], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    run(str(programs / "initdb"), "-D", str(data), "-U", "llmlab", "--auth", "trust", "--no-sync")
    options = f"-p {port} -k {directory} -c listen_addresses=127.0.0.1 -c fsync=off"
    # Its output goes to a file: a pipe that it inherited would never end.
    run(str(programs / "pg_ctl"), "-D", str(data), "-l", str(directory / "log"), "-o", options, "-w", "start")
    try:
        yield f"postgresql+psycopg://llmlab@127.0.0.1:{port}/postgres"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(directory)
