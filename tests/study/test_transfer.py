"""Learning-rate transfer: drift and regret of valleys that are known, and the command on real runs."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from llmlab.cli import main
from llmlab.experiment import Experiment
from llmlab.study.report import transfer as report
from llmlab.study.transfer import Transfer, drift, optimum, over_seeds, regret, transfer_points
from llmlab.study.transfer_results import analyse_transfer
from llmlab.study.trials import Status, Trial

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
WIDTHS = (8, 16, 32)


def valley(rate: float, best: float, floor: float) -> float:
    return floor + 0.1 * math.log(rate / best) ** 2


def best_rate(arm: str, width: int) -> float:
    return 1.1e-2 * (8 / width if arm == "standard" else 1.0)


def study(tiny: Experiment, **changes: Any) -> Transfer:
    def build(width: int) -> Experiment:
        return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, embed_dim=width, vocab_size=384))

    return Transfer(
        **{
            "question": "Does it transfer?",
            "arms": {"standard": build, "muP": build},
            "widths": WIDTHS,
            "learning_rates": RATES,
            "coordinate_steps": 0,
            **changes,
        }
    )


def analysed(transfer: Transfer, **changed: Trial) -> dict[str, Any]:
    trials = {}
    for point in transfer_points(transfer):
        loss = valley(point.learning_rate, best_rate(point.arm, point.width), 3.0 - 0.1 * math.log(point.width))
        loss += 0.01 * point.seed
        trials[point.name] = Trial(
            directory=Path("runs/trials/0"),
            hash="0",
            status=Status.FINISHED,
            summary={"validation/loss": loss, "unit": "token"},
        )
    trials |= changed
    return analyse_transfer(
        transfer, transfer_points(transfer), trials, {}, name="t", command="llmlab scaling t.py", file=None
    )


def test_the_parabola_finds_the_floor_of_a_parabola() -> None:
    found = optimum(RATES, [valley(rate, 5.3e-3, 2.0) for rate in RATES])
    assert found.rate == pytest.approx(5.3e-3)
    assert (found.grid_rate, found.grid_loss) == (4e-3, valley(4e-3, 5.3e-3, 2.0))
    assert optimum(RATES, [6.0, 5, 4, 3, 2, 1]).rate is None  # at an end
    assert optimum(RATES, [3.0, 2, 1, None, None, None]).rate == 4e-3  # beyond it runs diverge
    assert optimum(RATES, [None] * 6).grid_rate is None


def test_drift_is_the_exponent_and_regret_the_price(tiny: Experiment) -> None:
    results = analysed(study(tiny, seeds=2))
    standard, mup = results["arms"]
    assert standard["drift"]["value"] == pytest.approx(-1.0)
    assert mup["drift"]["value"] == pytest.approx(0.0, abs=1e-9)
    at_own = min(valley(rate, best_rate("standard", 32), 0.0) for rate in RATES)
    narrow = min(RATES, key=lambda rate: valley(rate, best_rate("standard", 8), 0.0))
    assert standard["regret"]["value"] == pytest.approx(valley(narrow, best_rate("standard", 32), 0.0) - at_own)
    assert mup["regret"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert results["problems"] == []
    assert [row["best"]["rate"] for row in mup["widths"]] == pytest.approx([1.1e-2] * 3)


def test_intervals_over_seeds_are_students() -> None:
    values = [0.1, 0.4, 0.25]
    low, high = stats.t.interval(0.9, 2, loc=np.mean(values), scale=stats.sem(values))
    assert over_seeds(values, 0.9) == {"value": pytest.approx(0.25), "interval": pytest.approx([low, high])}
    assert over_seeds([None, 0.5], 0.9) == {"value": 0.5, "interval": None}
    assert over_seeds([None], 0.9) == {"value": None, "interval": None}
    assert drift(WIDTHS, [optimum(RATES, [None] * 6)] * 3) is None
    best = optimum(RATES, [3.0, 2, 1, 2, 3, 4])
    assert regret(RATES, best, [3.0, 2, None, 1.0, 2, 3]) is None


def test_a_best_rate_at_the_end_and_damaged_runs_are_told_and_diverged_ones_count_as_worst(tiny: Experiment) -> None:
    transfer = study(tiny, learning_rates=RATES[:4])
    gone = Trial(directory=Path("x"), hash="0", status=Status.CORRUPT, problem="no JSON")
    diverged = Trial(directory=Path("x"), hash="0", status=Status.DIVERGED, problem="the loss is nan")
    results = analysed(transfer, **{"muP/width=8/lr=0.001": gone, "muP/width=8/lr=0.002": diverged})
    assert results["problems"] == [
        "standard, width 8: the best learning rate, 0.008, is at an end of the grid",
        "muP/width=8/lr=0.001: corrupt: no JSON",
        *(f"muP, width {width}: the best learning rate, 0.008, is at an end of the grid" for width in WIDTHS),
    ]
    assert results["arms"][1]["widths"][0]["means"][:2] == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8,)}, r"widths=\(8,\) must be two or more"),
        ({"learning_rates": (1e-3, 1e-3, 2e-3)}, "must be three or more positive numbers, ascending"),
        ({"arms": {}}, "arms is empty"),
        ({"level": 0.0}, "level=0.0 must lie"),
    ],
)
def test_a_definition_that_cannot_be_is_refused(tiny: Experiment, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(tiny, **changes)


FILE = """
import dataclasses

from llmlab.nn.mup import MuP
from llmlab.study.transfer import Transfer
from tiny import config


def standard(width):
    base = config()
    mixer = dataclasses.replace(base.model.pattern[0].mixer, num_heads=width // 4)
    block = dataclasses.replace(base.model.pattern[0], mixer=mixer)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, embed_dim=width, pattern=(block,)))


def mup(width):
    base = standard(width)
    model = dataclasses.replace(base.model, mup=MuP(base_width=8, base_head_dim=4) if width > 8 else None)
    return dataclasses.replace(base, model=model)


def scaling():
    return Transfer(question="Does it?", arms={"standard": standard, "muP": mup}, widths=(8, 16),
                    learning_rates=(1e-3, 1e-2, 1e-1), coordinate_steps=1)
"""


@pytest.mark.scale
def test_the_command_trains_checks_coordinates_and_reports(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(directory)
    (directory / "study.py").write_text(FILE, encoding="utf-8")
    assert main(["scaling", "study.py", "--out", "here"]) == 0
    said = capsys.readouterr().out
    assert "here/transfer.png" in said
    results = json.loads((directory / "here/results.json").read_text(encoding="utf-8"))
    standard, mup = results["arms"]
    assert (standard["parametrisation"], mup["parametrisation"]) == ("standard", "muP")
    same = [run["hash"] for run in standard["runs"][:3]]
    assert [run["hash"] for run in mup["runs"][:3]] == same  # equal experiments at the base width, trained once
    assert len(list((directory / "runs/trials").glob("*/summary.json"))) == 9
    assert standard["coordinates"]["change"]["layer 1"][0] == mup["coordinates"]["change"]["layer 1"][0] > 0
    page = (directory / "here/report.html").read_text(encoding="utf-8")
    assert "Coordinate check" in page
    broken = results | {"widths": [8, 16, 32]}
    (directory / "here/results.json").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(ValueError, match="arm standard has other widths than the study"):
        report.write(directory / "here")
