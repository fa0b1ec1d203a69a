"""Measures of runs: computed once, again when their source changes, and never a number where they fail."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmlab import runs
from llmlab.config import load_experiment_file
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.nn.module import num_parameters, split
from llmlab.optim import AdamW
from llmlab.study.ablation import Ablation, with_values
from llmlab.study.conduct import Conduct
from llmlab.study.measures import FILE_NAME, measured, source_hash, values_of
from llmlab.study.record import PeekingError
from llmlab.study.trials import Status, Trial, directory_of, read_trial
from llmlab.training.config import Train
from tests.study.fakes import finished

pytestmark = pytest.mark.scale

FACTOR = 2


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    rng = np.random.default_rng(0)
    corpus.write_text("\n".join("".join(map(chr, rng.integers(97, 123, 40))) for _ in range(60)), encoding="utf-8")
    return Experiment(
        model=llama(embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16),
        data=Packed(TextFiles(str(corpus), separator="\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=3e-3),
        train=Train(steps=2, batch_size=8, sequence_length=16, keep_best=0),
    )


@pytest.fixture(scope="module")
def run(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return runs.train(experiment, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def clean(run: runs.Run) -> Path:
    """The run's directory, nothing measured."""
    (run.directory / FILE_NAME).unlink(missing_ok=True)
    return run.directory


def size(run: runs.Run) -> Mapping[str, float]:
    """Parameters of the trained model, counted; and the seed, doubled."""
    return {"size": num_parameters(split(run.model)[1]), "twice": doubled(run.experiment.train.seed)}


def doubled(value: float) -> float:
    return FACTOR * value


def broken(run: runs.Run) -> Mapping[str, float]:
    raise KeyError("no such thing")


def infinite(run: runs.Run) -> Mapping[str, float]:
    return {"fine": 1.0, "far": math.inf}


def forbidden(run: runs.Run) -> Mapping[str, float]:
    raise AssertionError("measured again")


def test_a_measure_sees_the_run_and_is_computed_once(clean: Path, run: runs.Run) -> None:
    expected = {"size": float(run.summary["num_parameters"]), "twice": 0.0}
    assert values_of(clean, size) == expected
    (entry,) = json.loads((clean / FILE_NAME).read_text()).values()
    assert entry == {"function": "size", "values": expected}
    kept = {source_hash(size): {"function": "size", "values": {"size": 7.0}}}
    (clean / FILE_NAME).write_text(json.dumps(kept))
    assert values_of(clean, size) == {"size": 7.0}


def test_what_is_measured_by_another_function_is_kept_beside(clean: Path) -> None:
    values_of(clean, size)
    with pytest.raises(ValueError, match=r"broken of .* failed: KeyError: 'no such thing'"):
        values_of(clean, broken)
    assert len(json.loads((clean / FILE_NAME).read_text())) == 1


def test_a_damaged_file_is_measured_again(clean: Path) -> None:
    for text in ("{torn", "[]", json.dumps({source_hash(size): {"function": "size", "values": {"size": "big"}}})):
        (clean / FILE_NAME).write_text(text)
        assert values_of(clean, size)["size"] > 100


def module(folder: Path, text: str) -> ModuleType:
    path = folder / "study.py"
    path.write_text(text)
    return load_experiment_file(path)


BODY = """
'''A study.'''
LIMIT = 3
def config():
    return None
def helper(x):
    return x + LIMIT
def measure(run):
    return {"a": helper(1)}
def other(run):
    return {}
"""


