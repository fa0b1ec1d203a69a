"""FLOPs of single operations, by the name of the jax primitive."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from llmlab.plan.hlo import UNEVEN

Shapes = Sequence[Any]
"""Arrays of a jaxpr: each has `.shape`, `.size` and `.dtype`."""
Kernel = Callable[[Shapes, Shapes], int]
"""Matmul FLOPs of a kernel from its inputs and outputs."""


def _dot_general(inputs: Shapes, outputs: Shapes, params: Mapping[str, Any]) -> int:
    (contracting, _), _ = params["dimension_numbers"]
    return 2 * outputs[0].size * math.prod(inputs[0].shape[dim] for dim in contracting)


def _ragged_dot(inputs: Shapes, outputs: Shapes, params: Mapping[str, Any]) -> int:
    """Each row of the left operand meets one group of the right."""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    inner = {*contracting, *batch, *numbers.rhs_group_dimensions}
    return 2 * inputs[0].size * math.prod(n for dim, n in enumerate(inputs[1].shape) if dim not in inner)


def _convolution(inputs: Shapes, outputs: Shapes, params: Mapping[str, Any]) -> int:
    kernel = inputs[1]
    return 2 * outputs[0].size * kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]


MATMULS: Mapping[str, Callable[[Shapes, Shapes, Mapping[str, Any]], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


def _attention_forward(inputs: Shapes, outputs: Shapes) -> int:
    """Two products: q k^T and weights times v. q (B, S, N, H), k (B, T, K, H)."""
    return 4 * inputs[0].size * inputs[1].shape[1]


def _attention_backward(inputs: Shapes, outputs: Shapes) -> int:
    """Five products: the scores again, dv, the weights' gradient, dq, dk."""
    return 10 * inputs[0].size * inputs[1].shape[1]


ATTENTION: Mapping[str, Kernel] = {
    "dot_product_attention_fwd": _attention_forward,
    "dot_product_attention_fwd_wrapper": _attention_forward,
    "dot_product_attention_bwd": _attention_backward,
    "dot_product_attention_bwd_wrapper": _attention_backward,
}


def _blocked_spare(num_rows: int, num_experts: int) -> int:
    """Rows that llmlab.nn.moe.blocked computes in vain for all experts, at most."""
    return (63 if num_rows >= 512 * num_experts else 31) * num_experts


def _blocked_mlp(inputs: Shapes, outputs: Shapes) -> int:
    """Rows (R, D) times all matrices of their expert, which are those inputs that have three dimensions."""
    matrices = [array.shape for array in inputs if len(array.shape) == 3]
    rows = inputs[0].shape[0]
    return 2 * (rows + _blocked_spare(rows, matrices[0][0])) * sum(math.prod(shape[1:]) for shape in matrices)


def _tiled_rows(inputs: Shapes, outputs: Shapes) -> int:
    """Rows times a matrix of their expert; the tiles that two experts share (E - 1 at most) are not counted twice."""
    return 2 * inputs[0].size * outputs[0].shape[1]


def _tiled_outer(inputs: Shapes, outputs: Shapes) -> int:
    return 2 * inputs[0].size * inputs[1].shape[1]


FUNCTIONS: Mapping[str, Kernel] = {
    "blocked_mlp_forward": _blocked_mlp,
    # Gradients of the rows and of the matrices.
    "blocked_mlp_backward": lambda inputs, outputs: 2 * _blocked_mlp(inputs, outputs),
    "megablox_matmul": _tiled_rows,
    "megablox_matmul_transposed": _tiled_rows,
    "megablox_outer": _tiled_outer,
    UNEVEN: lambda inputs, outputs: 0,
    "searchsorted": lambda inputs, outputs: 0,  # comparisons
}
"""Jitted functions that are counted as a whole, since the data decides how often their loops run."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES = _names("""
    after_all all_gather all_gather_invariant all_gather_reduced all_to_all axis_index bitcast_convert_type
    broadcast_in_dim broadcast_to check concatenate convert_element_type copy create_token debug_callback debug_print
    device_put dynamic_slice dynamic_update_slice empty empty2 from_edtype gather imag inspect_sharding iota
    iota_2x32_shape layout_constraint name optimization_barrier pad pbroadcast pcast pin platform_index ppermute precv
    preduced psend pvary ragged_all_to_all random_bits random_clone random_fold_in random_seed random_split
    random_unwrap random_wrap real reduce_precision reduced_vary_cast reshape reshard rev rng_bit_generator rng_uniform
    scatter select_n sharding_constraint slice split squeeze stack stage stop_gradient threefry2x32 tie tile to_edtype
    transpose unpin unstack vary_unreduced_cast with_memory_space_constraint
""")

_ELEMENTWISE = _names("""
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow
    is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne neg nextafter not one_minus_square
    or polygamma population_count pow random_gamma reciprocal regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta
""")

# Counted by the operand. Collectives: each device adds its part.
_REDUCTIONS = _names("""
    argmax argmin approx_top_k cumlogsumexp cummax cummin cumprod cumsum pmax pmin psum psum_invariant reduce reduce_and
    reduce_max reduce_min reduce_or reduce_prod reduce_scatter reduce_sum reduce_xor sort top_k
""")

# Operand number 2 holds what is combined with the elements it is scattered to.
_SCATTERS = _names("scatter-add scatter-mul scatter-min scatter-max scatter-sub")
_WINDOWS = _names("reduce_window reduce_window_sum reduce_window_max reduce_window_min")


def elementwise_flops(name: str, inputs: Shapes, outputs: Shapes, params: Mapping[str, Any]) -> int | None:
    """FLOPs of an elementwise operation or a reduction; None for any other operation."""
    if name in _ELEMENTWISE:
        flops = outputs[0].size
    elif name in _REDUCTIONS:
        flops = inputs[0].size
    elif name in _SCATTERS:
        flops = inputs[2].size
    elif name in _WINDOWS:
        flops = outputs[0].size * math.prod(params["window_dimensions"])
    elif name == "polynomial":  # x and its coefficients, in Horner's scheme
        flops = 2 * (len(inputs) - 2) * outputs[0].size
    else:
        return None
    # Index arithmetic, masks and random bits are integers and booleans.
    return flops if jnp.issubdtype(outputs[0].dtype, jnp.inexact) else 0
