"""GLM-4-0414 of transformers: committed cases and random ones."""

import numpy as np

from tests.models.families.glm import case, random_glm
from tests.models.references import Case


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {"glm4": case(kind="Glm4")}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    return case(seed=int(rng.integers(1000)), kind="Glm4", **random_glm(rng))
