"""Caches: training from one equals training with the teacher, and nothing that is torn or another's is used."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab.distill import Distill, JensenShannon, Predictions, ReverseKL, States
from llmlab.distill import cache as caches
from llmlab.distill.cache import Cache, CacheError, DiskFull, Key, Layout, row_checks
from llmlab.distill.writing import write_cache
from llmlab.nn.module import split
from llmlab.objectives import Classification, NextToken
from tests.distill.conftest import TEACHER
from tests.selection import at_scale_but

VOCABULARY = 384


@pytest.fixture(scope="module")
def whole(teacher: str, experiment_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of whole distributions in float32, softened by 2."""
    directory = tmp_path_factory.mktemp("caches") / "whole"
    objective = Distill(teacher=teacher, terms=(Predictions(temperature=2.0),))
    write_cache(experiment_of(objective), directory, entries=VOCABULARY, dtype="float32", rows_per_shard=5)
    return directory


@pytest.mark.scale
def test_training_from_a_cache_of_whole_distributions_equals_training_with_the_teacher(
    whole: Path, teacher: str, experiment_of: Any, tmp_path: Path
) -> None:
    terms = (Predictions(divergence=JensenShannon(beta=0.4), temperature=2.0, labels=0.2),)
    live = llmlab.train(experiment_of(Distill(teacher=teacher, terms=terms)), tmp_path / "live")
    cached = llmlab.train(experiment_of(Distill(teacher=teacher, terms=terms, cache=str(whole))), tmp_path / "cached")
    # Log-probabilities in float32 are off by 1e-7; two steps at a rate of 0.5 keep that.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        split(cached.model)[1],
        split(live.model)[1],
    )
    np.testing.assert_allclose(cached.summary["validation/loss"], live.summary["validation/loss"], rtol=1e-5)


@pytest.mark.parametrize("kind", at_scale_but(("top-k",), ["top-k", "sampled"]))
def test_what_is_kept_of_a_row_is_what_the_teacher_says_of_it(
    kind: Any, teacher: str, experiment_of: Any, batch: Any, tmp_path: Path
) -> None:
    cache = write_cache(experiment_of(Distill(teacher=teacher)), tmp_path / kind, kind=kind, entries=16)
    found = cache.read(np.arange(8), row_checks(batch))
    names = ("input_ids", "segment_ids", "position_ids")
    model: Any = llmlab.load(teacher)
    logits = model(**{name: jnp.asarray(batch[name]) for name in names}).logits
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    of_kept = np.take_along_axis(log_p, found["ids"].astype(np.int64), axis=-1)
    if kind == "top-k":
        best = np.sort(log_p, axis=-1)[..., :-17:-1]
        np.testing.assert_allclose(of_kept, best, atol=1e-6)
        np.testing.assert_allclose(found["log_probabilities"], best, atol=0.004)  # float16 between 4 and 8
        np.testing.assert_allclose(np.exp(found["log_rest"]), 1 - np.exp(best).sum(-1), atol=1e-5)
    else:
        # The mean of -log p over draws is the entropy: 8 x 12 x 16 of them, each off by about 1.
        entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
        np.testing.assert_allclose(-of_kept.mean(), entropy, atol=5 / np.sqrt(of_kept.size))


@pytest.mark.scale
def test_drawn_tokens_train_by_forward_kl_alone(teacher: str, experiment_of: Any, tmp_path: Path) -> None:
    objective = Distill(teacher=teacher)
    cache = write_cache(experiment_of(objective), tmp_path / "sampled", kind="sampled", entries=4)
    drawn = dataclasses.replace(objective, cache=str(cache.directory))
    run = llmlab.train(experiment_of(drawn), tmp_path / "run")
    assert run.metrics[0]["train/divergence"] > 0
    reverse = dataclasses.replace(drawn, terms=(Predictions(divergence=ReverseKL()),))
    with pytest.raises(ValueError, match=r"drawn tokens, which estimate ForwardKL\(\) alone"):
        llmlab.train(experiment_of(reverse), tmp_path / "reverse")


def cached(teacher: str, directory: Path, temperature: float = 2.0) -> Distill:
    return Distill(teacher=teacher, terms=(Predictions(temperature=temperature),), cache=str(directory))


def test_a_cache_of_something_else_is_refused(
    whole: Path, teacher: str, experiment_of: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "teacher"
    llmlab.train(experiment_of(NextToken(), TEACHER, seed=8), other)
    cases = {
        "teacher: made for": experiment_of(cached(str(other), whole)),
        "seed: made for 0, asked for 1": experiment_of(cached(teacher, whole), seed=1),
        "temperature: made for 2.0, asked for 1.0": experiment_of(cached(teacher, whole, 1.0)),
        "sequence_length: made for 12, asked for 10": experiment_of(cached(teacher, whole), sequence_length=10),
        "has 16 rows and the run reads 24": experiment_of(cached(teacher, whole), steps=3),
        "it has no manifest.json": experiment_of(cached(teacher, tmp_path)),
    }
    for number, (message, experiment) in enumerate(cases.items()):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            llmlab.train(experiment, tmp_path / f"run-{number}")
    changed = experiment_of(cached(teacher, whole))
    changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, validation_fraction=0.3))
    with pytest.raises(ValueError, match="data: made for"):
        llmlab.train(changed, tmp_path / "data")


