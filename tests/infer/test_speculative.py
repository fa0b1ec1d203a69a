"""What speculation writes has the model's own distribution, whatever the draft proposes."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llmlab.infer.drafts import Drawing, LookupDrafter, PromptLookup, Proposal
from llmlab.infer.greedy import greedy
from llmlab.infer.sampling import GREEDY, Sampling, SamplingRows
from llmlab.infer.speculative import _checked, _run, accept, speculative
from llmlab.nn.module import merge, split
from tests.infer.random_models import log_softmax, programs, randomised, tiny, whole

PROMPTS = [[5, 9, 2, 7], [3], [11, 4, 6, 11, 4, 6, 13]]
SAMPLES = 100_000


def tables(rng: np.random.Generator, vocab: int, depth: int) -> dict[tuple[int, ...], np.ndarray]:
    """A distribution after every prefix; some tokens have no mass."""
    found = {}
    for length in range(depth + 1):
        for prefix in itertools.product(range(vocab), repeat=length):
            mass = rng.exponential(size=vocab) * (rng.random(vocab) < 0.8)
            mass[rng.integers(vocab)] += 0.1
            found[prefix] = mass / mass.sum()
    return found


@pytest.mark.parametrize(("vocab", "drafted"), [(2, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize("proposes", ["draws", "one token", "nothing"])
def test_the_distribution_of_what_is_written_is_the_models_exactly(vocab, drafted, proposes):
    rng = np.random.default_rng(vocab + drafted)
    p, q = tables(rng, vocab, drafted), tables(rng, vocab, drafted)
    if proposes == "one token":
        q = {prefix: np.eye(vocab)[rng.integers(vocab)] for prefix in q}
    if proposes == "nothing":
        q = {prefix: np.zeros(vocab) for prefix in q}
    drafts = list(itertools.product(range(vocab), repeat=drafted))
    with jax.enable_x64(True):
        q_BPV = jnp.array([[q[draft[:i]] for i in range(drafted)] for draft in drafts])
        p_BQV = jnp.array([[p[draft[:i]] for i in range(drafted + 1)] for draft in drafts])
        accepted_BP, other_BQV = (np.asarray(part) for part in accept(p_BQV, q_BPV, jnp.array(drafts)))
    assert accepted_BP.dtype == np.float64
    # Every way to write: a draft, the place of its first rejection, the token written there; then the model alone.
    mass: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(vocab), repeat=drafted + 1), 0.0)
    for draft, accepted_P, other_QV in zip(drafts, accepted_BP, other_BQV, strict=True):
        drawn = np.prod([q[draft[:i]][token] for i, token in enumerate(draft)])
        if proposes == "nothing":
            drawn = vocab**-drafted  # whatever stands there
        for place in range(drafted + 1):
            reached = drawn * np.prod(accepted_P[:place])
            rejected = 1.0 if place == drafted else 1 - accepted_P[place]
            for rest in itertools.product(range(vocab), repeat=drafted + 1 - place):
                tokens = (*draft[:place], *rest)
                alone = np.prod([p[tokens[:i]][tokens[i]] for i in range(place + 1, drafted + 1)])
                mass[tokens] += reached * rejected * other_QV[place, rest[0]] * alone
    for tokens, written in mass.items():
        own = np.prod([p[tokens[:i]][token] for i, token in enumerate(tokens)])
        assert abs(written - own) < 1e-12
    assert abs(sum(mass.values()) - 1) < 1e-12


def test_acceptances_and_tokens_per_step_are_what_the_theory_says():
    rng = np.random.default_rng(0)
    vocab, drafted = 5, 3
    p, q = rng.dirichlet(np.ones(vocab)), rng.dirichlet(np.ones(vocab))
    rate = 1 - 0.5 * np.abs(p - q).sum()
    token_BP = jnp.asarray(rng.choice(vocab, (SAMPLES, drafted), p=q), jnp.int32)
    q_BPV = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (SAMPLES, drafted, vocab))
    p_BQV = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (SAMPLES, drafted + 1, vocab))
    proposal = Proposal(token_BP, jnp.full(SAMPLES, drafted), q_BPV)
    place_BQ = jnp.broadcast_to(jnp.arange(drafted + 1), (SAMPLES, drafted + 1))
    drawing = Drawing(SamplingRows.of([Sampling(seed=1)] * SAMPLES, samples=range(SAMPLES)), None)
    accepted_B, token_BQ = (np.asarray(part) for part in jax.jit(_checked)(p_BQV, proposal, place_BQ, drawing))
    expected = (1 - rate ** (drafted + 1)) / (1 - rate)
    # Five standard errors.
    assert abs((accepted_B > 0).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / SAMPLES)
    assert abs((accepted_B + 1).mean() - expected) < 5 * (accepted_B + 1).std() / np.sqrt(SAMPLES)
    tested = np.minimum(accepted_B + 1, drafted).sum()
    assert abs(accepted_B.sum() / tested - rate) < 5 * np.sqrt(rate * (1 - rate) / tested)
    # Every token that is written comes from p, whatever was written before it.
    for place in range(drafted + 1):
        written = token_BQ[accepted_B >= place, place]
        assert fits(np.bincount(written, minlength=vocab), p)
        assert not fits(np.bincount(written, minlength=vocab), q)


def fits(counts: np.ndarray, p: np.ndarray) -> bool:
    """Whether a chi-square test at 0.1% lets these counts come from p."""
    assert counts[p == 0].sum() == 0
    counts, p = counts[p > 0], p[p > 0]
    return bool(scipy.stats.chisquare(counts, counts.sum() * p / p.sum()).pvalue > 1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "t5"])
@pytest.mark.scale
def test_greedy_speculation_writes_what_greedy_decoding_writes(family):
    model, length = randomised(tiny(family)), 14
    options: dict[str, Any] = {"max_new_tokens": length, "sampling": GREEDY}
    own = greedy(model, PROMPTS, max_new_tokens=length, eos_id=None)
    ends = [own[0][6], own[1][9]]
    until = greedy(model, PROMPTS, max_new_tokens=length, eos_id=ends)
    assert len({len(row) for row in until}) > 1
    drafts: dict[str, Any] = {
        "itself": model,
        "another": randomised(tiny(family), seed=5),
        "lookup": PromptLookup(),
        "nearly": perturbed(model),
    }
    rates = {}
    for name, draft in drafts.items():
        found = speculative(model, draft, PROMPTS, **options, num_drafted=3)
        assert [list(row.token_ids) for row in found.rows] == own, name
        assert found.statistics.tokens == len(PROMPTS) * (length - 1)
        rates[name] = found.statistics.acceptance_rate
        stopped = speculative(model, draft, PROMPTS, **options, num_drafted=3, eos_id=ends)
        assert [list(row.token_ids) for row in stopped.rows] == until, name
        assert {row.finish_reason for row in stopped.rows} <= {"stop", "length"}
    assert rates["itself"] == 1
    assert 0 <= rates["another"] < rates["nearly"] < 1
    # All proposals accepted: four tokens a step, but for the last step of each row.
    best = speculative(model, model, PROMPTS, **options, num_drafted=3).statistics
    assert best.steps == len(PROMPTS) * -(-(length - 1) // 4)


def perturbed(model: Any) -> Any:
    """A draft that often agrees with the model."""
    graphdef, params = split(model)
    rng = np.random.default_rng(7)
    return merge(graphdef, jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), params))


@pytest.mark.parametrize(
    ("proposes", "prompt", "count"),
    [
        ("model", [2], SAMPLES // 10),
        ("lookup", [1, 2, 1], SAMPLES // 10),
        pytest.param("model", [2], SAMPLES, marks=pytest.mark.scale),
        pytest.param("lookup", [1, 2, 1], SAMPLES, marks=pytest.mark.scale),
    ],
)
def test_rows_have_the_models_distribution(proposes, prompt, count):
    vocab = 4
    model = randomised(tiny("llama", vocab, embed_dim=8), scale=0.5)
    draft: Any = PromptLookup(max_ngram=1) if proposes == "lookup" else perturbed(model)
    samplings = [Sampling(temperature=1.3, top_k=3, seed=seed) for seed in range(count)]
    found = speculative(model, draft, [prompt] * count, max_new_tokens=3, num_drafted=2, sampling=samplings)
    rows = np.array([row.token_ids for row in found.rows])
    every = np.array(list(itertools.product(range(vocab), repeat=3)))
    logits = whole(model)(np.concatenate([np.tile(prompt, (len(every), 1)), every], axis=1)).logits[
        :, len(prompt) - 1 : -1
    ]
    kept = logits >= np.sort(logits, axis=-1)[..., 1:2]  # three of four
    p_NSV = np.exp(log_softmax(np.where(kept, logits / 1.3, -np.inf)))
    mass = np.take_along_axis(p_NSV, every[..., None], axis=-1)[..., 0].prod(axis=1)
    counts = np.bincount(rows @ [vocab**2, vocab, 1], minlength=vocab**3)
    assert fits(counts, mass)
    # The same test tells the model without top-k and temperature from it.
    plain_NSV = np.exp(log_softmax(logits))
    plain = np.take_along_axis(plain_NSV, every[..., None], axis=-1)[..., 0].prod(axis=1)
    assert not fits(counts, plain)
    assert 0.1 < found.statistics.acceptance_rate < 0.99
    assert found.statistics.tested <= found.statistics.proposed


RULES = (
    Sampling(temperature=0, repetition_penalty=1.7, banned_ids=(4, 9)),
    Sampling(temperature=0, frequency_penalty=3.0, presence_penalty=2.0, forced_ids=(6, 6)),
    Sampling(temperature=0, logit_bias=((8, 9.0), (2, -9.0)), forced_last_id=12),
)


def literal(model: Any, prompt: list[int], rule: Sampling, length: int) -> list[int]:
    """Greedy decoding under rules, one token and one whole forward pass at a time."""
    run, text = whole(model), list(prompt)
    while len(text) < len(prompt) + length:
        scores = run(np.array([text + [0] * (len(prompt) + length - len(text))])).logits[0, len(text) - 1].copy()
        for token, more in rule.logit_bias:
            scores[token] += more
        scores[list(rule.banned_ids)] = -np.inf
        for token in set(text):
            scores[token] *= rule.repetition_penalty if scores[token] < 0 else 1 / rule.repetition_penalty
        new = text[len(prompt) :]
        for token in set(new):
            scores[token] -= rule.presence_penalty + rule.frequency_penalty * new.count(token)
        best = int(np.argmax(scores))
        if len(new) < len(rule.forced_ids):
            best = rule.forced_ids[len(new)]
        elif len(new) == length - 1 and rule.forced_last_id is not None:
            best = rule.forced_last_id
        text.append(best)
    return text[len(prompt) :]


@pytest.mark.scale
def test_each_row_follows_its_own_rules():
    model, length = randomised(tiny("llama")), 9
    expected = [literal(model, prompt, rule, length) for prompt, rule in zip(PROMPTS, RULES, strict=True)]
    assert expected != greedy(model, PROMPTS, max_new_tokens=length, eos_id=None)
    for draft in (model, perturbed(model), PromptLookup()):
        found = speculative(model, draft, PROMPTS, max_new_tokens=length, num_drafted=3, sampling=RULES)
        assert [list(row.token_ids) for row in found.rows] == expected
        if draft is model:  # with the same rules a model agrees with itself
            assert found.statistics.acceptance_rate == 1


def test_a_row_does_not_depend_on_its_batch_and_values_do_not_compile_again():
    model, draft = randomised(tiny("llama"), scale=0.5), randomised(tiny("llama"), seed=5, scale=0.5)

    def sampled(prompts: list[list[int]], **changes: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": 9, "sampling": Sampling(seed=4), "batch_size": 3}
        return speculative(model, draft, prompts, **options | changes).rows

    together = sampled(PROMPTS)
    compiled = programs(_run)
    assert sampled(PROMPTS[:1])[0] == together[0]
    assert sampled(PROMPTS[:2]) == together[:2]
    other = sampled(PROMPTS, sampling=Sampling(seed=5), eos_id=3, max_new_tokens=11)
    assert other != together
    assert programs(_run) == compiled


def test_lookup_proposes_what_followed_the_last_tokens_before():
    drawing = Drawing(SamplingRows.of([GREEDY]), None)

    def proposed(text: list[int], source: list[int], lookup: PromptLookup, count: int = 4) -> list[int]:
        text_BT = jnp.array([text + [7] * (12 - len(text))])
        drafter = LookupDrafter(lookup, count, 20)
        source_BT = jnp.array([source], jnp.int32).reshape(1, len(source))
        proposal, _ = drafter.propose({}, source_BT, text_BT, jnp.array([len(text)]), drawing)
        tokens = proposal.token_BP[0, : int(proposal.count_B[0])].tolist()
        one_hot = np.eye(20)[tokens].reshape(-1, 20)
        np.testing.assert_array_equal(proposal.q_BPV[0], np.pad(one_hot, ((0, count - len(tokens)), (0, 0))))
        return tokens

    three = PromptLookup()
    assert proposed([1, 2, 3, 4, 5, 6, 2, 3], [], three) == [4, 5, 6, 2]
    assert proposed([9, 2, 3, 8, 1, 2, 3, 5, 2, 3], [], three) == [5, 2, 3, 5]  # the later one, going on with itself
    assert proposed([1, 2, 3, 8, 4, 2, 3, 5, 1, 2, 3], [], three) == [8, 4, 2, 3]  # the longer one
    assert proposed([6, 6], [], three) == [6, 6, 6, 6]
    assert proposed([1, 2, 3], [], three) == []
    assert proposed([1, 2, 5, 1], [], PromptLookup(min_ngram=2)) == []
    assert proposed([0, 12], [11, 12, 13, 14, -1, -1], three) == [13, 14]  # from the source, up to its end


def test_a_source_is_looked_up_too():
    model = randomised(tiny("t5"))
    found = speculative(model, PromptLookup(max_ngram=1), [[2, 3, 4, 5, 6, 7, 8, 9] * 2], max_new_tokens=6)
    assert found.statistics.proposed > 0


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        ("t5", {}, "the draft is of EncoderDecoder and the model of Transformer"),
        ("small", {}, "the draft has 9 tokens and the model writes 17"),
        ("gpt2", {"max_new_tokens": 25}, "there are 24 positions"),
        ("gpt2", {"num_drafted": 0}, "num_drafted=0 is not positive"),
        ("gpt2", {"sampling": Sampling(logprobs=1)}, "reports no log-probabilities"),
        ("gpt2", {"sampling": Sampling(banned_ids=(17,))}, "names token 17"),
        ("gpt2", {"sampling": [GREEDY]}, "1 values for 3 prompts"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(draft, options, message):
    configs = {"t5": tiny("t5"), "small": tiny("llama", 9), "gpt2": tiny("gpt2")}
    model = randomised(tiny("llama"))
    with pytest.raises(ValueError, match=message):
        speculative(model, randomised(configs[draft]), PROMPTS, **{"max_new_tokens": 4, **options})
    with pytest.raises(ValueError, match="min_ngram=3 is not in"):
        PromptLookup(max_ngram=2, min_ngram=3)
