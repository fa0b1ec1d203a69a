"""What a request gets from the engine is what it gets alone, whatever is done to it on the way."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.constraints import Regex
from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.engine import Engine
from llmlab.infer.engine.request import Event, Reply, Request, RequestRefused
from llmlab.infer.generate import generate
from llmlab.infer.sampling import GREEDY, Sampling
from llmlab.nn.module import merge, split
from tests.infer.engine.tiny import (
    CONFIG,
    CONFIGS,
    VOCAB,
    assert_all_free,
    engine,
    ids,
    model,
    prompt,
    run,
    serve,
    tokenizer,
)
from tests.selection import at_scale_but

LENGTHS = (1, 7, 16, 17, 33, 4)
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=3)
MIXED = (
    GREEDY,
    Sampling(seed=1),
    SAMPLED,
    Sampling(temperature=0, logprobs=2),
    Sampling(seed=5, repetition_penalty=1.3, frequency_penalty=0.2, logit_bias=((65, 2.0),), logprobs=3),
    Sampling(min_p=0.1, seed=9, logprobs=0),
)


def requests(sampling: Sampling = GREEDY, new: int = 9, **more: Any) -> list[Request]:
    return [
        Request(prompt(i, length), sampling=sampling, max_new_tokens=new + i, **more)
        for i, length in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("name", at_scale_but(("llama", "windowed"), CONFIGS))
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_engine_writes_what_generate_writes(name: str, sampling: Sampling) -> None:
    texts = ["", "a", "hello there", "The quick brown fox jumps over", "x" * 40]
    spelled = [tokenizer().encode(text, add_special_tokens=True) for text in texts]
    asked = [Request(tuple(row), sampling=sampling, max_new_tokens=30) for row in spelled]
    alone = [generate(model(name), tokenizer(), text, max_new_tokens=30, sampling=sampling)[0] for text in texts]
    served = engine(replace(CONFIG, max_length=None if name == "gpt2" else 128), name)
    for (reply,), completion in zip(serve(served, asked), alone, strict=True):
        assert (reply.token_ids, reply.text) == (completion.token_ids, completion.text)
        assert reply.finish_reason == completion.finish_reason
    assert name != "gpt2" or "position" in [completion.finish_reason for completion in alone]


def test_samples_of_a_request_are_those_that_generate_draws() -> None:
    asked = Request(tuple(tokenizer().encode("Once", add_special_tokens=True)), sampling=SAMPLED, max_new_tokens=9, n=3)
    (replies,) = serve(engine(), [asked])
    drawn = generate(model(), tokenizer(), "Once", max_new_tokens=9, sampling=SAMPLED, n=3)
    assert [reply.token_ids for reply in replies] == [completion.token_ids for completion in drawn]
    assert len({reply.token_ids for reply in replies}) == 3


@pytest.mark.scale
@pytest.mark.parametrize("change", [{"prefill_chunk": 4}, {"steps_per_call": 1}, {"block_size": 16}])
def test_how_the_work_is_cut_does_not_matter(change: dict[str, Any]) -> None:
    usual = serve(engine(), requests())
    assert serve(engine(replace(CONFIG, max_rows=1, **change)), requests()) == usual


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_requests_get_what_they_would_have_got(preemption: Any) -> None:
    asked = [*requests(new=16), *requests(SAMPLED, new=16, n=2)]
    tight = engine(replace(CONFIG, num_blocks=17, preemption=preemption))
    assert serve(tight, asked) == serve(engine(), asked)
    assert tight.stats().preemptions > 3


def test_deterministic_replies_are_to_the_bit_those_of_an_idle_engine() -> None:
    shared = prompt(50, 35)
    asked = [
        Request((*shared[: 20 + 5 * i], i), sampling=sampling, max_new_tokens=14, n=1 + i % 2, prompt_logprobs=i == 3)
        for i, sampling in enumerate(MIXED)
    ]
    config = replace(CONFIG, deterministic=True, num_blocks=24)
    crowded = engine(config)
    together = serve(crowded, [*asked, *requests(), *asked])
    assert crowded.stats().preemptions > 0
    assert crowded.stats().prefix_hit_tokens > 0
    for number, request in enumerate(asked):
        (solo,) = serve(engine(config), [request])
        assert together[number] == solo  # log-probabilities too, all their bits
        assert together[len(asked) + len(LENGTHS) + number] == solo


def test_a_found_prefix_changes_nothing_and_is_not_computed_again() -> None:
    served = engine()
    logprobs = Sampling(temperature=0, logprobs=0)
    first = Request(prompt(7, 30), sampling=logprobs, max_new_tokens=8)
    (before,) = serve(served, [first])
    assert served.stats().prefix_hit_tokens == 0
    (again,) = serve(served, [first])
    assert served.stats().prefix_hit_tokens == 28  # seven full blocks of what is prefilled
    longer = Request((*first.prompt_ids, *before[0].token_ids, 5), sampling=logprobs, max_new_tokens=8)
    (continued,) = serve(served, [longer])
    assert served.stats().prefix_hit_tokens == 28 + 36  # what was generated is found as well
    (fresh,) = serve(engine(), [longer])
    for one, other in ((before[0], again[0]), (continued[0], fresh[0])):
        assert one.token_ids == other.token_ids
        # the same float32 sums, cut differently
        np.testing.assert_allclose(
            [t.logprob for t in one.logprobs or ()], [t.logprob for t in other.logprobs or ()], rtol=0, atol=1e-5
        )
    serve(served, [replace(first, cache_salt="someone else")])
    assert served.stats().prefix_hit_tokens == 28 + 36


def test_without_prefix_caching_nothing_is_kept() -> None:
    served = engine(replace(CONFIG, prefix_caching=False))
    serve(served, requests())
    serve(served, requests())
    assert (served.stats().prefix_hit_tokens, served.stats().blocks_cached) == (0, 0)


def test_log_probabilities_are_those_of_the_whole_forward_pass() -> None:
    request = Request(
        prompt(3, 21), sampling=Sampling(temperature=0, logprobs=2), max_new_tokens=7, prompt_logprobs=True
    )
    served = engine()
    ((reply,),) = serve(served, [request])
    ((again,),) = serve(served, [request])  # the prompt is found, and scored all the same
    graphdef, params = split(model())
    everything = jnp.asarray([[*request.prompt_ids, *reply.token_ids]])
    logits = jax.jit(lambda params: merge(graphdef, params)(everything).logits)(params)[0]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for got in (reply, again):
        assert got.prompt_logprobs is not None
        assert got.logprobs is not None
        assert got.prompt_logprobs[0] is None
        for position, one in enumerate((*got.prompt_logprobs[1:], *got.logprobs)):
            assert one is not None
            assert one.token_id == everything[0, position + 1]
            np.testing.assert_allclose(one.logprob, expected[position, one.token_id], rtol=0, atol=1e-5)
            best = np.argsort(-expected[position])[:2]
            assert [index for index, _ in one.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in one.top], expected[position][best], rtol=0, atol=1e-5)


def test_stop_strings_and_stop_tokens_end_a_sample_before_them() -> None:
    ((free,),) = serve(engine(), [Request(prompt(2, 5), sampling=Sampling(seed=4), max_new_tokens=30)])
    token = free.token_ids[11]
    at = free.token_ids.index(token)
    middle = free.text[3:5]
    by_token, by_text = serve(
        engine(),
        [
            Request(prompt(2, 5), sampling=Sampling(seed=4), max_new_tokens=30, stop_ids=(token,)),
            Request(prompt(2, 5), sampling=Sampling(seed=4), max_new_tokens=30, stop=("never", middle)),
        ],
    )
    assert (by_token[0].token_ids, by_token[0].finish_reason, by_token[0].stop) == (free.token_ids[:at], "stop", token)
    assert by_text[0].text == free.text[: free.text.index(middle)]
    assert (by_text[0].finish_reason, by_text[0].stop) == ("stop", middle)


def test_a_constraint_is_met_beside_requests_without_one() -> None:
    form = Regex("(yes|no), [0-9]{3}")
    asked = [*requests(), Request(prompt(1, 5), sampling=Sampling(seed=2), max_new_tokens=40, constraint=form, n=2)]
    *others, constrained = serve(engine(), asked)
    for reply in constrained:
        assert reply.finish_reason == "stop"
        answer, number = reply.text.split(", ")
        assert answer in ("yes", "no")
        assert len(number) == 3
        assert number.isdigit()
    assert others == serve(engine(), requests())


def test_a_cancelled_request_frees_its_blocks_and_leaves_the_others_alone() -> None:
    served = engine()
    handles = [served.submit(request) for request in requests(new=20)]
    waiting = served.submit(Request(prompt(9, 9)))
    served.step()
    used = served.stats().blocks_total - served.stats().blocks_free
    handles[1].cancel()
    waiting.cancel()
    served.step()
    assert handles[1].finished
    assert waiting.finished
    assert used > 0
    run(served)
    assert_all_free(served)
    assert [handles[1].replies(0)[0].finish_reason, waiting.replies(0)[0].finish_reason] == ["cancelled"] * 2
    whole = [reply.token_ids for (reply,) in serve(engine(), requests(new=20))]
    assert [ids(handle) for number, handle in enumerate(handles) if number != 1] == [*whole[:1], *whole[2:]]
    assert ids(handles[1]) == whole[1][: len(ids(handles[1]))]
    handles[0].cancel()  # too late, and no matter
    assert not served.step()


def poisoned() -> Any:
    """A model in which token 7 is no number."""
    graphdef, params = split(model())
    table = params["embedding"]["tokens"]["table"]
    params = {**params, "embedding": {"tokens": {"table": table.at[7].set(jnp.nan)}}}
    return merge(graphdef, params)


def test_scores_that_are_no_numbers_end_their_request_alone() -> None:
    config = replace(CONFIG, num_blocks=17)
    served = Engine(poisoned(), tokenizer(), config)
    bad = Request((1, 7, 2, 3, 4, 5), max_new_tokens=8)
    good = [r for r in requests() if 7 not in r.prompt_ids]
    replies = serve(served, [good[0], bad, *good[1:], bad])
    assert (replies[1][0].finish_reason, replies[1][0].token_ids) == ("error", ())
    assert "not finite numbers" in replies[1][0].message
    expected = serve(engine(config), good)
    assert [*replies[:1], *replies[2:-1]] == expected
    assert serve(served, good) == expected  # in the blocks that held what was no number


@pytest.mark.parametrize("new", [2, 9])  # both samples end in the step in which the callback fails, or none
def test_a_callback_that_fails_ends_its_request_alone(new: int) -> None:
    served = engine()
    first = served.submit(Request(prompt(1, 7), sampling=SAMPLED, max_new_tokens=new, n=2))
    second = served.submit(requests()[2])

    def fail(_: Event) -> None:
        raise OSError("gone")

    first.on_event(fail)
    run(served)
    assert_all_free(served)
    replies = first.replies(0)
    if new == 9:
        assert [reply.finish_reason for reply in replies] == ["error", "error"]
        assert "OSError: gone" in replies[0].message
    assert second.replies(0)[0].finish_reason == "length"


def test_after_a_failure_of_the_device_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine()
    handles = [served.submit(request) for request in requests()]
    served.step()
    decode, device = served._device.decode, served._device

    def fail(*_: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(device, "decode", fail)
    served.step()
    monkeypatch.setattr(device, "decode", decode)
    run(served)
    assert_all_free(served)
    replies = [handle.replies(0)[0] for handle in handles]
    failed = [reply for reply in replies if reply.finish_reason == "error"]
    assert 0 < len(failed) < len(replies)
    assert all("the device failed: RESOURCE_EXHAUSTED" in reply.message for reply in failed)
    usual = serve(engine(), requests())
    assert [reply for reply in replies if reply.finish_reason != "error"] == [
        reply for (reply,), own in zip(usual, replies, strict=True) if own.finish_reason != "error"
    ]
    assert serve(served, requests()) == usual


def test_nothing_is_compiled_after_the_warm_up() -> None:
    # a shape that no other test has, so that its programs are not there already
    config = EngineConfig(
        block_size=8,
        num_blocks=21,
        max_rows=2,
        max_length=40,
        prefill_chunk=16,
        steps_per_call=3,
        max_logprobs=4,
        preemption="swap",
    )
    served = engine(config)
    served.warm_up()
    compiled = served.stats().compilations
    assert compiled > 0
    shared = prompt(60, 20)
    serve(
        served,
        [
            *(Request(shared[: 5 + 3 * i], sampling=s, max_new_tokens=12, n=1 + i % 2) for i, s in enumerate(MIXED)),
            Request(shared, max_new_tokens=20, constraint=Regex("[a-z]{3}")),
            Request((*shared, 1), max_new_tokens=20, prompt_logprobs=True, stop=("x", "y"), stop_ids=tuple(range(12))),
            Request((1,), max_new_tokens=39, sampling=Sampling(banned_ids=tuple(range(40)), forced_ids=(70, 71))),
        ],
    )
    assert served.stats().compilations == compiled
    tight = engine(replace(config, num_blocks=7, preemption="swap"))  # other pools, and so other programs
    tight.warm_up()
    compiled = tight.stats().compilations
    serve(tight, [Request(prompt(1, 20), max_new_tokens=18), Request(prompt(2, 20), max_new_tokens=18)])
    assert tight.stats().preemptions > 0
    assert tight.stats().compilations == compiled


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request((VOCAB,)), "token 259 of the prompt is not in the vocabulary"),
        (Request((1,), sampling=Sampling(logprobs=5)), "logprobs ask for 5, and the engine has room for 4"),
        (Request((1,), sampling=Sampling(banned_ids=(VOCAB,))), "banned_ids names token 259"),
        (Request((1,), constraint=Regex("(")), "cannot be followed"),
        (Request((1,) * 64), "shorten it to at most 63"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(request_: Request, reason: str) -> None:
    served = engine()
    with pytest.raises(RequestRefused, match=reason):
        served.submit(request_)
    assert not served.step()


@pytest.mark.parametrize("most", [0, 3, 5])
def test_as_many_log_probabilities_may_be_asked_for_as_the_engine_says(most: int) -> None:
    asked = Request(prompt(1, 5), sampling=Sampling(temperature=0, logprobs=most), max_new_tokens=2)
    ((reply,),) = serve(engine(replace(CONFIG, max_logprobs=most, max_rows=1)), [asked])
    assert [len(token.top) for token in reply.logprobs or ()] == [most, most]


def test_events_add_up_to_the_reply() -> None:
    served = engine()
    handle = served.submit(Request(prompt(4, 6), sampling=Sampling(seed=8, logprobs=1), max_new_tokens=11, n=2))
    seen: list[Event] = []
    handle.on_event(seen.append)
    run(served)
    late: list[Event] = []
    handle.on_event(late.append)
    assert seen == late == list(handle.events(timeout=0))
    for number, reply in enumerate(handle.replies(0)):
        events = [event for event in seen if event.sample == number]
        assert sum(len(event.token_ids) for event in events) == 11
        assert "".join(event.text for event in events) == reply.text != ""
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert isinstance(reply, Reply)
