"""Runs end to end: what is cut short anywhere ends with the same bits, and bad input loses nothing."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab import runs
from llmlab.experiment import Experiment, read_experiment
from llmlab.nn.module import split
from llmlab.objectives import NextToken
from llmlab.sharding import Mesh
from llmlab.training.checkpoint import restore_params, saved_steps
from llmlab.training.faults import Interrupted, NonFiniteError
from llmlab.training.program import Programs
from llmlab.training.report import NullReport

DETERMINISTIC = ("step", "tokens", "train/loss", "validation/loss", "learning_rate", "gradient_norm")

# whoever starts the tests decides these: a shell's background job ignores SIGINT
HANDLERS_AT_IMPORT = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

EXPERIMENT = """
from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW, Cosine
from llmlab.sharding.mesh import Mesh
from llmlab.training.config import Train

BLOCK = Block(
    mixer=Attention(num_heads=2, position=Rotary()),
    ffn=MLP(hidden_dim=32, activation="relu"),
    norm=RMSNorm(),
    wiring=PreNorm(),
    dropout=0.1,
)

def config() -> Experiment:
    return Experiment(
        model=Transformer(embed_dim=16, num_layers=2, pattern=(BLOCK,), final_norm=RMSNorm()),
        data=Packed(TextFiles("CORPUS", separator="\\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=2), ema=0.9),
        mesh=Mesh(data=2, fsdp=-1),
        train=Train(
            steps=12,
            batch_size=16,
            sequence_length=16,
            accumulation=2,
            evaluate_every=4,
            checkpoint_every=5,
            log_every=2,
        ),
    )
"""


@pytest.fixture(scope="module")
def experiment_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment")
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 6))) for _ in range(50)]
    lines = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(300)]
    (directory / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    text = textwrap.dedent(EXPERIMENT).replace("CORPUS", str(directory / "corpus.txt"))
    (directory / "tiny.py").write_text(text, encoding="utf-8")
    return directory / "tiny.py"


@pytest.fixture(scope="module")
def experiment(experiment_file: Path) -> Experiment:
    return read_experiment(experiment_file)


@pytest.fixture(scope="module")
def uninterrupted(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return runs.train(experiment, tmp_path_factory.mktemp("runs") / "uninterrupted")


def changed(experiment: Experiment, **train: Any) -> Experiment:
    return replace(experiment, train=replace(experiment.train, **train))


class Watcher(NullReport):
    """Calls a function at a moment of the run, and keeps what was said."""

    def __init__(self, moment: str = "", at: int = 0, do: Callable[[], None] | None = None) -> None:
        self.said: list[str] = []
        self.closed: list[Any] = []
        self.moment, self.at, self.do = moment, at, do

    def _maybe(self, moment: str, at: int) -> None:
        if self.do is not None and (moment, at) == (self.moment, self.at):
            do, self.do = self.do, None
            do()

    def phase(self, name: str, detail: str = "") -> None:
        self._maybe(name, 0)

    def progress(self, done: int, total: int | None, what: str) -> None:
        self._maybe(what, done)

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(text)

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        self.closed.append(summary)


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def deterministic(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in DETERMINISTIC if key in line} for line in lines]


def final_bytes(run: Path) -> dict[str, bytes]:
    """Parameters and their average after the last step, as bytes."""
    experiment = read_experiment(run)
    shapes = runs.load(run).config.abstract()[1]
    trees = {
        ema: restore_params(run / "checkpoints", shapes, step=experiment.train.steps, ema=ema) for ema in (False, True)
    }
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def assert_same_as(uninterrupted: runs.Run, run: Path) -> None:
    assert deterministic(run) == deterministic(uninterrupted.directory)
    assert final_bytes(run) == final_bytes(uninterrupted.directory)


def test_a_run_leaves_everything_it_should(uninterrupted: runs.Run, experiment: Experiment) -> None:
    directory = uninterrupted.directory
    names = {"config.json", "provenance.json", "metrics.jsonl", "summary.json", "tensorboard", "tokenizer"}
    assert names | {"checkpoints"} <= {path.name for path in directory.iterdir()}
    assert read_experiment(directory) == experiment
    # keep_last=2 of 5, 10 and 12, and the best of those that are kept
    assert saved_steps(directory / "checkpoints")[-2:] == [10, 12]
    steps = [line["step"] for line in uninterrupted.metrics if "train/loss" in line]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    evaluated = [line["step"] for line in uninterrupted.metrics if "validation/loss" in line]
    assert evaluated == [4, 5, 8, 10, 12]  # 5 and 10: a checkpoint's own validation loss decides whether it is best
    assert all(line["tokens"] == line["step"] * 16 * 16 for line in uninterrupted.metrics)
    provenance = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["sessions"][-1]["status"] == "finished"
    assert set(provenance["fingerprints"]) == {"data", "tokenizer"}


def test_the_summary_says_what_the_metrics_say(uninterrupted: runs.Run) -> None:
    summary, last = uninterrupted.summary, uninterrupted.metrics[-1]
    assert summary["step"] == 12
    assert summary["validation/loss"] == last["validation/loss"]
    assert summary["validation/perplexity"] == pytest.approx(math.exp(last["validation/loss"]))
    # a byte a token, and an end-of-document token for every document: a little more than a bit per byte each
    bits = last["validation/loss"] / math.log(2)
    assert bits < summary["validation/bits_per_byte"] < 1.2 * bits
    assert summary["baselines"]["bigram"] < summary["baselines"]["unigram"] < math.log(256)
    assert sum(v for k, v in summary["seconds"].items() if k != "total") == pytest.approx(summary["seconds"]["total"])
    assert set(summary["sample"]) == {"prompt", "text"}


def test_validation_loss_is_that_of_the_loaded_model_over_the_whole_split(
    uninterrupted: runs.Run, experiment: Experiment
) -> None:
    train = experiment.train
    data = experiment.data.build(
        uninterrupted.tokenizer, sequence_length=train.sequence_length, batch_size=16, seed=train.seed
    )
    total, count = 0.0, 0
    for number in range(data.validation.num_batches):
        batch = data.validation.batch(number)
        input_ids, segment_ids, position_ids = (
            jnp.asarray(batch[name]) for name in ("input_ids", "segment_ids", "position_ids")
        )
        output = uninterrupted.model(input_ids, segment_ids=segment_ids, position_ids=position_ids)
        logits = np.asarray(output.logits, np.float64)
        scored = batch["labels"] != -100
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= np.take_along_axis(log_probs, np.where(scored, batch["labels"], 0)[..., None], -1)[..., 0][
            scored
        ].sum()
        count += scored.sum()
    assert count == data.sizes["validation"]["tokens"]
    np.testing.assert_allclose(uninterrupted.metrics[-1]["validation/loss"], total / count, rtol=1e-5)
    assert uninterrupted.summary["baselines"] == data.baselines(1)


@pytest.mark.scale
def test_a_run_killed_twice_ends_with_the_bits_of_an_uninterrupted_one(
    uninterrupted: runs.Run, experiment_file: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal, sys, time
        from pathlib import Path
        from llmlab import runs
        from llmlab.experiment import read_experiment
        from llmlab.training.report import NullReport

        class Kill(NullReport):
            def progress(self, done, total, what):
                digests = Path({str(tmp_path / "run/checkpoints/5/digests.json")!r})
                while what == "steps" and done == 7 and not digests.exists():
                    time.sleep(0.01)
                if what == "steps" and done == int(sys.argv[1]):
                    os.kill(os.getpid(), signal.SIGKILL)

        runs.train(read_experiment(Path({str(experiment_file)!r})), {str(tmp_path / "run")!r}, report=Kill())
        """
    )
    for step in (3, 9):  # before the first checkpoint, and between two
        killed = subprocess.run([sys.executable, "-c", script, str(step)], capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    watcher = Watcher()
    runs.train(read_experiment(experiment_file), tmp_path / "run", report=watcher)
    assert watcher.said == ["resumed at step 5"]
    assert_same_as(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "exit_code", "moment", "at", "saved"),
    [
        (signal.SIGINT, 130, "steps", 6, 7),  # numbers are read one step late
        (signal.SIGTERM, 42, "evaluate", 1, 4),
        (signal.SIGINT, 130, "checkpoint", 0, 6),  # that of step 5 is being written
    ],
)
@pytest.mark.scale
def test_a_run_that_a_signal_stopped_saves_and_goes_on_to_the_same_bits(
    number: int,
    exit_code: int,
    moment: str,
    at: int,
    saved: int,
    uninterrupted: runs.Run,
    experiment: Experiment,
    tmp_path: Path,
) -> None:
    watcher = Watcher(moment, at, send(number))
    with pytest.raises(Interrupted) as caught:
        runs.train(experiment, tmp_path, report=watcher)
    assert (caught.value.exit_code, caught.value.step) == (exit_code, saved)
    assert saved_steps(tmp_path / "checkpoints")[-1] == saved
    assert watcher.closed == [None]
    session = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))["sessions"][-1]
    assert session["status"] == ("interrupted" if exit_code == 130 else "preempted")
    assert session["last_step"] == saved
    runs.train(experiment, tmp_path)
    assert_same_as(uninterrupted, tmp_path)


