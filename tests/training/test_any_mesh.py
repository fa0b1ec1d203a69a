"""A mesh changes the speed and nothing else: three steps, dropout included, and evaluations equal one device's."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from llmlab.models.config import Transformer
from llmlab.models.decoder import DecoderModel
from llmlab.nn.config import Context
from llmlab.nn.positions import T5Relative
from llmlab.nn.stack import Stack
from llmlab.optim import AdamW, Constant
from llmlab.sharding import Mesh
from llmlab.sharding.rules import ScheduleName
from tests.training.models_on_meshes import CASES, assert_equal, initial, on_one_device, outcome, program

pytestmark = pytest.mark.scale


class BiasedStack(Stack):
    """Layers that share a learned bias on the scores, which is part of their context."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs) -> None:
        super().__init__(config.blocks(), config.num_layers, config.embed_dim, config.execution, rngs=rngs)
        self.relative = T5Relative(num_buckets=4, max_distance=8, bidirectional=False).build(4, rngs=rngs)

    def __call__(self, x_BSD: Any, context: Context, key: Any = None, cache: Any = None) -> Any:
        return super().__call__(x_BSD, dataclasses.replace(context, bias=self.relative.bias()), key, cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Biased(Transformer):
    """A decoder with them."""

    def build(self, rngs: nnx.Rngs) -> DecoderModel:
        model = DecoderModel(self, rngs=rngs)
        model.stack = BiasedStack(self, rngs)
        return model


# Every axis alone, on as many devices as it can have here.
ALONE = {
    "data": Mesh(data=8),
    "fsdp": Mesh(data=1, fsdp=8),
    "zero 1": Mesh(data=1, fsdp=8, zero=1),
    "zero 2": Mesh(data=2, fsdp=4, zero=2),
    "tensor": Mesh(data=1, tensor=4),  # more shards than key heads
    "ring": Mesh(data=1, sequence=4),
    "all to all": Mesh(data=1, sequence=4, context="all_to_all"),
    "pipeline": Mesh(data=1, pipeline=4),  # five layers on four stages
    "gpipe": Mesh(data=1, pipeline=2, schedule="gpipe"),
    "interleaved": Mesh(data=1, pipeline=2, interleave=2),
    "interleaved gpipe": Mesh(data=1, pipeline=2, interleave=2, schedule="gpipe"),
    "slices": Mesh(data=2, fsdp=4, slices=2),
}
# Every two axes together in one of them; with experts:
PAIRS = {
    "data fsdp tensor": Mesh(data=2, fsdp=2, tensor=2),
    "data fsdp sequence": Mesh(data=2, fsdp=2, sequence=2),
    "data expert pipeline": Mesh(data=2, expert=2, pipeline=2),
    "fsdp expert pipeline": Mesh(data=1, fsdp=2, expert=2, pipeline=2, schedule="gpipe"),
    "tensor sequence expert": Mesh(data=1, tensor=2, sequence=2, expert=2),
    "tensor sequence pipeline": Mesh(data=1, tensor=2, sequence=2, pipeline=2),
}
# and without:
DENSE_PAIRS = {
    "data fsdp tensor": Mesh(data=2, fsdp=2, tensor=2),
    "data fsdp sequence": Mesh(data=2, fsdp=2, sequence=2, context="all_to_all"),
    "data fsdp pipeline": Mesh(data=2, fsdp=2, pipeline=2),
    "tensor sequence pipeline": Mesh(data=1, tensor=2, sequence=2, pipeline=2, schedule="gpipe"),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_axis_alone_equals_one_device(name: str) -> None:
    mesh, case = ALONE[name], CASES["decoder"]
    evaluate = name in ("data", "ring", "interleaved")
    assert_equal(outcome(program(case, mesh, mesh.num_devices or 1), case, evaluate=evaluate), on_one_device("decoder"))


def test_experts_alone_equal_one_device() -> None:
    case = CASES["mixture"]
    assert_equal(outcome(program(case, Mesh(data=1, expert=4), 4), case), on_one_device("mixture"))


@pytest.mark.parametrize("name", PAIRS)
def test_axes_together_equal_one_device(name: str) -> None:
    case = CASES["mixture"]
    evaluate = name in ("data fsdp tensor", "data expert pipeline")
    assert_equal(outcome(program(case, PAIRS[name], 8), case, evaluate=evaluate), on_one_device("mixture"))


@pytest.mark.parametrize("name", DENSE_PAIRS)
@pytest.mark.parametrize("shape", ["encoder", "encoder-decoder", "vision-language"])
def test_every_shape_of_model_equals_one_device(shape: str, name: str) -> None:
    case = CASES[shape]
    evaluate = name == "tensor sequence pipeline"
    assert_equal(outcome(program(case, DENSE_PAIRS[name], 8), case, evaluate=evaluate), on_one_device(shape))


def test_one_part_equals_one_device() -> None:
    case = CASES["decoder"]
    whole = outcome(program(case, Mesh(data=2, fsdp=4), 8, accumulation=1), case)
    assert_equal(whole, on_one_device("decoder", accumulation=1))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_pipelines_compute_in_bfloat16_too(schedule: ScheduleName) -> None:
    case, mesh = CASES["decoder"], Mesh(data=1, pipeline=2, schedule=schedule)
    half = outcome(program(case, mesh, 2, precision="bfloat16"), case, evaluate=False)
    for mine, exact in zip(half.metrics, on_one_device("decoder").metrics, strict=True):
        assert mine["train/loss"] != exact["train/loss"]
        assert mine["train/loss"] == pytest.approx(exact["train/loss"], rel=2**-7)  # 8 bits
        assert mine["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=2**-5)


def test_an_optimizer_with_state_does_not_see_the_layout() -> None:
    # epsilon: Adam divides a gradient by its own size, so where that is rounding (5e-8 here), its direction is random.
    # The moments are held against an epsilon that rounding does not reach.
    optimizer, case = AdamW(peak_lr=1e-1, weight_decay=0.1, epsilon=1.0, schedule=Constant()), CASES["decoder"]
    expected = outcome(program(case, Mesh(), 1, optimizer=optimizer), case)
    for mesh in (Mesh(data=2, fsdp=4), Mesh(data=1, fsdp=2, tensor=2, zero=1)):
        assert_equal(outcome(program(case, mesh, mesh.num_devices or 1, optimizer=optimizer), case), expected)


def test_what_zero_splits() -> None:
    """Bytes of a device: of 8, an eighth of what is split (the parameters here all divide)."""
    case = CASES["decoder"]
    held = {}
    for zero in (1, 2, 3):
        built = program(case, Mesh(data=1, fsdp=8, zero=zero), 8, optimizer=AdamW(peak_lr=1e-3))
        state = built.initialise(None)
        held[zero] = [
            sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim > 1)
            for tree in (state.params, state.optimizer_state)
        ]
    whole = sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(built.state.params) if len(leaf.shape) > 1)
    moments = [2 * whole // 8] * 3
    assert [optimizer for _, optimizer in held.values()] == moments
    assert [params for params, _ in held.values()] == [whole, whole, whole // 8]


def test_a_context_that_takes_parameters_goes_through_a_pipeline() -> None:
    case = CASES["decoder"]._replace(model=Biased(**vars(CASES["decoder"].model)))
    expected = outcome(program(case, Mesh(), 1), case)
    assert_equal(outcome(program(case, Mesh(data=1, pipeline=2), 2), case), expected)
    assert not np.array_equal(
        expected.params["stack"]["relative"]["table"], initial(case)["stack"]["relative"]["table"]
    )


def test_every_stage_of_a_pipeline_stores_its_share_of_all_that_is_large() -> None:
    """Vocabulary and layers, five of which four stages cannot share out: a quarter of every matrix."""
    case = CASES["decoder"]
    built = program(case, Mesh(data=1, pipeline=4), 4, optimizer=AdamW(peak_lr=1e-3))
    state = built.initialise(None)
    for tree, times in ((state.params, 1), (state.optimizer_state, 2)):
        matrices = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in matrices)
        assert held == sum(leaf.nbytes for leaf in matrices) // 4
        assert held == times * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1) // 4
