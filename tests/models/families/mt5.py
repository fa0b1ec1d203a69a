"""mT5 of transformers: committed cases and random ones; its configs are T5's."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

import numpy as np

from tests.models.families import t5
from tests.models.references import Case


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {"mt5": t5.case("MT5", untied=True), "mt5-tied": t5.case("MT5", seed=1, num_layers=1)}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    return t5.drawn(rng, "MT5")
