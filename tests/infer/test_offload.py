"""Layers in the host's memory: the same numbers, from weights that are where they should be and come when needed."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import llmlab
from llmlab.commands.convert import main as convert
from llmlab.commands.serve_model import _cast
from llmlab.infer import decoding, joined
from llmlab.infer import offload as offload_module
from llmlab.infer import unstacked as unstacked_module
from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.device import Device
from llmlab.infer.engine.engine import Engine
from llmlab.infer.engine.request import Request
from llmlab.infer.joined import JoinedAttention
from llmlab.infer.offload import OffloadedLayer, check_offload, offload, offloaded_bytes
from llmlab.infer.sampling import GREEDY
from llmlab.infer.steps import EncoderDecoderSteps, prepare
from llmlab.models import paligemma, reformer
from llmlab.nn.module import merge, num_parameters, split
from llmlab.sharding import Mesh
from llmlab.sharding.memory import DEVICE, HOST
from tests.drawing import built
from tests.infer.engine import tiny as tiny_engine
from tests.infer.offloading import decode_call, in_host_memory
from tests.infer.random_models import randomised, tiny
from tests.models.references import FIXTURES

LLAMA = tiny("llama")
LOCAL = dataclasses.replace(LLAMA.pattern[0], mixer=dataclasses.replace(LLAMA.pattern[0].mixer, window=3))
CONFIGS = {
    "llama": LLAMA,
    "two kinds of layers and a rest": dataclasses.replace(LLAMA, num_layers=3, pattern=(LOCAL, LLAMA.pattern[0])),
    "gpt2": tiny("gpt2"),
    "t5": tiny("t5"),
}
IDS = np.array([[5, 9, 2, 7], [3, 1, 8, 8]], np.int32)


def written(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Five tokens after the prompt, the best ones, and the scores that they have: from a loop on the device."""
    steps, params = prepare(model)
    inputs = {"input_ids": jnp.asarray(IDS)} if isinstance(steps, EncoderDecoderSteps) else None

    # Without the option, on a CPU some bfloat16 numbers of the model on the device would have more bits.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        position_BS = jnp.broadcast_to(jnp.arange(4), IDS.shape)
        hidden_BSD, state = steps.prefill(
            params, steps.new_state(2, 12, inputs=inputs), jnp.asarray(IDS), position_BS, inputs
        )

        def step(carry: Any, position: jax.Array) -> Any:
            state, logits_BV = carry
            token_B1 = jnp.argmax(logits_BV, axis=-1)[:, None].astype(jnp.int32)
            hidden_BSD, state = steps.step(params, state, token_B1, jnp.full((2, 1), position))
            return (state, steps.project(params, hidden_BSD[:, 0])), (token_B1, logits_BV)

        start = state, steps.project(params, hidden_BSD[:, -1])
        return jax.lax.scan(step, start, jnp.arange(4, 9))[1]

    token_SB1, logits_SBV = run(params)
    return np.asarray(token_SB1), np.asarray(logits_SBV)


def memory_kinds(model: Any) -> dict[str, str]:
    """The kind of memory that each parameter is in."""
    flat = jax.tree_util.tree_flatten_with_path(split(model)[1])[0]
    return {"/".join(str(key.key) for key in path): leaf.sharding.memory_kind for path, leaf in flat}


def in_host(model: Any) -> set[str]:
    """Layers whose parameters are all in the host's memory; asserts that all others' are on the device."""
    kinds = memory_kinds(model)
    assert set(kinds.values()) <= {HOST, DEVICE}
    of_layer: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        layer = re.match(r"(.*remainder/\d+)/", name)
        of_layer.setdefault(layer[1] if layer else name, set()).add(kind)
    assert all(len(kinds) == 1 for kinds in of_layer.values())
    return {name for name, kinds in of_layer.items() if kinds == {HOST}}


