"""The cost counter against counts by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from llmlab.plan.cost import Cost, count


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


M, K, N = 4, 3, 5
X, W = shape(M, K), shape(K, N)
PRODUCT = 2 * M * K * N


def test_a_matrix_product_costs_two_flops_per_multiply_add() -> None:
    cost = count(lambda x, w: x @ w, X, W)
    assert cost == Cost(PRODUCT, 0, 4 * (M * K + K * N + M * N), {"dot_general": PRODUCT})
    assert cost.flops == PRODUCT


@pytest.mark.parametrize(
    ("equation", "left", "right", "flops"),
    [
        ("bmk,bkn->bmn", (7, 4, 3), (7, 3, 5), 2 * 7 * 4 * 3 * 5),
        ("bsnh,nhd->bsd", (2, 3, 4, 5), (4, 5, 6), 2 * (2 * 3) * (4 * 5) * 6),
        ("bsnh,btnh->bnst", (2, 3, 4, 5), (2, 7, 4, 5), 2 * (2 * 4) * 3 * 5 * 7),
        ("i,j->ij", (3,), (5,), 2 * 3 * 5),  # one multiplication each: a product with an inner dimension of one
    ],
)
def test_an_einsum_counts_batch_dimensions_once(
    equation: str, left: tuple[int, ...], right: tuple[int, ...], flops: int
) -> None:
    cost = count(partial(jnp.einsum, equation), shape(*left), shape(*right))
    assert cost.matmul_flops + (cost.elementwise_flops * 2) == flops  # XLA gets the outer product as a `mul`


def test_elementwise_operations_cost_one_flop_per_element_and_moves_none() -> None:
    def function(x: jax.Array) -> jax.Array:
        y = jnp.tanh(x.T.reshape(-1)) * 2.0  # two per element
        return jnp.sum(jnp.where(y > 0, y, 0.0))  # one per element for the sum; comparison and choice are free

    cost = count(function, X)
    assert (cost.matmul_flops, cost.elementwise_flops) == (0, 3 * M * K)
    assert cost.by_primitive == {"tanh": M * K, "mul": M * K, "reduce_sum": M * K}


def test_integers_do_not_count() -> None:
    assert count(lambda i: jnp.cumsum(i * 2 + 1), jax.ShapeDtypeStruct((9,), jnp.int32)).flops == 0


def test_a_scan_costs_its_length_times_its_body() -> None:
    def function(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    cost = count(function, shape(8, 6), shape(11, 6, 6))
    assert (cost.matmul_flops, cost.elementwise_flops) == (11 * 2 * 8 * 6 * 6, 11 * 8 * 6)


def test_loops_inside_loops_multiply() -> None:
    def inner(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x)

    def function(xs: jax.Array) -> jax.Array:
        body = jax.jit(lambda carry, _: (jax.lax.map(inner, carry), None))
        return jax.lax.scan(body, xs, None, length=5)[0]

    assert count(function, shape(7, 4, 4)).matmul_flops == 5 * 7 * 3 * 2 * 4**3


S, HEADS, H = 64, 2, 8
QKV = [shape(S, HEADS, H)] * 3
SCORES = 2 * HEADS * S * S * H


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(jnp.einsum("SNH,TNH->NST", q, k))
    return jnp.einsum("NST,TNH->SNH", weights, v)


def mapped_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense attention, eight queries at a time."""
    return jax.lax.map(lambda block: attention(block, k, v), q.reshape(-1, 8, HEADS, H)).reshape(q.shape)


@pytest.mark.parametrize("function", [attention, mapped_attention])
def test_attention_costs_two_products_forward_and_six_with_backward(function: Callable[..., Any]) -> None:
    assert count(function, *QKV).matmul_flops == 2 * SCORES

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(function(*qkv))

    # Of the sum, the backward pass needs no values of the second product, which is dead code: 1 forward, 4 backward.
    assert count(jax.grad(loss, argnums=(0, 1, 2)), *QKV).matmul_flops == 5 * SCORES
    assert count(jax.value_and_grad(loss, argnums=(0, 1, 2)), *QKV).matmul_flops == 6 * SCORES


def test_mapping_attention_over_blocks_hides_nothing() -> None:
    """What cost_analysis does not see: it counts a mapped body once."""
    analyses: list[Any] = [jax.jit(f).lower(*QKV).compile().cost_analysis() for f in (attention, mapped_attention)]
    assert analyses[1]["flops"] < analyses[0]["flops"] / 4
    assert count(mapped_attention, *QKV).matmul_flops == count(attention, *QKV).matmul_flops
    # 4 x the sequence, 16 x the cost
    longer = count(mapped_attention, *[shape(4 * S, HEADS, H)] * 3)
    assert longer.matmul_flops == 16 * count(mapped_attention, *QKV).matmul_flops


