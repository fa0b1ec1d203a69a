"""What a student learns of its teacher, term by term: predictions, states, attention.

    Predictions         distributions over the vocabulary              Hinton et al. 2015, GKD, MiniLLM
    States              hidden states, through a learned projection    TinyBERT
    Embeddings          what the first layer reads, likewise           TinyBERT
    CosineStates        directions of states                           DistilBERT
    FeatureMaps         states of equal width                          MobileBERT
    AttentionMaps       products of queries and keys                   TinyBERT
    AttentionTransfer   where queries look                             MiniLM, MobileBERT
    Relations           values (queries, keys) with each other         MiniLM, MiniLMv2

A term is a config: what it looks at, the layers that it compares, and its weight. It may hold for some of the steps
only, `begin` to `end`, which makes recipes of several stages: intermediate layers first, predictions after (TinyBERT).
Outside of them it costs nothing. Terms over layers are means over pairs of layers and over real tokens.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from llmlab.distill.layers import LastLayers, LayerMap, Uniform, num_layers
from llmlab.nn.capture import What
from llmlab.objectives.divergences import Divergence, ForwardKL
from llmlab.objectives.relations import attention_transfer, map_error, relation
from llmlab.objectives.states import cosine_distance, normalised, projected_error, statistics_error

Side = Literal["", "encoder", "decoder"]
"""Which stack of an encoder-decoder; "" where there is one alone."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """What a term over layers sees of both models."""

    student: Mapping[str, jax.Array]
    """Captured of the student, by name; layers in front."""
    teacher: Mapping[str, jax.Array]
    """Captured of the teacher."""
    weights: Float[Array, "B S"]
    """Of every token: 0 for padding."""
    learned: Mapping[str, jax.Array]
    """The term's own parameters."""
    pairs: tuple[tuple[int, int], ...]
    """(student layer, teacher layer)."""
    factors: Float[Array, "P"]
    """Of every pair of layers; they sum to one."""

    def matched(self, name: What) -> tuple[Shaped[Array, "P ..."], Shaped[Array, "P ..."]]:
        """The student's and the teacher's layers that belong together."""
        mine, theirs = (np.asarray(side) for side in zip(*self.pairs, strict=True))
        return self.student[name][mine], self.teacher[name][theirs]

    def weighted(self) -> Float[Array, "P B S"]:
        """Weights of every token of every pair."""
        return self.factors[:, None, None] * self.weights


@dataclass(frozen=True, kw_only=True)
class Term:
    """One of the things that a student learns of its teacher."""

    weight: float = 1.0
    """Factor on it."""
    begin: int = 0
    """First step in which it holds."""
    end: int | None = None
    """Step at which it holds no more; None for never."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"{type(self).__name__}.weight={self.weight} is not positive; leave the term out instead")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise ValueError(f"{type(self).__name__} holds from step {self.begin} to {self.end}, which is no step")

    @property
    def always(self) -> bool:
        """Whether it holds in every step."""
        return self.begin == 0 and self.end is None

    def holds(self, step: jax.Array) -> jax.Array:
        """Whether it holds after so many steps."""
        now = step >= self.begin
        return now if self.end is None else now & (step < self.end)


@dataclass(frozen=True, kw_only=True)
class Predictions(Term):
    """The teacher's distributions over the vocabulary, at all places with a label (Hinton et al. 2015, 1503.02531)."""

    divergence: Divergence = ForwardKL()
    """ForwardKL(), ReverseKL(), JensenShannon(beta) or TotalVariation()."""
    temperature: float = 1.0
    """Divides both models' logits."""
    labels: float = 0.0
    """Factor on the cross-entropy with the labels, which is added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} is not positive; 1 softens nothing, 2 to 4 are usual")
        if self.labels < 0:
            raise ValueError(f"labels={self.labels} is negative; 0 leaves labels out")


@dataclass(frozen=True, kw_only=True)
class LayerTerm(Term):
    """A term that compares layers."""

    looks_at: ClassVar[tuple[What, ...]] = ()
    metric: ClassVar[str] = ""
    """What it is called in metrics."""

    layers: LayerMap = Uniform()
    """Which layers are compared."""
    side: Side = ""
    """Which stack of an encoder-decoder."""

    @property
    def captures(self) -> tuple[What, ...]:
        """What it looks at in both models."""
        return self.looks_at

    def pairs(self, student: Any, teacher: Any) -> tuple[tuple[int, int], ...]:
        """Layers of two model configs. Raises ValueError where there are no such layers."""
        return self.layers.pairs(num_layers(student, self.side), num_layers(teacher, self.side))

    def check(self, student: Any, teacher: Any) -> None:
        """Raises a ValueError where two model configs cannot be compared."""
        self.pairs(student, teacher)

    def learned(self, student: Any, teacher: Any) -> dict[str, tuple[int, int]]:
        """Shapes of matrices that are learned with it."""
        return {}

    @abc.abstractmethod
    def loss(self, views: Views) -> Float[Array, ""]:
        """Sum over tokens, each with its weight."""


@dataclass(frozen=True, kw_only=True)
class States(LayerTerm):
    """Mean square difference of hidden states; one projection for all layers where widths differ (Jiao et al. 2019)."""

    looks_at: ClassVar[tuple[What, ...]] = ("state",)
    metric: ClassVar[str] = "states"

    project: bool | None = None
    """Whether a projection to the teacher's width is learned; None where the widths differ."""

    def check(self, student: Any, teacher: Any) -> None:
        super().check(student, teacher)
        if self.project is False:
            _same_width(self, student, teacher)

    def learned(self, student: Any, teacher: Any) -> dict[str, tuple[int, int]]:
        needed = student.embed_dim != teacher.embed_dim if self.project is None else self.project
        return {"kernel": (student.embed_dim, teacher.embed_dim)} if needed else {}

    def loss(self, views: Views) -> Float[Array, ""]:
        return projected_error(*views.matched(self.looks_at[0]), views.weighted(), views.learned.get("kernel"))