@pytest.mark.scale
@pytest.mark.parametrize(
    ("name", "dtype", "num_layers", "expected"),
    [
        ("two kinds of layers and a rest", None, 2, {"stack/remainder/1", "stack/remainder/2"}),
        ("gpt2", "bfloat16", 2, {"stack/remainder/0", "stack/remainder/1"}),
        ("t5", None, 3, {"encoder/stack/remainder/0", "encoder/stack/remainder/1", "decoder/stack/remainder/1"}),
    ],
)
def test_the_last_layers_are_in_the_hosts_memory_and_the_numbers_are_the_same(
    name: str, dtype: str | None, num_layers: int, expected: set[str]
) -> None:
    """To the bit. Of an encoder-decoder, the layers that every step applies go last."""
    given = randomised(CONFIGS[name])
    model, moved = _cast(given, dtype), offload(_cast(in_host_memory(given), dtype), num_layers)
    assert in_host(moved) == expected
    assert num_parameters(split(moved)[1]) == num_parameters(split(model)[1])
    assert len(offloaded_bytes(moved)) == num_layers
    kinds, leaves = memory_kinds(moved).values(), jax.tree.leaves(split(moved)[1])
    in_host_bytes = sum(leaf.nbytes for kind, leaf in zip(kinds, leaves, strict=True) if kind == HOST)
    assert sum(offloaded_bytes(moved)) == in_host_bytes > 0
    assert prepare(moved)[0].graphdef == split(moved)[0]  # nothing is copied again
    for got, want in zip(written(moved), written(model), strict=True):
        np.testing.assert_array_equal(got, want)


def test_layers_of_a_vision_tower_go_first() -> None:
    """They are applied once for an image."""
    model = built(paligemma.PRESETS["paligemma-nano"].with_vocabulary(320))
    assert in_host(offload(model, 3)) == {
        *(f"vision/stack/remainder/{layer}" for layer in range(2)),
        "text/stack/remainder/1",
    }


def test_no_layers_and_a_model_on_the_device_are_moved_as_well_and_the_model_is_left_as_it_is() -> None:
    model = randomised(LLAMA)
    before = split(model)
    assert in_host(offload(model, 0)) == set()
    moved, ids = offload(model, 1), jnp.asarray(IDS)
    assert in_host(moved) == {"stack/remainder/1"}
    np.testing.assert_array_equal(moved(ids).logits, offload(model, 0)(ids).logits)  # outside of compiled programs too
    after = split(model)
    assert after[0] == before[0]
    assert all(a is b for a, b in zip(jax.tree.leaves(after[1]), jax.tree.leaves(before[1]), strict=True))


