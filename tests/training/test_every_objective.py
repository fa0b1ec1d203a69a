"""Every objective trains a model that is meant for it, on the data whose batches are for it, through the one step."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmlab.data import (
    Blanks,
    Data,
    Denoising,
    Digits,
    FactorizationOrder,
    LabelledTexts,
    LabelledWords,
    NextSentence,
    Packed,
    Pairs,
    Questions,
    RandomPrefix,
    SentenceOrder,
    Sentences,
    SpanCorruption,
    SpanMasking,
    TextFiles,
    TokenMasking,
    sentinels,
)
from llmlab.experiment import Experiment
from llmlab.flags import concrete
from llmlab.models import bart, bert, clip, glm, llama, t5, vit, xlnet
from llmlab.models.config import ModelConfig, Tied
from llmlab.models.heads import MaskedLM, QuestionAnswering, SequenceClassification, TokenClassification
from llmlab.objectives import (
    BlankInfilling,
    Classification,
    ImageTextContrastive,
    MaskedToken,
    MaskedTokenAndNextSentence,
    NextToken,
    Objective,
    Permutation,
    PrefixLM,
    SentenceContrastive,
    SequenceToSequence,
)
from llmlab.objectives import (
    QuestionAnswering as Answers,
)
from llmlab.objectives import (
    TokenClassification as TokenClasses,
)
from llmlab.optim import AdamW, Constant
from llmlab.sharding.mesh import Mesh
from llmlab.tokenizers import Bytes, SpecialTokens
from llmlab.training.config import Train
from llmlab.training.program import Program

TOKENIZER = Bytes(special=SpecialTokens(cls="[CLS]", sep="[SEP]", mask="[MASK]", extra=sentinels(8)))
IDS = TOKENIZER.build()
LENGTH, STEPS = 32, 6
TINY: dict[str, Any] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
DECODER = llama.llama(**TINY, hidden_dim=24, head=Tied())
ENCODER = bert.bert(**TINY, hidden_dim=24, max_length=LENGTH)
T5 = t5.t5(**TINY, head_dim=8, hidden_dim=24, embedding_std=0.1, decoder_start_id=IDS.pad_id)
VISION = vit.vit(**TINY, image_size=8, patch_size=4, channels=1, num_labels=10)
CLIP = clip.CLIP(
    text=clip.clip_text(**TINY, max_length=LENGTH),
    vision=clip.clip_vision(**TINY, image_size=8, patch_size=4, channels=1),
    projection_dim=8,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every kind."""
    directory = tmp_path_factory.mktemp("files")
    words = [f"w{i} said so. {'x' * (i % 7)} and w{i + 1} heard it." for i in range(60)]
    records = {
        "classes": [{"text": word, "label": str(i % 3)} for i, word in enumerate(words)],
        "words": [{"words": word.split(), "labels": [str(len(w) % 2) for w in word.split()]} for word in words],
        "questions": [{"question": "who?", "context": word, "answer": "said"} for word in words],
    }
    for name, rows in records.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, texts in (("source.txt", words), ("target.txt", [word.upper() for word in words])):
        (directory / name).write_text("\n".join(texts) + "\n")
    return directory


def text(corruption: Any = None) -> Any:
    return lambda files: Packed(
        TextFiles(str(files / "source.txt"), separator="\n"), corruption=corruption, validation_fraction=0.3
    )


def labelled(kind: Any, name: str) -> Any:
    return lambda files: kind(str(files / f"{name}.jsonl"), validation_fraction=0.3)