@pytest.mark.parametrize("moment", ["tokens", "compile"])
def test_a_signal_before_training_stops_at_once(moment: str, experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        runs.train(experiment, tmp_path, report=Watcher(moment, 0, send(signal.SIGINT)))
    assert caught.value.step is None
    assert not saved_steps(tmp_path / "checkpoints")


def test_signals_mean_what_they_meant_when_the_run_is_over(uninterrupted: runs.Run) -> None:
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == HANDLERS_AT_IMPORT


@pytest.mark.scale
def test_a_truncated_checkpoint_costs_its_steps_and_no_bit(
    uninterrupted: runs.Run, experiment: Experiment, tmp_path: Path
) -> None:
    # numbers are read one step late, but those of a checkpoint before it is saved
    with pytest.raises(Interrupted):
        runs.train(experiment, tmp_path, report=Watcher("steps", 10, send(signal.SIGINT)))
    assert saved_steps(tmp_path / "checkpoints") == [5, 10]
    largest = max((tmp_path / "checkpoints" / "10" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    watcher = Watcher()
    runs.train(experiment, tmp_path, report=watcher)
    assert "step 10 is damaged" in watcher.said[0]
    assert watcher.said[1] == "resumed at step 5"
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["checkpoint-10"]
    assert_same_as(uninterrupted, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = experiment.data.build(experiment.tokenizer.build(), sequence_length=16, batch_size=16, seed=0)
    batch_of_step_8 = data.train.batch(7)["input_ids"]
    plain_loss = NextToken.loss

    def loss(self: NextToken, model: Any, batch: Any, *, key: Any = None) -> Any:
        parts = plain_loss(self, model, batch, key=key)
        # accumulation takes every second row
        broken = jnp.all(batch["input_ids"] == batch_of_step_8[::2])
        return replace(parts, metrics={"loss": jnp.where(broken, jnp.nan, parts.total)})

    monkeypatch.setattr(NextToken, "loss", loss)
    watcher = Watcher()
    with pytest.raises(NonFiniteError, match=r"train/loss=nan at step 8; the last good checkpoint is of step 5.*--opt"):
        runs.train(experiment, tmp_path, report=watcher)
    assert saved_steps(tmp_path / "checkpoints") == [5]
    assert not (tmp_path / "summary.json").exists()
    assert watcher.closed == [None]
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["train/loss"] == "NaN"


def test_a_changed_config_is_refused_with_the_difference_unless_allowed(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        runs.train(experiment, tmp_path, report=Watcher("steps", 5, send(signal.SIGINT)))
    before = (tmp_path / "config.json").read_bytes()
    other = changed(experiment, log_every=3)
    with pytest.raises(ValueError, match=r"train\.log_every: 2 -> 3(.|\n)*--allow-config-change"):
        runs.train(other, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    watcher = Watcher()
    run = runs.train(other, tmp_path, allow_config_change=True, report=watcher)
    assert "train.log_every: 2 -> 3" in watcher.said[0]
    assert watcher.said[1] == "resumed at step 5"
    assert run.experiment == other
    assert [line["step"] for line in run.metrics if "train/loss" in line] == [1, 2, 4, 6, 9, 12]


@pytest.mark.scale
def test_a_finished_run_says_so_and_can_be_trained_longer(
    uninterrupted: runs.Run, experiment: Experiment, tmp_path: Path
) -> None:
    summary = (uninterrupted.directory / "summary.json").read_bytes()
    watcher = Watcher()
    runs.train(experiment, uninterrupted.directory, report=watcher)
    assert "is finished: all 12 steps are done" in watcher.said[0]
    assert "--allow-config-change" in watcher.said[0]
    assert (uninterrupted.directory / "summary.json").read_bytes() == summary
    short = changed(experiment, steps=3)
    runs.train(short, tmp_path)
    longer = runs.train(changed(experiment, steps=4), tmp_path, allow_config_change=True)
    assert longer.summary["step"] == 4
    with pytest.raises(ValueError, match=r"has done 4 steps already, more than train\.steps=3"):
        runs.train(short, tmp_path, allow_config_change=True)


def test_the_tokenizer_of_a_run_cannot_change(experiment: Experiment, tmp_path: Path) -> None:
    from llmlab.tokenizers import Bytes, SpecialTokens

    with pytest.raises(Interrupted):
        runs.train(experiment, tmp_path, report=Watcher("tokens", 0, send(signal.SIGINT)))
    other = replace(experiment, tokenizer=Bytes(special=SpecialTokens(extra=("<x>",))))
    with pytest.raises(ValueError, match=r"tokenizer of .* cannot change"):
        runs.train(other, tmp_path, allow_config_change=True)


def test_a_run_that_another_process_holds_is_left_alone(experiment: Experiment, tmp_path: Path) -> None:
    with runs.RunDirectory(tmp_path).held():
        content = sorted(tmp_path.iterdir())
        script = textwrap.dedent(
            f"""
            from pathlib import Path
            from llmlab.training.directory import RunDirectory
            try:
                with RunDirectory(Path({str(tmp_path)!r})).held():
                    print("got it")
            except ValueError as error:
                print(error)
            """
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert f"held by process {os.getpid()} on" in done.stdout
        assert sorted(tmp_path.iterdir()) == content


def test_a_directory_that_is_no_run_is_left_alone(experiment: Experiment, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="not empty and is not a run"):
        runs.train(experiment, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    foreign = tmp_path / "model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        runs.train(experiment, foreign)
    assert (foreign / "config.json").read_text(encoding="utf-8") == '{"model_type": "gpt2"}'


def test_an_experiment_that_cannot_run_makes_no_directory(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=12 is not divisible by .* use 16 or 32"):
        runs.train(changed(experiment, batch_size=12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_checkpoints_and_averages_load(uninterrupted: runs.Run) -> None:
    directory = uninterrupted.directory
    last, earlier, average = (
        split(model)[1]
        for model in (
            llmlab.load(directory),
            llmlab.load(directory / "checkpoints" / "10"),
            runs.load(directory, ema=True),
        )
    )
    tables = [tree["embedding"]["tokens"]["table"] for tree in (last, earlier, average)]
    assert tables[0].shape == (-(-uninterrupted.tokenizer.vocab_size // 128) * 128, 16)
    assert not np.array_equal(tables[0], tables[1])
    assert not np.array_equal(tables[0], tables[2])
    assert np.array_equal(
        tables[0], split(llmlab.load(directory / "checkpoints" / "12"))[1]["embedding"]["tokens"]["table"]
    )


def test_a_run_loads_straight_to_the_devices_of_a_mesh(uninterrupted: runs.Run) -> None:
    placement = Mesh(data=1, tensor=2).build(jax.devices()[:2])
    there = split(llmlab.load(uninterrupted.directory, placement=placement))[1]
    _, shapes, axes = llmlab.load_config(uninterrupted.directory).abstract()
    assert jax.tree.map(lambda leaf: leaf.sharding, there) == placement.shardings(axes, shapes)
    here = split(llmlab.load(uninterrupted.directory))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, there, here))


def test_loading_says_what_is_wrong(uninterrupted: runs.Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        llmlab.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config.json.*holds nothing"):
        llmlab.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        llmlab.load(uninterrupted.directory / "checkpoints" / "3")
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="neither a run nor a Hugging Face model"):
        llmlab.load(tmp_path)


@pytest.mark.scale
def test_a_run_can_start_from_another_runs_weights(
    uninterrupted: runs.Run, experiment: Experiment, tmp_path: Path
) -> None:
    source = str(uninterrupted.directory)
    gentle = replace(experiment.optimizer, peak_lr=1e-12)
    fine_tuned = replace(changed(experiment, steps=3), initialize_from=source, optimizer=gentle)
    run = runs.train(fine_tuned, tmp_path / "fine")
    np.testing.assert_allclose(
        run.metrics[-1]["validation/loss"], uninterrupted.metrics[-1]["validation/loss"], rtol=1e-6
    )
    wider = replace(fine_tuned, model=replace(experiment.model, embed_dim=32))
    with pytest.raises(ValueError, match=r"holds another model(.|\n)*final_norm.scale: \(16,\) there, \(32,\) here"):
        runs.train(wider, tmp_path / "wider")


# --- several runs of one process -------------------------------------------------------------------------------------


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of events of XLA's compiler in here."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.scale
def test_runs_that_differ_in_rate_decay_and_seed_share_a_program_and_end_as_runs_apart(
    experiment: Experiment, tmp_path: Path
) -> None:
    first = changed(experiment, steps=4)
    optimizer = replace(first.optimizer, peak_lr=3e-3, weight_decay=0.3)
    second = replace(changed(first, seed=7), optimizer=optimizer)
    programs = Programs()
    runs.train(first, tmp_path / "first", programs=programs)
    with compilations() as compiled:
        together = runs.train(second, tmp_path / "second", programs=programs)
    assert compiled == []
    apart = runs.train(second, tmp_path / "apart")
    for path in ("params", "ema"):
        one, other = (split(llmlab.load(run.directory, ema=path == "ema"))[1] for run in (together, apart))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))

    def deterministic(run: runs.Run) -> list[dict[str, Any]]:
        return [{name: record[name] for name in DETERMINISTIC if name in record} for record in run.metrics]

    assert deterministic(together) == deterministic(apart)
    assert together.summary["validation/loss"] != runs.Run(tmp_path / "first").summary["validation/loss"]


@pytest.mark.scale
def test_a_run_of_another_shape_or_without_decay_gets_a_program_of_its_own(
    experiment: Experiment, tmp_path: Path
) -> None:
    programs = Programs()
    runs.train(changed(experiment, steps=4), tmp_path / "first", programs=programs)
    other = changed(experiment, steps=4)
    for name, each in {
        "steps": changed(experiment, steps=5),
        "undecayed": replace(other, optimizer=replace(other.optimizer, weight_decay=0.0)),
        "beta": replace(other, optimizer=replace(other.optimizer, beta2=0.9)),
    }.items():
        expected = runs.train(each, tmp_path / f"{name}-apart").summary["validation/loss"]
        assert runs.train(each, tmp_path / name, programs=programs).summary["validation/loss"] == expected
