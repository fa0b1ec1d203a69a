"""The catalogue as it is shown."""

import json

import pytest

from llmlab import cli
from llmlab.commands.models import find, main, record
from llmlab.models import gpt2
from llmlab.models.catalog import FAMILIES
from llmlab.models.config import ModelConfig


def test_the_list_has_every_family_and_preset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelConfig, "num_parameters", lambda self: 1_000_000)  # counted below, and slow for all
    assert main([]) == 0
    text = capsys.readouterr().out
    for family in FAMILIES:
        for word in (family.name, *family.presets):
            assert word in text


@pytest.mark.parametrize("name", ["gpt2", "GPT-2", "gpt2-nano", "gpt-2"])
def test_a_family_is_found_by_any_of_its_names(name: str) -> None:
    assert find(name, FAMILIES) is gpt2.FAMILY


def test_every_family_is_found_by_its_own_name() -> None:
    assert all(find(family.name, FAMILIES) is family for family in FAMILIES)


def test_one_family_is_shown_with_its_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt2"]) == 0
    text = capsys.readouterr().out
    assert (gpt2.__doc__ or "").strip() in text
    assert "gpt2-124m" in text
    assert "124M" in text


def test_a_family_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpt2", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == record(gpt2.FAMILY)
    presets = {preset["name"]: preset for preset in row["presets"]}
    assert presets["gpt2-124m"] == {"name": "gpt2-124m", "num_parameters": 124_439_808, "vocab_size": 50257}
    assert row["model_type"] == "gpt2"
    assert row["module"] == "llmlab.models.gpt2"


def test_an_unknown_family_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "gpt3"]) == 2
    assert "there is no family 'gpt3'; did you mean GPT-2?" in capsys.readouterr().err