def test_the_whole_stack_is_never_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put on the device before the host has it is one layer, and no layer before the last one is in place."""
    moved: list[tuple[str, int]] = []
    put = jax.device_put

    def watched(tree: Any, where: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        if where.memory_kind == DEVICE:  # from NumPy arrays: nothing was there before
            assert all(isinstance(leaf, np.ndarray) for leaf in leaves) or all(
                leaf.sharding.memory_kind == DEVICE for leaf in leaves
            )
        moved.append((where.memory_kind, sum(leaf.nbytes for leaf in leaves)))
        return put(tree, where)

    monkeypatch.setattr(offload_module.jax, "device_put", watched)
    config = dataclasses.replace(LLAMA, num_layers=4)
    model = in_host_memory(randomised(config))
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(split(model)[1]["stack"])) // 4
    offload(model, 3)
    to_host = [number for number, one in enumerate(moved) if one == (HOST, layer)]
    assert len(to_host) == 3
    assert all(moved[number - 1] == (DEVICE, layer) for number in to_host)
    assert max(size for _, size in moved) == layer


def test_weights_are_loaded_to_the_hosts_memory(tmp_path: Path) -> None:
    convert([str(FIXTURES / "gpt2"), str(tmp_path / "own")])
    want = jax.tree.leaves(split(llmlab.load(FIXTURES / "gpt2"))[1])
    for path in (FIXTURES / "gpt2", tmp_path / "own"):
        got = jax.tree.leaves(split(llmlab.load(path, host=True))[1])
        for one, other in zip(got, want, strict=True):
            assert isinstance(one, np.ndarray)
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="host=True leaves the weights in the host's memory and placement spreads"):
        llmlab.load(FIXTURES / "gpt2", host=True, placement=Mesh(data=1, tensor=2).build(jax.devices()[:2]))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_layers_are_laid_out_for_the_platform_as_those_on_the_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "platform", lambda: "gpu")
    model = randomised(CONFIGS[name])
    want, got = merge(*unstacked_module.unstacked(model)), offload(in_host_memory(model), 2)
    layers = (got if name == "llama" else got.encoder).stack.remainder
    assert all(isinstance(layer, OffloadedLayer) for layer in layers)
    assert isinstance(layers[0].layer.mixer, JoinedAttention)
    flat = {
        tuple(key for key in path if key.key != "layer"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(split(got)[1])[0]
    }
    for path, leaf in jax.tree_util.tree_flatten_with_path(split(want)[1])[0]:
        np.testing.assert_array_equal(flat.pop(tuple(path)), leaf)
    assert not flat


@pytest.mark.scale
def test_the_engine_serves_from_it() -> None:
    model = tiny_engine.model()
    moved = offload(model, 2)
    requests = [Request(tiny_engine.prompt(seed, 5), sampling=GREEDY, max_new_tokens=9) for seed in (1, 2)]
    (got, want) = (
        tiny_engine.serve(Engine(one, tiny_engine.tokenizer(), tiny_engine.CONFIG), requests) for one in (moved, model)
    )
    assert got == want


def test_memory_fraction_leaves_room_for_the_layer_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "_free_bytes", lambda self, fraction: 64 * 1024)
    model = tiny_engine.model()
    config = EngineConfig(block_size=4, max_rows=1, max_length=16, prefill_chunk=16)
    monkeypatch.setattr("llmlab.infer.engine.device._FULL_BATCHES", 1000)  # as many as there is room for
    block = 2 * 2 * 4 * 2 * 4 * 4  # keys and values of 2 layers, 4 positions, 2 heads of 4 dimensions, in float32
    for num_layers in (0, 1, 2):
        moved = offload(model, num_layers)
        passing = max(offloaded_bytes(moved), default=0)
        assert (passing > 0) == (num_layers > 0)
        blocks = Device(moved, tiny_engine.VOCAB, config).config.num_blocks
        assert blocks == (64 * 1024 - passing) // block - 4  # the last are the working space of a row


def test_a_number_of_layers_that_there_is_not_is_refused() -> None:
    model = built(LLAMA)
    for number in (-1, 3):
        with pytest.raises(ValueError, match=rf"num_layers={number} is not between 0 and the 2 layers of the model"):
            offload(model, number)
    with pytest.raises(ValueError, match="--offload-layers=5 is not between 0 and the 4 layers"):
        check_offload(nnx.eval_shape(lambda: CONFIGS["t5"].build(nnx.Rngs(params=0))), 5, setting="--offload-layers")
    with pytest.raises(ValueError, match="in the host's memory already; give the original"):
        offload(offload(model, 1), 1)


def test_models_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graphdef, params = split(built(LLAMA))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(ValueError, match="weights are on 2 devices, and layers are offloaded from one; spread them"):
        offload(merge(graphdef, spread), 1)

    class Other(nnx.Module):
        weight = nnx.Param(jnp.zeros(3))

    with pytest.raises(ValueError, match=r"a Other has no stack of layers; leave it out"):
        offload(Other(), 1)
    with pytest.raises(ValueError, match="a ReversibleModel has two streams, and its layers are applied by halves"):
        check_offload(nnx.eval_shape(lambda: reformer.preset("nano").with_vocabulary(17).build(nnx.Rngs(params=0))), 1)

    class Device:
        device_kind = "abacus"

        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(offload_module, "_device", lambda model, setting: Device())
    with pytest.raises(ValueError, match=r"num_layers=1 needs memory of kind 'pinned_host', which abacus .*leave it"):
        offload(merge(graphdef, params), 1)


def test_transfers_stand_inside_the_loop_of_steps_each_behind_its_layers_input() -> None:
    """In the program as it is given to the compilers of GPUs and TPUs; on a CPU there is nothing to be moved."""
    moved = offload(randomised(LLAMA), 1)
    text = decoding._decode.trace(*decode_call(moved)).lower(lowering_platforms=("cuda",)).as_text()
    transfer = re.compile(r"= stablehlo\.custom_call @annotate_device_placement\((%\w+)#\d+\).*_xla_buffer_placement")
    body = text[text.index("stablehlo.while") : text.index("func.func private")]
    sources = transfer.findall(body)
    assert len(sources) == len(transfer.findall(text)) == len(jax.tree.leaves(split(moved.stack.remainder[1])[1]))
    assert len(set(sources)) == 1
    barrier = next(line for line in body.splitlines() if line.lstrip().startswith(f"{sources[0]}:"))
    assert f"{sources[0]}:{len(sources) + 1} = stablehlo.optimization_barrier" in barrier  # weights, and the input
