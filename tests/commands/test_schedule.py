"""`llmlab schedule`: the numbers, the picture in the terminal, the PNG, and what goes wrong."""

import json
import math
from pathlib import Path

import pytest

from llmlab.cli import main as llmlab
from llmlab.commands.schedule import draw

EXPERIMENT = '''
"""An experiment for tests."""

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.gpt2 import preset
from llmlab.optim import AdamW, Cosine, Group
from llmlab.training.config import Train


def config():
    return Experiment(
        model=preset("nano"),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(
            peak_lr=0.01,
            schedule=Cosine(warmup_steps=20),
            groups=(Group(match="embedding", lr_multiplier=0.5), Group(match="head", frozen=True)),
        ),
        train=Train(steps=100, batch_size=4, sequence_length=16),
    )
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "claim.py"
    path.write_text(EXPERIMENT)
    return str(path)


def test_json_gives_the_rate_of_every_step(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmlab(["schedule", file, "--json", "--optimizer.peak-lr", "2.0", "--train.steps", "60"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == list(range(60))
    for k, row in enumerate(rows):
        expected = (k + 1) / 21 if k < 20 else 0.5 * (1 + math.cos(math.pi * (k - 20) / 40))
        assert row["learning_rate"] == pytest.approx(2 * expected, rel=1e-5, abs=1e-6)


def test_the_picture_is_explained_and_a_png_written(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "schedule.png"
    assert llmlab(["schedule", file, "--out", str(png)]) == 0
    out = capsys.readouterr().out
    assert "AdamW with Cosine over 100 steps: 0.000476 at first, 0.01 at most" in out
    assert "embedding: 0.5 times these rates" in out
    assert "head: frozen" in out
    assert f"wrote {png}" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_curve_has_its_peak_at_the_top_and_its_end_at_the_bottom() -> None:
    rates = [k / 10 for k in range(11)] + [1 - k / 30 for k in range(1, 31)]
    lines = draw(range(41), rates, width=50, braille=False)
    body = [line[line.index("|") + 1 :].ljust(45) for line in lines[:-1]]
    assert [line[:5].strip(" |") for line in (lines[0], lines[7], lines[13])] == ["1", "0.5", "0"]
    assert body[0].index("*") == round(10 / 40 * 45)  # a quarter of the way
    assert body[-1].startswith("*")
    assert body[-1].rstrip().endswith("*")
    for column in range(45):  # a line without gaps
        assert any(row[column] == "*" for row in body)
    assert lines[-1].split() == ["step", "0", "40"]


def test_braille_and_plain_pictures_have_the_same_size() -> None:
    rates = [math.sin(k / 30) ** 2 for k in range(200)]
    for width in (40, 72, 100):
        for braille in (True, False):
            lines = draw(range(200), rates, width=width, braille=braille)
            assert len(lines) == 15
            assert max(map(len, lines)) == width


def test_a_run_of_one_step_and_a_rate_that_never_changes_can_be_drawn() -> None:
    for steps in (1, 2, 5):
        assert len(draw(range(steps), [0.3] * steps, width=40)) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.schedule.warmup-steps", "100"], "is 100 steps, but the run has 100"),
        (["--optimizer.pek-lr", "1"], "--optimizer.peak-lr"),
        (["--out", "nowhere/schedule.png"], "there is no directory nowhere"),
    ],
)
def test_a_mistake_is_the_users_error(
    file: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmlab(["schedule", file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmlab(["schedule", "nowhere.py"]) == 2
    assert "there is no file" in capsys.readouterr().err
