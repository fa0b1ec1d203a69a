"""Distillation: a model that learns from another one (Bucila et al. 2006; Hinton et al. 2015, 1503.02531).

    Distill(teacher="runs/teacher")                                   next tokens, by the teacher's distributions
    Distill(teacher=..., terms=(Predictions(divergence=ReverseKL(), temperature=2.0, labels=0.5),))
    Distill(teacher=..., terms=(States(end=300), AttentionMaps(end=300), Predictions(begin=300)))      two stages
    Distill(teacher=..., on_policy=OnPolicy(fraction=0.5, prompt=16))    at the student's own places
    Distill(teacher=..., cache="caches/mine")                          the teacher's words were written down before

It is an objective as any other: the same data, the same train step. The teacher's parameters are an argument of the
step, laid out by the mesh's rules, never differentiated, with no optimizer state; a step costs the student's and the
teacher's forward pass. "loss" stays the plain loss of `base`, so that a student can be compared with one that was
trained without a teacher; "distillation" is what is minimised.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab import buckets
from llmlab.distill.layers import LayerMap
from llmlab.distill.on_policy import OnPolicy
from llmlab.distill.terms import LayerTerm, Predictions, Term
from llmlab.objectives import NextToken, Objective
from llmlab.objectives.base import Batch, LossParts
from llmlab.objectives.labels import Classification, TokenClassification
from llmlab.objectives.tokens import TokenObjective


@dataclass(frozen=True, kw_only=True)
class Distill(Objective):
    """Learn what a teacher does."""

    teacher: str
    """Run, checkpoint or Hugging Face directory of the teacher, also one in a bucket (gs://...)."""
    base: Objective | None = NextToken()
    """What the rows are for, and what "loss" is; None where the teacher's states alone are learned."""
    terms: tuple[Term, ...] = (Predictions(),)
    """What is learned of the teacher: Predictions(), States(), Relations(), ..."""
    initialize: LayerMap | None = None
    """Layers of the teacher that the student starts from, with its embedding and head; None for a fresh student."""
    progressive: int | None = None
    """Steps in which one pair of layers after the other is learned, first to last, by the terms over layers, while
    nothing but that layer changes; None for all at once."""
    on_policy: OnPolicy | None = None
    """Rows that a model writes during training; None for those of the data."""
    cache: str | None = None
    """Directory that `llmlab distill cache` wrote the teacher's predictions to; None asks the teacher itself."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> Any:
        if not self.terms:
            yield "terms is empty: a teacher that is not listened to teaches nothing; the default is (Predictions(),)"
        if len(self.predictions) > 1:
            yield "terms has Predictions twice; mix labels in with Predictions(labels=...), stages with begin and end"
        if self.predictions and not isinstance(self.base, TokenObjective | Classification | TokenClassification):
            yield (
                f"Predictions needs an objective that scores tokens or classes, and base={type(self.base).__name__}; "
                "use base=NextToken(), or terms over states alone"
            )
        if self.base is not None and isinstance(self.base, Distill):
            yield "base is Distill itself; give the plain objective, such as NextToken()"
        if self.progressive is not None and not (self.progressive > 0 and self.layer_terms):
            yield f"progressive={self.progressive} must be a positive number of steps, and needs terms over layers"
        if self.cache is not None and (self.layer_terms or self.on_policy is not None):
            yield (
                "cache holds the teacher's predictions on the rows of the data: terms over layers and on_policy need "
                "the teacher itself; leave cache out"
            )
        if self.cache is not None and not (self.predictions and isinstance(self.base, TokenObjective)):
            yield (
                f"cache holds distributions over tokens, and base={type(self.base).__name__} with terms "
                f"{', '.join(type(term).__name__ for term in self.terms)} asks for none; leave cache out"
            )
        if self.on_policy is not None and not isinstance(self.base, TokenObjective):
            yield "on_policy writes text, and base predicts no tokens; leave it out"

    @property
    def predictions(self) -> tuple[Predictions, ...]:
        """The term over the vocabulary, where there is one."""
        return tuple(term for term in self.terms if isinstance(term, Predictions))

    @property
    def layer_terms(self) -> tuple[LayerTerm, ...]:
        """The terms over layers."""
        return tuple(term for term in self.terms if isinstance(term, LayerTerm))

    @property
    def plain(self) -> Objective:
        return self if self.base is None else self.base

    def chunked(self, choose: Callable[[], int]) -> "Distill":
        return self if self.base is None else dataclasses.replace(self, base=self.base.chunked(choose))

    @property
    def asks_the_head(self) -> bool:
        return self.base is not None

    def problems(self, model: Any, tokenizer: Any) -> list[str]:
        from llmlab.runs import load_config

        if buckets.address(self.teacher) is not None:
            return []  # copied when it is needed
        if not Path(self.teacher).is_dir():
            return [f"teacher={self.teacher} is not a directory; give a run, a checkpoint or a Hugging Face directory"]
        try:
            teacher = load_config(self.teacher)
        except (ValueError, FileNotFoundError) as error:
            return [f"teacher={self.teacher}: {error}"]
        return check_layers(self, model, teacher)

    def check_tokenizer(self, tokenizer: Any) -> None:
        from llmlab.distill.teacher import check_same_tokenizer

        check_same_tokenizer(self.teacher, tokenizer)

    def companion(self, model: Any) -> Any:
        from llmlab.distill.teacher import Teacher

        return Teacher(self, model)

    def weights(self, model: Any) -> Any:
        from llmlab.distill.teacher import starting_weights

        return None if self.initialize is None else starting_weights(self, self.initialize, model)

    def dataset(self, dataset: Any, **made_with: Any) -> Any:
        if self.cache is None:
            return dataset
        from llmlab.distill.cached_rows import with_cache

        return with_cache(self, dataset, **made_with)

    def loss(self, model: Any, batch: Batch, *, key: Any = None) -> LossParts:
        raise AssertionError("training binds the objective to its teacher first (companion)")

    def count(self, batch: Batch) -> Any:
        from llmlab.distill.taught import real_tokens

        return real_tokens(batch, "").sum() if self.base is None else self.base.count(batch)


def check_layers(objective: Distill, student: Any, teacher: Any) -> list[str]:
    """What the terms over layers cannot do with two model configs."""
    found = []
    for term in objective.layer_terms:
        try:
            term.check(student, teacher)
        except ValueError as error:
            found.append(f"{type(term).__name__}: {error}")
    return found


def learned_shapes(objective: Distill, student: Any, teacher: Any) -> Mapping[str, Mapping[str, tuple[int, int]]]:
    """Shapes of what the terms bring along, by the term's number and name."""
    shapes = {
        f"{number}_{term.metric}": term.learned(student, teacher) for number, term in enumerate(objective.layer_terms)
    }
    return {name: of_term for name, of_term in shapes.items() if of_term}