@dataclass(frozen=True, kw_only=True)
class Embeddings(States):
    """The same of what the first layer reads."""

    looks_at: ClassVar[tuple[What, ...]] = ("input",)
    metric: ClassVar[str] = "embeddings"

    def pairs(self, student: Any, teacher: Any) -> tuple[tuple[int, int], ...]:
        for model in (student, teacher):
            num_layers(model, self.side)  # there is a stack
        return ((0, 0),)


@dataclass(frozen=True, kw_only=True)
class CosineStates(LayerTerm):
    """1 - cosine of states of equal width (Sanh et al. 2019, 1910.01108)."""

    looks_at: ClassVar[tuple[What, ...]] = ("state",)
    metric: ClassVar[str] = "cosine"

    layers: LayerMap = LastLayers(count=1)

    def check(self, student: Any, teacher: Any) -> None:
        super().check(student, teacher)
        _same_width(self, student, teacher)

    def loss(self, views: Views) -> Float[Array, ""]:
        return cosine_distance(*views.matched("state"), views.weighted())


@dataclass(frozen=True, kw_only=True)
class FeatureMaps(LayerTerm):
    """Mean square difference of states of equal width (Sun et al. 2020, 2004.02984)."""

    looks_at: ClassVar[tuple[What, ...]] = ("state",)
    metric: ClassVar[str] = "feature_maps"

    decomposed: bool = False
    """Compare states with mean 0 and variance 1, and their means and variances by themselves."""

    def check(self, student: Any, teacher: Any) -> None:
        super().check(student, teacher)
        _same_width(self, student, teacher)

    def loss(self, views: Views) -> Float[Array, ""]:
        mine, theirs = views.matched("state")
        if not self.decomposed:
            return projected_error(mine, theirs, views.weighted())
        apart = projected_error(normalised(mine), normalised(theirs), views.weighted())
        return apart + statistics_error(mine, theirs, views.weighted())


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(LayerTerm):
    """Mean square difference of the products of queries and keys, of equally many heads (Jiao et al. 2019)."""

    looks_at: ClassVar[tuple[What, ...]] = ("scores", "allowed")
    metric: ClassVar[str] = "attention_maps"

    def loss(self, views: Views) -> Float[Array, ""]:
        mine, theirs = views.matched("scores")
        _same_heads(self, mine, theirs)
        return map_error(mine, theirs, views.matched("allowed")[0], views.weighted())


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(LayerTerm):
    """KL of the teacher's attention from the student's, of equally many heads (Wang et al. 2020, 2002.10957)."""

    looks_at: ClassVar[tuple[What, ...]] = ("attention",)
    metric: ClassVar[str] = "attention"

    layers: LayerMap = LastLayers(count=1)

    def loss(self, views: Views) -> Float[Array, ""]:
        mine, theirs = views.matched("attention")
        _same_heads(self, mine, theirs)
        return attention_transfer(mine, theirs, views.weighted())


@dataclass(frozen=True, kw_only=True)
class Relations(LayerTerm):
    """KL of how the teacher's values (queries, keys) relate to each other from the student's (Wang et al. 2020,
    2002.10957; 2012.15828): of any widths and head counts."""

    metric: ClassVar[str] = "relations"

    of: tuple[Literal["query", "key", "value"], ...] = ("value",)
    """("value",) for MiniLM; all three for MiniLMv2. Their mean is taken."""
    heads: int = 12
    """Relation heads that both models' heads are cut into."""
    layers: LayerMap = LastLayers(count=1)

    @property
    def captures(self) -> tuple[What, ...]:
        return (*self.of, "allowed")

    def loss(self, views: Views) -> Float[Array, ""]:
        mine_allowed, their_allowed = views.matched("allowed")
        total = jnp.zeros(())
        for name in self.of:
            mine, theirs = views.matched(name)
            relations = relation(mine, mine_allowed, self.heads), relation(theirs, their_allowed, self.heads)
            total = total + attention_transfer(*relations, views.weighted())
        return total / len(self.of)


def when(term: Term, step: jax.Array | None, compute: Callable[[], jax.Array], last: int | None) -> jax.Array:
    """The term's value in the steps in which it holds, 0 in others, where it is not computed.

    Args:
        term: it.
        step: steps done; None in evaluation, which looks at the recipe's end.
        compute: its value.
        last: the last step in which any term begins.
    """
    if term.always:
        return compute()
    if step is None:
        return compute() if term.end is None or (last is not None and term.end > last) else jnp.zeros(())
    return jax.lax.cond(term.holds(step), compute, lambda: jnp.zeros(()))


def _same_width(term: LayerTerm, student: Any, teacher: Any) -> None:
    if student.embed_dim != teacher.embed_dim:
        raise ValueError(
            f"{type(term).__name__} compares states of one width; the student's is {student.embed_dim} and the "
            f"teacher's {teacher.embed_dim}: use States(), which learns a projection"
        )


def _same_heads(term: LayerTerm, mine: jax.Array, theirs: jax.Array) -> None:
    if mine.shape[2] != theirs.shape[2]:
        raise ValueError(
            f"{type(term).__name__} compares head with head; the student has {mine.shape[2]} and the teacher "
            f"{theirs.shape[2]}: give the student as many, or use Relations(), which cuts heads anew"
        )
