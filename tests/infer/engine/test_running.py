"""The engine in its own thread, on a mesh, and in the memory that there is."""

import threading
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.device import Device
from llmlab.infer.engine.engine import Engine
from llmlab.infer.engine.request import Event, Reply, Request, RequestRefused
from llmlab.infer.sampling import GREEDY, Sampling
from llmlab.nn.module import logical_axes, merge, split
from llmlab.sharding.mesh import Mesh
from tests.drawing import built
from tests.infer.engine.tiny import CONFIG, LLAMA, assert_all_free, engine, model, prompt, run, serve, tokenizer

SECONDS = 60


def test_threads_get_their_own_replies_while_others_come_and_go() -> None:
    asked = [Request(prompt(i, 3 + i), sampling=Sampling(seed=i), max_new_tokens=8, user=str(i % 3)) for i in range(12)]
    expected = [replies[0] for replies in serve(engine(), asked)]
    got: list[Reply | None] = [None] * len(asked)

    def client(number: int) -> None:
        noise = served.submit(Request(prompt(100 + number, 9), max_new_tokens=30))
        (got[number],) = served.submit(asked[number]).replies(SECONDS)
        noise.cancel()
        assert noise.replies(SECONDS)[0].finish_reason in ("cancelled", "length", "stop")

    with engine() as served:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(len(asked))]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(SECONDS)
        assert served.drain(SECONDS)
        assert_all_free(served)
    assert got == expected


def test_draining_serves_what_is_there_and_refuses_what_comes() -> None:
    served = engine()
    handle = served.submit(Request(prompt(1, 5), sampling=GREEDY, max_new_tokens=9))
    assert served.drain()
    assert handle.replies(0)[0].finish_reason == "length"
    with pytest.raises(RequestRefused, match="is shutting down"):
        served.submit(Request((1,)))
    served.close()
    with pytest.raises(RequestRefused, match="the engine is closed"):
        served.submit(Request((1,)))
    with pytest.raises(RuntimeError, match="cannot start: the engine is closed"):
        served.start()


def test_closing_cancels_what_has_not_ended() -> None:
    served = engine()
    handles = [served.submit(Request(prompt(1, 5), max_new_tokens=50)) for _ in range(6)]
    served.step()
    assert not served.drain(0.0)
    served.close()
    assert [handle.replies(0)[0].finish_reason for handle in handles] == ["cancelled"] * 6
    assert_all_free(served)
    assert served.stats().finished == {"cancelled": 6}


@pytest.mark.parametrize("broken", ["plan", "finish"])
def test_an_engine_that_breaks_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    served = engine()

    def fail(*_: Any) -> Any:
        raise KeyError("a mistake in the scheduler")

    monkeypatch.setattr(served._scheduler, broken, fail)
    with served:
        handle = served.submit(Request(prompt(1, 5), max_new_tokens=3, n=2))
        for reply in handle.replies(SECONDS):
            assert (reply.finish_reason, "a mistake in the scheduler" in reply.message) == ("error", True)
        with pytest.raises(RequestRefused, match="the engine has failed"):
            served.submit(Request(prompt(1, 5)))


def test_waiting_for_an_engine_that_was_not_started_times_out() -> None:
    handle = engine().submit(Request(prompt(1, 5)))
    with pytest.raises(TimeoutError, match="is the engine started"):
        next(handle.events(timeout=0.01))


def test_a_callback_may_ask_for_more() -> None:
    served = engine()
    later: list[Any] = []

    def again(event: Event) -> None:
        if event.finish_reason is not None:
            later.append(served.submit(Request(prompt(2, 5), max_new_tokens=3)))

    served.submit(Request(prompt(1, 5), max_new_tokens=3)).on_event(again)
    run(served)
    assert later[0].finished


def heads_are_split(served: Engine) -> bool:
    sharding: Any = served._device.pools[0].key.data_BKTH.sharding
    return sharding.spec[:2] == (None, "tensor")


