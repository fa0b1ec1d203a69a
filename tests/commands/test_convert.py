"""Conversions there and back, which change no bit, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from safetensors.numpy import load_file

import llmlab
from llmlab import cli
from llmlab.commands.convert import main
from llmlab.config import save
from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.nn.module import split
from llmlab.optim import AdamW
from llmlab.runs import pretrained
from llmlab.tokenizers import Bytes, SentencePiece
from llmlab.training.checkpoint import save_params
from llmlab.training.config import Train
from tests.models.comparison import assert_same_weights
from tests.models.references import FIXTURES

TINY = llama(embed_dim=8, num_layers=2, num_heads=2, hidden_dim=12)


def run(directory: Path, tokenizer: Any, **changes: Any) -> Path:
    """A run as training leaves it, with random weights."""
    built = tokenizer.build(lambda: iter(["def main():\n    return 0\n"] * 50))
    directory.mkdir()
    model = TINY.with_vocabulary(built.vocab_size)
    save_params(directory / "checkpoints", split(model.build(nnx.Rngs(params=0)))[1], step=7)
    built.save(directory / "tokenizer")
    experiment = Experiment(
        model=TINY,
        tokenizer=tokenizer,
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-3),
        train=Train(steps=7, batch_size=1, sequence_length=8),
    )
    save(experiment, directory)
    return directory


def test_a_hugging_face_directory_becomes_a_model_and_the_same_directory_again(tmp_path: Path) -> None:
    source, there, back = FIXTURES / "gpt2", tmp_path / "there", tmp_path / "back"
    assert main([str(source), str(there)]) == 0
    assert main([str(there), str(back)]) == 0
    assert_same_weights(llmlab.load(there), llmlab.load(source))
    assert llmlab.load(there).config == llmlab.load(source).config
    ours, theirs = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "there"]


def test_a_converted_model_initialises_an_experiment_of_its_shape(tmp_path: Path) -> None:
    main([str(FIXTURES / "gpt2"), str(tmp_path / "model")])
    model = llmlab.load(FIXTURES / "gpt2")
    shapes = model.config.abstract()[1]
    weights = pretrained(str(tmp_path / "model"), model.config)(shapes)
    assert (weights["embedding"]["tokens"]["table"] == model.embedding.tokens.table[...]).all()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_run_becomes_a_directory_with_its_tokenizer(
    checkpoint: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run(tmp_path / "run", SentencePiece(vocab_size=276))
    path = source / "checkpoints" / "7" if checkpoint else source
    assert main([str(path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    assert_same_weights(llmlab.load(tmp_path / "out"), llmlab.load(source))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (
        source / "tokenizer" / "tokenizer.model"
    ).read_bytes()
    assert llmlab.load_tokenizer(tmp_path / "out").fingerprint == llmlab.load_tokenizer(source).fingerprint


def test_a_tokenizer_that_transformers_does_not_have_is_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run(tmp_path / "run", Bytes())), str(tmp_path / "out")]) == 0
    assert "transformers has none for this model" in capsys.readouterr().err


def test_the_family_can_be_chosen_and_must_have_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run(tmp_path / "run", Bytes())
    assert cli.main(["convert", str(source), str(tmp_path / "llama"), "--model-type", "llama"]) == 0
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--model-type", "gpt2"]) == 2
    assert "the Hugging Face family gpt2 does not compute what this model does" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["llama", "run"]


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert cli.main(["convert", str(FIXTURES / "gpt2"), str(tmp_path / "out")]) == 2
    assert "is left as it is" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "there is no directory nowhere"),
        ([str(FIXTURES / "gpt2"), "out", "--model-type", "llama"], "--model-type is about runs"),
        ([str(FIXTURES), "out"], "has no config.json"),
    ],
)
def test_errors_are_the_users(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