D, F = 6, 24


def mlp(params: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ params[0]) @ params[1]


def test_rematerialisation_counts_what_runs_again() -> None:
    params, x = (shape(D, F), shape(F, D)), shape(M, D)
    product = 2 * M * D * F

    def loss(apply: Callable[..., jax.Array], params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(apply(params, x)))

    plain = count(jax.grad(partial(loss, mlp), argnums=(0, 1)), params, x)
    assert plain.matmul_flops == (2 + 4) * product
    # Again: the first product, whose result the gelu's derivative and the second weight's gradient need. The second
    # one's result is what the square keeps.
    again = count(jax.grad(partial(loss, jax.checkpoint(mlp)), argnums=(0, 1)), params, x)
    assert again.matmul_flops == (2 + 4 + 1) * product
    assert again.elementwise_flops > plain.elementwise_flops


def test_a_scan_of_rematerialised_layers_counts_forward_twice_but_for_the_last_product() -> None:
    params, x, layers = (shape(9, D, F), shape(9, F, D)), shape(M, D), 9
    product = 2 * M * D * F

    def loss(params: Any, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda x, p: x + mlp(p, x))
        return jnp.sum(jnp.square(jax.lax.scan(lambda x, p: (step(x, p), None), x, params)[0]))

    assert count(jax.grad(loss), params, x).matmul_flops == layers * (2 + 4 + 1) * product


def test_dead_code_does_not_count() -> None:
    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        _ = jax.jit(lambda x: x @ w)(x)
        return x + 1

    assert count(function, X, W).matmul_flops == 0


@jax.custom_vjp
def own_backward(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


own_backward.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, dy: (dy @ saved[1].T, (saved[0].T @ saved[0]) @ saved[0].T @ dy),  # wasteful on purpose
)


@jax.custom_jvp
def own_tangent(x: jax.Array) -> jax.Array:
    return x @ x


own_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[0], 2 * tangents[0]))


def test_custom_derivatives_count_what_they_say() -> None:
    assert count(own_backward, X, W).matmul_flops == PRODUCT
    grad = count(jax.grad(lambda x, w: jnp.sum(jnp.square(own_backward(x, w))), argnums=(0, 1)), X, W)
    assert grad.matmul_flops == PRODUCT + PRODUCT + 2 * K * M * K + 2 * K * K * M + 2 * K * M * N
    square = shape(4, 4)
    assert count(own_tangent, square).matmul_flops == 2 * 4**3
    assert count(jax.grad(lambda x: jnp.sum(jnp.square(own_tangent(x)))), square).matmul_flops == 2 * 4**3


def test_what_a_counted_function_makes_of_nothing_costs_what_it_is() -> None:
    @jax.jit
    def blocked_mlp_forward() -> jax.Array:
        return jnp.full((3,), 2.0) * 3.0

    assert count(blocked_mlp_forward).flops == 3


def test_a_condition_costs_its_most_expensive_branch() -> None:
    def function(p: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.switch(p, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert count(function, jax.ShapeDtypeStruct((), jnp.int32), shape(4, 4)).matmul_flops == 2 * 2 * 4**3


def test_the_platforms_branch_counts() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ x, tpu=lambda x: x, default=lambda x: x @ x @ x)

    product = 2 * 4**3
    for platform, flops in ((None, product), ("cpu", product), ("tpu", 0), ("cuda", 2 * product)):
        assert count(function, shape(4, 4), platform=platform).matmul_flops == flops
        batched = count(jax.vmap(jax.grad(lambda x: function(x).sum())), shape(6, 4, 4), platform=platform)
        assert (batched.matmul_flops > 0) == (platform != "tpu")

    def no_gpu(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, tpu=lambda x: x, cpu=lambda x: x @ x)

    with pytest.raises(ValueError, match="no branch of platform_dependent is for platform='cuda'"):
        count(no_gpu, shape(4, 4), platform="cuda")


def repeated(n: Any, x: jax.Array) -> jax.Array:
    """A while loop in the jaxpr wherever n is an argument of a compiled function."""
    return jax.jit(lambda n, x: jax.lax.fori_loop(2, n, lambda i, x: x @ x, x))(n, x)


def test_a_while_loop_counts_its_trips_where_its_range_is_known() -> None:
    product = 2 * 4**3
    assert count(lambda x: repeated(7, x), shape(4, 4)).matmul_flops == 5 * product
    assert count(lambda x: repeated(jnp.int32(1), x), shape(4, 4)).matmul_flops == 0

    def by_threes(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ x), (0, x))[1]

    assert count(by_threes, shape(4, 4)).matmul_flops == 4 * product  # at 0, 3, 6 and 9


