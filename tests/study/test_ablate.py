"""`llmlab ablate` as a user meets it: ten lines, a plan, runs that are killed and go on, an answer."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmlab.cli import main
from tests.study.conftest import EXPERIMENT

pytestmark = pytest.mark.scale

TEN_LINES = """
from tiny import config
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.study.ablation import Ablation, swap

def ablation() -> Ablation:
    return Ablation(
        hypothesis="LayerNorm is no worse than RMSNorm",
        baseline=config(),
        variants={"layernorm": swap(RMSNorm, LayerNorm())},
        margin=0.1, seeds=2)
"""
# What an interruption may change: when, how fast, in how many sessions.
TIMES = {"date", "seconds", "tokens_per_second", "provenance", "command", "remarks"}


def write(directory: Path, text: str = TEN_LINES, name: str = "norm.py") -> Path:
    (directory / "tiny.py").write_text(EXPERIMENT, encoding="utf-8")
    lines = [f"{i} is half of {2 * i} and a third of {3 * i}" for i in range(200)]
    (directory / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    (directory / name).write_text(text, encoding="utf-8")
    return directory


def results(directory: Path, name: str = "norm") -> dict[str, Any]:
    return json.loads((directory / "studies" / f"{name}-ablation" / "results.json").read_text(encoding="utf-8"))


def timeless(value: Any) -> Any:
    """Without what an interruption may change."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a study that was carried out."""
    directory = write(tmp_path_factory.mktemp("study"))
    with contextlib.chdir(directory):
        assert main(["ablate", "norm.py"]) == 0
    return directory


