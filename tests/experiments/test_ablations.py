"""The studies of experiments/ablations: claims that say all they must, arms that differ in what they say and match in
what they say, and one of them carried out for a few steps."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmlab.config import config_hash, load_experiment_file
from llmlab.data import Packed, StandardLibrary
from llmlab.data.dataset import Stream
from llmlab.optim import AdamW
from llmlab.study import matching
from llmlab.study.ablation import Ablation, read_ablation
from llmlab.study.conduct import Conduct
from llmlab.tokenizers import Bytes

FOLDER = Path(__file__).parent.parent.parent / "experiments" / "ablations"
# base.py is what they share, and no study.
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "base.py")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_study_says_its_claim_its_source_its_command_its_cost_and_its_result(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first, *rest = text.splitlines()
    assert first.endswith("?"), "the first line asks a question"
    for heading in ("Claim    ", "Command  ", "Cost     ", "Result   "):
        assert sum(line.startswith(heading) for line in rest) == 1, heading
    assert f"Command  llmlab ablate experiments/ablations/{path.name}" in rest
    assert re.search(r"\b\d{4}\.\d{4,5}\b", text), "an arXiv number of the source"


def test_arms_are_valid_differ_in_what_they_declare_and_match_in_what_they_claim(path: Path) -> None:
    study = read_ablation(path)
    arms = study.arms()  # raises for whatever is not declared, not valid, or changes nothing
    assert study.baseline == load_experiment_file(path).config() or path.stem == "extrapolation"
    assert matching.check(study, arms) == []
    assert study.acknowledge_mismatch is None
    assert {arm.experiment.train.batch_size for arm in arms} == {study.baseline.train.batch_size}


def test_a_study_says_how_many_runs_it_costs(path: Path) -> None:
    study = read_ablation(path)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    cost = next(line for line in text.splitlines() if line.startswith("Cost     "))
    assert isinstance(study.seeds, int)
    if study.learning_rates:
        assert f"{len(study.arms())} arms x ({len(study.learning_rates)} rates + {study.seeds} seeds)" in cost
    elif (other := re.search(r"none beyond (\w+\.py)", cost)) is not None:
        assert hashes(study) <= hashes(read_ablation(FOLDER / other[1])), "it needs runs that the other has not"
    else:
        assert f"{len(study.arms())} arms x {study.seeds} seeds" in cost


def hashes(study: Ablation) -> set[str]:
    return {config_hash(arm.run(seed)) for arm in study.arms() for seed in study.first_seeds}


def test_a_learned_table_of_positions_says_that_it_cannot_be_extrapolated() -> None:
    learned = next(arm for arm in read_ablation(FOLDER / "positions.py").arms() if arm.name == "learned")
    longer = replace(learned.experiment, train=replace(learned.experiment.train, sequence_length=128))
    with pytest.raises(ValueError, match=r"sequence_length=128 is beyond the position table's max_length=64"):
        longer.validate()


def test_arms_of_equal_parameters_have_them() -> None:
    for name, tolerance in (("tied_embeddings", 0.001), ("gated_ffn", 0.0), ("heads", 0.0), ("objectives_probe", 0.05)):
        arms = {
            arm.name: matching.expected(arm.experiment)["parameters"] for arm in read_ablation(path_of(name)).arms()
        }
        arms.pop("tied, equal width", None)
        values = [value for value in arms.values() if value is not None]
        assert len(values) == len(arms)
        assert max(values) - min(values) <= tolerance * min(values), arms


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.py"


def test_objectives_process_equally_many_tokens() -> None:
    """By the rows that the data makes, which a config alone does not tell for an encoder-decoder."""
    totals = {}
    for arm in read_ablation(path_of("objectives_probe")).arms():
        train, data = arm.experiment.train, arm.experiment.data
        assert train.sequence_length is not None
        corruption: Any = getattr(data, "corruption", None)
        targets = 0
        if arm.name == "spans":
            targets = corruption.lengths(corruption.text_length(train.sequence_length))[1]
        totals[arm.name] = train.steps * train.batch_size * (train.sequence_length + targets)
    assert max(totals.values()) <= 1.001 * min(totals.values()), totals


@pytest.mark.scale
def test_a_study_runs_measures_and_decides(tmp_path: Path) -> None:
    """Two steps on one package: BatchNorm lets a row's first token see its last one, LayerNorm does not."""
    study = read_ablation(path_of("batch_norm"))
    little = replace(
        study.baseline,
        tokenizer=Bytes(),
        data=Packed(StandardLibrary(include=("json",)), validation_fraction=0.3),
        optimizer=AdamW(peak_lr=1e-3),
        train=replace(study.baseline.train, steps=2, batch_size=8, evaluate_batches=1, evaluate_every=0),
    )
    short = replace(study, baseline=little, seeds=2)
    results = Conduct(name="batch_norm", folder=tmp_path / "study", root=tmp_path / "trials").run(short)
    assert results["problems"] == []
    assert [arm["name"] for arm in results["arms"]] == ["baseline", "batch norm"]
    layer, batch = (arm["measures"]["leak"]["values"] for arm in results["arms"])
    assert layer == [0.0, 0.0]
    assert min(batch) > 1e-4
    assert all(isinstance(value, float) for arm in results["arms"] for value in arm["values"])


def test_garbage_comes_in_bursts_that_follow_from_seed_and_step() -> None:
    module = load_experiment_file(path_of("clipping"))
    bursts = module.WithGarbage(every=10, length=2)

    class Rows(Stream):
        """Rows that count up, with a label in two that does not count."""

        def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
            ids = (numbers[:, None] + np.arange(4)).astype(np.int32)
            return {"input_ids": ids, "labels": np.where(ids % 2 == 0, ids, -100).astype(np.int32)}

        def epochs(self, rows: int) -> tuple[float, ...]:
            return (0.0,)

    class Clean:
        vocab_size = 11

        class train:
            rows, batch_size = Rows(), 3

    def split(seed: int) -> Any:
        return module.Spoilt(Clean, bursts, seed)

    def clean(step: int) -> dict[str, np.ndarray]:
        return Rows().read(step * 3 + np.arange(3))

    spoilt = [s for s in range(45) if not np.array_equal(split(0).batch(s)["input_ids"], clean(s)["input_ids"])]
    assert spoilt == [10, 11, 20, 21, 30, 31, 40, 41]
    for step in spoilt:
        batch, other = split(0).batch(step), split(0).batch(step)
        assert np.unique(batch["input_ids"]).size == 1
        np.testing.assert_array_equal(batch["labels"] == -100, clean(step)["labels"] == -100)
        assert set(np.unique(batch["labels"])) == {-100, int(batch["input_ids"][0, 0])}
        assert batch["input_ids"].dtype == batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["input_ids"], other["input_ids"])
        halves = [split(0).batch(step, host=0), split(0).part(step, np.array([2]))]
        np.testing.assert_array_equal(halves[0]["input_ids"][2:], halves[1]["input_ids"])
    tokens = {seed: [int(split(seed).batch(step)["input_ids"][0, 0]) for step in spoilt] for seed in (0, 1)}
    assert len(set(tokens[0])) > 1
    assert tokens[0] != tokens[1]
    assert bursts.fingerprint() != module.WithGarbage(every=20, length=2).fingerprint()