def test_a_while_loop_of_unknown_length_is_an_error_unless_told() -> None:
    def halve(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    for function, args in ((halve, (shape(4, 4),)), (repeated, (n, shape(4, 4)))):
        with pytest.raises(ValueError, match="give its trip count as while_trips"):
            count(function, *args)
        assert count(function, *args, while_trips=6).matmul_flops == 6 * 2 * 4**3
    growing = jax.jit(lambda x: jax.lax.while_loop(lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - 1), (0, x)))
    with pytest.raises(ValueError, match="while_trips"):
        count(growing, n)


def kernel(x_ref: Any, y_ref: Any) -> None:
    y_ref[...] = x_ref[...] @ x_ref[...]


def squared(x: jax.Array) -> jax.Array:
    return pallas.pallas_call(kernel, out_shape=x, name="squared", interpret=True)(x)


def test_a_kernel_costs_what_the_table_says_and_is_an_error_without() -> None:
    with pytest.raises(ValueError, match="the cost of 'squared' is unknown"):
        count(squared, shape(4, 4))
    table = {"squared": lambda inputs, outputs: 2 * inputs[0].shape[0] * outputs[0].size}
    cost = count(lambda x: jax.lax.map(squared, x), shape(9, 4, 4), kernels=table)
    assert cost.by_primitive == {"squared": 9 * 2 * 4**3}
    assert cost.matmul_flops == 9 * 2 * 4**3


def test_an_unknown_operation_is_an_error_and_not_free() -> None:
    with pytest.raises(ValueError, match="the cost of 'cholesky' is unknown"):
        count(jnp.linalg.cholesky, shape(4, 4))
    assert count(jnp.linalg.cholesky, shape(4, 4), kernels={"cholesky": lambda i, o: 4**3 // 3}).matmul_flops == 21


def test_a_sharded_body_counts_on_every_device() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec

    def body(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.psum(x @ w, "tensor")

    function = jax.shard_map(body, mesh=mesh, in_specs=(spec("data", "tensor"), spec("tensor")), out_specs=spec("data"))
    assert count(function, shape(8, 12), shape(12, 6)).matmul_flops == 2 * 8 * 12 * 6
    # Over one axis only, and the same on all devices of it
    function = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec("data"), axis_names={"data"}
    )
    assert count(function, shape(8, 12), shape(12, 6)).matmul_flops == 2 * 8 * 12 * 6


def test_a_convolution_costs_its_kernel_at_every_output() -> None:
    def function(x: jax.Array, w: jax.Array, groups: int) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert count(partial(function, groups=1), shape(5, 9, 9, 4), shape(3, 3, 4, 6)).matmul_flops == (
        2 * (5 * 4 * 4 * 6) * (3 * 3 * 4)
    )
    assert count(partial(function, groups=2), shape(5, 9, 9, 4), shape(3, 3, 2, 6)).matmul_flops == (
        2 * (5 * 4 * 4 * 6) * (3 * 3 * 2)
    )


def test_a_ragged_product_costs_one_group_for_each_row() -> None:
    sizes = jnp.asarray([3, 1, 6], jnp.int32)

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, sizes)

    x, w, product = shape(10, 4), shape(3, 4, 5), 2 * 10 * 4 * 5
    assert count(function, x, w).matmul_flops == product
    grad = jax.grad(lambda x, w: jnp.sum(jnp.square(function(x, w))), argnums=(0, 1))
    assert count(grad, x, w).matmul_flops == 3 * product


def test_a_gather_costs_nothing_and_its_gradient_one_addition_per_element() -> None:
    def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.take(table, ids, axis=0, mode="clip") * 2.0)

    cost = count(jax.grad(loss), shape(100, 8), jax.ShapeDtypeStruct((7,), jnp.int32))
    assert cost.by_primitive["scatter-add"] == 7 * 8


def test_randomness_and_sorting_count_without_an_entry_in_the_table() -> None:
    def function(key: jax.Array, x: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sort(jnp.where(kept, x, 0.0), axis=-1) + jax.lax.top_k(x, 3)[0]

    assert count(function, jax.random.key(0), shape(5, 3)).matmul_flops == 0
