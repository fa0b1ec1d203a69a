"""Sequence-level distillation: the student's targets are what the teacher writes, written once."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmlab
from llmlab.data import Pairs
from llmlab.distill import Beam, Greedy, Sampled, TeacherTexts
from llmlab.distill import texts as texts_module
from llmlab.distill.texts import teacher_texts
from llmlab.experiment import Experiment
from llmlab.infer.greedy import greedy
from llmlab.models.config import Untied
from llmlab.models.t5 import t5
from llmlab.objectives import SequenceToSequence
from llmlab.optim import AdamW, Constant
from llmlab.tokenizers import Bytes, SpecialTokens
from llmlab.training.config import Train

BYTES = Bytes(special=SpecialTokens(pad="<pad>", eos="</s>", bos=None))
LENGTH = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    words = [f"w{i}" for i in range(24)]
    (folder / "source.txt").write_text("\n".join(words))
    (folder / "target.txt").write_text("\n".join(word.upper() for word in words))
    return folder


def pairs(files: Path) -> dict[str, Any]:
    paths = {"source": str(files / "source.txt"), "target": str(files / "target.txt")}
    return {**paths, "validation_fraction": 0.4}


@pytest.fixture(scope="module")
def translator(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of an encoder-decoder that was trained for two steps."""
    experiment = Experiment(
        model=t5(
            embed_dim=16,
            num_layers=1,
            num_heads=2,
            head_dim=8,
            hidden_dim=24,
            head=Untied(),
            decoder_start_id=BYTES.build().pad_id,
        ),
        tokenizer=BYTES,
        data=Pairs(**pairs(files)),
        objective=SequenceToSequence(),
        optimizer=AdamW(peak_lr=3e-2, schedule=Constant()),
        train=Train(steps=2, batch_size=8, sequence_length=LENGTH, evaluate_every=0, keep_best=0),
    )
    directory = tmp_path_factory.mktemp("translator") / "run"
    llmlab.train(experiment, directory)
    return str(directory)


def data(files: Path, teacher: str, **changes: Any) -> TeacherTexts:
    return TeacherTexts(**pairs(files), teacher=teacher, written_length=8, **changes)


@pytest.mark.scale
def test_targets_are_what_the_teacher_writes_and_validation_is_the_files_own(files: Path, translator: str) -> None:
    train, validation = data(files, translator).read()
    plain_train, plain_validation = Pairs(**pairs(files)).read()
    assert validation == plain_validation
    tokenizer = llmlab.load_tokenizer(translator)
    model: Any = llmlab.load(translator)
    sources = [source for source, _ in plain_train]
    framed = [[*tokenizer.encode(source), tokenizer.eos_id] for source in sources]
    rows = greedy(model, framed, max_new_tokens=8, eos_id=tokenizer.eos_id, num_tokens=tokenizer.vocab_size)
    expected = [" ".join(tokenizer.decode(row).split()) for row in rows]
    assert train == [pair for pair in zip(sources, expected, strict=True) if pair[1].strip()]


@pytest.mark.scale
def test_beam_search_finds_targets_that_the_teacher_finds_more_probable(files: Path, translator: str) -> None:
    sources = [f"w{i}" for i in range(8)]
    tokenizer = llmlab.load_tokenizer(translator)
    model: Any = llmlab.load(translator)
    framed = [[*tokenizer.encode(source), tokenizer.eos_id] for source in sources]
    kinds = Beam(num_beams=4, length_penalty=0.0), Greedy()
    beam, greedily = (kind.write(model, tokenizer, framed, length=8, first=0) for kind in kinds)
    graphdef, params = nnx.split(model)

    @jax.jit
    def log_probability(params: Any, source: Any, target: Any) -> Any:
        """Of each of eight tokens of one target."""
        late = jnp.concatenate([jnp.asarray([model.config.decoder_start_id]), target[:-1]])
        teacher: Any = nnx.merge(graphdef, params)
        logits = teacher(source[None], decoder_input_ids=late[None]).logits[0]
        log_p = jax.nn.log_softmax(logits[:, : tokenizer.vocab_size])  # other rows are no tokens
        return log_p[jnp.arange(8), target]

    def total(source: list[int], target: list[int]) -> float:
        ended = [*target, tokenizer.eos_id][:8]
        padded = jnp.asarray([*ended, *[0] * (8 - len(ended))])
        return float(log_probability(params, jnp.asarray(source), padded)[: len(ended)].sum())

    gains = [total(s, b) - total(s, g) for s, b, g in zip(framed, beam, greedily, strict=True)]
    assert min(gains) > -1e-4
    assert max(gains) > 0.0


