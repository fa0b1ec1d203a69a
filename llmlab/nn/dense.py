"""The dense layer: y = x W + b over any number of input and output dimensions.

    query of attention   (embed,) -> (heads, head_dim)     kernel (embed, heads, head_dim)
    output of attention  (heads, head_dim) -> (embed,)     kernel (heads, head_dim, embed)

2 * in * out FLOPs a token forward, twice that backward.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.module import normal
from llmlab.nn.platform import platform

Dims = tuple[tuple[str, int], ...]
"""Logical name and size of each dimension."""

_FEW_ROWS = 64


class Dense(nnx.Module):
    """y = x W + b.

    Args:
        inputs: dimensions that are contracted, the last ones of the input.
        outputs: dimensions that replace them.
        bias: whether to add one, of the shape of `outputs`.
        gain: factor on the initial standard deviation, which is 1/sqrt(inputs) (LeCun et al. 1998).
    """

    def __init__(self, inputs: Dims, outputs: Dims, *, bias: bool, rngs: nnx.Rngs, gain: float = 1.0) -> None:
        shape = tuple(size for _, size in (*inputs, *outputs))
        names = tuple(name for name, _ in (*inputs, *outputs))
        std = gain / math.sqrt(math.prod(size for _, size in inputs))
        self.num_inputs = len(inputs)
        self.kernel = nnx.Param(std * normal(rngs, shape), axes=names)
        rest = len(inputs)
        self.bias = nnx.Param(jnp.zeros(shape[rest:]), axes=names[rest:]) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = contract(x, self.kernel[...], self.num_inputs)
        return y if self.bias is None else y + self.bias[...]


def contract(x: Float[Array, "..."], kernel: Float[Array, "..."], num_inputs: int) -> Float[Array, "..."]:
    """Contract the last `num_inputs` dimensions of x with the first of the kernel.

    The platform chooses the formulation. On CPU every matmul is made two-dimensional and the weight gradient is
    written as x^T dy over flattened tokens: left to itself, XLA transposes dy for it and fuses the backward
    arithmetic of whatever came before into that strided copy, which costs a fifth of a training step.
    """
    if platform() == "cpu":
        batch = x.shape[: x.ndim - num_inputs]
        outputs = kernel.shape[num_inputs:]
        size = math.prod(x.shape[x.ndim - num_inputs :])
        return _matmul_2d(x.reshape(-1, size), kernel.reshape(size, -1)).reshape(*batch, *outputs)
    return jnp.tensordot(x, kernel, axes=num_inputs)


def contract_rows(x: Float[Array, "*B D"], kernel_FD: Float[Array, "F D"]) -> Float[Array, "*B F"]:
    """Contract the last dimension of x with that of a matrix whose rows are the weights of an output each.

    The platform chooses the formulation here too. On CPU XLA's products repack their right operand at every call. Where
    x has many rows that is little beside the product; where it has few, as in a step of decoding, it is a third of it,
    and so the matrix becomes the left operand, which is read as it lies. 16 rows with the 17 million weights of a small
    model took 7.3 ms instead of 9.3 on 2 CPU cores, 4 rows 5.0 instead of 6.4.
    """
    rows = math.prod(x.shape[:-1])
    if platform() == "cpu" and 1 < rows <= _FEW_ROWS:
        y_FB = jax.lax.dot_general(kernel_FD, x.reshape(rows, -1), (((1,), (1,)), ((), ())))
        # The barrier: XLA makes of a transposed product the product of the operands the other way round.
        return jax.lax.optimization_barrier(y_FB).T.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...D,FD->...F", x, kernel_FD)


@jax.custom_vjp
def _matmul_2d(x: Float[Array, "M K"], kernel: Float[Array, "K N"]) -> Float[Array, "M N"]:
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    contract_last = partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
    contract_first = partial(jax.lax.dot_general, dimension_numbers=(((0,), (0,)), ((), ())))
    return contract_last(dy, kernel), contract_first(x, dy)


_matmul_2d.defvjp(_forward, _backward)
