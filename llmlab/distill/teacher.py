"""The teacher: a model that is there, frozen, beside the student that is trained."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab import buckets
from llmlab.distill.layers import LayerMap, student_weights
from llmlab.distill.objective import Distill, check_layers, learned_shapes
from llmlab.distill.taught import Taught
from llmlab.nn.module import Params, merge, split
from llmlab.objectives.companion import Companion
from llmlab.training.program import place

_DIGITS = 16


class Teacher(Companion):
    """A teacher, and what a student needs to be compared with it.

    Args:
        objective: what is learned of it.
        student: the student's model config, its vocabulary settled.

    Raises:
        FileNotFoundError: there is no teacher.
        ValueError: it is damaged, or the two cannot be compared as the objective says.
    """

    def __init__(self, objective: Distill, student: Any) -> None:
        from llmlab.runs import load_config

        self.objective = objective
        self.config = load_config(objective.teacher)
        problems = [
            *check_layers(objective, student, self.config),
            *_vocabulary_problems(objective, student, self.config),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.student = student
        self.num_tokens = min(student.vocab_size, self.config.vocab_size) if objective.predictions else None
        self._learned = learned_shapes(objective, student, self.config)

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Params, Any]:
        return self.config.abstract()

    @property
    def is_needed(self) -> bool:
        """Whether the model itself is asked; a cache may answer for it."""
        return self.objective.cache is None

    @property
    def frozen_shapes(self) -> Params:
        return self._abstract[1] if self.is_needed else {}

    @property
    def frozen_axes(self) -> Any:
        return self._abstract[2] if self.is_needed else {}

    def frozen(self, kinds: Params) -> Params:
        return read_params(self.objective.teacher, kinds) if self.is_needed else {}

    @property
    def learned_shapes(self) -> Params:
        return {
            name: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in of_term.items()}
            for name, of_term in self._learned.items()
        }

    @property
    def learned_axes(self) -> Any:
        return {name: dict.fromkeys(of_term, ("embed", "teacher")) for name, of_term in self._learned.items()}

    def draw(self, key: jax.Array) -> Params:
        key = jax.random.fold_in(key, 0x7EAC)
        drawn: Params = {}
        for number, (name, of_term) in enumerate(sorted(self._learned.items())):
            drawn[name] = {
                leaf: jax.random.normal(jax.random.fold_in(key, number), shape) / np.sqrt(shape[0])
                for leaf, shape in of_term.items()
            }
        return drawn

    def bind(self, learned: Params, frozen: Params, step: jax.Array | None) -> Taught:
        model = merge(self._abstract[0], jax.lax.stop_gradient(frozen)) if frozen else None
        return Taught(
            distill=self.objective,
            teacher=model,
            configs=(self.student, self.config),
            learned=learned,
            step=step,
            num_tokens=self.num_tokens,
        )

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return {"teacher": digest(self.objective.teacher)}


def read_params(path: str, kinds: Params) -> Params:
    """Parameters of a model on disk, laid out.

    A run's arrays are read by every device as much as it holds; those of a Hugging Face directory pass through the
    host's memory. No device ever holds a teacher whole that is split over several.

    Args:
        path: of the teacher.
        kinds: shapes, types and shardings.
    """
    from llmlab.runs import is_hugging_face, load, locate
    from llmlab.training.checkpoint import restore_params
    from llmlab.training.directory import RunDirectory

    directory, step = locate(path)
    if is_hugging_face(directory):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            params = split(load(path))[1]
        return jax.tree.map(lambda x, kind: place(np.asarray(x, kind.dtype), kind.sharding), params, kinds)
    stored = jax.tree.map(lambda kind: jax.ShapeDtypeStruct(kind.shape, jnp.float32, sharding=kind.sharding), kinds)
    params = restore_params(RunDirectory(directory).checkpoints, stored, step=step)
    return jax.tree.map(lambda x, kind: x.astype(kind.dtype), params, kinds)


def _vocabulary_problems(objective: Distill, student: Any, teacher: Any) -> list[str]:
    if objective.predictions and None in (student.vocab_size, teacher.vocab_size):
        return [f"{type(student).__name__} or {type(teacher).__name__} has no vocabulary; Predictions needs one"]
    return []


def starting_weights(objective: Distill, layer_map: LayerMap, student: Any) -> Callable[[Params], Params]:
    """What a student starts from: shapes of its parameters to parameters, as `llmlab.runs.pretrained` gives them."""

    def weights(shapes: Params) -> Params:
        from llmlab.runs import load

        return student_weights(shapes, split(load(objective.teacher))[1], layer_map, student.replaceable)

    return weights


def check_same_tokenizer(teacher: str, tokenizer: Any) -> None:
    """Raises a ValueError unless the teacher reads the same ids as the student: token by token, it is asked about the
    student's rows."""
    from llmlab.tokenizers import load_tokenizer

    theirs = load_tokenizer(buckets.local(teacher))
    if theirs.fingerprint == tokenizer.fingerprint or theirs.vocabulary == tokenizer.vocabulary:
        return
    different = sum(theirs.vocabulary.get(token) != index for token, index in tokenizer.vocabulary.items())
    raise ValueError(
        f"teacher={teacher} reads other tokens than the student: {different} of the student's {tokenizer.vocab_size} "
        f"tokens have another number in the teacher's vocabulary of {theirs.vocab_size}, or none. Token by token both "
        f'must read the same ids: give the student the teacher\'s tokenizer, tokenizer=Opened(path="{teacher}"); or '
        "distil texts, which every tokenizer reads (TeacherTexts)"
    )


def digest(teacher: str) -> str:
    """What a teacher is: hexadecimal digest of its config and its weights.

    Of a run, the newest checkpoint's (or the one that the path names) digests are read, not its arrays.
    """
    from llmlab.runs import is_hugging_face, locate
    from llmlab.training.checkpoint import DIGESTS, digests, saved_steps

    directory, step = locate(teacher)
    parts: list[Any] = [hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()]
    if is_hugging_face(directory):
        parts += [[path.name, _file_digest(path)] for path in sorted(directory.glob("*.safetensors"))]
    else:
        checkpoints = directory / "checkpoints"
        steps = saved_steps(checkpoints) if step is None else [step]
        newest = checkpoints / str(max(steps)) if steps else directory
        known = newest / DIGESTS
        files = json.loads(known.read_bytes())["files"] if known.exists() else digests(newest)
        parts.append({name: entry for name, entry in files.items() if name.startswith("params/")})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
