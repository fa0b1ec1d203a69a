"""Other ways to write than token by token, by the name that `generate(strategy=...)` takes.

    Beams         the most probable texts there are, as far as a few prefixes tell       llmlab.infer.beam
    Contrastive   a probable token that is not like what stands there already            llmlab.infer.contrastive
    Speculation   what sampling writes, several tokens for one step of the model         llmlab.infer.speculative

They search on the device until they are done: text is shown when it is whole, and a stop string shortens what was
written. Constraints, log-probabilities and deterministic mode are those of sampling; the positions of the model must
have room for all of `max_new_tokens`.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmlab.infer.beam import beam_search
from llmlab.infer.contrastive import contrastive_search
from llmlab.infer.drafts import PromptLookup
from llmlab.infer.prompts import Given
from llmlab.infer.sampling import Sampling
from llmlab.infer.speculative import speculative


@dataclass(frozen=True)
class Found:
    """What a strategy wrote."""

    token_ids: tuple[int, ...]
    """The new tokens, with the one that ended them."""
    score: float | None = None
    """What beam search ranks it by."""

    @classmethod
    def of(cls, token_ids: tuple[int, ...], end_id: int | None, score: float | None = None) -> "Found":
        """New tokens, and the one that ended them where one did."""
        return cls(token_ids if end_id is None else (*token_ids, end_id), score)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be written, for all prompts of a call."""

    given: Sequence[Given]
    inputs: Mapping[str, Any] | None
    samplings: Sequence[Sampling] | None
    """For each prompt, None where none was asked for."""
    n: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    num_tokens: int
    max_rows: int

    def keywords(self, rows_each: int = 1) -> dict[str, Any]:
        """What all searches are told; `rows_each` is how many rows a prompt takes."""
        reads = self.given[0].source is not None
        return {
            "prompts": [one.source if reads else one.ids for one in self.given],
            "start_ids": [one.ids for one in self.given] if reads else None,
            "inputs": None if reads or self.inputs is None else jax.tree.map(jnp.asarray, dict(self.inputs)),
            "max_new_tokens": self.max_new_tokens,
            "eos_id": self.stop_ids,
            "num_tokens": self.num_tokens,
            "batch_size": min(len(self.given), max(1, self.max_rows // rows_each)),
        }


class Strategy(abc.ABC):
    """How texts are written."""

    @abc.abstractmethod
    def write(self, model: nnx.Module, order: Order) -> list[list[Found]]:
        """`order.n` texts for each prompt, best first.

        Raises:
            ValueError: the order asks for what the strategy does not do.
        """

    def _no_sampling(self, order: Order) -> None:
        if order.samplings is not None:
            raise ValueError(f"{type(self).__name__} searches and draws nothing; leave sampling out")

    def _one_sample(self, order: Order) -> None:
        if order.n != 1:
            raise ValueError(f"n={order.n}: {type(self).__name__} writes one text for a prompt; give the prompt again")


@dataclass(frozen=True, kw_only=True)
class Beams(Strategy):
    """Beam search; see `llmlab.infer.beam.beam_search` for what each number does."""

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_groups: int = 1
    diversity_penalty: float = 0.0

    def write(self, model: nnx.Module, order: Order) -> list[list[Found]]:
        self._no_sampling(order)
        found = beam_search(
            model,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            num_groups=self.num_groups,
            diversity_penalty=self.diversity_penalty,
            num_return_sequences=order.n,
            **order.keywords(self.num_beams),
        )
        return [[Found.of(one.token_ids, one.end_id, one.score) for one in ranked] for ranked in found]


@dataclass(frozen=True, kw_only=True)
class Contrastive(Strategy):
    """Contrastive search; see `llmlab.infer.contrastive.contrastive_search`."""

    top_k: int = 4
    alpha: float = 0.6

    def write(self, model: nnx.Module, order: Order) -> list[list[Found]]:
        self._no_sampling(order)
        self._one_sample(order)
        rows = contrastive_search(model, top_k=self.top_k, alpha=self.alpha, **order.keywords(self.top_k))
        return [[Found.of(row.token_ids, row.end_id)] for row in rows]


@dataclass(frozen=True, kw_only=True)
class Speculation(Strategy):
    """Speculative decoding; see `llmlab.infer.speculative.speculative`."""

    draft: nnx.Module | PromptLookup = PromptLookup()
    """A cheaper model of the same kind and vocabulary, or a look into the text so far."""
    num_drafted: int = 4

    def write(self, model: nnx.Module, order: Order) -> list[list[Found]]:
        self._one_sample(order)
        found = speculative(
            model, self.draft, num_drafted=self.num_drafted, sampling=order.samplings, **order.keywords()
        )
        return [[Found.of(row.token_ids, row.end_id)] for row in found.rows]
