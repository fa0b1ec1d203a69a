import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from llmlab import cli
from llmlab.commands.plot import main, read_curves
from llmlab.display.figure import RunCurves, draw_curves, running_mean, spread


def make_run(directory: Path, *, steps: int = 100, baselines: dict[str, float] | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    records: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        loss = 2 + 5 * math.exp(-step / 20)
        records.append({"step": step, "tokens": 64 * step, "train/loss": loss, "learning_rate": 1e-3 / step})
        if step % 25 == 0:
            records.append({"step": step, "tokens": 64 * step, "validation/loss": loss + 0.1})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if baselines is not None:
        (directory / "summary.json").write_text(json.dumps({"baselines": baselines}))
    return directory


BASELINES = {"unigram": 5.21, "bigram": 2.55}


def size_of_png(path: Path) -> tuple[int, int]:
    """Width and height, from the header that the format defines."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_a_png_is_written_into_the_run_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "claim-1", baselines=BASELINES)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'loss.png'}\n"
    width, height = size_of_png(run / "loss.png")
    assert width > 1200
    assert height > 700


@pytest.mark.parametrize("flags", [["--x", "tokens"], ["--x", "seconds"], ["--log-y"], ["--smooth", "10"]])
def test_every_flag_draws_several_runs(tmp_path: Path, flags: list[str]) -> None:
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    keys = ["--key", "train/loss,validation/loss,learning_rate"]
    assert main([*runs, "--out", str(tmp_path / "both.png"), *keys, *flags]) == 0
    assert size_of_png(tmp_path / "both.png")[1] > 1000  # two panels


def test_the_axis_says_what_losses_are_per(tmp_path: Path) -> None:
    runs = [read_curves(make_run(tmp_path / name)) for name in ("a", "b")]
    units = [dataclasses.replace(run, unit=unit) for run, unit in zip(runs, ("token", "masked token"), strict=True)]
    for shown, label in ((runs, "loss (nats)"), (units, "loss (nats per masked token or token)")):
        assert draw_curves(shown, ["train/loss"]).axes[0].get_ylabel() == label


def test_curves_are_the_recorded_numbers_and_baselines_are_dashed(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path / "claim-1", baselines=BASELINES))
    (axes,) = draw_curves([curves], ["train/loss", "validation/loss"]).axes
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    for line, key in zip(solid, ("train/loss", "validation/loss"), strict=True):
        expected = [(record["step"], record[key]) for record in curves.records if key in record]
        assert np.asarray(line.get_xydata()).tolist() == [list(point) for point in expected]
    assert sorted(np.asarray(line.get_ydata())[0] for line in dashed) == sorted(BASELINES.values())
    assert axes.get_ylabel() == "loss (nats)"
    assert axes.get_xlabel() == "optimizer step"
    last = curves.records[-1]["validation/loss"]
    assert {text.get_text() for text in axes.texts} >= {"unigram 5.21", "bigram 2.55", f"validation {last:.2f}"}


def test_baselines_that_differ_are_each_runs_own(tmp_path: Path) -> None:
    runs = [
        read_curves(make_run(tmp_path / "a", baselines=BASELINES)),
        read_curves(make_run(tmp_path / "b", baselines=BASELINES | {"bigram": 2.75})),
        read_curves(make_run(tmp_path / "c")),
    ]
    (axes,) = draw_curves(runs, ["train/loss"]).axes
    texts = {text.get_text() for text in axes.texts}
    assert {"a, bigram 2.55", "b, bigram 2.75"} <= texts
    (axes,) = draw_curves([runs[0], runs[2]], ["train/loss"]).axes
    assert "bigram 2.55" in {text.get_text() for text in axes.texts}


def test_seconds_are_tokens_over_speed() -> None:
    speeds = [100.0, 200.0, 50.0]
    records = [
        {"step": i + 1, "tokens": 1000 * (i + 1), "tokens_per_second": speed, "train/loss": 1.0}
        for i, speed in enumerate(speeds)
    ]
    xs, _ = RunCurves(name="a", records=records).curve("train/loss", "seconds")
    assert xs.tolist() == [10.0, 15.0, 35.0]


def test_numbers_that_are_not_finite_are_gaps() -> None:
    records = [{"step": i, "tokens": i, "train/loss": y} for i, y in enumerate([3.0, math.nan, math.inf, 2.0])]
    run = RunCurves(name="a", records=records)
    _, ys = run.curve("train/loss", "step")
    assert np.isnan(ys).tolist() == [False, True, True, False]
    draw_curves([run], ["train/loss"], smooth=3)


def test_a_running_mean_keeps_a_constant_and_averages_its_window() -> None:
    assert running_mean(np.full(9, 2.0), 5).tolist() == [2.0] * 9
    ys = np.array([8.0, 4.0, 0.0, 2.0, 1.0, 3.0])
    # Centred on the left (1, then 3 values), cut off on the right (3, then 2).
    expected = [8.0, np.mean(ys[0:3]), np.mean(ys[1:4]), np.mean(ys[2:5]), np.mean(ys[3:6]), np.mean(ys[4:6])]
    np.testing.assert_allclose(running_mean(ys, 3), expected, rtol=1e-15)


def test_labels_keep_their_order_and_distance_and_move_no_further_than_needed() -> None:
    assert spread([10.0, 50.0, 90.0], 10, 0, 100) == [10.0, 50.0, 90.0]
    assert spread([52.0, 50.0], 10, 0, 100) == [56.0, 46.0]
    assert spread([99.0, 98.0, 1.0], 10, 0, 100) == [100.0, 90.0, 1.0]
    generator = np.random.default_rng(0)
    for _ in range(50):
        wanted = generator.uniform(0, 100, 8).tolist()
        places = spread(wanted, 10, 0, 100)
        order = np.argsort(wanted)
        gaps = np.diff(np.array(places)[order])
        assert gaps.min() > 10 - 1e-9
        assert min(places) > -1e-9
        assert max(places) < 100 + 1e-9


def test_two_runs_of_the_same_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    monkeypatch.setattr("llmlab.display.figure.draw_curves", lambda runs, *_, **__: names.extend(r.name for r in runs))
    monkeypatch.setattr("llmlab.display.figure.save_figure", lambda *_: None)
    make_run(tmp_path / "one" / "base")
    make_run(tmp_path / "two" / "base")
    assert main(["one/base", "two/base"]) == 0
    assert names == ["one/base", "two/base"]


def test_a_run_without_an_evaluation_is_drawn_without_one(tmp_path: Path) -> None:
    assert main([str(make_run(tmp_path / "young", steps=10))]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "there is no directory nowhere; llmlab runs lists"),
        (["folder"], "folder is not a run directory: it holds notes.txt; llmlab runs lists"),
        (["folder/notes.txt"], "folder/notes.txt is a file; give the run directory"),
        (["run", "--key", "train/los"], "no run has train/los; there are train/loss, learning_rate, validation/loss"),
        (["run", "--key", ","], "no run has a metric without a name"),
        (["run", "--smooth", "0"], "--smooth 0 is not a number of steps; use 1 or more"),
        (["run", "--out", "loss.pdf"], "--out loss.pdf is no PNG file"),
        (["run", "--out", "away/loss.png"], "there is no directory away to write loss.png to"),
    ],
)
def test_bad_input_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    assert cli.main(["plot", *argv]) == 2
    assert message in capsys.readouterr().err
