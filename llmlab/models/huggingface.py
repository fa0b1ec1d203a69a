"""Hugging Face directories: `load_hf` and `save_hf`.

A directory holds `config.json`, whose `model_type` names the family, and weights as safetensors. Loading refuses what
llmlab would compute differently: unknown attributes, tensors missing, left over or of a wrong shape, each time with
the whole list. Saving writes float32, so that reading it back gives the same bits.
"""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from llmlab.models import catalog
from llmlab.models.config import ModelConfig
from llmlab.models.family import HuggingFace
from llmlab.models.heads import SequenceClassification
from llmlab.models.hf_config import Inexpressible
from llmlab.models.hf_heads import labels_to_hf
from llmlab.models.safetensors_io import INDEX, SINGLE, Checkpoint, read_json, write_checkpoint, write_json
from llmlab.models.weights import dump, flatten, load, tensor_shapes, unflatten
from llmlab.nn.module import merge, split
from llmlab.sharding.rules import Placement

CONFIG = "config.json"


FAMILIES: dict[str, HuggingFace] = {
    family.hugging_face.model_type: family.hugging_face for family in catalog.FAMILIES if family.hugging_face
}
"""Families by the `model_type` of their configs."""


def load_hf(directory: str | os.PathLike[str], *, placement: Placement | None = None) -> Any:
    """The model of a Hugging Face directory, its parameters in float32.

    bfloat16 and float16 weights convert without loss. Needs the memory of the float32 model and of its largest
    parameter; the files are mapped, so what they take besides is cache that the system can drop.

    Args:
        directory: with a config.json and weights.
        placement: a mesh that each parameter goes to as soon as it is read, every device getting its part alone; None
            for the first device.

    Raises:
        FileNotFoundError: no such directory, or no config or weights in it.
        ValueError: the config has attributes that llmlab does not implement; the weights do not fit it; files are
            damaged or pickled. The message lists every offender.
    """
    root = Path(directory)
    family, config = _read_config(root)
    model = family.from_hf(config)
    graphdef, shapes, axes = model.abstract()
    shardings = {} if placement is None else flatten(placement.shardings(axes, shapes))
    leaves: dict[str, jax.Array] = {}
    with Checkpoint(root) as checkpoint:
        for path, array in load(family.weights, shapes, checkpoint, where=str(root)):
            leaves[path] = jax.device_put(array, shardings.get(path))
    return merge(graphdef, unflatten(leaves))


def load_hf_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The model config of a Hugging Face directory; no weights are read. Errors as for `load_hf`."""
    family, config = _read_config(Path(directory))
    return family.from_hf(config)


def save_hf(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a model as a Hugging Face directory that `transformers` and `load_hf` open; returns the directory.

    Everything is written beside its place first and moved there at the end, config.json last: a directory with a
    config is complete. Other files in the directory, a tokenizer's for instance, stay.

    Args:
        model: of a family that Hugging Face has.
        directory: created if it is not there.
        model_type: the family to write it as, where several have the model ("mistral" has all that "llama" has with
            no biases); None for the first that does.
        max_shard_bytes: weights beyond this size are written as several files with an index.

    Raises:
        ValueError: no family expresses the model (what the nearest one lacks is listed), or not the one that was asked
            for; or the directory has a model.
    """
    root = Path(directory)
    if (root / CONFIG).exists():
        raise ValueError(f"{root} already holds a model ({CONFIG}); choose another directory, or remove it first")
    family, config = _express(model.config, model_type)
    params = split(model)[1]
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=root))
    try:
        shapes = tensor_shapes(family.weights, params)
        write_checkpoint(staging, shapes, dump(family.weights, params), max_shard_bytes=max_shard_bytes)
        write_json(staging / CONFIG, config)
        # What a save that was killed left behind would be read instead of, or beside, the new files.
        for stale in (root / SINGLE, root / INDEX, *root.glob("model-*-of-*.safetensors")):
            stale.unlink(missing_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(root / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return root


HeadKind = Literal["MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering"]


def with_head(model: ModelConfig, kind: HeadKind, *, labels: int | Sequence[str] | None = None) -> ModelConfig:
    """The model with the head that its family has for a task, as `transformers` builds it: to fine-tune and export.

    A family's classifier is more than a matrix: BERT's reads the pooler, RoBERTa's has a layer of its own, DistilBERT's
    another. What stands below the head stays the same.

    Args:
        model: of a family that Hugging Face has, with any head or none.
        kind: the end of the name of the class in `transformers`: "SequenceClassification" in
            RobertaForSequenceClassification.
        labels: how many labels there are, or what they are called; None for heads that have none, and for two.

    Raises:
        ValueError: the family has no such head, or no family expresses the model.
    """
    family, config = _express(model, None)
    if "architectures" not in config:
        raise ValueError(f"{family.model_type} has no heads to choose from")
    stem = re.sub("(For[A-Z].*|LMHeadModel|ModelWithLMHead|Model)$", "", config["architectures"][0])
    changed: dict[str, Any] = {"architectures": [f"{stem}For{kind}"]}
    if labels is not None:
        count, names = (labels, None) if isinstance(labels, int) else (len(labels), tuple(labels))
        changed |= labels_to_hf(SequenceClassification(num_labels=count, names=names))
    kept = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "problem_type")}
    return family.from_hf(kept | changed)


def _read_config(root: Path) -> tuple[HuggingFace, dict[str, Any]]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no directory")
    if not (root / CONFIG).is_file():
        raise FileNotFoundError(f"{root} has no {CONFIG}, so it is no Hugging Face directory")
    config = read_json(root / CONFIG)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{root / CONFIG} has model_type {model_type!r}; implemented are {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    if family.amended is not None:
        with Checkpoint(root) as checkpoint:
            config = family.amended(config, checkpoint.tensors.keys())
    return family, config


def _express(model: ModelConfig, model_type: str | None) -> tuple[HuggingFace, dict[str, Any]]:
    """The family that has this model, and its config."""
    if model_type is not None and model_type not in FAMILIES:
        raise ValueError(f"there is no family with model_type {model_type!r}; implemented are {', '.join(FAMILIES)}")
    asked = [family for name, family in FAMILIES.items() if model_type in (None, name)]
    refusals: dict[str, ValueError] = {}
    for family in asked:
        if isinstance(model, family.config):
            try:
                return family, family.to_hf(model)
            except ValueError as error:
                refusals[family.model_type] = error
    if not refusals:
        made_of = sorted({family.config.__name__ for family in asked})
        raise ValueError(f"{_headline(model_type)}: it is a {type(model).__name__}, not a {' or '.join(made_of)}")
    # A family of other parts than the model's is further away than any that differs in values.
    nearest = min(refusals, key=lambda name: _distance(refusals[name]))
    message = f"{_headline(model_type)}\n{refusals[nearest]}"
    others = [name for name in refusals if name != nearest]
    if others:
        message += f"\nThat is the nearest; save_hf(..., model_type=...) tells of another: {', '.join(others)}"
    raise ValueError(message)


def _distance(refusal: ValueError) -> float:
    return len(refusal.differences) if isinstance(refusal, Inexpressible) else math.inf


def _headline(model_type: str | None) -> str:
    if model_type is None:
        return "no Hugging Face family computes what this model does"
    return f"the Hugging Face family {model_type} does not compute what this model does"
