"""`llmlab generate` writes what `llmlab.generate` does, and says what is wrong with an option."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import llmlab
from llmlab import cli
from llmlab.infer.sampling import Sampling
from llmlab.infer.strategies import Beams, Contrastive, Speculation, Strategy
from llmlab.models import llama, paligemma, t5
from llmlab.models.huggingface import save_hf
from llmlab.nn.module import split
from llmlab.tokenizers import ByteLevelBPE
from tests.drawing import built

TEXT = "the cat sat on the mat and the dog sat on the log, again and again; 0123456789 [yes|no]"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories of tiny models: decoder, encoder-decoder, vision-language."""
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 24, "vocab_size": 320}
    nano = paligemma.PRESETS["paligemma-nano"]
    configs: dict[str, Any] = {
        "llama": replace(llama.llama(**sizes), embedding_std=1.0),
        "t5": replace(t5.t5(**sizes, head_dim=8, num_buckets=8), embedding_std=1.0),
        "paligemma": nano.with_vocabulary(320),
    }
    tokenizer = ByteLevelBPE(vocab_size=280).build(lambda: iter([TEXT] * 20))
    for name, config in configs.items():
        save_hf(built(config), root / name)
        tokenizer.save(root / name)
    return root


def records(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert cli.main(["generate", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_writes_what_the_function_does(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--temperature 0.8 --top-k 40 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.1"
    more = "--frequency-penalty 0.2 --logit-bias 70=1.5 --logit-bias 71=-inf --seed 3 --logprobs 2 --prompt-logprobs"
    found = records(
        capsys,
        *(str(models / "llama"), "--prompt", "the cat", "--max-new-tokens", "12", "--num-samples", "2"),
        *(options.split() + more.split()),
    )
    sampling = Sampling(
        temperature=0.8,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias=((70, 1.5), (71, float("-inf"))),
        seed=3,
        logprobs=2,
    )
    model, tokenizer = llmlab.load(models / "llama"), llmlab.load_tokenizer(models / "llama")
    expected = llmlab.generate(
        model, tokenizer, "the cat", max_new_tokens=12, sampling=sampling, n=2, prompt_logprobs=True
    )
    assert len(found) == 2
    for record, completion in zip(found, expected, strict=True):
        assert (record["text"], record["finish_reason"]) == (completion.text, completion.finish_reason)
        assert tuple(record["token_ids"]) == completion.token_ids
        assert completion.logprobs is not None
        assert [token["logprob"] for token in record["logprobs"]] == [token.logprob for token in completion.logprobs]
        assert all(len(token["top"]) == 2 for token in record["logprobs"])
        assert record["prompt_logprobs"][0] is None
        assert "".join(token["token"] for token in record["prompt_logprobs"][1:]) == "theĠcat"


def test_caches_in_eight_bits_write_nearly_the_same(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(models / "llama"), "--prompt", "the cat", "--max-new-tokens", "1", "--logprobs", "0", "--temperature=0"]
    exact, rounded = (records(capsys, *argv, "--cache-dtype", dtype)[0]["logprobs"] for dtype in ("float32", "int8"))
    assert exact != rounded
    # scores of size one from numbers that are off by 1/254 of the largest
    assert exact[0]["logprob"] == pytest.approx(rounded[0]["logprob"], abs=0.1)


def test_the_text_is_streamed_behind_the_prompt(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(models / "llama"), "--prompt", "the cat", "--max-new-tokens", "8", "--temperature", "0"]
    (record,) = records(capsys, *argv)
    assert cli.main(["generate", *argv]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"the cat{record['text']}\n"
    assert "--max-new-tokens reached" in shown.err
    stop = record["text"][2:4]
    assert cli.main(["generate", *argv, "--stop", stop]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"the cat{record['text'][: record['text'].index(stop)]}\n"
    assert f"stopped at {stop!r}" in shown.err


def test_an_encoder_decoder_shows_its_target_alone(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(models / "t5"), "--prompt", "the cat", "--max-new-tokens", "6", "--seed", "2"]
    (record,) = records(capsys, *argv)
    assert cli.main(["generate", *argv]) == 0
    assert capsys.readouterr().out == f"{record['text']}\n"


@pytest.mark.scale
@pytest.mark.parametrize(("name", "num_layers"), [("llama", 1), ("t5", 2)])
def test_layers_in_the_hosts_memory_write_the_same(
    name: str, num_layers: int, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the model is not loaded to the device before they are there."""
    argv = [str(models / name), "--prompt", "the cat", "--max-new-tokens", "4", "--temperature", "0", "--logprobs", "2"]
    expected = records(capsys, *argv)
    loaded = []
    load = llmlab.load
    monkeypatch.setattr(llmlab, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    assert records(capsys, *argv, "--offload-layers", str(num_layers)) == expected
    (model,) = loaded
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(split(model)[1]))


def test_the_form_of_the_text(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance")
    argv = [str(models / "llama"), "--prompt", "a", "--num-samples", "3", "--temperature", "2"]
    for record in records(capsys, *argv, "--regex", "(yes|no){1,3}!"):
        assert re.fullmatch("(yes|no){1,3}!", record["text"])
        assert record["finish_reason"] == "stop"
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"type": "boolean"}, "maxItems": 2}')
    for record in records(capsys, *argv, "--json-schema", str(tmp_path / "schema.json")):
        value = json.loads(record["text"])
        assert len(value) <= 2
        assert all(isinstance(item, bool) for item in value)
    (tmp_path / "form.lark").write_text('start: "a" "b"+ "c"\n')
    (tmp_path / "form.regex").write_text("[ab]{4}\n")
    assert cli.main(["generate", *argv[:3], "--regex-file", str(tmp_path / "form.regex")]) == 0
    shown = capsys.readouterr()
    assert re.fullmatch("a[ab]{4}\n", shown.out)
    assert "the form is complete" in shown.err
    (record,) = records(capsys, *argv[:3], "--grammar", str(tmp_path / "form.lark"))
    assert re.match("ab+c?$", record["text"])


def test_an_image_is_looked_at(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    argv = [str(models / "paligemma"), "--prompt", "what", "--max-new-tokens", "4", "--logprobs", "0"]
    one, two = (records(capsys, *argv, "--image", str(tmp_path / name))[0] for name in ("one.png", "two.png"))
    assert one["logprobs"][0]["logprob"] != two["logprobs"][0]["logprob"]
    assert len(one["token_ids"]) == 4
    (tmp_path / "no.png").write_text("no image")
    for model, path, words in (("paligemma", "no.png", "is no image"), ("llama", "one.png", "sees no images")):
        assert cli.main(["generate", str(models / model), "--image", str(tmp_path / path)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "2"], "top_p=2.0 is not in (0, 1]"),
        (["--min-p", "-1"], "min_p=-1.0"),
        (["--temperature", "-1"], "0 is greedy"),
        (["--repetition-penalty", "0"], "1 is off"),
        (["--logit-bias", "the=1"], "write 42=1.5"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--logprobs", "3"], "add --json"),
        (["--stop", ""], "stop string is empty"),
        (["--image-std", "0"], "--image-std 0"),
        (["--logit-bias", "5000=1"], "ids run from 0 to 279"),
        (["--offload-layers", "-1"], "--offload-layers=-1 is not between 0 and the 1 layers of the model"),
        (["--offload-layers", "2"], "--offload-layers=2 is not between 0 and the 1 layers of the model"),
    ],
)
def test_what_is_wrong_with_an_option(
    models: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(models / "llama"), "--prompt", "a", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.scale
@pytest.mark.parametrize(
    ("options", "strategy", "sampling"),
    [
        (
            ["--beams", "3", "--length-penalty", "0.5", "--num-samples", "2"],
            Beams(num_beams=3, length_penalty=0.5),
            None,
        ),
        (["--contrastive", "0.5", "--top-k", "3"], Contrastive(top_k=3, alpha=0.5), None),
        (["--prompt-lookup", "--num-drafted", "2", "--seed", "4"], Speculation(num_drafted=2), Sampling(seed=4)),
    ],
)
def test_other_ways_to_write(
    models: Path, capsys: pytest.CaptureFixture[str], options: list[str], strategy: Strategy, sampling: Sampling | None
) -> None:
    found = records(capsys, str(models / "llama"), "--prompt", "the cat", "--max-new-tokens", "6", *options)
    model, tokenizer = llmlab.load(models / "llama"), llmlab.load_tokenizer(models / "llama")
    n = 2 if isinstance(strategy, Beams) else 1
    want = llmlab.generate(model, tokenizer, "the cat", max_new_tokens=6, strategy=strategy, sampling=sampling, n=n)
    assert [(one["text"], one.get("score")) for one in found] == [(one.text, one.score) for one in want]


def test_a_draft_is_a_model_of_its_own_and_a_search_draws_nothing(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = str(models / "llama")
    shown = ["--prompt", "the cat", "--max-new-tokens", "6", "--temperature", "0"]
    assert records(capsys, llama, *shown, "--draft", llama) == records(capsys, llama, *shown)
    assert cli.main(["generate", llama, "--beams", "2", "--temperature", "0.5"]) == 2
    assert "--beams searches and draws nothing" in capsys.readouterr().err
    for option, other in (("--length-penalty", "--beams"), ("--num-drafted", "--draft")):
        assert cli.main(["generate", llama, option, "2"]) == 2
        assert f"give {other}" in capsys.readouterr().err
