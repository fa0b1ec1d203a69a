"""PaliGemma of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.vit import images
from tests.models.references import Case, Inputs, channels_first

# Rows of a batch: padding before, prefix, suffix, padding after; the image stands at the start of the prefix.
ROWS = ((0, 3, 6, 0), (2, 2, 3, 0), (0, 4, 2, 3))


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {"paligemma": case(), "paligemma-untied": case(image_token=60, tie_word_embeddings=False)}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    kv_heads, heads, patch = int(rng.integers(1, 3)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    vocab = int(rng.integers(5, 90))
    vision = {
        "num_attention_heads": heads,
        "hidden_size": heads * int(rng.integers(3, 9)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(1, 50)),
        "patch_size": patch,
        "image_size": patch * int(rng.integers(1, 4)),
        "num_channels": int(rng.integers(1, 4)),
    }
    text = {
        "num_attention_heads": kv_heads * int(rng.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "hidden_size": int(rng.integers(5, 30)),
        "head_dim": 2 * int(rng.integers(2, 7)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "vocab_size": vocab,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
    }
    image_token = int(rng.choice([vocab - 1, vocab + 5]))  # inside the vocabulary or beyond
    tied = bool(rng.random() < 0.5)
    return case(int(rng.integers(1000)), text, vision, image_token, tie_word_embeddings=tied)


def case(
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    image_token: int = 52,
    **changes: Any,
) -> Case:
    """A model of tiny sizes but for the changes; padding before and after, and of the type of the prefix."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    towers = {
        "vision_config": {**sizes, "model_type": "siglip_vision_model", "image_size": 4, "patch_size": 2}
        | {"vision_use_head": False, **(vision or {})},
        "text_config": {**sizes, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 6, "vocab_size": 53}
        | {"pad_token_id": None, "max_position_embeddings": 64, **(text or {})},
    }
    width, image = towers["text_config"]["hidden_size"], towers["vision_config"]
    config = transformers.PaliGemmaConfig(
        **towers, image_token_index=image_token, hidden_size=width, projection_dim=width, **changes
    )
    inputs = sequences(
        seed, towers["text_config"]["vocab_size"], image_token, (image["image_size"] // image["patch_size"]) ** 2
    )
    inputs |= images(seed, config.vision_config, len(ROWS))
    return Case(
        config,
        "PaliGemmaForConditionalGeneration",
        inputs,
        outputs=("logits", "image_hidden_states"),
        call=channels_first,
        saved=saved,
        std=0.2,  # the decoder's gains are around 2 here
    )


def sequences(seed: int, vocab_size: int, image_token: int, num_patches: int) -> Inputs:
    """Rows of image, prefix and suffix; the suffix is what labels ask for."""
    rng = np.random.default_rng(seed)
    length = num_patches + max(sum(row) for row in ROWS)
    input_ids = rng.integers(0, vocab_size - 1, (len(ROWS), length)).astype(np.int32)
    attention_mask, token_type_ids = np.zeros_like(input_ids), np.zeros_like(input_ids)
    labels = np.full_like(input_ids, -100)
    for row, (before, prefix, suffix, _) in enumerate(ROWS):
        text = before + num_patches
        end = text + prefix + suffix
        input_ids[row, before:text] = image_token
        attention_mask[row, before:end] = 1
        token_type_ids[row, text + prefix : end] = 1
        labels[row, text + prefix - 1 : end - 1] = input_ids[row, text + prefix : end]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": labels,
    }


def saved(name: str) -> str:
    """The name of a parameter in checkpoints."""
    for module, stored in (("language_model.", "language_model.model."), ("", "")):
        if name.startswith(f"model.{module}"):
            return stored + name.removeprefix(f"model.{module}")
    return f"language_model.{name}"  # lm_head
