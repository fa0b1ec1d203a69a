"""How long the gradient is, layer by layer: what vanishes or explodes on its way down shows here first.

    gradient_norm/layer.0 ...           layers of the model's one stack, first to last
    gradient_norm/encoder.layer.0 ...   of its stacks, where it has several
    gradient_norm/embedding ...         whatever is in no stack, by the first name of its path

Each is the Euclidean norm over all parameters of the part, of the gradient of the mean loss, before clipping. The
squares of all of them add up to the square of the whole gradient's norm (frozen parameters, which the optimizer's
`gradient_norm` leaves out, included). One pass over the gradient, which is small against a step.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmlab.nn.module import Params

PREFIX = "gradient_norm/"


def norms_by_layer(gradient: Params) -> dict[str, Float[Array, ""]]:
    """Norms by metric name.

    Args:
        gradient: in the structure of the model's parameters; a layer stack is the dict with `blocks`, each stacked
            over its repeats, and `remainder`.
    """
    stacks = list(_stacks(gradient, ()))
    squares: dict[str, Float[Array, ""]] = {}
    for path, stack in stacks:
        prefix = f"{path[0]}." if len(stacks) > 1 else ""
        for number, square in enumerate(_squares_of_layers(stack)):
            squares[f"{prefix}layer.{number}"] = square
    for name, part in gradient.items():
        rest = _without_stacks(part)
        if jax.tree.leaves(rest):
            squares[name] = _square(rest)
    return {PREFIX + name: jnp.sqrt(square) for name, square in squares.items()}


def _is_stack(tree: Params) -> bool:
    return "blocks" in tree or "remainder" in tree  # of no layers the other one is not there


def _stacks(tree: Params, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Params]]:
    for name, part in tree.items():
        if isinstance(part, dict):
            if _is_stack(part):
                yield (*path, name), part
            else:
                yield from _stacks(part, (*path, name))


def _without_stacks(tree: Params | jax.Array) -> Params | jax.Array:
    if not isinstance(tree, dict):
        return tree
    return {} if _is_stack(tree) else {name: _without_stacks(part) for name, part in tree.items()}


def _squares_of_layers(stack: Params) -> list[Float[Array, ""]]:
    """Of every layer, first to last: repeats of the pattern, then what is left over."""
    pattern = [stack.get("blocks", {})[key] for key in sorted(stack.get("blocks", {}), key=int)]
    of_blocks = [_square_by_repeat(block) for block in pattern]
    repeats = of_blocks[0].shape[0] if of_blocks else 0
    rest = stack.get("remainder", {})
    return [block[r] for r in range(repeats) for block in of_blocks] + [
        _square(rest[key]) for key in sorted(rest, key=int)
    ]


def _square_by_repeat(block: Params) -> Float[Array, "repeats"]:
    """Sum of squares over everything but the first dimension, in float32 whatever the gradient's type."""
    leaves = (jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(block))
    return sum((jnp.sum(x.reshape(x.shape[0], -1), axis=1) for x in leaves), jnp.zeros(()))


def _square(tree: Params | jax.Array) -> Float[Array, ""]:
    leaves = (jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))
    return sum((jnp.sum(x) for x in leaves), jnp.zeros(()))
