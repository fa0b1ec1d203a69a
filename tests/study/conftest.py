"""An experiment that trains in two seconds, most of which is compilation, and the file that holds it."""

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