@pytest.mark.scale
def test_on_a_mesh_replies_are_those_of_one_device() -> None:
    asked = [Request(prompt(i, 5 * i + 1), max_new_tokens=20, sampling=Sampling(seed=i), n=1 + i % 2) for i in range(5)]
    placement = Mesh(data=1, tensor=2).build(jax.devices()[:2])
    graphdef, params = split(model())
    placed = jax.device_put(params, placement.shardings(logical_axes(model()), params))
    config = replace(CONFIG, num_blocks=17, preemption="swap")
    served = Engine(merge(graphdef, placed), tokenizer(), config, placement=placement)
    assert heads_are_split(served)
    assert serve(served, asked) == serve(engine(), asked)
    assert served.stats().preemptions > 0
    assert heads_are_split(served)


@pytest.mark.scale
def test_smaller_storage_is_paged_like_any() -> None:
    scored = Sampling(temperature=0, logprobs=0)
    asked = [Request(prompt(i, 5 * i + 1), max_new_tokens=20, sampling=scored) for i in range(5)]
    usual = serve(engine(replace(CONFIG, cache_dtype=jnp.int8)), asked)
    tight = engine(replace(CONFIG, cache_dtype=jnp.int8, num_blocks=17, preemption="swap", prefill_chunk=4))
    assert [reply.token_ids for (reply,) in serve(tight, asked)] == [reply.token_ids for (reply,) in usual]
    assert tight.stats().preemptions > 0
    assert usual != serve(engine(), asked)  # it does round


class _Memory:
    """A device with so much memory."""

    def __init__(self, limit: int, used: int) -> None:
        self.limit, self.used = limit, used

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def test_blocks_take_the_fraction_of_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(block_size=4, max_rows=2, max_length=64, memory_fraction=0.5, prefill_chunk=16)
    block = 2 * 2 * 4 * 2 * 4 * 4  # layers, keys and values, positions, kv heads, head_dim, float32
    windows = 2 * 16  # rows, blocks each
    monkeypatch.setattr(jax, "local_devices", lambda: [_Memory(2 * 100 * block, 20 * block)])
    assert Device(model(), 259, config).config.num_blocks == 100 - 20 - windows
    monkeypatch.setattr(jax, "local_devices", lambda: [_Memory(10**9, 0)])
    assert Device(model(), 259, config).config.num_blocks == 4 * windows
    monkeypatch.setattr(jax, "local_devices", lambda: [_Memory(2 * 60 * block, 20 * block)])
    with pytest.raises(ValueError, match=f"leaves room for 8 blocks of {block} bytes"):
        Device(model(), 259, config)


def test_a_model_without_limit_gets_one_and_a_limit_beyond_the_model_is_refused() -> None:
    assert Device(model(), 259, replace(CONFIG, max_length=None, num_blocks=200)).config.max_length == 2048
    with pytest.raises(ValueError, match="max_length=65 is more than the 64 positions"):
        Device(model("gpt2"), 259, replace(CONFIG, max_length=65))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 12}, "block_size=12 is not a power of two"),
        ({"prefill_chunk": 40}, "prefill_chunk=40 is not a multiple of block_size=16; use 32"),
        ({"max_rows": 0}, "max_rows=0 is not positive"),
        ({"num_blocks": 0}, "num_blocks=0 is not positive; None chooses it"),
        ({"memory_fraction": 1.5}, r"memory_fraction=1.5 is not in \(0, 1\]"),
        ({"max_logprobs": -1}, "max_logprobs=-1 is negative"),
        ({"deterministic": True, "preemption": "recompute"}, "use preemption='swap'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        EngineConfig(**change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_ids": ()}, "the prompt has no tokens"),
        ({"prompt_ids": (1,), "max_new_tokens": 0}, "max_new_tokens=0 is not positive"),
        ({"prompt_ids": (1,), "n": 0}, "n=0 is not positive"),
        ({"prompt_ids": (1,), "stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_a_request_that_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestRefused, match=reason):
        Request(**change)


def test_a_model_of_bfloat16_is_served_in_bfloat16() -> None:
    graphdef, params = split(built(LLAMA, 1))
    half = merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    served = Engine(half, tokenizer(), CONFIG)
    assert served._device.pools[0].key.dtype == jnp.bfloat16
    assert serve(served, [Request((1, 2, 3), max_new_tokens=5, sampling=GREEDY)])[0][0].finish_reason == "length"
