"""A teacher of two layers, trained for two steps, and students of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llmlab
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama
from llmlab.objectives import NextToken, Objective
from llmlab.optim import SGD, Constant, Optimizer
from llmlab.sharding.mesh import Mesh
from llmlab.tokenizers import Bytes
from llmlab.training.config import Train
from llmlab.training.program import Program

LENGTH = 12
TEACHER = llama(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24, embedding_std=0.3, head=Tied())
STUDENT = llama(embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16, embedding_std=0.3, head=Tied())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, a document a line."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(f"line {i} says {i * i} and {'x' * (i % 5)}" for i in range(120)))
    return path


@pytest.fixture(scope="session")
def experiment_of(corpus: Path) -> Callable[..., Experiment]:
    """Function (objective, model, other settings of training) -> a small experiment."""

    def make(objective: Objective, model: Any = STUDENT, **train: Any) -> Experiment:
        settings: dict[str, Any] = {"steps": 2, "batch_size": 8, "sequence_length": LENGTH, "keep_best": 0}
        settings |= {"evaluate_batches": 1, "evaluate_every": 0} | train
        return Experiment(
            model=model,
            tokenizer=Bytes(),
            data=Packed(TextFiles(str(corpus), separator="\n"), validation_fraction=0.2),
            objective=objective,
            optimizer=SGD(peak_lr=0.5, schedule=Constant(), clip_norm=None),
            mesh=Mesh(),
            train=Train(**settings),
        )

    return make


@pytest.fixture(scope="session")
def teacher(experiment_of: Callable[..., Experiment], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of the teacher's run."""
    directory = tmp_path_factory.mktemp("teacher") / "run"
    llmlab.train(experiment_of(NextToken(), TEACHER, seed=7), directory)
    return str(directory)


@pytest.fixture(scope="session")
def batch(experiment_of: Callable[..., Experiment]) -> dict[str, np.ndarray]:
    """The first batch of every run."""
    experiment = experiment_of(NextToken())
    data = experiment.data.build(Bytes().build(), sequence_length=LENGTH, batch_size=8, seed=0)
    return data.train.batch(0)


@pytest.fixture(scope="session")
def program_of(experiment_of: Callable[..., Experiment], batch: Any) -> Callable[..., Program]:
    """Function (objective, model, mesh, optimizer, settings of training) -> the program."""

    def make(
        objective: Objective,
        model: Any = STUDENT,
        mesh: Mesh | None = None,
        optimizer: Optimizer | None = None,
        **train: Any,
    ) -> Program:
        experiment = experiment_of(objective, model, **train)
        settled = model.with_vocabulary(Bytes().build().vocab_size)
        placement = (mesh or Mesh(data=1)).build(jax.devices()[: 1 if mesh is None else None])
        optimizer = optimizer or experiment.optimizer
        return Program.build(settled, objective, optimizer, placement, experiment.train, batch)

    return make