def test_the_hash_follows_the_function_what_it_calls_and_the_constants_it_reads_and_nothing_else(
    tmp_path: Path,
) -> None:
    def of(text: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return source_hash(module(folder, text).measure)

    first = of(BODY)
    assert of(BODY) == first
    assert of(BODY.replace("A study.", "Another word.").replace("return {}", "return {'b': 1}")) == first
    changed = [("helper(1)", "helper(2)"), ("x + LIMIT", "x - LIMIT"), ("LIMIT = 3", "LIMIT = 4")]
    hashes = [of(BODY.replace(before, after)) for before, after in changed]
    assert len({first, *hashes}) == 4


def test_what_has_no_source_of_its_own_is_refused(experiment: Experiment) -> None:
    limit = 3

    def closure(run: runs.Run) -> Mapping[str, float]:
        return {"a": limit}

    for measure in (closure, math.sin):
        with pytest.raises(ValueError, match="must be a function of a file's top level"):
            ablation(experiment, measure=measure)


def ablation(experiment: Experiment, **changes: Any) -> Ablation:
    variants = {"wide": with_values({"model.pattern.0.ffn.hidden_dim": 32})}
    settings = {"hypothesis": "size matters", "variants": variants, "seeds": 2, "measure": size}
    return Ablation(baseline=experiment, **{**settings, **changes})


def test_a_measured_metric_needs_its_function(experiment: Experiment) -> None:
    with pytest.raises(ValueError, match=r"metric='measure/size' is measured of a run: give the function"):
        ablation(experiment, metric="measure/size", measure=None)


def test_only_finished_runs_are_measured_and_a_failure_is_the_trials_problem(clean: Path, run: runs.Run) -> None:
    trial = replace(finished(run.experiment, 2.0), directory=clean)
    assert measured(trial, size).summary["measure/size"] == run.summary["num_parameters"]
    for measure, text in ((broken, "KeyError"), (infinite, "far=inf, which is no finite number")):
        failed = measured(trial, measure)
        assert failed.problem is not None
        assert text in failed.problem
        assert failed.summary == trial.summary
    diverged = Trial(directory=clean, hash="x", status=Status.DIVERGED)
    assert measured(diverged, forbidden) == diverged
    assert "measure/size" in measured(trial, size, compute=False).summary
    assert measured(trial, forbidden, compute=False) == trial


def real_runs(experiment: Experiment, root: Path, arms: Ablation) -> Any:
    """An executor that trains in this process."""

    def execute(jobs: Mapping[str, Experiment]) -> dict[str, Trial]:
        found = {}
        for label, each in jobs.items():
            directory = directory_of(root, each)
            runs.train(each, directory)
            found[label] = read_trial(directory, each)
        return found

    return execute


def test_a_study_is_decided_by_what_it_measures(experiment: Experiment, tmp_path: Path) -> None:
    study = ablation(experiment, metric="measure/size", claim="worse")
    conduct = Conduct(name="s", folder=tmp_path / "s", execute=real_runs(experiment, tmp_path / "runs", study))
    results = conduct.run(study)
    sizes = [arm.experiment.model.with_vocabulary(259).num_parameters() for arm in study.arms()]
    assert [arm["values"] for arm in results["arms"]] == [[float(n)] * 2 for n in sizes]
    assert [arm["measures"]["size"]["mean"] for arm in results["arms"]] == sizes
    assert results["arms"][0]["measures"]["twice"]["values"] == [0.0, 2.0]
    assert results["comparisons"][0]["difference"] == sizes[1] - sizes[0]
    assert results["verdict"] == "supported"
    with pytest.raises(PeekingError, match="measure"):  # another function is another question
        conduct.run(replace(study, measure=broken))


def test_runs_that_cannot_be_measured_are_problems_where_the_metric_needs_them_and_remarks_where_not(
    experiment: Experiment, tmp_path: Path
) -> None:
    shown = ablation(experiment, measure=broken)
    execute = real_runs(experiment, tmp_path / "runs", shown)
    results = Conduct(name="a", folder=tmp_path / "a", execute=execute).run(shown)
    assert results["problems"] == []
    assert results["paired_seeds"] == [0, 1]
    assert sum("failed: KeyError" in remark for remark in results["remarks"]) == 4
    assert results["arms"][0]["measures"] == {}
    decisive = ablation(experiment, measure=broken, metric="measure/size")
    results = Conduct(name="b", folder=tmp_path / "b", execute=execute).run(decisive)
    assert len(results["problems"]) == 4
    assert results["paired_seeds"] == []
    assert results["verdict"] == "inconclusive"
    assert "failed: KeyError" in results["problems"][0]["problem"]
