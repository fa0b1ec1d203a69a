"""What models return: small dataclasses whose fields have the field's usual names."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hidden:
    """What `hidden_states` returns: the input of a head, and what else the stack gives."""

    states: Float[Array, "B S D"]
    """Input of the head."""
    cache: tuple[Cache, ...] | None = None
    """Keys and values with this call's positions stored, when a cache was given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalOutput:
    """What a causal language model returns."""

    logits: Float[Array, "B S V"]
    """Scores of the next token, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    cache: tuple[Cache, ...] | None = None
    """Keys and values with this call's positions stored, when a cache was given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""
