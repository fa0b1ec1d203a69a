"""What it means that a model of llmlab computes what the reference does: outputs, loss, gradient of every parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.models.huggingface import FAMILIES
from llmlab.models.weights import dump, flatten
from llmlab.nn.module import merge, split

# The claim is 1e-4 of the reference's largest value. Both sides round in float32, 6e-8 an operation, in their own
# order; a wrong rotary layout or a missing bias is off by 1e-1. A tenth of the claim is asked for.
CLOSE = 1e-5


def under(prefix: str, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with "prefix.", without it."""
    return {name.removeprefix(f"{prefix}."): a for name, a in values.items() if name.startswith(f"{prefix}.")}


def evaluated(model: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]) -> tuple[Any, dict[str, Any], Any]:
    """Loss, outputs by name, gradient. The loss of a model that has none is the sum of its outputs' mean squares."""
    graphdef, params = split(model)

    def loss(params: Any) -> Any:
        out = merge(graphdef, params)(**arguments(inputs))
        values = {name: getattr(out, name) for name in outputs}
        loss = sum(jnp.mean(jnp.square(value)) for value in values.values()) if out.loss is None else out.loss
        return loss, values

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, found, gradient


def arguments(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Inputs as a model is called with them: "draws.lsh_rotations" is an entry of the dictionary `draws`."""
    called: dict[str, Any] = {}
    for name, value in inputs.items():
        group, _, entry = name.rpartition(".")
        (called.setdefault(group, {}) if group else called)[entry] = jnp.asarray(value)
    return called


def assert_close(ours: Any, theirs: Any, name: str, tolerance: float = CLOSE) -> None:
    """Within the tolerance of the reference's largest value."""
    assert np.shape(ours) == np.shape(theirs), name
    error = np.max(np.abs(np.asarray(ours) - theirs)) / max(np.max(np.abs(theirs)), 1e-30)
    assert error < tolerance, f"{name} differs by {error:.1e} of its largest value"


def assert_equals_reference(
    model: Any, values: dict[str, np.ndarray], model_type: str, tolerance: float = CLOSE
) -> None:
    """Outputs at real tokens, loss, and the gradient of every parameter.

    Gradients are compared against the largest of all gradients where they are tiny themselves: a key's bias has none
    in exact arithmetic, and what both sides have there is rounding.
    """
    inputs, outputs, gradients = (under(prefix, values) for prefix in ("input", "output", "gradient"))
    loss, found, gradient = evaluated(model, inputs, tuple(outputs))
    for name, theirs in outputs.items():
        ours, real = np.asarray(found[name]), real_positions(inputs, theirs)
        # what padding positions compute is nobody's business
        assert_close(ours if real is None else ours[real], theirs if real is None else theirs[real], name, tolerance)
    assert_close(loss[None], values["loss"], "loss", tolerance)
    table = FAMILIES[model_type].weights
    ours = {name: value for name, value in dump(table, gradient) if name in gradients or name not in table.unread}
    # Parameters that do not take part have no gradient in torch and zeros here.
    assert gradients.keys() <= ours.keys(), gradients.keys() - ours.keys()
    assert all(not np.any(ours[name]) for name in ours.keys() - gradients.keys())
    largest = max(np.max(np.abs(value)) for value in gradients.values())
    for name, theirs in gradients.items():
        if np.max(np.abs(theirs)) < 1e-6 * largest:
            assert np.max(np.abs(ours[name])) < 1e-5 * largest, name
        elif np.size(theirs) == 1 and np.max(np.abs(ours[name] - theirs)) < 1e-5 * largest:
            pass  # a scale's gradient is a sum whose terms may nearly cancel: logits of 0.2 to 3e-4, in a CLIP
        else:
            assert_close(ours[name], theirs, f"gradient.{name}", tolerance)


def real_positions(inputs: dict[str, np.ndarray], output: np.ndarray) -> np.ndarray | None:
    """Where an output of shape (batch, sequence, ...) stands for real tokens; None for other outputs."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name)
        if mask is not None and mask.ndim == 2 and output.ndim >= 2 and mask.shape == output.shape[:2]:
            return mask == 1
    return None


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Parameters by dotted path."""
    return {name: np.asarray(leaf) for name, leaf in flatten(split(model)[1]).items()}


def assert_same_weights(first: Any, second: Any) -> None:
    """Bitwise."""
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        np.testing.assert_array_equal(leaf, theirs[name])
