"""Greedy decoding and beam search write what transformers writes: committed, and live with the parity extra."""

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmlab.infer.beam import beam_search
from llmlab.infer.greedy import greedy
from llmlab.models.huggingface import load_hf
from tests.infer.reference_generation import (
    BANNED,
    ENDS,
    FAMILIES,
    FIXTURE,
    MODELS,
    NEW_TOKENS,
    PROMPTS,
    SEARCHES,
    beams,
    greedy_tokens,
)


def assert_writes(model: Any, greedily: Sequence[Any], searched: Sequence[Any], atol: float = 1e-4) -> None:
    """Greedy decoding and all searches give these tokens and scores."""
    banned: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_id": ENDS, "batch_size": len(PROMPTS)}
    once = beam_search(model, PROMPTS, num_beams=1, early_stopping=True, banned_ids=BANNED, **banned)
    assert [list(row[0].token_ids) for row in once] == greedily
    plain = greedy(model, PROMPTS, **banned)
    for row, own in zip(plain, greedily, strict=True):
        clean = next((place for place, token in enumerate(row) if token in BANNED), len(row))
        assert row[:clean] == own[:clean]  # greedy() bans nothing
    for rules, expected in zip(SEARCHES, searched, strict=True):
        found = beam_search(model, PROMPTS, banned_ids=BANNED, **banned, **rules)
        for hypotheses, pairs in zip(found, expected, strict=True):
            np.testing.assert_allclose([one.score for one in hypotheses], [score for _, score in pairs], atol=atol)
            assert [list(one.token_ids) for one in hypotheses] == [tokens for tokens, _ in pairs], rules


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.scale
def test_committed_models_write_what_transformers_wrote(family):
    written = json.loads(FIXTURE.read_text())[family]
    lengths = {len(tokens) for search in written["beams"] for pairs in search for tokens, _ in pairs}
    assert {0, NEW_TOKENS} & lengths
    assert len(lengths) > 2
    assert_writes(load_hf(MODELS / family), written["greedy"], written["beams"])


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_write_what_transformers_writes(family, seed, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed (the parity extra)")
    pytest.importorskip("transformers", reason="transformers is not installed (the parity extra)")
    from tests.models.references import build

    model = build(importlib.import_module(f"tests.models.families.{family}").case(seed=seed), 200 + seed)
    model.save_pretrained(tmp_path)
    assert_writes(load_hf(tmp_path), greedy_tokens(model), [beams(model, rules) for rules in SEARCHES])
