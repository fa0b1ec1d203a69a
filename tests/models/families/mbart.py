"""mBART of transformers: committed cases and random ones; its configs are BART's."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

import numpy as np

from tests.models.families import bart
from tests.models.references import Case


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {
        "mbart": bart.case("MBart", scale_embedding=True),
        "mbart-shifted": bart.case("MBart", seed=1, activation_function="relu", encoder_layers=1, shifted=True),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    return bart.drawn(rng, "MBart")