def test_what_a_cache_cannot_hold_is_refused_before_any_work(teacher: str, experiment_of: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="terms over layers and on_policy need the teacher itself"):
        Distill(teacher=teacher, terms=(Predictions(), States()), cache="x")
    with pytest.raises(ValueError, match="distributions over tokens, and base=Classification"):
        Distill(teacher=teacher, base=Classification(), cache="x")
    with pytest.raises(ValueError, match="need the teacher itself"):
        write_cache(experiment_of(Distill(teacher=teacher, terms=(Predictions(), States()))), tmp_path / "c")
    assert not (tmp_path / "c").exists()


KEY = Key(teacher="t", data="d", tokenizer="k", sequence_length=4, seed=0, temperature=1.0)
LAYOUT = Layout(kind="top-k", entries=2, places=4, rows_per_shard=3)


def rows(numbers: np.ndarray) -> Any:
    shapes = LAYOUT.fields(len(numbers))
    found = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
    found["check"] = numbers.astype(np.uint32)
    found["ids"] += numbers[:, None, None].astype(np.uint16)
    return found


def test_what_is_written_is_read_row_by_row_in_any_order(tmp_path: Path) -> None:
    cache = Cache.begin(tmp_path / "c", KEY, LAYOUT, 8)
    caches.fill(cache, rows, lambda done, total: None)
    numbers = np.asarray([7, 0, 4, 3])
    found = Cache(tmp_path / "c").read(numbers, numbers.astype(np.uint32))
    np.testing.assert_array_equal(found["ids"][:, 0, 0], numbers)
    with pytest.raises(CacheError, match="row 4 was written for other tokens"):
        cache.read(numbers, np.asarray([7, 0, 5, 3], np.uint32))


def test_a_full_disk_leaves_whole_shards_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    cache = Cache.begin(tmp_path / "c", KEY, LAYOUT, 9)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="3 of 9 rows are there and whole; free some space"):
        caches.fill(cache, rows, lambda done, total: None)
    assert sorted(path.name for path in cache.directory.iterdir()) == ["manifest.json", "rows-00000000.zst"]
    asked: list[int] = []
    again = Cache.begin(tmp_path / "c", KEY, LAYOUT, 9)
    caches.fill(again, lambda numbers: asked.extend(numbers.tolist()) or rows(numbers), lambda done, total: None)
    assert asked == [3, 4, 5, 6, 7, 8]
    assert again.complete() == 9


def test_a_killed_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    program = f"""
import os, signal
import numpy as np
from pathlib import Path
from llmlab.distill import cache as caches
key = caches.Key(teacher="t", data="d", tokenizer="k", sequence_length=4, seed=0, temperature=1.0)
layout = caches.Layout(kind="top-k", entries=2, places=4, rows_per_shard=3)
cache = caches.Cache.begin(Path({str(tmp_path / "c")!r}), key, layout, 9)
real, calls = os.fsync, []
def kill(descriptor):
    calls.append(1)
    real(descriptor)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
zeros = {{name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.fields(3).items()}}
caches.fill(cache, lambda numbers: zeros, lambda done, total: None)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode < 0
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names[1:] == ["manifest.json", "rows-00000000.zst"]
    assert names[0].startswith(".rows-00000003.")  # never has the name of a shard, and the next writer removes it
    cache = Cache.begin(tmp_path / "c", KEY, LAYOUT, 9)
    assert cache.complete() == 3
    assert sorted(path.name for path in cache.directory.iterdir()) == names[1:]


def test_damage_is_found_and_told(tmp_path: Path) -> None:
    cache = Cache.begin(tmp_path / "c", KEY, LAYOUT, 3)
    caches.fill(cache, rows, lambda done, total: None)
    shard = cache.directory / "rows-00000000.zst"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    numbers = np.arange(3)
    with pytest.raises(CacheError, match="is damaged"):
        Cache(cache.directory).read(numbers, numbers.astype(np.uint32))
    shard.write_bytes(bytes(content[:-6]))
    with pytest.raises(CacheError, match="is damaged"):
        Cache(cache.directory).read(numbers, numbers.astype(np.uint32))
    shard.unlink()
    with pytest.raises(CacheError, match="has 0 of 3 rows"):
        Cache(cache.directory).read(numbers, numbers.astype(np.uint32))
    manifest = cache.directory / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": {"kind": "top-k"}}))
    with pytest.raises(CacheError, match="does not describe a cache"):
        Cache(cache.directory)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CacheError, match="not empty and no cache"):
        Cache.begin(tmp_path, KEY, LAYOUT, 3)
    Cache.begin(tmp_path / "c", KEY, LAYOUT, 3)
    with pytest.raises(CacheError, match="was begun as"):
        Cache.begin(tmp_path / "c", KEY, dataclasses.replace(LAYOUT, entries=3), 3)
    with pytest.raises(CacheError, match="teacher: made for t, asked for u"):
        Cache.begin(tmp_path / "c", dataclasses.replace(KEY, teacher="u"), LAYOUT, 3)
