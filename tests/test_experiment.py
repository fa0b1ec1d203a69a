"""An experiment that cannot run is refused before any work, with every reason at once."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from llmlab import cli
from llmlab.config import config_hash, difference, from_json, save, to_json
from llmlab.data import Packed, StandardLibrary, TextFiles, TokenMasking
from llmlab.data.tasks import WAYS
from llmlab.experiment import Experiment, read_experiment
from llmlab.flags import concrete, entries, parse
from llmlab.models import bert, llama, reformer
from llmlab.models.gpt2 import gpt2
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.moe import MixtureOfExperts
from llmlab.objectives import MaskedToken, NextToken, Objective
from llmlab.optim import AdamW, Cosine
from llmlab.sharding.mesh import Mesh
from llmlab.tokenizers import Bytes, SentencePiece, SpecialTokens
from llmlab.training.config import Train

FILE = """
from llmlab.data import Packed, TextFiles, TokenMasking
from llmlab.data.tasks import WAYS
from llmlab.experiment import Experiment
from llmlab.models.gpt2 import gpt2
from llmlab.optim import AdamW, Cosine
from llmlab.training.config import Train


def config() -> Experiment:
    return Experiment(
        model=gpt2(embed_dim=16, num_layers=2, num_heads=2, max_length=64),
        data=Packed(TextFiles("corpus/*.txt")),
        optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=5)),
        train=Train(steps=20, batch_size=8, sequence_length=32),
    )
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def experiment(path: Path) -> Experiment:
    return read_experiment(path)


def problems(experiment: Experiment, num_devices: int | None = None, **train: int) -> list[str]:
    changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **train))
    try:
        changed.validate(num_devices=num_devices)
    except ValueError as error:
        headline, *lines = str(error).splitlines()
        assert headline == "this experiment cannot run:"
        return [line.strip() for line in lines]
    return []


def test_an_experiment_survives_json_and_a_run_directory(experiment: Experiment, tmp_path: Path) -> None:
    assert from_json(to_json(experiment), Experiment) == experiment
    save(experiment, tmp_path)
    assert read_experiment(tmp_path) == experiment
    assert config_hash(read_experiment(tmp_path)) == config_hash(experiment)


def test_a_sound_experiment_has_no_problems(experiment: Experiment) -> None:
    for num_devices in (None, 1, 2, 4, 8):
        assert problems(experiment, num_devices) == []


def test_a_sequence_beyond_the_position_table_is_refused(experiment: Experiment) -> None:
    assert problems(experiment, sequence_length=64) == []
    [problem] = problems(experiment, sequence_length=65)
    assert "train.sequence_length=65 is beyond the position table's max_length=64" in problem


@pytest.mark.parametrize(
    ("num_devices", "batch_size", "accumulation", "sizes"),
    [
        (None, 9, 2, "use 8 or 10"),
        (8, 12, 1, "use 8 or 16"),
        (8, 8, 2, "use 16 or 32"),
        (4, 30, 4, "use 16 or 32"),
    ],
)
def test_a_batch_that_does_not_divide_says_which_sizes_work(
    experiment: Experiment, num_devices: int | None, batch_size: int, accumulation: int, sizes: str
) -> None:
    [problem] = problems(experiment, num_devices, batch_size=batch_size, accumulation=accumulation)
    assert f"train.batch_size={batch_size} is not divisible" in problem
    assert problem.endswith(sizes)
    for size in (int(word) for word in sizes.split() if word.isdigit()):
        assert problems(experiment, num_devices, batch_size=size, accumulation=accumulation) == []


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(data=1, sequence=8), "train.sequence_length=60 is not divisible by mesh.sequence=8; use 56 or 64"),
        (Mesh(data=1, pipeline=8), "is more than the 2 repeats of the model's layers; use at most 2 in all"),
        (Mesh(data=4, pipeline=2, interleave=2), "mesh.interleave=2 is more than the 2 repeats"),
        (Mesh(data=1, expert=8), r"mesh.expert=8 does not divide num_experts=4; use one of \[1, 2, 4\]"),
    ],
)
def test_a_mesh_that_the_model_does_not_admit_is_refused_with_what_would_work(mesh: Mesh, message: str) -> None:
    experts = MixtureOfExperts(num_experts=4, experts_per_token=1, expert=GatedMLP(hidden_dim=8))
    model = llama.llama(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=16, vocab_size=512)
    model = dataclasses.replace(model, pattern=(dataclasses.replace(model.pattern[0], ffn=experts),))
    experiment = Experiment(
        model=model,
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-3),
        mesh=mesh,
        train=Train(steps=10, batch_size=8, sequence_length=60),
    )
    with pytest.raises(ValueError, match=message):
        experiment.validate(num_devices=8)


