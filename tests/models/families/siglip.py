"""SigLIP's vision tower of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.vit import images
from tests.models.references import Case, channels_first, squares


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {"siglip": case()}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    heads, patch = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    return case(
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        hidden_size=heads * int(rng.integers(3, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 50)),
        patch_size=patch,
        image_size=patch * int(rng.integers(1, 4)) + int(rng.integers(0, patch)),
        num_channels=int(rng.integers(1, 5)),
        hidden_act=str(rng.choice(["gelu_pytorch_tanh", "gelu", "quick_gelu"])),
        layer_norm_eps=float(rng.choice([1e-6, 1e-3])),
        vision_use_head=bool(rng.random() < 0.6),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**{**sizes, "image_size": 6, "patch_size": 2, **changes})
    pooled = config.vision_use_head
    return Case(
        config,
        "SiglipVisionModel",
        images(seed, config, 3),
        outputs=("last_hidden_state", "pooled") if pooled else ("last_hidden_state",),
        loss=squares("last_hidden_state", "pooler_output") if pooled else squares("last_hidden_state"),
        fields={"pooled": "pooler_output"},
        call=channels_first,
    )