CASES: dict[str, tuple[Objective, ModelConfig, Any]] = {
    "next tokens": (NextToken(), DECODER, text()),
    "prefixes": (PrefixLM(), DECODER, text(RandomPrefix())),
    "masked tokens": (MaskedToken(), dataclasses.replace(ENCODER, pooler=None, head=MaskedLM()), text(TokenMasking())),
    "whole words": (
        MaskedToken(),
        dataclasses.replace(ENCODER, pooler=None, head=MaskedLM()),
        text(TokenMasking(whole_words=True)),
    ),
    "masked spans": (MaskedToken(), dataclasses.replace(ENCODER, pooler=None, head=MaskedLM()), text(SpanMasking())),
    "next sentence": (MaskedTokenAndNextSentence(), ENCODER, text(NextSentence())),
    "sentence order": (MaskedTokenAndNextSentence(), ENCODER, text(SentenceOrder())),
    "permutation": (Permutation(), xlnet.xlnet(**TINY), text(FactorizationOrder())),
    "span corruption": (SequenceToSequence(), T5, text(SpanCorruption())),
    "denoising": (
        SequenceToSequence(label_smoothing=0.1),
        bart.bart(**TINY, max_length=LENGTH, decoder_start_id=IDS.eos_id, pad_id=3),
        text(Denoising()),
    ),
    "pairs": (
        SequenceToSequence(),
        T5,
        lambda files: Pairs(str(files / "source.txt"), str(files / "target.txt"), validation_fraction=0.3),
    ),
    "blanks in two dimensions": (BlankInfilling(), glm.infilling(**TINY, max_length=LENGTH), text(Blanks())),
    "blanks in one": (BlankInfilling(), glm.glm(**TINY, hidden_dim=24), text(Blanks(two_dimensional=False))),
    "image and text": (
        ImageTextContrastive(),
        CLIP,
        lambda files: Digits(captions=True),
    ),
    "sentences": (
        SentenceContrastive(),
        dataclasses.replace(ENCODER, head=None, pooler=None),
        lambda files: Sentences(TextFiles(str(files / "source.txt"), separator="\n"), validation_fraction=0.3),
    ),
    "classes of texts": (
        Classification(),
        dataclasses.replace(ENCODER, head=SequenceClassification(num_labels=3)),
        labelled(LabelledTexts, "classes"),
    ),
    "classes of images": (Classification(), VISION, lambda files: Digits()),
    "classes of tokens": (
        TokenClasses(),
        dataclasses.replace(ENCODER, pooler=None, head=TokenClassification(num_labels=2)),
        labelled(LabelledWords, "words"),
    ),
    "answers": (
        Answers(),
        dataclasses.replace(ENCODER, pooler=None, head=QuestionAnswering()),
        labelled(Questions, "questions"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.scale
def test_a_few_steps_on_one_batch_lower_its_loss(case: str, files: Path, tmp_path: Path):
    objective, model, make_data = CASES[case]
    data: Data = make_data(files)
    length = None if data.task == "classes of images" else LENGTH
    experiment = Experiment(
        model=model,
        data=data,
        tokenizer=TOKENIZER,
        objective=objective,
        optimizer=AdamW(peak_lr=1e-2, schedule=Constant()),
        train=Train(steps=STEPS, batch_size=8, sequence_length=length),
    )
    experiment.validate(num_devices=1)
    dataset = data.build(IDS, sequence_length=length, batch_size=8, seed=0, cache_dir=tmp_path)
    batch = dataset.train.batch(0)
    model = model.with_vocabulary(IDS.vocab_size)
    model.check_batch(batch)
    mesh = Mesh().build(jax.devices()[:1])
    program = Program.build(model, objective, experiment.optimizer, mesh, experiment.train, batch)
    assert model.flops(program.shapes) > 0
    state, losses = program.initialise(None), []
    step = program.train_step
    for _ in range(STEPS):
        state, metrics = step(state, program.place(batch))
        losses.append(float(metrics["train/loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.01


def test_there_is_a_case_for_every_objective():
    own = {kind for kind in concrete(Objective) if kind.tasks and kind.__module__.startswith("llmlab.")}
    assert {type(objective) for objective, _, _ in CASES.values()} == own


def test_positions_in_blanks_need_a_table_for_them(files: Path, tmp_path: Path):
    dataset = text(Blanks())(files).build(IDS, sequence_length=LENGTH, batch_size=8, seed=0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="the model has no block_position: give it one"):
        DECODER.check_batch(dataset.train.batch(0))
