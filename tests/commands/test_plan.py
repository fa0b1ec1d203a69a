"""`llmlab plan` as a user calls it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmlab.cli import main
from llmlab.plan.chips import CHIPS
from llmlab.plan.report import Flops, Memory, Plan, Times, Traffic

EXPERIMENT = """
from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.optim import AdamW, Constant
from llmlab.training.config import Train


def config():
    return Experiment(
        model=llama(embed_dim=64, num_layers=2, num_heads=4, hidden_dim=128),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-3, schedule=Constant()),
        train=Train(steps=10, batch_size=8, sequence_length=32),
    )
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(EXPERIMENT)
    return str(path)


def test_memory_arithmetic_prints_what_fits_and_flags_that_the_experiment_takes(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", file, "--memory", "16GB", "--devices", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    best = record["fits"][0]
    assert (best["optimizer"], best["precision"], best["remat"], best["accumulation"]) == (
        "AdamW",
        "bfloat16",
        "none",
        1,
    )
    assert {"SGD", "Lion", "Adafactor", "AdamW"} <= {row["optimizer"] for row in record["least"]}
    assert main(["config", file, *best["flags"]]) == 0
    capsys.readouterr()
    assert main(["plan", file, "--memory", "16GB"]) == 0
    assert "use  llmlab train" in capsys.readouterr().out


def test_what_fits_nowhere_says_how_far_it_is(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--memory", "10KB"]) == 0
    assert "nothing fits: the least is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology v5p:4x4x4 for TPUs, or --memory 80GB"),
        (["--topology", "v5p:4x4x4", "--memory", "1GB"], "--topology v5p:4x4x4 for TPUs, or --memory 80GB"),
        (["--memory", "lots"], "80GB, 24GiB"),
        (["--memory", "1GB", "--search"], "needs --topology"),
        (["--memory", "1GB", "--devices", "3"], "use a multiple of 3"),
        (["--topology", "v5p:3x3x3"], "multiples of 4"),
        (["--topology", "v5p:4x4x4"], "train.batch_size=8 is not divisible by"),
        (["--topology", "v5p:4x4x4", "--mesh.fsdp", "48"], "must be one of"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_would_work(
    file: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmlab.plan import topology

    monkeypatch.setattr(topology, "check_compiler", lambda: None)
    assert main(["plan", file, *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", file, "--topology", "v5e:2x2"]) == 2
    assert "llmlab[tpu]" in capsys.readouterr().err


# --- the tables ------------------------------------------------------------------------------------------------------

MEMORY = Memory(capacity=1000 * 2**20, parameters=200 * 2**20, optimizer=400 * 2**20, other=4, batch=0)


def shown(plan: Plan) -> str:
    from llmlab.display.plan import render

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(plan, CHIPS["v5e"], ascii_only=True, title="t"))
    return console.export_text()


def plan(**changes: Any) -> Plan:
    parts: dict[str, Any] = {
        "topology": "v5e:2x2", "num_chips": 4, "mesh": {"data": 2, "tensor": 2}, "tokens": 1024,
        "num_parameters": 10**6, "memory": MEMORY,
    }  # fmt: skip
    return Plan(**{**parts, **changes})


def test_the_table_says_what_the_plan_says() -> None:
    text = shown(
        plan(
            flops=Flops(model=10**12, compiled=15 * 10**11, kernels=0),
            traffic=(
                Traffic(kind="all-reduce", axes=("data",), crosses_slices=True, count=3, sent=2**20, seconds=0.002),
            ),
            times=Times(
                compute=0.01, memory=0.02, interconnect=0.002, between_slices=0.03, mfu=0.25, mfu_without_overlap=0.1
            ),
            warnings=("look out",),
        )
    )
    for part in ("data=2 x tensor=2", "600.0 MiB of 1000.0 MiB", "fits, 40% free", "1.500", "look out", "1.0 MiB"):
        assert part in text, text
    for part in ("between slices", "bound by between slices", "MFU 25.0%", "10.0% if nothing does"):
        assert part in text, text
    bar = next(line for line in text.splitlines() if line.startswith("["))
    assert (bar.count("p"), bar.count("o"), bar.count(".")) == (12, 24, 24)


def test_what_does_not_fit_shows_by_how_much() -> None:
    import dataclasses

    text = shown(plan(memory=dataclasses.replace(MEMORY, needed=2500 * 2**20)))
    assert "does not fit: needs 2.50 times what there is" in text
    assert "|" in text  # the bar goes beyond its end
