"""Does a student translate better when it learns from its teacher's translations instead of from people's?

Claim    Half as deep and trained on what its teacher writes, a BART scores higher in BLEU than the same BART trained on
         the targets that people wrote, at equal steps (Kim and Rush 2016, 1606.07947).
Command  llmlab train experiments/finetune/translation_bart.py --out runs/translation-teacher
         llmlab ablate experiments/distill/translation.py
         both where multi30k/ is a folder with {train,val,test}.{de,en}.gz
Cost     the teacher's training as its file says, 8 minutes for its translations of 29,000 sentences (once), 2 arms x 3
         seeds x 5 minutes on 2 CPU cores (to be measured)
Result   not yet measured

The data are Multi30k's pairs of sentences (Elliott et al. 2016, 1605.00459); BLEU is sacrebleu's of greedy translations
of the first 500 sentences of the 2016 test set against those of people, in both arms.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from llmlab.data import Pairs
from llmlab.data.pairs import aligned
from llmlab.distill import Greedy, TeacherTexts
from llmlab.experiment import Experiment
from llmlab.infer.greedy import greedy
from llmlab.models.bart import bart
from llmlab.objectives import SequenceToSequence
from llmlab.optim import Cosine, Muon
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, Variant
from llmlab.tokenizers import Opened
from llmlab.training.config import Train

TEACHER, TEST, SENTENCES = "runs/translation-teacher", "multi30k/test", 500


def config() -> Experiment:
    """The student of the teacher's translations."""
    return Experiment(
        model=bart(
            embed_dim=128,
            num_layers=1,
            num_heads=4,
            max_length=64,
            pre_norm=True,
            embedding_std=0.1,
            decoder_start_id=2,
            pad_id=3,
        ),
        tokenizer=Opened(path=TEACHER),
        data=TeacherTexts(
            source="multi30k/train.de.gz",
            target="multi30k/train.en.gz",
            validation_source="multi30k/val.de.gz",
            validation_target="multi30k/val.en.gz",
            start="eos",
            bos=True,
            teacher=TEACHER,
            decoding=Greedy(),
            written_length=32,
        ),
        objective=SequenceToSequence(label_smoothing=0.1),
        optimizer=Muon(peak_lr=1e-2, schedule=Cosine(warmup_steps=100)),
        train=Train(steps=1500, batch_size=64, sequence_length=32, evaluate_every=500, checkpoint_every=0, keep_best=0),
    )


def from_people(experiment: Experiment) -> Experiment:
    """The same with the files' own targets."""
    data = experiment.data
    return replace(experiment, data=Pairs(**{field.name: getattr(data, field.name) for field in fields(Pairs)}))


def bleu(run: Run) -> Mapping[str, float]:
    """BLEU of greedy translations of the test set."""
    import sacrebleu

    data: Any = run.experiment.data
    model: Any = run.model
    pairs = aligned((f"{TEST}.de.gz",), (f"{TEST}.en.gz",))[:SENTENCES]
    length = run.experiment.train.sequence_length or 32
    sources = [data.framed(run.tokenizer, run.tokenizer.encode(data.texts(pair)[0]), length) for pair in pairs]
    targets = greedy(
        model, sources, max_new_tokens=length, eos_id=run.tokenizer.eos_id, num_tokens=run.tokenizer.vocab_size
    )
    translations = [run.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in targets]
    return {"bleu": sacrebleu.BLEU().corpus_score(translations, [[reference for _, reference in pairs]]).score}


def ablation() -> Ablation:
    """The teacher's targets against people's."""
    return Ablation(
        hypothesis="a student of its teacher's translations scores higher than one of people's",
        baseline=from_people(config()),
        variants={"teacher's targets": Variant(lambda e: replace(e, data=config().data), changes=("data", "data.*"))},
        measure=bleu,
        metric="measure/bleu",
        direction="higher",
        claim="better",
        match="tokens",
        seeds=3,
    )
