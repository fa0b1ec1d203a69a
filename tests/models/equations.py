"""The parts of a Transformer in float64 NumPy, for families that no library has: parameters are nested dicts by the
names that llmlab gives them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.module import merge, split

_ERF = np.vectorize(math.erf, otypes=[float])


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def layer_norm(params: Any, x: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * params["scale"] + params["bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + _ERF(x / math.sqrt(2))) / 2


def mlp(params: Any, x: np.ndarray) -> np.ndarray:
    hidden = gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def projected(params: Any, x: np.ndarray) -> np.ndarray:
    """Into heads: (..., D) to (..., N, H)."""
    return np.tensordot(x, params["kernel"], axes=1) + params.get("bias", 0.0)


def joined(params: Any, o: np.ndarray) -> np.ndarray:
    """Out of heads: (..., N, H) to (..., D)."""
    return np.tensordot(o, params["kernel"], axes=2) + params.get("bias", 0.0)


def layer(params: Any, number: int) -> Any:
    """Parameters of one layer of a stack whose pattern is one block."""
    return jax.tree.map(lambda leaf: leaf[number], params["stack"]["blocks"]["0"])


def sinusoids(position_ids: np.ndarray, dim: int) -> np.ndarray:
    """Vaswani et al. 2017, section 3.5."""
    waves = position_ids[..., None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    return np.stack([np.sin(waves), np.cos(waves)], axis=-1).reshape(*position_ids.shape, dim)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels that are not -100."""
    counted = labels != -100
    logits, labels = logits[counted], labels[counted]
    return float(np.mean(np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(len(labels)), labels]))


def randomised(model: Any, seed: int = 0, std: float = 0.3) -> Any:
    """The model with every parameter moved at random: gains of one and biases of zero would hide mistakes."""
    graphdef, params = split(model)
    rng = np.random.default_rng(seed)
    return merge(graphdef, jax.tree.map(lambda p: p + jnp.float32(std * rng.normal(size=p.shape)), params))


def assert_model_is_its_equations(
    model: Any, inputs: dict[str, Any], equations: Callable[[Any], np.ndarray], real: np.ndarray
) -> None:
    """Logits at real tokens, loss, and the gradient of every parameter along a random direction.

    Args:
        model: the model.
        inputs: what it is called with, labels included.
        equations: logits in float64 from float64 parameters.
        real: tokens that count.
    """
    graphdef, params = split(model)

    def value(params: Any) -> Any:
        output = merge(graphdef, params)(**{name: jnp.asarray(array) for name, array in inputs.items()})
        return output.loss, output.logits

    (loss, logits), slopes = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = equations(exact)
    # 1e-5 of the largest value: a tenth of what is claimed of models that have a reference in float32
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-5 * np.abs(expected[real]).max())
    assert float(loss) == pytest.approx(cross_entropy(expected, inputs["labels"]), rel=1e-5)
    leaves, tree = jax.tree.flatten(exact)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(exact)[0]]
    rng = np.random.default_rng(0)
    for number, slope in enumerate(jax.tree.leaves(slopes)):
        along, moved = rng.normal(size=slope.shape), []
        for step in (1e-5, -1e-5):
            nudged = [leaf + step * along if i == number else leaf for i, leaf in enumerate(leaves)]
            moved.append(cross_entropy(equations(jax.tree.unflatten(tree, nudged)), inputs["labels"]))
        # central differences: h^2 ~ 1e-10 and 1e-15 / h ~ 1e-10
        size = np.linalg.norm(slope) + 1e-3
        assert abs((moved[0] - moved[1]) / 2e-5 - np.sum(np.asarray(slope) * along)) < 1e-4 * size, paths[number]
