"""A request while it is served: its samples' texts as they grow, and the news of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmlab.infer.completion import Limits, Row, token_logprob
from llmlab.infer.constraints import Matcher
from llmlab.infer.engine.programs import Drawn
from llmlab.infer.engine.request import Event, Handle, TokenLogprobs
from llmlab.infer.sampling import Logprobs
from llmlab.infer.stopping import GrowingText
from llmlab.tokenizers import Tokenizer


@dataclass(eq=False)
class Work:
    """See the module's docstring."""

    handle: Handle
    rows: list[Row]
    """Of each sample."""
    pieces: list[list[str]]
    """New text of each sample that was not told yet."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])

    @classmethod
    def of(cls, handle: Handle, tokenizer: Tokenizer, max_length: int, matchers: Sequence[Matcher | None]) -> "Work":
        """A request of which nothing is done; `matchers` follow the constraint of each sample."""
        request = handle.request
        stop_ids = set(request.stop_ids)
        if request.stop_at_eos and tokenizer.eos_id is not None:
            stop_ids.add(tokenizer.eos_id)
        positions = max_length + 1 - len(request.prompt_ids)
        limits = Limits(frozenset(stop_ids), request.max_new_tokens, positions)
        pieces: list[list[str]] = [[] for _ in matchers]
        rows = [
            Row(
                number,
                GrowingText(tokenizer, request.stop, after=request.prompt_ids),
                limits,
                top=request.sampling.logprobs,
                stream=lambda number, text: pieces[number].append(text),
                matcher=matcher,
            )
            for number, matcher in enumerate(matchers)
        ]
        return cls(handle, rows, pieces)

    def take(self, sample: int, column: int, drawn: Drawn) -> list[int]:
        """Gives a sample the tokens that were drawn for it; those that it took, until it ended."""
        count = int(drawn.count_B[column])
        if not drawn.finite_B[column]:
            count -= 1  # the last one was drawn from what are no numbers
        tokens = drawn.token_SB[:count, column].tolist()
        scored = self.handle.request.sampling.logprobs is not None
        taken = self.rows[sample].extend(tokens, lambda step: _at(drawn.logprobs, step, column) if scored else None)
        return tokens[:taken]

    def score(self, start: int, next_ids: Sequence[int], scores: Logprobs) -> None:
        """Keeps log-probabilities of the prompt's tokens that follow the positions from `start` on."""
        del self.prompt_logprobs[start + 1 :]  # those of a prefill that was preempted
        top = self.handle.request.sampling.logprobs or 0
        self.prompt_logprobs += [
            token_logprob(token, _at(scores, number, 0), top) for number, token in enumerate(next_ids)
        ]

    def event(self, sample: int, known: int, **more: Any) -> Event:
        """What is new of a sample of which `known` tokens were told."""
        row, text = self.rows[sample], "".join(self.pieces[sample])
        self.pieces[sample].clear()
        scored = None
        if self.handle.request.prompt_logprobs and sample == 0 and known == 0:
            scored = tuple(self.prompt_logprobs)
        return Event(
            sample=sample,
            token_ids=tuple(row.tokens[known:]),
            text=text,
            logprobs=None if row.logprobs is None else tuple(row.logprobs[known:]),
            prompt_logprobs=scored,
            **more,
        )


def _at(logprobs: Logprobs, step: int, column: int) -> Logprobs:
    """Of one token."""
    return Logprobs(
        np.asarray(logprobs.chosen_B)[step, column],
        np.asarray(logprobs.top_id_BN)[step, column],
        np.asarray(logprobs.top_BN)[step, column],
    )
