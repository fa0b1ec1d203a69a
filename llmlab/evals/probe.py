"""Linear probes: what can be read off frozen representations by a linear map alone (Alain and Bengio 2016, 1610.01644).

A classifier that is only linear cannot compute much, so what it finds was there already. The probe is multinomial
logistic regression on standardised states,

    min over W, b of   sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / 2 * l2,

a convex problem with one solution: the probe adds no luck of its own to the comparison. States are standardised by the
training side's mean and spread, so that the penalty means the same for models whose states have different sizes.

A probe compares representations by one question. Another question may rank them differently, and wider states have more
to offer a linear map: compare equal widths.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int


def probe_accuracy(
    train: tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m d"], Int[np.ndarray, " m"]],
    *,
    l2: float = 1.0,
) -> float:
    """Share of the test side that the probe of the training side classifies rightly.

    Args:
        train: states and their classes, numbered from 0.
        test: states and classes that the probe does not see.
        l2: weight of the penalty.
    """
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    std = np.where(std > 0, std, 1.0)
    weights, bias = fit_probe((train[0] - mean) / std, train[1], l2=l2)
    predicted = np.argmax((test[0] - mean) / std @ weights + bias, axis=1)
    return float(np.mean(predicted == test[1]))


def fit_probe(
    states: Float[np.ndarray, "n d"], classes: Int[np.ndarray, " n"], *, l2: float = 1.0
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Weights and biases of the logistic regression, in float64, by L-BFGS.

    Raises:
        ValueError: there are fewer than two classes, or the penalty is not positive (the solution might be infinite).
    """
    from scipy.optimize import minimize

    num_classes, (count, dim) = int(classes.max()) + 1, states.shape
    if num_classes < 2 or l2 <= 0:
        raise ValueError(f"{num_classes} classes and l2={l2}: a probe needs two classes and a positive penalty")
    x, one_hot = states.astype(np.float64), np.eye(num_classes)[classes]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: dim * num_classes].reshape(dim, num_classes), flat[dim * num_classes :]
        logits = x @ w + b
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = np.exp(log_p) - one_hot
        loss = -(log_p * one_hot).sum() + l2 / 2 * np.square(w).sum()
        return loss, np.concatenate([(x.T @ error + l2 * w).ravel(), error.sum(axis=0)])

    start = np.zeros(dim * num_classes + num_classes)
    options = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-6 * count}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return found[: dim * num_classes].reshape(dim, num_classes), found[dim * num_classes :]


def mean_states(
    model: Any,
    states: Callable[..., Any],
    rows: Sequence[Sequence[int]],
    *,
    length: int,
    batch_size: int = 64,
    pad_id: int = 0,
) -> Float[np.ndarray, "n d"]:
    """Mean of a model's states over the tokens of each row, as its summary.

    Args:
        model: a built model.
        states: `(model, input_ids, attention_mask) -> (B, S, D)`, what represents a token.
        rows: token ids; those beyond `length` are cut.
        length: that rows are padded to.
        batch_size: rows that are computed at once.
        pad_id: fills rows up; where the mask is 0 its states do not count.

    Raises:
        ValueError: a row has no token.
    """
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"row {empty[0]} has no token, so that it has no mean")
    graphdef, params = nnx.split(model)

    @jax.jit
    def summary(params: Any, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
        x_BSD = states(nnx.merge(graphdef, params), input_ids, mask).astype(jnp.float32)
        weight = mask[..., None].astype(jnp.float32)
        return jnp.sum(x_BSD * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)

    ids = np.full((-(-len(rows) // batch_size) * batch_size, length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row[:length])] = row[:length]
        mask[i, : len(row[:length])] = 1
    parts = [
        np.asarray(summary(params, ids[i : i + batch_size], mask[i : i + batch_size]))
        for i in range(0, len(ids), batch_size)
    ]
    return np.concatenate(parts)[: len(rows)]
