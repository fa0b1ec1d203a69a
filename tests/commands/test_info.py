"""The layer table, against the model itself."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmlab import cli
from llmlab.commands.info import main
from llmlab.models.huggingface import load_hf
from llmlab.models.weights import flatten
from llmlab.nn.module import logical_axes, split
from tests.models.references import FIXTURES


def described(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa-tied", "vit", "xlnet"])
def test_every_parameter_is_listed_with_shape_axes_and_flops(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = described(capsys, str(FIXTURES / case))
    model = load_hf(FIXTURES / case)
    params, axes = flatten(split(model)[1]), flatten(logical_axes(model))
    assert [row["path"] for row in found["parameters"]] == list(params)
    for row in found["parameters"]:
        assert tuple(row["shape"]) == params[row["path"]].shape
        assert tuple(row["axes"]) == axes[row["path"]]
        assert row["parameters"] == params[row["path"]].size
        assert row["flops_per_token"] == (2 * row["parameters"] if row["path"].endswith("kernel") else 0)
    assert found["num_parameters"] == sum(row["parameters"] for row in found["parameters"])
    assert found["flops_per_token"]["training"] == pytest.approx(3 * found["flops_per_token"]["forward"])


def test_the_total_is_the_tables_and_what_attention_and_a_tied_head_add(capsys: pytest.CaptureFixture[str]) -> None:
    found = described(capsys, str(FIXTURES / "gpt2"), "--length", "10")
    kernels = sum(row["flops_per_token"] for row in found["parameters"])
    scores, head = 2 * 4 * 16 * 10, 2 * 16 * 53  # layers x 4 D S, 2 D V
    forward = kernels + scores + head
    assert found["flops_per_token"] == {"length": 10, "forward": forward, "training": 3 * forward}


def test_weights_are_never_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURES / "gpt2", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + b"\xff" * (len(content) - header))
    numbers = described(capsys, str(tmp_path / "model"))["weights"]["numbers"]
    assert numbers == {"F32": (len(content) - header) // 4}
    path.unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    assert "a pickle" in described(capsys, str(tmp_path / "model"))["weights"]["problem"]


def test_the_table_names_layers_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FIXTURES / "gpt2")]) == 0
    text = capsys.readouterr().out
    assert "stack.blocks.0.mixer.query.kernel" in text
    assert "2 x 16 x 4 x 4" in text
    assert "layers, embed, heads, head_dim" in text
    size = sum(math.prod(leaf.shape) for leaf in flatten(split(load_hf(FIXTURES / "gpt2"))[1]).values())
    assert f"{size:,} parameters" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no directory nowhere"),
        ([str(FIXTURES / "gpt2"), "--length", "0"], "--length 0 is not positive"),
        ([str(FIXTURES / "gpt2"), "--length", "17"], "--length 17 is beyond the 16 positions"),
    ],
)
def test_errors_are_the_users(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", *arguments]) == 2
    assert message in capsys.readouterr().err
