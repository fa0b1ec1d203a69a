"""Layers laid out and put together for decoding.

A step that decodes one token a row does little but read weights, so what counts is that they are read as they lie, and
how many kernels are launched beside. On this occasion (see `llmlab.infer.unstacked`)

    every matrix       is laid out with the inputs of an output side by side, (outputs, inputs): each output is a sum
                       along memory. Of (heads, head_dim, embed) XLA makes on a GPU a product in memory and its sum, and
                       on a CPU it repacks (inputs, outputs) in every step of several rows (`contract_rows`)
    matrices           of one input become one: query, key, value; gate, up. Two launches a layer instead of five, and
                       the small matrices of few key/value heads are read with the large one. On a CPU that has only
                       XLA's products those run side by side, on a core each, and are left apart
    on GPUs            attention over the cache and RMSNorm are one kernel each (`llmlab.nn.kernels.decoding`)
    on CPUs            attention over the cache and products of few rows are, where there is a compiler to make them
                       (`llmlab.nn.kernels.cpu`)

The result is the same but for the order of sums.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import AttentionLayer
from llmlab.nn.cache import KVCache
from llmlab.nn.config import Auxiliary, Cache, Context
from llmlab.nn.dense import Dense, contract_rows
from llmlab.nn.dropout import dropout
from llmlab.nn.embedding import Embedding
from llmlab.nn.feed_forward import ACTIVATIONS, GatedMLPLayer
from llmlab.nn.kernels import cpu, decoding
from llmlab.nn.masks import Causal
from llmlab.nn.moe.layer import MixtureOfExpertsLayer
from llmlab.nn.norms import RMSNormLayer
from llmlab.nn.platform import platform
from llmlab.sharding.rules import active_placement


def few_rows(x: Float[Array, "*B D"], kernel_FD: Float[Array, "F D"]) -> Float[Array, "*B F"]:
    """`contract_rows`, by the kernel for CPUs where that is for these arrays; not to be differentiated."""
    if cpu.takes(x, kernel_FD) and _has_cpu_kernels():
        return cpu.product(x, kernel_FD)
    return contract_rows(x, kernel_FD)


class _Rows(nnx.Module):
    """The matrix of dense layers of one input, with the weights of an output as a row.

    Args:
        layers: all contract as many dimensions, and their outputs differ in the first dimension only.
    """

    def __init__(self, *layers: Dense) -> None:
        self.num_inputs = layers[0].num_inputs
        self.outputs = tuple(layer.kernel.shape[self.num_inputs :] for layer in layers)
        names = layers[0].kernel.get_metadata("axes")
        output = names[self.num_inputs] if len(layers) == 1 else None  # heads and their dimensions are split by heads
        self.kernel = nnx.Param(jnp.concatenate([_by_output(layer) for layer in layers]), axes=(output, names[0]))
        biases = [layer.bias[...].reshape(-1) for layer in layers if layer.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases), axes=(output,)) if biases else None

    def product(self, x: Float[Array, "..."]) -> Float[Array, "*B F"]:
        """The outputs of all layers, side by side."""
        batch = x.shape[: x.ndim - self.num_inputs]
        y_BF = few_rows(x.reshape(math.prod(batch), -1), self.kernel[...])
        y_BF = y_BF if self.bias is None else y_BF + self.bias[...]
        return y_BF.reshape(*batch, -1)


class RowsDense(_Rows):
    """One dense layer."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self.product(x)
        return y.reshape(*y.shape[:-1], *self.outputs[0])


class JoinedDense(_Rows):
    """Dense layers of one input, by one matmul."""

    def __call__(self, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        y = self.product(x)
        ends = [sum(math.prod(shape) for shape in self.outputs[: i + 1]) for i in range(len(self.outputs) - 1)]
        parts = jnp.split(y, ends, axis=-1)
        return [part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, self.outputs, strict=True)]


