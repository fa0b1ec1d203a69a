"""Beam search against exhaustive search and against a literal search over whole forward passes."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from llmlab.infer.beam import _search, beam_search
from llmlab.infer.greedy import greedy
from tests.infer.random_models import log_softmax, next_log_probabilities, programs, randomised, tiny, whole
from tests.selection import at_scale_but

PROMPTS = [[5, 9, 2, 7], [3], [11, 4, 6, 8, 12, 2, 13]]
ENDS = [1, 4, 13]
LENGTH = 7

Scored = tuple[float, float, tuple[int, ...]]
"""Score, log-probability, new tokens with their end."""


def all_sequences(
    model: Any, given: list[int], source: list[int] | None, vocab: int, length: int, end: int
) -> dict[tuple[int, ...], float]:
    """Log-probability of every sequence there is, its end included."""
    every = np.array(list(itertools.product(range(vocab), repeat=length)))
    rows = np.concatenate([np.tile(given, (len(every), 1)), every], axis=1)
    log_NSV = log_softmax(whole(model, source)(rows).logits[:, len(given) - 1 : -1])
    log_NS = np.take_along_axis(log_NSV, every[..., None], axis=-1)[..., 0]
    found = {}
    for tokens, log_S in zip(every.tolist(), log_NS, strict=True):
        stop = tokens.index(end) + 1 if end in tokens else length
        found[tuple(tokens[:stop])] = float(log_S[:stop].sum())
    return found


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_wide_beam_is_exhaustive_search(family):
    vocab, length, end = 4, 4, 1
    model = randomised(tiny(family, vocab), scale=0.6)
    given, source = ([2, 3, 0], None) if family == "llama" else ([0], [2, 3, 3])
    every = all_sequences(model, given, source, vocab, length, end)
    width = 3**3 * 4  # 27 prefixes of three tokens without an end, each with 4 continuations
    for power, minimum, banned in ((1.0, 0, ()), (0.0, 0, ()), (-0.5, 2, ()), (2.0, 0, (2,))):
        allowed = {
            tokens: log / len(tokens) ** power
            for tokens, log in every.items()
            if not set(tokens) & set(banned) and (tokens[-1] != end or len(tokens) > minimum)
        }
        best = sorted(allowed, key=lambda tokens: -allowed[tokens])[:width]
        found = beam_search(
            model,
            [source or given],
            max_new_tokens=length,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=power,
            early_stopping="never",
            eos_id=end,
            banned_ids=banned,
            min_new_tokens=minimum,
        )[0]
        tokens = [(*one.token_ids, end) if one.finish_reason == "stop" else one.token_ids for one in found]
        assert len(set(tokens)) == len(best)
        # 1e-4: sums of four float32 log-probabilities of size 10
        np.testing.assert_allclose([one.score for one in found], [allowed[t] for t in best], rtol=0, atol=1e-4)
        np.testing.assert_allclose([one.log_probability for one in found], [every[t] for t in tokens], atol=1e-4)
        assert tokens[:5] == best[:5]


def literal(
    after: Callable[[Sequence[int]], np.ndarray],
    given: Sequence[int],
    *,
    beams: int,
    groups: int,
    penalty: float,
    power: float,
    early: Any,
    minimum: int = 0,
) -> list[Scored]:
    """Beam search in groups, one prefix at a time."""
    size = beams // groups
    living: list[list[Scored]] = [[(0.0, 0.0, ())] for _ in range(groups)]
    ended: list[list[Scored]] = [[] for _ in range(groups)]
    over = [False] * groups
    for count in range(1, LENGTH + 1):
        used: dict[int, int] = {}
        for group in range(groups):
            candidates: list[Scored] = []
            for score, log, tokens in living[group]:
                for token, more in enumerate(after([*given, *tokens])):
                    if token in ENDS and count <= minimum:
                        continue
                    paid = penalty * used.get(token, 0)
                    candidates.append((score + more - paid, log + more, (*tokens, token)))
            candidates.sort(key=lambda one: -one[0])
            if not over[group]:
                done = [one for one in candidates[:size] if one[2][-1] in ENDS or count == LENGTH]
                ended[group] += [(score / count**power, log, tokens) for score, log, tokens in done]
                ended[group] = sorted(ended[group], key=lambda one: -one[0])[:size]
            living[group] = [one for one in candidates if one[2][-1] not in ENDS][:size]
            for _, _, tokens in living[group]:
                used[tokens[-1]] = used.get(tokens[-1], 0) + 1
            if len(ended[group]) == size:
                reach = LENGTH if early == "never" and power > 0 else count
                best = living[group][0][0] / reach**power
                over[group] |= early is True or best <= ended[group][-1][0]
    return sorted(itertools.chain(*ended), key=lambda one: -one[0])


RULES: list[dict[str, Any]] = [
    {"beams": 3, "groups": 1, "penalty": 0.0, "power": 1.0, "early": False},
    {"beams": 3, "groups": 1, "penalty": 0.0, "power": 1.0, "early": True},
    {"beams": 3, "groups": 1, "penalty": 0.0, "power": 2.0, "early": "never"},
    {"beams": 3, "groups": 1, "penalty": 0.0, "power": -1.0, "early": "never", "minimum": 3},
    {"beams": 6, "groups": 3, "penalty": 0.0, "power": 1.0, "early": False},
    {"beams": 6, "groups": 3, "penalty": 1.5, "power": 1.0, "early": False},
    {"beams": 6, "groups": 3, "penalty": 0.7, "power": 0.0, "early": True, "minimum": 2},
]


@pytest.mark.parametrize("family", at_scale_but(("llama",), ["llama", "bart"]))
def test_it_finds_what_a_literal_search_over_whole_forward_passes_finds(family):
    model = randomised(tiny(family), scale=0.7)
    decodes = family == "llama"
    givens = PROMPTS if decodes else [[2]] * 3
    searches = [
        next_log_probabilities(model, len(given) + LENGTH, None if decodes else source)
        for given, source in zip(givens, PROMPTS, strict=True)
    ]
    texts = set()
    for rules in RULES:
        found = beam_search(
            model,
            PROMPTS,
            max_new_tokens=LENGTH,
            num_beams=rules["beams"],
            num_return_sequences=rules["beams"],
            num_groups=rules["groups"],
            diversity_penalty=rules["penalty"],
            length_penalty=rules["power"],
            early_stopping=rules["early"],
            min_new_tokens=rules.get("minimum", 0),
            eos_id=ENDS,
        )
        for hypotheses, given, after in zip(found, givens, searches, strict=True):
            expected = literal(after, given, **rules)
            ids = [tokens[:-1] if tokens[-1] in ENDS else tokens for _, _, tokens in expected]
            assert [one.token_ids for one in hypotheses] == ids, rules
            assert [one.finish_reason == "stop" for one in hypotheses] == [t[-1] in ENDS for _, _, t in expected]
            np.testing.assert_allclose([one.score for one in hypotheses], [one[0] for one in expected], atol=1e-4)
            logs = [one.log_probability for one in hypotheses]
            np.testing.assert_allclose(logs, [one[1] for one in expected], atol=1e-4)
        texts.add(tuple(one.token_ids for one in found[0]))
    assert len(texts) > len(RULES) // 2  # the rules make a difference


def test_one_beam_that_stops_at_its_first_end_is_greedy_decoding():
    model = randomised(tiny("gpt2"))
    found = beam_search(model, PROMPTS, max_new_tokens=LENGTH, num_beams=1, early_stopping=True, eos_id=ENDS)
    assert [list(row[0].token_ids) for row in found] == greedy(model, PROMPTS, max_new_tokens=LENGTH, eos_id=ENDS)


def test_rows_do_not_depend_on_their_batch_and_values_do_not_compile_again():
    model = randomised(tiny("llama"), scale=0.7)

    def search(prompts: list[list[int]], **changes: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": LENGTH, "num_beams": 3, "eos_id": 4, "num_return_sequences": 2}
        return beam_search(model, prompts, **options | changes)

    together = search(PROMPTS, batch_size=4)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = search([prompt], batch_size=4)
        assert [(one.token_ids, one.finish_reason) for one in alone] == [(o.token_ids, o.finish_reason) for o in found]
        # Alone a prompt is padded to another length, whose sums some processors add up in another order.
        for one, other in zip(alone, found, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-5)
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
    compiled = programs(_search)
    others = {"length_penalty": 0.5, "eos_id": 7, "banned_ids": (3,), "max_new_tokens": 9, "min_new_tokens": 2}
    assert search(PROMPTS, batch_size=4, early_stopping=True, **others) != together
    assert programs(_search) == compiled


def test_what_cannot_be_written_is_not_found():
    model = randomised(tiny("llama"), scale=0.7)
    options: dict[str, Any] = {"num_beams": 8, "num_return_sequences": 8, "early_stopping": "never"}
    found = beam_search(model, [[3]], max_new_tokens=2, num_tokens=4, banned_ids=(0, 3), eos_id=1, **options)[0]
    assert {(one.token_ids, one.finish_reason) for one in found} == {
        ((), "stop"),
        ((2,), "stop"),
        ((2, 2), "length"),
    }
    assert beam_search(model, [], max_new_tokens=2) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0 is not positive"),
        ({"num_return_sequences": 5}, "not in 1..4"),
        ({"num_groups": 3}, "groups of one size"),
        ({"diversity_penalty": 0.5}, "only groups pay it"),
        ({"num_groups": 2, "diversity_penalty": -0.5}, "not negative"),
        ({"early_stopping": "always"}, "early_stopping='always'"),
        ({"eos_id": 17}, r"eos_id=\[17\] are no tokens"),
        ({"num_tokens": 18}, "not in 1..17"),
        ({"max_new_tokens": 25}, "there are 24 positions"),
    ],
)
def test_numbers_that_make_no_search_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        beam_search(randomised(tiny("gpt2")), PROMPTS, **{"max_new_tokens": 4, **options})
