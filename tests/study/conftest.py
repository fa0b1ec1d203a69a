"""A corpus, and an experiment on it that trains in a second."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmlab.experiment import Experiment, read_experiment

EXPERIMENT = """
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW, Cosine
from llmlab.sharding.mesh import Mesh
from llmlab.training.config import Train

BLOCK = Block(
    mixer=Attention(num_heads=2, position=Rotary()),
    ffn=MLP(hidden_dim=32, activation="relu"),
    norm=RMSNorm(),
    wiring=PreNorm(),
)

def config() -> Experiment:
    return Experiment(
        model=Transformer(embed_dim=16, num_layers=2, pattern=(BLOCK, BLOCK), final_norm=RMSNorm()),
        data=Packed(TextFiles("CORPUS", separator="\\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=2)),
        mesh=Mesh(data=1),
        train=Train(
            steps=6, batch_size=8, sequence_length=16, evaluate_every=3, checkpoint_every=2, log_every=2, keep_best=0
        ),
    )
"""


def _write(directory: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 6))) for _ in range(50)]
    lines = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(200)]
    (directory / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    text = textwrap.dedent(EXPERIMENT).replace("CORPUS", str(directory / "corpus.txt"))
    (directory / "tiny.py").write_text(text, encoding="utf-8")
    return directory / "tiny.py"


@pytest.fixture(scope="session")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an experiment, beside its corpus."""
    return _write(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="session")
def experiment(experiment_file: Path) -> Experiment:
    """The experiment."""
    return read_experiment(experiment_file)


@pytest.fixture
def write_experiment() -> Callable[[Path], Path]:
    """Function (directory) -> the file of the same experiment there."""
    return _write
