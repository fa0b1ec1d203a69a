"""Several seeds as one program: what they leave is what runs apart leave."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llmlab
from llmlab import runs
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.nn.module import split
from llmlab.optim import AdamW, Constant, Cosine
from llmlab.sharding.mesh import Mesh
from llmlab.study import work
from llmlab.study.trials import Status
from llmlab.study.vectorized import train_seeds
from llmlab.training.checkpoint import saved_steps
from llmlab.training.config import Train
from llmlab.training.faults import Interrupted, NonFiniteError
from llmlab.training.provenance import read_provenance
from llmlab.training.report import NullReport

pytestmark = pytest.mark.scale
NUMBERS = ("train/loss", "validation/loss", "gradient_norm", "learning_rate", "validation/ema_loss")
NUMBERS += ("gradient_norm/layer.0", "gradient_norm/layer.1", "gradient_norm/embedding")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Dropout, averaged weights, accumulation, a mesh of eight devices: whatever depends on keys and layouts."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    rng = np.random.default_rng(0)
    corpus.write_text("\n".join("".join(map(chr, rng.integers(97, 123, 40))) for _ in range(200)), encoding="utf-8")
    model = llama(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=32)
    block = replace(model.pattern[0], dropout=0.1)
    return Experiment(
        model=replace(model, pattern=(block,)),
        data=Packed(TextFiles(str(corpus), separator="\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=3e-3, schedule=Cosine(warmup_steps=2), ema=0.9),
        mesh=Mesh(data=2, fsdp=-1),
        train=Train(
            steps=8,
            batch_size=16,
            sequence_length=16,
            accumulation=2,
            evaluate_every=4,
            checkpoint_every=3,
            log_every=1,
            log_gradients="layers",
        ),
    )


def seeds(experiment: Experiment, *numbers: int) -> list[Experiment]:
    return [replace(experiment, train=replace(experiment.train, seed=number)) for number in numbers]


def check_equal(run: runs.Run, other: runs.Run) -> None:
    """Two runs of one experiment, up to the rounding of float32."""
    assert [(record["step"], record["tokens"]) for record in run.metrics] == [
        (record["step"], record["tokens"]) for record in other.metrics
    ]
    assert {*NUMBERS} <= {name for record in run.metrics for name in record}
    for one, two in zip(run.metrics, other.metrics, strict=True):
        assert {*one} & {*NUMBERS} == {*two} & {*NUMBERS}
        for name in {*one} & {*NUMBERS}:
            assert one[name] == pytest.approx(two[name], rel=1e-5), (one["step"], name)
    assert run.summary["validation/loss"] == pytest.approx(other.summary["validation/loss"], rel=1e-5)
    for ema in (False, True):
        one, two = (split(llmlab.load(each.directory, ema=ema))[1] for each in (run, other))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one, two)


def test_seeds_trained_together_leave_what_runs_apart_leave(experiment: Experiment, tmp_path: Path) -> None:
    two = seeds(experiment, 3, 5)
    together = train_seeds(two, [tmp_path / "3", tmp_path / "5"])
    for each, run in zip(two, together, strict=True):
        assert isinstance(run, runs.Run)
        check_equal(run, runs.train(each, tmp_path / f"apart-{each.train.seed}"))
        sessions = read_provenance(run.directory)["sessions"]
        assert [(session["status"], session["last_step"]) for session in sessions] == [("finished", 8)]
        assert saved_steps(run.directory / "checkpoints")
    losses = {run.summary["validation/loss"] for run in together if isinstance(run, runs.Run)}
    assert len(losses) == 2


class Stop(NullReport):
    """Sends SIGINT after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, metrics: Any) -> None:
        if metrics["step"] == self._step:
            signal.raise_signal(signal.SIGINT)


def test_what_was_interrupted_goes_on_each_seed_from_its_own_checkpoint(experiment: Experiment, tmp_path: Path) -> None:
    two, outs = seeds(experiment, 0, 1), [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(Interrupted):
        train_seeds(two, outs, report=Stop(5))
    assert all(not runs.Run(out).summary for out in outs)
    runs.train(two[0], outs[0])  # one of them goes on alone, and is finished
    first, second = train_seeds(two, outs)
    assert isinstance(first, runs.Run)
    assert isinstance(second, runs.Run)
    check_equal(first, runs.train(two[0], tmp_path / "apart-0"))
    check_equal(second, runs.train(two[1], tmp_path / "apart-1"))
    assert [session["status"] for session in read_provenance(outs[1])["sessions"]] == ["interrupted", "finished"]


def test_a_seed_that_diverges_does_not_stop_the_others(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmlab.training import recorder

    plain = recorder.Recorder._record

    def broken(self: Any, step: int, metrics: Any) -> None:
        if step == 5 and "sick" in str(self._log.path):
            metrics = metrics | {"train/loss": np.float32(np.nan)}
        plain(self, step, metrics)

    monkeypatch.setattr(recorder.Recorder, "_record", broken)
    sick, well = train_seeds(seeds(experiment, 0, 1), [tmp_path / "sick", tmp_path / "well"])
    assert isinstance(sick, NonFiniteError)
    assert sick.step == 5
    assert isinstance(well, runs.Run)
    assert not runs.Run(tmp_path / "sick").summary
    assert read_provenance(tmp_path / "sick")["sessions"][-1]["status"] == "failed"
    assert max(saved_steps(tmp_path / "sick" / "checkpoints")) == 3
    check_equal(well, runs.train(seeds(experiment, 1)[0], tmp_path / "apart"))


def test_experiments_that_differ_in_more_than_the_seed_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    other = replace(experiment, optimizer=AdamW(peak_lr=1e-3, schedule=Constant()))
    with pytest.raises(ValueError, match="in more than the seed"):
        train_seeds([experiment, other], [tmp_path / "one", tmp_path / "two"])


def test_a_study_trains_the_seeds_of_an_arm_together_and_each_once(experiment: Experiment, tmp_path: Path) -> None:
    other = replace(experiment, optimizer=replace(experiment.optimizer, peak_lr=1e-3))
    jobs = {
        f"{arm}/seed={each.train.seed}": each
        for arm, base in {"one": experiment, "other": other}.items()
        for each in seeds(base, 0, 1)
    }
    apart = runs.train(jobs["other/seed=1"], tmp_path / "apart")
    trials = work.execute(jobs, folder=tmp_path / "study", root=tmp_path / "trials", seeds_together=True)
    assert [trial.status for trial in trials.values()] == [Status.FINISHED] * 4
    assert [trial.summary["seeds_together"] for trial in trials.values()] == [2] * 4
    check_equal(runs.Run(trials["other/seed=1"].directory), apart)
    again = work.execute(jobs, folder=tmp_path / "study", root=tmp_path / "trials", seeds_together=True)
    for name, trial in again.items():
        assert len(trial.provenance["sessions"]) == 1
        assert trial.summary == trials[name].summary
