"""Contrastive search against the paper's equation over whole forward passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmlab.infer.contrastive import contrastive_search
from llmlab.infer.greedy import greedy
from tests.infer.random_models import log_softmax, randomised, tiny, whole
from tests.selection import at_scale_but

PROMPTS = [[5, 9, 2, 7], [3], [11, 4, 6, 8, 12, 2, 13]]
LENGTH = 8


def literal(run: Any, given: Sequence[int], banned: int, top_k: int, alpha: float) -> list[int]:
    """One token at a time, each candidate put into the whole text."""
    text = list(given)
    while len(text) < len(given) + LENGTH:

        def outcome(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
            out = run(np.array([tokens + [0] * (len(given) + LENGTH - len(tokens))]))
            return out.logits[0, : len(tokens)].astype(np.float64), out.last_hidden_state[0, : len(tokens)]

        logits = outcome(text)[0][-1]
        logits[banned] = -np.inf
        probabilities = np.exp(log_softmax(logits))
        scores = {}
        for token in np.argsort(-probabilities)[:top_k].tolist():
            states = outcome([*text, token])[1]
            states = states / np.linalg.norm(states, axis=-1, keepdims=True)
            scores[token] = (1 - alpha) * probabilities[token] - alpha * (states[:-1] @ states[-1]).max()
        text.append(max(scores, key=lambda token: scores[token]))
    return text[len(given) :]


@pytest.mark.parametrize("family", at_scale_but(("llama",), ["llama", "t5"]))
def test_it_writes_what_the_equation_says(family):
    model = randomised(tiny(family), scale=0.8)
    decodes = family == "llama"
    givens = PROMPTS if decodes else [[0]] * 3
    runs = [whole(model)] * 3 if decodes else [whole(model, source) for source in PROMPTS]
    texts = []
    for top_k, alpha in ((4, 0.6), (3, 0.9)):
        full = [literal(run, given, 5, top_k, alpha) for run, given in zip(runs, givens, strict=True)]
        options: dict[str, Any] = {"max_new_tokens": LENGTH, "top_k": top_k, "alpha": alpha, "banned_ids": (5,)}
        found = contrastive_search(model, PROMPTS, **options, batch_size=2)
        assert [list(row.token_ids) for row in found] == full
        assert {row.finish_reason for row in found} == {"length"}
        end = full[0][3]
        found = contrastive_search(model, PROMPTS, **options, eos_id=end)
        assert [list(row.token_ids) for row in found] == [t[: t.index(end)] if end in t else t for t in full]
        assert found[0].finish_reason == "stop"
        texts.append(full)
    assert texts[0] != texts[1]


def test_without_a_penalty_it_is_greedy_decoding():
    model = randomised(tiny("gpt2"))
    found = contrastive_search(model, PROMPTS, max_new_tokens=LENGTH, alpha=0.0, eos_id=4)
    assert [list(row.token_ids) for row in found] == greedy(model, PROMPTS, max_new_tokens=LENGTH, eos_id=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 18}, "top_k=18 is not in 1..17"),
        ({"alpha": 1.5}, r"alpha=1.5 is not in \[0, 1\]"),
        ({"banned_ids": range(17)}, "no token to write"),
    ],
)
def test_numbers_that_make_no_search_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        contrastive_search(randomised(tiny("gpt2")), PROMPTS, max_new_tokens=3, **options)