def test_a_model_without_a_plain_stack_cannot_be_a_pipeline(experiment: Experiment) -> None:
    model = reformer.preset("reformer-nano")
    changed = dataclasses.replace(experiment, model=model, mesh=Mesh(data=4, pipeline=2))
    [problem] = problems(changed, 8)
    assert "mesh.pipeline=2 cannot split model=ReversibleTransformer" in problem


def test_experts_that_there_are_not_cannot_be_spread_out(experiment: Experiment) -> None:
    [problem] = problems(dataclasses.replace(experiment, mesh=Mesh(data=4, expert=2)), 8)
    assert "mesh.expert=2 has nothing to split" in problem


def test_only_devices_that_share_the_batch_count(experiment: Experiment) -> None:
    tensor = dataclasses.replace(experiment, mesh=Mesh(tensor=4))
    assert problems(tensor, 8, batch_size=2) == []
    sharded = dataclasses.replace(experiment, mesh=Mesh(fsdp=4))
    assert "mesh data=2 x fsdp=4" in problems(sharded, 8, batch_size=4)[0]


def with_parts(experiment: Experiment, **parts: Any) -> Experiment:
    return dataclasses.replace(experiment, **parts)


def test_an_objective_that_does_not_fit_the_data_is_refused_with_those_that_do(experiment: Experiment) -> None:
    masked = dataclasses.replace(experiment.data, corruption=TokenMasking())
    special = Bytes(special=SpecialTokens(mask="[MASK]"))
    encoder = bert.bert(embed_dim=16, num_layers=2, num_heads=2)
    sound = with_parts(experiment, data=masked, tokenizer=special, model=encoder, objective=MaskedToken())
    assert problems(sound) == []
    [problem] = problems(with_parts(sound, data=experiment.data))
    assert "objective=MaskedToken learns from masked tokens or masked tokens and sentence pairs" in problem
    assert "data=Packed gives next tokens; use objective=NextToken for this data" in problem
    assert "Packed(..., corruption=TokenMasking())" in problem
    [problem] = problems(with_parts(sound, tokenizer=Bytes()))
    assert "data: TokenMasking puts the special tokens mask into rows" in problem
    assert "tokenizer.special=SpecialTokens(mask='[MASK]', ...)" in problem


def test_an_objective_that_cannot_train_the_model_is_refused_with_those_that_can(experiment: Experiment) -> None:
    masked = dataclasses.replace(experiment.data, corruption=TokenMasking())
    special = Bytes(special=SpecialTokens(mask="[MASK]"))
    [problem] = problems(with_parts(experiment, data=masked, tokenizer=special, objective=MaskedToken()))
    assert "objective=MaskedToken cannot train model=Transformer with the head that it has" in problem
    assert "it is trained by NextToken or PrefixLM or BlankInfilling" in problem


class Own(NextToken):
    """An objective of the user's own: nobody knows what it can do."""

    tasks: ClassVar[tuple[str, ...]] = ()


def test_a_users_own_objective_is_trusted(experiment: Experiment) -> None:
    masked = dataclasses.replace(experiment.data, corruption=TokenMasking())
    special = Bytes(special=SpecialTokens(mask="[MASK]"))
    assert problems(with_parts(experiment, data=masked, tokenizer=special, objective=Own())) == []


def test_text_without_a_length_is_refused(experiment: Experiment) -> None:
    changed = with_parts(experiment, train=dataclasses.replace(experiment.train, sequence_length=None))
    assert problems(changed) == ["data: rows of text need a length: set train.sequence_length"]


def test_every_task_of_an_objective_has_data_that_is_for_it() -> None:
    tasks = [task for kind in concrete(Objective) for task in kind.tasks]
    assert set(tasks) == set(WAYS)