@pytest.fixture
def study(finished_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the working directory."""
    shutil.copytree(finished_study, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files and no run, the working directory."""
    monkeypatch.chdir(write(tmp_path))
    return tmp_path


def summaries(directory: Path) -> list[Path]:
    return sorted((directory / "runs" / "trials").glob("*/summary.json"))


# --- plan, run, run again --------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_will_happen_and_does_nothing(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(fresh.iterdir())
    assert main(["ablate", "norm.py", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "model.pattern.0.norm: RMSNorm() → LayerNorm()" in said
    assert "2 arms x 2 seeds: 4 runs, 0 of them in runs/trials already, 4 to do" in said
    assert "tokens to do: 1,536" in said  # 4 runs x 6 steps x 8 rows x 8 tokens
    assert "a guess" in said
    # Python keeps the compiled tiny.py, which norm.py imports, unless it is told not to
    assert sorted(path for path in fresh.iterdir() if path.name != "__pycache__") == before


def test_ten_lines_give_an_answer_and_a_report(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(study)
    assert found["verdict"] in ("supported", "refuted", "inconclusive")
    assert [arm["name"] for arm in found["arms"]] == ["baseline", "layernorm"]
    for arm in found["arms"]:
        assert arm["achieved"]["tokens"] == 6 * 8 * 8
        for run, value in zip(arm["runs"], arm["values"], strict=True):
            summary = json.loads((study / run["directory"] / "summary.json").read_text(encoding="utf-8"))
            assert summary["validation/loss"] == value == run["value"]
    assert found["arms"][1]["achieved"]["parameters"] > found["arms"][0]["achieved"]["parameters"]  # LayerNorm's bias
    times = [path.stat().st_mtime_ns for path in summaries(study)]
    assert main(["ablate", "norm.py", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "LayerNorm is no worse than RMSNorm" in said
    assert f"{found['comparisons'][0]['difference']:+.4f}" in said
    assert "studies/norm-ablation/results.json" in said
    assert [path.stat().st_mtime_ns for path in summaries(study)] == times  # nothing was trained
    assert timeless(results(study)) == timeless(found)


def test_the_results_name_no_place_of_this_machine(study: Path) -> None:
    text = json.dumps(results(study))
    assert str(study) not in text
    assert str(Path.home()) not in text
    assert sys.prefix not in text


def test_json_is_the_results_and_nothing_else(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "norm.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results(study)
    assert main(["ablate", "norm.py", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["to_do"], {run["status"] for run in plan["runs"]}) == (0, {"finished"})


def test_a_plan_says_why_a_run_is_not_there(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (study / "tiny.py").read_text(encoding="utf-8").replace("steps=6", "steps=9")
    (study / "tiny.py").write_text(text, encoding="utf-8")
    sys.modules.pop("tiny", None)  # a new process would read the file again
    record = (study / "studies" / "norm-ablation" / "study.json").read_bytes()
    assert main(["ablate", "norm.py", "--dry-run"]) == 2  # as without --dry-run: its results are known
    said, refused = capsys.readouterr()
    assert "arms.baseline.config.train.steps: 6 -> 9" in refused
    assert "--exploratory" in refused
    assert (study / "studies" / "norm-ablation" / "study.json").read_bytes() == record
    assert "0 of them in runs/trials already, 4 to do" in said
    for arm, run in (("baseline", 0), ("layernorm", 0)):
        near = results(study)["arms"][("baseline", "layernorm").index(arm)]["runs"][run]
        line = f"{arm}/seed={run} is new: the nearest run, {near['directory']}, has\n    train.steps: 6, here 9"
        assert line in said
    assert "finished runs of the same models and batches" in said
    sys.modules.pop("tiny", None)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_corrupt_result_is_told_and_not_averaged_and_can_be_made_again(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(study)
    broken = Path(before["arms"][1]["runs"][0]["directory"]) / "summary.json"
    text = broken.read_text(encoding="utf-8")
    broken.write_text(text[: len(text) // 2], encoding="utf-8")
    assert main(["ablate", "norm.py"]) == 1
    found = results(study)
    (problem,) = found["problems"]
    assert (problem["arm"], problem["seed"], problem["status"]) == ("layernorm", 0, "corrupt")
    assert found["paired_seeds"] == [1]
    assert found["arms"][0]["mean"] == before["arms"][0]["values"][1]
    assert "layernorm/seed=0 has no result (corrupt)" in capsys.readouterr().out
    assert main(["ablate", "norm.py", "--retry-failed"]) == 0
    assert timeless(results(study)) == timeless(before)


def test_seeds_added_after_the_results_ask_for_exploratory(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "norm.py", "--seeds", "3"]) == 2
    assert "--exploratory" in capsys.readouterr().err
    assert main(["ablate", "norm.py", "--seeds", "3", "--exploratory"]) == 0
    assert "(exploratory)" in capsys.readouterr().out
    assert results(study)["mode"] == "exploratory"
    assert len(summaries(study)) == 6


def test_arms_that_will_not_match_are_refused_before_anything_runs(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TEN_LINES.replace("margin=0.1", 'match="parameters", tolerance=0.001')
    write(fresh, text)
    assert main(["ablate", "norm.py"]) == 1
    said = capsys.readouterr().err
    assert "to match in parameters, within 0.10%, and do not" in said
    assert "layernorm has 3,640 parameters, the baseline 3,624 (+0.44%)" in said
    assert main(["ablate", "norm.py", "--dry-run"]) == 1
    assert not (fresh / "runs").exists()
    assert not (fresh / "studies").exists()
    write(fresh, text.replace("tolerance", 'acknowledge_mismatch="a bias more", tolerance'))
    assert main(["ablate", "norm.py", "--dry-run"]) == 0
    assert "a bias more" in capsys.readouterr().out


def test_a_second_change_is_refused_before_anything_runs(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = 'lambda e: with_values({"train.steps": 12})(swap(RMSNorm, LayerNorm())(e))'
    write(fresh, TEN_LINES.replace("swap(RMSNorm, LayerNorm())", change).replace(", swap", ", swap, with_values"))
    assert main(["ablate", "norm.py"]) == 2
    assert "it changes 2 things at once" in capsys.readouterr().err
    assert not (fresh / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from tiny import config\n", "has no function ablation()"),
        ("from tiny import config\ndef ablation():\n    return 3\n", "ablation() returned 3, which is no Ablation"),
        (TEN_LINES.replace("margin=0.1", "margin=-1.0"), "margin=-1.0 must be a number of at least 0"),
    ],
)
def test_a_file_that_holds_no_ablation_is_explained(
    fresh: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(fresh, text)
    assert main(["ablate", "norm.py"]) == 2
    assert message in capsys.readouterr().err


def test_an_arm_with_what_changes_nothing_is_neither_better_nor_worse(fresh: Path) -> None:
    """A/A: the arms differ in how many checkpoints they keep, and by nothing in any loss."""
    text = TEN_LINES.replace("swap(RMSNorm, LayerNorm())", 'with_values({"train.keep_last": 1})')
    write(fresh, text.replace(", swap", ", with_values").replace("margin=0.1", 'claim="better"'))
    assert main(["ablate", "norm.py"]) == 0
    found = results(fresh)
    assert found["comparisons"][0]["differences"] == [0.0, 0.0]
    assert found["verdict"] == "refuted"


# --- interruptions ---------------------------------------------------------------------------------------------------

LONG = (
    TEN_LINES.replace("config()", "longer(config())").replace(", swap", ", swap, with_values")
    + 'longer = with_values({"train.steps": 80, "train.evaluate_every": 40, "train.checkpoint_every": 10})\n'
)


@contextlib.contextmanager
def started(directory: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "llmlab", "ablate", "norm.py", *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},  # one device: a batch of 8 rows on eight is slower
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def in_the_middle(directory: Path) -> bool:
    """One run is finished, and another has saved something."""
    trials = directory / "runs" / "trials"
    unfinished = [path for path in trials.glob("*") if not (path / "summary.json").exists()]
    return bool(summaries(directory)) and any((path / "checkpoints" / "10").exists() for path in unfinished)


@pytest.mark.scale
def test_a_study_that_was_killed_goes_on_to_the_same_results(tmp_path: Path) -> None:
    killed, whole = (write(_made(tmp_path / name), LONG) for name in ("killed", "whole"))
    with started(killed) as process:
        wait_for(lambda: in_the_middle(killed), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(summaries(killed))
    assert 1 <= done < 3
    assert not (killed / "studies" / "norm-ablation" / "results.json").exists()
    with started(killed) as process:
        wait_for(lambda: len(summaries(killed)) > done, process)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate()
    assert process.returncode == 130, (out, said)
    assert "of 4 runs are done. To go on:\n  llmlab ablate norm.py" in said
    for directory in (killed, whole):
        with started(directory) as process:
            out, said = process.communicate()
        assert process.returncode == 0, (out, said)
    assert timeless(results(killed)) == timeless(results(whole))
    sessions = [run["sessions"] for run in results(killed)["provenance"]["runs"]]
    assert max(sessions) > 1


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_the_help_needs_no_jax() -> None:
    program = "import sys\nfrom llmlab.commands import ablate\nablate._parser().print_help()\n"
    program += "sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
