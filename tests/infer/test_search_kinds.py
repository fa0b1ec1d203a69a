"""Searches and speculation with models that remember otherwise than by a slot for each token, or see images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.beam import beam_search
from llmlab.infer.contrastive import contrastive_search
from llmlab.infer.drafts import PromptLookup
from llmlab.infer.greedy import greedy
from llmlab.infer.sampling import GREEDY
from llmlab.infer.speculative import speculative
from llmlab.nn.module import merge, split
from tests.drawing import built
from tests.infer.random_models import log_softmax
from tests.infer.test_cached import CASES

NEW = 6


def scorer(model: Any, kind: str, inputs: dict[str, Any], number: int, given: int) -> Any:
    """Log-probabilities of the token after each place of a text, by a whole forward pass."""
    graphdef, params = split(model)

    @jax.jit
    def forward(params: Any, ids: jax.Array, images: dict[str, jax.Array]) -> jax.Array:
        answer = {"token_type_ids": (jnp.arange(ids.shape[1])[None] >= given).astype(jnp.int32)}
        return merge(graphdef, params)(ids, **images, **(answer if kind == "PaliGemma" else {})).logits[0]

    images = {name: jnp.asarray(value[number : number + 1]) for name, value in inputs.items()}
    return lambda text: log_softmax(np.asarray(forward(params, jnp.array([text]), images)))


@pytest.mark.parametrize("kind", ["Performer", "PaliGemma", "Flamingo"])
@pytest.mark.scale
def test_what_is_found_has_the_scores_of_whole_forward_passes(kind):
    case = CASES[kind]
    model = built(case.config, std=0.4)
    prompts = [list(row[:length]) for row, length in zip(case.rows, case.lengths, strict=True)]
    inputs = dict(case.inputs or {})
    shared: dict[str, Any] = {"max_new_tokens": NEW, "num_tokens": 16, "inputs": inputs or None}
    written = greedy(model, prompts, eos_id=None, **shared)
    searched = beam_search(model, prompts, num_beams=3, num_return_sequences=3, eos_id=3, **shared)
    for number, prompt in enumerate(prompts):
        log_of = scorer(model, kind, inputs, number, len(prompt))
        log_SV = log_of([*prompt, *written[number]])[len(prompt) - 1 : -1, :16]
        assert written[number] == np.argmax(log_SV, axis=-1).tolist()
        for one in searched[number]:
            tokens = [*one.token_ids, *([3] if one.finish_reason == "stop" else [])]
            log_SV = log_of([*prompt, *tokens, *[0] * (NEW - len(tokens))])[len(prompt) - 1 :, :16]
            log_SV = log_softmax(log_SV)  # over what may be written
            own = sum(log_SV[place, token] for place, token in enumerate(tokens))
            assert abs(one.log_probability - own) < 1e-4
    assert [list(r.token_ids) for r in contrastive_search(model, prompts, alpha=0.0, top_k=2, **shared)] == written
    if kind == "Performer":
        with pytest.raises(ValueError, match="keeps sums, of which nothing can be taken back"):
            speculative(model, PromptLookup(), prompts, **shared)
        return
    for draft in (model, PromptLookup()):
        found = speculative(model, draft, prompts, num_drafted=2, sampling=GREEDY, **shared)
        assert [list(row.token_ids) for row in found.rows] == written
        assert draft is not model or found.statistics.acceptance_rate == 1