@pytest.mark.scale
def test_texts_are_written_once_and_an_interrupted_writer_goes_on(
    files: Path, translator: str, monkeypatch: Any
) -> None:
    asked: list[int] = []
    real = texts_module._writer

    def counting(of: TeacherTexts) -> Any:
        write = real(of)
        return lambda sources, first: asked.append(first) or write(sources, first)

    monkeypatch.setattr(texts_module, "_writer", counting)
    monkeypatch.setattr(texts_module, "_PART", 4)
    drawn = data(files, translator, decoding=Sampled(seed=5))
    sources = [f"w{i}" for i in range(10)]
    whole = teacher_texts(drawn, sources)
    assert asked == [0, 4, 8]
    assert teacher_texts(drawn, sources) == whole
    assert asked == [0, 4, 8]
    (folder,) = {path.parent for path in texts_module.default_cache_dir().glob("teacher-texts/*/00000008.json")}
    (folder / "00000004.json").write_text('{"texts": [')  # torn
    assert teacher_texts(drawn, sources) == whole
    assert asked == [0, 4, 8, 4]


def test_building_the_data_tells_how_far_the_teacher_is(files: Path, translator: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(texts_module, "_PART", 4)
    told: list[tuple[int, int | None, str]] = []
    drawn = data(files, translator, decoding=Sampled(seed=6))
    sources = [source for source, _ in drawn.plain.read()[0]]
    tokenizer = llmlab.load_tokenizer(translator)
    drawn.build(tokenizer, sequence_length=8, batch_size=4, seed=0, report=lambda *progress: told.append(progress))
    done = [number for number, total, what in told if what == "texts of the teacher" and total == len(sources)]
    assert done == [*range(0, len(sources), 4), len(sources)]


def test_draws_are_the_seeds_own_and_fingerprints_know_the_decoding(files: Path, translator: str) -> None:
    sources = [f"w{i}" for i in range(8)]
    a, b = (teacher_texts(data(files, translator, decoding=Sampled(seed=seed)), sources) for seed in (0, 1))
    assert a != b
    equal = teacher_texts(data(files, translator, decoding=Sampled()), ["w1"] * 8)
    assert len({*equal}) > 1, "equal sources have draws of their own"
    kinds = [Beam(), Beam(num_beams=2), Greedy(), Sampled(seed=0), Sampled(seed=1), Sampled(top_p=0.9)]
    prints = {data(files, translator, decoding=kind).fingerprint() for kind in kinds}
    assert len(prints | {Pairs(**pairs(files)).fingerprint()}) == len(kinds) + 1
    mistakes = {
        "seed=-1": lambda: Sampled(seed=-1),
        "temperature=-1": lambda: Sampled(temperature=-1.0),
        "top_p=2": lambda: Sampled(top_p=2.0),
        "num_beams=0": lambda: Beam(num_beams=0),
    }
    for message, make in mistakes.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_a_student_with_another_tokenizer_learns_from_it(files: Path, translator: str) -> None:
    own = Bytes(special=SpecialTokens(pad="[P]", eos="[E]", bos=None, extra=("[X]",)))
    built = data(files, translator).build(own.build(), sequence_length=LENGTH, batch_size=4, seed=0)
    batch = built.train.batch(0)
    assert batch["labels"].shape == (4, LENGTH)
    assert np.all((batch["labels"] == -100) | (batch["labels"] < own.build().vocab_size))


def test_a_decoder_is_no_teacher_of_targets(files: Path, teacher: str) -> None:
    with pytest.raises(ValueError, match="is a Transformer, which does not turn a source into a target"):
        data(files, teacher).read()