class JoinedAttention(AttentionLayer):
    """A self-attention layer whose queries, keys and values come of one matmul.

    Args:
        layer: what it is made of.
    """

    def __init__(self, layer: AttentionLayer) -> None:
        self.config, self.scale = layer.config, layer.scale
        self.joined, self.last = JoinedDense(layer.query, layer.key, layer.value), RowsDense(layer.output)
        self.norm_query, self.norm_key = layer.norm_query, layer.norm_key
        self.rotation, self.relative = layer.rotation, layer.relative

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        attend_one = _attend_one(self.config.resolved_head_dim(x_BSD.shape[2]))
        if attend_one is None or not (isinstance(cache, KVCache) and self._is_plain_step(x_BSD, context)):
            return super().__call__(x_BSD, context, key, cache)
        q_B1NH, k_B1KH, v_B1KH = self.placed(x_BSD, context)
        cache, _, _ = cache.update(k_B1KH, v_B1KH, context.position_ids)
        o_B1NH = attend_one(
            q_B1NH,
            (cache.key.data_BKTH, cache.key.scale_BKT),
            (cache.value.data_BKTH, cache.value.scale_BKT),
            context.position_ids[:, 0],
            scale=self.scale,
            softcap=self.config.softcap,
        )
        return self.output(o_B1NH), cache

    def project(
        self, x_BSD: Float[Array, "B S D"], source_BTM: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        assert source_BTM is x_BSD
        q_BSNH, k_BTKH, v_BTKH = self.joined(x_BSD)
        q_BSNH = q_BSNH if self.norm_query is None else self.norm_query(q_BSNH)
        return q_BSNH, k_BTKH if self.norm_key is None else self.norm_key(k_BTKH), v_BTKH

    def output(self, o_BSNH: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
        """Back to the residual stream."""
        return self.last(o_BSNH)

    def _is_plain_step(self, x_BSD: jax.Array, context: Context) -> bool:
        """Whether each row has one token, which sees all that came before."""
        mask, bias = self.restrictions(context)
        return x_BSD.shape[1] == 1 and bias is None and all(isinstance(term, Causal) for term in mask.terms)


class JoinedGatedMLP(nnx.Module):
    """A gated MLP whose gate and hidden layer come of one matmul."""

    def __init__(self, layer: GatedMLPLayer) -> None:
        self.activation, self.dropout = layer.activation, layer.dropout
        self.joined, self.down = JoinedDense(layer.gate, layer.up), RowsDense(layer.down)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context | None = None, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B S D"], Auxiliary]:
        gate_BSF, up_BSF = self.joined(x_BSD)
        hidden_BSF = dropout(ACTIVATIONS[self.activation](gate_BSF) * up_BSF, self.dropout, key)
        return self.down(hidden_BSF), {}


class RowsEmbedding(Embedding):
    """An embedding whose rows score the next token by the kernel for few rows."""

    def __init__(self, embedding: Embedding) -> None:
        self.row_axis, self.table = embedding.row_axis, embedding.table

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """See Embedding."""
        return few_rows(x, self.table[...])


class OneKernelRMSNorm(nnx.Module):
    """RMSNorm as one kernel."""

    def __init__(self, layer: RMSNormLayer) -> None:
        self.epsilon, self.offset, self.scale = layer.epsilon, layer.offset, layer.scale

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return decoding.rms_norm(x, self.scale[...], self.epsilon, self.offset)


def laid_out(model: Any) -> Any:
    """The model, changed to what computes the same soonest on the platform that it is traced for. Layers that have a
    computation of their own stay as they are."""
    if platform() != "cpu" or _has_cpu_kernels():
        _join(model)
    if platform() == "cpu":
        _lay_out_apart(model)
    return model


def _join(model: Any) -> None:
    """Joined layers in the place of a model's attention and gated MLPs, and on GPUs kernels in that of its RMSNorms."""
    for module in [module for _, module in nnx.iter_modules(model)]:
        for name, child in list(vars(module).items()):
            if type(child) is AttentionLayer and _alike(child.query, child.key, child.value) and _plain(child.output):
                setattr(module, name, JoinedAttention(child))
            elif type(child) is GatedMLPLayer and _alike(child.gate, child.up) and _plain(child.down):
                setattr(module, name, JoinedGatedMLP(child))
            elif type(child) is RMSNormLayer and platform() == "gpu" and decoding.lacks() is None:
                setattr(module, name, OneKernelRMSNorm(child))


def _lay_out_apart(model: Any) -> None:
    """Layers that are laid out in the place of a model's dense layers, each by itself, and of its embeddings. A router
    stays as it is, for its matrix is read in float32."""
    for module in [module for _, module in nnx.iter_modules(model)]:
        for name, child in list(vars(module).items()):
            if _plain(child) and not isinstance(module, MixtureOfExpertsLayer):
                setattr(module, name, RowsDense(child))
            elif type(child) is Embedding:
                setattr(module, name, RowsEmbedding(child))


def _attend_one(head_dim: int) -> Callable[..., jax.Array] | None:
    """The kernel of a step's attention that takes heads of this width here."""
    if _has_cpu_kernels():
        return cpu.attend_one
    if platform() == "gpu" and decoding.lacks() is None and decoding.attend_one_lacks(head_dim) is None:
        return decoding.attend_one
    return None


def _has_cpu_kernels() -> bool:
    """Whether this is a CPU with kernels of its own; on a mesh of several XLA splits operations that it knows."""
    return platform() == "cpu" and active_placement() is None and cpu.lacks() is None


def _alike(*layers: Any) -> bool:
    """Whether layers can be joined: plain ones, all with a bias or none."""
    return all(_plain(layer) for layer in layers) and len({layer.bias is None for layer in layers}) == 1


def _plain(layer: Any) -> bool:
    return type(layer) is Dense


def _by_output(layer: Dense) -> Float[Array, "F D"]:
    """The weights of each output as a row."""
    kernel = layer.kernel[...]
    return kernel.reshape(math.prod(kernel.shape[: layer.num_inputs]), -1).T
