"""Addresses of buckets, with a bucket that lives in this process' memory: what is read, what is copied, and when."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import jax
import numpy as np
import pytest

import llmlab
from llmlab import buckets, runs
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.module import split
from llmlab.nn.norms import RMSNorm
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW
from llmlab.training.config import Train

BUCKET = "memory://bucket"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def experiment(text: str) -> Experiment:
    block = Block(
        mixer=Attention(num_heads=2), ffn=MLP(hidden_dim=8, activation="relu"), norm=RMSNorm(), wiring=PreNorm()
    )
    return Experiment(
        model=Transformer(embed_dim=8, num_layers=1, pattern=(block,)),
        data=Packed(TextFiles(text, separator="\n"), validation_fraction=0.3),
        optimizer=AdamW(peak_lr=1e-2),
        train=Train(steps=4, batch_size=8, sequence_length=8, checkpoint_every=2, keep_last=2),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run with two checkpoints on this machine, and in the bucket, whose corpus is in the bucket."""
    memory = fsspec.filesystem("memory")
    for part in range(3):
        lines = [f"{i} is half of {2 * i}" for i in range(40 * part, 40 * part + 40)]
        memory.pipe(f"/bucket/corpus/{part}.txt", "\n".join(lines).encode())
    directory = tmp_path_factory.mktemp("buckets") / "run"
    found = runs.train(experiment(f"{BUCKET}/corpus/*.txt"), directory)
    memory.put(f"{directory}/", "/bucket/runs/mine", recursive=True)
    return found


def assert_same_parameters(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, split(found)[1], split(expected)[1])


def test_a_path_is_an_address_also_when_pathlib_has_been_at_it() -> None:
    assert buckets.address("gs://b/runs/x/") == "gs://b/runs/x"
    assert buckets.address(Path("gs://b/runs/x")) == "gs://b/runs/x"
    assert buckets.address("runs/gs/x") is None
    assert buckets.address(Path("/gs://b")) is None


@pytest.mark.scale
def test_a_run_in_a_bucket_loads_like_its_directory_and_without_its_optimizer_state(run: runs.Run, cache: Path) -> None:
    url = f"{BUCKET}/runs/mine"
    assert_same_parameters(llmlab.load(url), run.model)
    assert_same_parameters(llmlab.load(Path(f"{url}/checkpoints/2")), llmlab.load(run.directory / "checkpoints" / "2"))
    assert llmlab.load_tokenizer(url).fingerprint == run.tokenizer.fingerprint
    there = runs.Run(url)
    assert (there.metrics, there.summary) == (run.metrics, run.summary)
    copied = {path.relative_to(cache / "copies").parts[1:] for path in (cache / "copies").rglob("*") if path.is_file()}
    assert {parts[1:3] for parts in copied if parts[:1] == ("checkpoints",)} == {
        (step, item) for step in ("2", "4") for item in ("params", "meta", "digests.json")
    }


def test_a_corpus_in_a_bucket_is_that_of_its_files(run: runs.Run, tmp_path: Path) -> None:
    for part in range(3):
        (tmp_path / f"{part}.txt").write_bytes(fsspec.filesystem("memory").cat(f"/bucket/corpus/{part}.txt"))
    there, here = TextFiles(f"{BUCKET}/corpus/*.txt"), TextFiles(str(tmp_path / "*.txt"))
    assert there.fingerprint() == here.fingerprint()
    assert [d.text for d in there.documents()] == [d.text for d in here.documents()]
    with pytest.raises(FileNotFoundError, match="no file matches 'memory://bucket/corpus/x"):
        TextFiles(f"{BUCKET}/corpus/x*.txt").fingerprint()


def test_a_file_is_copied_again_when_there_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, copied = fsspec.filesystem("memory"), []
    memory.pipe("/bucket/hf/config.json", b"one")
    memory.pipe("/bucket/hf/pytorch_model.bin", b"never read")
    get_file = type(memory).get_file
    monkeypatch.setattr(type(memory), "get_file", lambda *a: (copied.append(a[1]), get_file(*a)))
    for content, times in ((b"one", 1), (b"one", 1), (b"three", 2)):
        if content == b"three":
            memory.pipe("/bucket/hf/config.json", content)
        copy = buckets.local(f"{BUCKET}/hf")
        assert (copy / "config.json").read_bytes() == content
        assert copied == ["/bucket/hf/config.json"] * times
    shutil.rmtree(copy)
    assert (buckets.local(f"{BUCKET}/hf") / "config.json").read_bytes() == b"three"


def test_a_run_can_start_from_weights_in_a_bucket(run: runs.Run, tmp_path: Path) -> None:
    still = replace(
        experiment(f"{BUCKET}/corpus/*.txt"),
        optimizer=AdamW(peak_lr=1e-30),
        initialize_from=f"{BUCKET}/runs/mine",
    )
    assert_same_parameters(runs.train(still, tmp_path / "next").model, run.model)


def test_what_buckets_cannot_do_is_said(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is nothing at memory://bucket/runs/yours"):
        llmlab.load(f"{BUCKET}/runs/yours")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint memory://.*/checkpoints/3; .* steps \[2, 4\]"):
        llmlab.load(f"{BUCKET}/runs/mine/checkpoints/3")
    with pytest.raises(ValueError, match=r"out gs://b/run is an address, and a run is written to .*gcsfuse"):
        runs.train(run.experiment, Path("gs://b/run"))

    def missing(url: str) -> None:
        raise ImportError("please install")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match="gs://b/run cannot be read without the package gcsfs"):
        llmlab.load("gs://b/run")
