"""CLIP of transformers, both towers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.families.vit import images
from tests.models.references import ROWS, SEQUENCE, Case, channels_first, own_loss, tokens

OUTPUTS = ("text_embeds", "image_embeds", "logits_per_image", "logits_per_text")


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    return {"clip": case(), "clip-legacy": case(end=2)}


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""

    def tower() -> dict[str, Any]:
        heads = int(rng.integers(1, 5))
        return {
            "num_attention_heads": heads,
            "hidden_size": heads * int(rng.integers(3, 9)),
            "num_hidden_layers": int(rng.integers(1, 4)),
            "intermediate_size": int(rng.integers(1, 50)),
            "hidden_act": str(rng.choice(["quick_gelu", "gelu", "relu"])),
            "layer_norm_eps": float(rng.choice([1e-5, 1e-3])),
        }

    patch, vocab = int(rng.integers(1, 5)), int(rng.integers(4, 90))
    image = {
        "patch_size": patch,
        "image_size": patch * int(rng.integers(1, 4)),
        "num_channels": int(rng.integers(1, 4)),
    }
    return case(
        seed=int(rng.integers(1000)),
        text={**tower(), "vocab_size": vocab},
        vision={**tower(), **image},
        end=2 if rng.random() < 0.4 else vocab - 1,
        projection_dim=int(rng.integers(3, 20)),  # in one dimension all cosines are 1 or -1
    )


def case(
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    end: int = 52,
    **changes: Any,
) -> Case:
    """A model of tiny sizes but for the changes. Texts end in the end token, which is the vocabulary's last; padding,
    on either side, has it too, as CLIP's tokenizer pads."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    both = {
        "text_config": {**sizes, "vocab_size": 53, "max_position_embeddings": 14, "bos_token_id": 0} | (text or {}),
        "vision_config": {**sizes, "image_size": 6, "patch_size": 2} | (vision or {}),
    }
    both["text_config"] |= {"eos_token_id": end, "pad_token_id": 1}
    config = transformers.CLIPConfig(**both, **{"projection_dim": 12, **changes})
    last = both["text_config"]["vocab_size"] - 1
    inputs = tokens(last, seed)
    for row, (real, padding) in enumerate(ROWS):
        if padding == "right":
            inputs["input_ids"][row, real - 1 :] = last
        else:
            inputs["input_ids"][row, : SEQUENCE - real] = 0
            inputs["input_ids"][row, -1] = last
    return Case(
        config,
        "CLIPModel",
        inputs | images(seed, config.vision_config, len(ROWS)),
        outputs=OUTPUTS,
        loss=own_loss,
        kwargs={"return_loss": True},
        call=channels_first,
    )
