"""ViT of transformers, with a classifier and with a pooler: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

import re
from typing import Any

import numpy as np

from tests.models.references import Case, Inputs, channels_first, own_loss, squares

# What transformers calls its modules -> what they are called in checkpoints.
_SAVED = {
    r"^(vit\.)?layers\.": r"\1encoder.layer.",
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
}


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    changes = {"hidden_act": "gelu_pytorch_tanh", "qkv_bias": False, "layer_norm_eps": 1e-3}
    return {
        "vit": classifier(num_labels=5),
        "vit-model": pooled(**changes, num_channels=1, pooler_output_size=10, pooler_act="relu"),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    heads, patch = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    changes = {
        "seed": int(rng.integers(1000)),
        "num_attention_heads": heads,
        "hidden_size": heads * int(rng.integers(3, 9)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "intermediate_size": int(rng.integers(1, 50)),
        "patch_size": patch,
        "image_size": patch * int(rng.integers(1, 4)),
        "num_channels": int(rng.integers(1, 5)),
        "hidden_act": str(rng.choice(["gelu", "relu", "silu", "gelu_pytorch_tanh"])),
        "qkv_bias": bool(rng.random() < 0.5),
        "layer_norm_eps": float(rng.choice([1e-12, 1e-6, 1e-3])),
    }
    if rng.random() < 0.6:
        return classifier(**changes, num_labels=int(rng.integers(2, 9)))
    return pooled(**changes, pooler_output_size=int(rng.integers(1, 20)))


def images(seed: int, config: Any, *batch: int) -> Inputs:
    """Random images that fit a config, (batch..., height, width, channels)."""
    shape = (*batch, config.image_size, config.image_size, config.num_channels)
    return {"pixel_values": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def saved(name: str) -> str:
    """The name of a parameter in checkpoints."""
    for pattern, replacement in _SAVED.items():
        name = re.sub(pattern, replacement, name)
    return name


def config(**changes: Any) -> Any:
    """Tiny sizes but for the changes."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTConfig(**{**sizes, "image_size": 6, "patch_size": 2, **changes})


def classifier(seed: int = 0, **changes: Any) -> Case:
    """With labels and a loss, one label not counted."""
    made = config(**changes)
    labels = np.random.default_rng(seed).integers(0, made.num_labels, 4).astype(np.int32)
    labels[2] = -100
    inputs = images(seed, made, 4) | {"labels": labels}
    return Case(made, "ViTForImageClassification", inputs, loss=own_loss, hidden=(), call=channels_first, saved=saved)


def pooled(seed: int = 0, **changes: Any) -> Case:
    """Without a head."""
    made, outputs = config(**changes), ("last_hidden_state", "pooled")
    fields = {"pooled": "pooler_output"}
    return Case(
        made,
        "ViTModel",
        images(seed, made, 3),
        outputs=outputs,
        loss=squares("last_hidden_state", "pooler_output"),
        fields=fields,
        call=channels_first,
        saved=saved,
    )
