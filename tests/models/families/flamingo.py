"""Idefics of transformers, the open Flamingo: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.vit import images
from tests.models.references import ROWS, SEQUENCE, Case, causal, channels_first

IMAGES = 2


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    norms = {"qk_layer_norms": True, "alpha_type": "vector", "additional_vocab_size": 3, "cross_layer_interval": 2}
    resampler = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 5}
    return {
        "flamingo": case(resampler={**resampler, "qk_layer_norms_perceiver": True}, **norms),
        "flamingo-all-states-tied": case(tie_word_embeddings=True),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    heads, eyes, patch, interval = (int(n) for n in rng.integers(1, 4, 4))
    vision = {
        "num_attention_heads": eyes,
        "embed_dim": eyes * int(rng.integers(3, 9)),
        "num_hidden_layers": int(rng.integers(1, 3)),
        "intermediate_size": int(rng.integers(1, 50)),
        "patch_size": patch,
        "image_size": patch * int(rng.integers(1, 4)),
        "num_channels": int(rng.integers(1, 4)),
        "hidden_act": str(rng.choice(["gelu", "quick_gelu"])),
    }
    resampler = {
        "resampler_n_latents": int(rng.integers(1, 6)),
        "resampler_depth": int(rng.integers(1, 3)),
        "resampler_n_heads": int(rng.integers(1, 4)),
        "resampler_head_dim": int(rng.integers(3, 8)),
        "qk_layer_norms_perceiver": bool(rng.random() < 0.5),
    }
    return case(
        seed=int(rng.integers(1000)),
        vision=vision,
        resampler=resampler if rng.random() < 0.6 else None,
        num_attention_heads=heads,
        hidden_size=heads * 2 * int(rng.integers(3, 7)),
        num_hidden_layers=interval * int(rng.integers(1, 3)),
        cross_layer_interval=interval,
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(5, 60)),
        additional_vocab_size=int(rng.choice([0, 2])),
        alpha_type=str(rng.choice(["float", "vector"])),
        qk_layer_norms=bool(rng.random() < 0.5),
        rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.4),
    )


def case(
    seed: int = 0, vision: dict[str, Any] | None = None, resampler: dict[str, Any] | None = None, **changes: Any
) -> Case:
    """A model of tiny sizes but for the changes. A token sees no image, one, or both."""
    import transformers

    eyes = {"embed_dim": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.IdeficsConfig(
        **{**sizes, "num_attention_heads": 2, "max_position_embeddings": 16, **changes},
        vision_config={**eyes, "image_size": 4, "patch_size": 2, **(vision or {})},
        perceiver_config=resampler or {},
        use_resampler=resampler is not None,
        pad_token_id=None,  # torch drops the gradient of a padding token's row
        freeze_text_layers=False,
        freeze_vision_layers=False,
    )
    inputs = causal(config.vocab_size + config.additional_vocab_size, seed)
    sees = np.random.default_rng(seed).random((len(ROWS), SEQUENCE, IMAGES)) < 0.5
    inputs |= images(seed, config.vision_config, len(ROWS), IMAGES)
    inputs["image_attention_mask"] = sees.astype(np.int32)
    # of size 0.2: larger ones make the gradients of the norms of q and k badly conditioned
    return Case(config, "IdeficsForVisionText2Text", inputs, call=channels_first, std=0.2)
