"""The weight table engine: transforms against their definitions, tables on trees of arrays."""

from dataclasses import dataclass

import numpy as np
import pytest

from llmlab.models.transforms import (
    Axis,
    Conv1D,
    Conv2D,
    Fused,
    FusedByHead,
    Identity,
    Leading,
    Linear,
    One,
    Shape,
    Stacked,
    Transform,
    Vector,
)
from llmlab.models.weights import (
    Row,
    TensorInfo,
    WeightTable,
    bind,
    dump,
    flatten,
    linear,
    load,
    norm,
    tensor_shapes,
    unflatten,
)


class Memory:
    """Tensors held in memory, counting reads."""

    def __init__(self, **tensors: np.ndarray) -> None:
        self.content = tensors
        self.reads: list[str] = []

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        names = {"float32": "F32", "float16": "F16", "int32": "I32"}
        return {name: TensorInfo(array.shape, names[str(array.dtype)]) for name, array in self.content.items()}

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.content[name]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loaded(table: WeightTable, params: dict, source: Memory) -> dict[str, np.ndarray]:
    return dict(load(table, params, source, where="memory"))


@dataclass(frozen=True)
class Reversed(One):
    """A transform that the library does not have: the last dimension backwards."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return shape

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor[..., ::-1]

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf[..., ::-1]


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Identity(), ((3, 4),)),
        (Linear(), ((6, 2, 3),)),
        (Linear(2), ((2, 3, 6),)),
        (Linear(), ((6, 5),)),
        (Conv1D(), ((6, 2, 3),)),
        (Conv1D(2), ((2, 3, 6),)),
        (Conv2D(), ((2, 3, 4, 5),)),
        (Leading(2), ((5,),)),
        (Leading(1), ((4, 5),)),
        (Axis(after=1), ((4, 5),)),
        (Axis(before=1), ((4, 5),)),
        (Vector(), ((2, 3),)),
        (Fused(Conv1D(), axis=1), ((6, 4, 3), (6, 2, 3), (6, 2, 3))),
        (Fused(Linear(), axis=0), ((6, 4, 3), (6, 2, 3), (6, 2, 3))),
        (Fused(Vector(), axis=0), ((4, 3), (2, 3))),
        (FusedByHead(), ((6, 4, 3), (6, 4, 3), (6, 4, 3))),
        (FusedByHead(), ((4, 3), (4, 3))),
        (Stacked(Linear()), ((5, 6, 4),)),
        (Reversed(), ((2, 3),)),
    ],
)
def test_transforms_are_inverted_exactly_and_keep_every_number(transform: Transform, shapes: tuple[Shape, ...]):
    leaves = tuple(draw(*shape, seed=i) for i, shape in enumerate(shapes))
    tensors = transform.to_tensors(leaves)
    assert tuple(tensor.shape for tensor in tensors) == transform.tensor_shapes(shapes)
    for leaf, again in zip(leaves, transform.to_leaves(tensors, shapes), strict=True):
        np.testing.assert_array_equal(again, leaf)
    before = np.sort(np.concatenate([leaf.ravel() for leaf in leaves]))
    np.testing.assert_array_equal(np.sort(np.concatenate([tensor.ravel() for tensor in tensors])), before)


def test_linear_is_the_matrix_of_torch_linear_split_into_heads():
    weight, x = draw(6, 4), draw(4, seed=1)  # (out, in): y = W x
    (kernel,) = Linear().to_leaves((weight,), ((4, 2, 3),))
    np.testing.assert_allclose(np.einsum("D,DNH->NH", x, kernel).ravel(), weight @ x, rtol=1e-5)
    heads, out = draw(6, seed=2), draw(4, 6, seed=3)
    (kernel,) = Linear(2).to_leaves((out,), ((2, 3, 4),))
    np.testing.assert_allclose(np.einsum("NH,NHD->D", heads.reshape(2, 3), kernel), out @ heads, rtol=1e-5)


def test_conv2d_is_a_strided_convolution_as_a_matrix_over_patches():
    weight, image = draw(5, 3, 2, 4), draw(3, 6, 8, seed=1)  # (out, in, height, width), an image (in, 6, 8)
    (kernel,) = Conv2D().to_leaves((weight,), ((2, 4, 3, 5),))
    for row, column in ((0, 0), (2, 1)):
        patch = image[:, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4]
        ours = np.einsum("HWC,HWCD->D", patch.transpose(1, 2, 0), kernel)
        np.testing.assert_allclose(ours, np.sum(weight * patch, axis=(1, 2, 3)), rtol=1e-5)


def test_fused_parts_are_the_slices_of_one_matmul():
    weight, x = draw(4, 12), draw(4, seed=1)  # GPT-2's c_attn: y = x W, then split in query, key, value
    shapes = ((4, 2, 2), (4, 2, 2), (4, 2, 2))
    kernels = Fused(Conv1D(), axis=1).to_leaves((weight,), shapes)
    parts = np.split(x @ weight, 3)
    for kernel, part in zip(kernels, parts, strict=True):
        np.testing.assert_allclose(np.einsum("D,DNH->NH", x, kernel).ravel(), part, rtol=1e-5)


TABLE = WeightTable(
    prefix="model.",
    tied={"head.weight": "model.embed.weight"},
    ignored=("model.layers.{layer}.mask",),
    rows=(
        Row("model.embed.weight", "embedding.table"),
        *norm("model.layers.{layer}.norm", "stack.{layer}.norm"),
        *linear("model.layers.{layer}.up", "stack.{layer}.up"),
        Row("model.layers.{layer}.experts.{expert}.w.weight", "stack.{layer}.experts.kernel", Stacked(Linear())),
        *linear("head", "head"),
    ),
)


def tree(layers: int = 5, period: int = 2) -> dict:
    """A stack in which every second layer has experts; the rest have an `up` with a bias."""

    def block(i: int, lead: tuple[int, ...]) -> dict:
        if i % period:
            return {"norm": {"scale": draw(*lead, 4)}, "experts": {"kernel": draw(*lead, 3, 4, 2, seed=i)}}
        return {"norm": {"scale": draw(*lead, 4)}, "up": {"kernel": draw(*lead, 4, 6), "bias": draw(*lead, 6)}}

    repeats, rest = divmod(layers, period)
    stack = {"blocks": {str(i): block(i, (repeats,)) for i in range(period)}}
    if rest:
        stack["remainder"] = {str(i): block(i, ()) for i in range(rest)}
    return {"embedding": {"table": draw(7, 4)}, "stack": stack}


def test_every_layer_finds_its_place_in_the_stack_or_the_remainder():
    params = tree()
    tensors = dict(dump(TABLE, params))
    blocks, remainder = params["stack"]["blocks"], params["stack"]["remainder"]
    for layer, up in {0: blocks["0"]["up"], 2: blocks["0"]["up"], 4: remainder["0"]["up"]}.items():
        index = ... if layer == 4 else layer // 2
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.up.weight"], up["kernel"][index].T)
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.up.bias"], up["bias"][index])
    for layer in (1, 3):
        for expert in range(3):
            tensor = tensors[f"model.layers.{layer}.experts.{expert}.w.weight"]
            np.testing.assert_array_equal(tensor, blocks["1"]["experts"]["kernel"][layer // 2, expert].T)
    assert len(tensors) == 1 + 3 * 3 + 2 * (1 + 3)


@pytest.mark.parametrize(("layers", "period"), [(5, 2), (4, 2), (1, 2), (3, 1)])
def test_dump_then_load_is_exact(layers, period):
    params = tree(layers, period) if layers >= period else {"stack": {"remainder": {"0": {"norm": {"scale": draw(4)}}}}}
    source = Memory(**dict(dump(TABLE, params)))
    again = loaded(TABLE, params, source)
    assert again.keys() == flatten(params).keys()
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[name], leaf)
    assert sorted(source.reads) == sorted(source.content)  # each tensor once


def test_shapes_are_those_of_the_tensors():
    assert tensor_shapes(TABLE, tree()) == {name: tensor.shape for name, tensor in dump(TABLE, tree())}


def test_layers_are_written_one_after_the_other():
    layers = [int(name.split(".")[2]) for name in tensor_shapes(TABLE, tree()) if ".layers." in name]
    assert layers == sorted(layers)


def test_unflatten_inverts_flatten():
    params = tree()
    assert unflatten(flatten(params)).keys() == params.keys()
    assert flatten(unflatten(flatten(params))).keys() == flatten(params).keys()


def test_loading_holds_one_parameter_at_a_time():
    params = tree()
    source = Memory(**dict(dump(TABLE, params)))
    parameters = load(TABLE, params, source, where="memory")
    next(parameters)
    assert source.reads == ["model.embed.weight"]


def test_nothing_is_read_when_something_does_not_fit():
    params = tree()
    source = Memory(**dict(dump(TABLE, params)))
    del source.content["model.layers.0.norm.weight"]
    source.content["model.layers.0.mask"] = draw(2)  # known to be useless: no offence
    with pytest.raises(ValueError, match="memory does not fit its config: 1 problem"):
        load(TABLE, params, source, where="memory")
    assert source.reads == []


def test_the_same_parameter_twice_is_an_offence():
    params = tree()
    source = Memory(**dict(dump(TABLE, params)))
    source.content["embed.weight"] = source.content["model.embed.weight"]
    with pytest.raises(ValueError, match="the same parameter"):
        load(TABLE, params, source, where="memory")


def test_parameters_that_no_row_describes_are_all_named():
    params = tree()
    params["extra"] = {"kernel": draw(2)}
    params["stack"]["blocks"]["1"]["gate"] = {"bias": draw(2, 2)}
    with pytest.raises(ValueError, match="parameters that its family does not") as error:
        bind(TABLE, params)
    assert "extra.kernel" in str(error.value)
    assert "stack.blocks.1.gate.bias" in str(error.value)


def test_a_parameter_that_two_rows_describe_is_named():
    table = WeightTable(rows=(Row("a", "embedding.table"), Row("b", "embedding.table")))
    with pytest.raises(ValueError, match=r"embedding\.table: 2 rows"):
        bind(table, {"embedding": {"table": draw(2, 2)}})


def test_a_fused_row_needs_all_its_parts():
    table = WeightTable(rows=(Row("qk", ("query.bias", "key.bias"), Fused(Vector(), axis=0)),))
    with pytest.raises(ValueError, match=r"has query\.bias but not key\.bias"):
        bind(table, {"query": {"bias": draw(2)}})


def headed() -> WeightTable:
    return WeightTable(
        prefix="body.",
        head="head",
        unread={"score.copy": "score.bias"},
        synonyms={"norm.gamma": "norm.weight"},
        rows=(Row("body.norm.weight", "norm.scale"), Row("score.bias", "head.bias")),
    )


def test_a_model_without_its_head_is_written_without_the_prefix_and_read_either_way():
    scale, bias = draw(3), draw(2, seed=1)
    bare, whole = {"norm": {"scale": scale}}, {"norm": {"scale": scale}, "head": {"bias": bias}}
    assert list(dict(dump(headed(), bare))) == list(tensor_shapes(headed(), bare)) == ["norm.weight"]
    assert list(tensor_shapes(headed(), whole)) == ["body.norm.weight", "score.bias", "score.copy"]
    for name in ("norm.weight", "body.norm.weight"):
        np.testing.assert_array_equal(loaded(headed(), bare, Memory(**{name: scale}))["norm.scale"], scale)


def test_what_nothing_reads_is_written_as_a_copy_and_not_read():
    scale, bias = draw(3), draw(2, seed=1)
    params = {"norm": {"scale": scale}, "head": {"bias": bias}}
    np.testing.assert_array_equal(dict(dump(headed(), params))["score.copy"], bias)
    source = Memory(**{"body.norm.weight": scale, "score.bias": bias, "score.copy": 2 * bias})
    np.testing.assert_array_equal(loaded(headed(), params, source)["head.bias"], bias)


def test_what_nothing_reads_and_nothing_resembles_is_written_as_zeros_and_not_read():
    table, kernel = WeightTable(rows=(Row("score.weight", "head"),), blank={"score.bias": "score.weight"}), draw(3, 2)
    tensors = dict(dump(table, {"head": kernel}))
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(table, {"head": kernel})
    np.testing.assert_array_equal(tensors["score.bias"], np.zeros(3))
    source = Memory(**{"score.weight": kernel, "score.bias": draw(3)})
    np.testing.assert_array_equal(loaded(table, {"head": kernel}, source)["head"], kernel)
    headless = WeightTable(rows=(Row("body", "body"), *table.rows), blank=table.blank)
    assert list(dict(dump(headless, {"body": draw(2)}))) == ["body"]


def test_old_names_are_read():
    scale = draw(3)
    source = Memory(**{"body.norm.gamma": scale})
    np.testing.assert_array_equal(loaded(headed(), {"norm": {"scale": scale}}, source)["norm.scale"], scale)


def test_a_row_may_depend_on_the_parameter_beside_it():
    table = WeightTable(
        rows=(
            Row("wi", "up", excludes="gate"),
            Row("wi_0", "gate"),
            Row("wi_1", "up", requires="gate"),
        )
    )
    plain, gated = {"up": draw(2, 3)}, {"up": draw(2, 3), "gate": draw(2, 3, seed=1)}
    assert tensor_shapes(table, plain) == {"wi": (2, 3)}
    assert tensor_shapes(table, gated) == {"wi_0": (2, 3), "wi_1": (2, 3)}
    np.testing.assert_array_equal(loaded(table, gated, Memory(**dict(dump(table, gated))))["up"], gated["up"])


def test_a_buffer_that_older_checkpoints_leave_out_is_zero_without_them():
    table = WeightTable(rows=(Row("w", "w"), Row("constant", "constant")), zeros=("constant",))
    params = {"w": draw(2), "constant": draw(3)}
    np.testing.assert_array_equal(loaded(table, params, Memory(w=params["w"]))["constant"], np.zeros(3))
    source = Memory(w=params["w"], constant=params["constant"])
    np.testing.assert_array_equal(loaded(table, params, source)["constant"], params["constant"])


def test_copies_of_a_tied_tensor_may_lack_the_prefix():
    table = WeightTable(prefix="model.", tied={"model.tokens": "model.shared"}, rows=(Row("model.shared", "table"),))
    source = Memory(shared=draw(2), tokens=draw(2))
    np.testing.assert_array_equal(loaded(table, {"table": draw(2)}, source)["table"], draw(2))


def test_rows_fused_by_head_are_read_head_by_head():
    """BLOOM: row (n, part, h) of the weight makes dimension h of head n of query, key or value."""
    random = np.random.default_rng(0)
    x, weight, bias = random.normal(size=8), random.normal(size=(2 * 3 * 5, 8)), random.normal(size=2 * 3 * 5)
    kernels = FusedByHead().to_leaves((weight,), ((8, 2, 5),) * 3)
    biases = FusedByHead().to_leaves((bias,), ((2, 5),) * 3)
    fused = (weight @ x + bias).reshape(2, 3, 5)
    for part, (kernel, shift) in enumerate(zip(kernels, biases, strict=True)):
        np.testing.assert_allclose(np.einsum("d,dnh->nh", x, kernel) + shift, fused[:, part])