def test_every_problem_is_reported_at_once(experiment: Experiment) -> None:
    broken = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, vocab_size=100),
        tokenizer=SentencePiece(vocab_size=512),
        mesh=Mesh(data=3),
        initialize_from="no/such/run",
    )
    found = "\n".join(problems(broken, 8, sequence_length=100, steps=5))
    for part in ("max_length=64", "the tokenizer's 512", "warmup_steps=5", "needs 3 devices", "no/such/run"):
        assert part in found


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(experiment: Experiment) -> None:
    small = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=299))
    [problem] = problems(dataclasses.replace(small, tokenizer=SentencePiece(vocab_size=300)))
    assert "model.vocab_size=299 is less than the tokenizer's 300" in problem
    assert problems(dataclasses.replace(small, tokenizer=SentencePiece(vocab_size=299))) == []


def test_heads_that_do_not_divide_the_width_are_refused_where_they_are_written() -> None:
    with pytest.raises(ValueError, match="num_heads=3"):
        gpt2(embed_dim=16, num_layers=1, num_heads=3)


def test_every_field_of_every_part_is_documented(experiment: Experiment) -> None:
    assert [entry.path for entry in entries(experiment) if not entry.doc] == []


def test_flags_reach_every_value(experiment: Experiment) -> None:
    argv = ["--optimizer.peak-lr", "3e-4", "--model.pattern.0.mixer.num-heads", "4", "--mesh.fsdp", "2"]
    changed = parse(experiment, argv, prog="llmlab train tiny.py")
    assert [entry[0] for entry in difference(experiment, changed)] == [
        "model.pattern.0.mixer.num_heads",
        "optimizer.peak_lr",
        "mesh.fsdp",
    ]


def test_config_prints_what_the_flags_make_of_the_file(path: Path, experiment: Experiment, capsys) -> None:
    assert cli.main(["config", str(path), "--train.steps", "7"]) == 0
    printed = from_json(capsys.readouterr().out, Experiment)
    assert difference(experiment, printed) == [("train.steps", 20, 7)]


def test_config_compares_a_file_with_a_run(
    path: Path, experiment: Experiment, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run = tmp_path / "run"
    run.mkdir()
    save(dataclasses.replace(experiment, tokenizer=SentencePiece(vocab_size=300), initialize_from="x"), run)
    assert cli.main(["config", str(path), str(run)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["tokenizer", "Bytes()", "SentencePiece(vocab_size=300)"] in rows
    assert ["initialize_from", "None", "'x'"] in rows
    assert cli.main(["config", str(path), str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["field"] for row in rows] == ["tokenizer", "initialize_from"]
    assert rows[1] == {"field": "initialize_from", "left": None, "right": "x"}
    assert cli.main(["config", str(run), str(run)]) == 0
    assert "equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{file}", "--train.step", "3"], "did you mean --train.steps?"),
        (["{file}", "--train.sequence-length", "100"], "max_length=64"),
        (["{file}", "{file}", "--train.steps", "3"], "two experiments without"),
        (["{file}", "{file}", "{file}"], "takes one experiment with flags, or two"),
        (["--train.steps", "3"], "before the flags"),
        (["{folder}"], "no run directory"),
        (["{folder}/other.py"], "there is no file"),
    ],
)
def test_config_refuses_with_the_way_out(path: Path, argv: list[str], expected: str, capsys) -> None:
    argv = [argument.format(file=path, folder=path.parent) for argument in argv]
    assert cli.main(["config", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_a_file_that_returns_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("def config():\n    return 3\n")
    with pytest.raises(ValueError, match=r"config\(\) returned 3, which is no Experiment"):
        read_experiment(path)
    path.write_text("from llmlab.training.config import Train\ndef config():\n    return Train(steps=0)\n")
    with pytest.raises(ValueError, match=r"line 3, in config"):
        read_experiment(path)


def test_help_on_a_file_answers_and_lists_the_parts(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmlab", "config", str(path), "--help"], capture_output=True, text=True, check=True
    )
    for part in ("--train.steps", "--optimizer.peak-lr", "--model.pattern.0.mixer.num-heads", "Components"):
        assert part in done.stdout
    assert done.stderr == ""


def test_defaults_are_the_simplest_that_work(experiment: Experiment) -> None:
    assert experiment.tokenizer == Bytes()
    assert experiment == Experiment(
        model=gpt2(embed_dim=16, num_layers=2, num_heads=2, max_length=64),
        data=Packed(TextFiles("corpus/*.txt")),
        optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=5)),
        train=Train(steps=20, batch_size=8, sequence_length=32),
    )
