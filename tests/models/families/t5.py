"""T5 of transformers, v1.0 and v1.1: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.references import Case, own_loss, sequence_to_sequence

OUTPUTS = ("logits", "encoder_last_hidden_state")


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    v1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {
        "t5": case(),
        "t5-1.1": case(untied=True, **v1_1, num_layers=1, num_decoder_layers=2),
        # as transformers itself builds it: v1.1 whose head is tied and not scaled; buckets that most distances share
        "t5-1.1-tied": case(**v1_1, relative_attention_num_buckets=8, relative_attention_max_distance=6, shifted=True),
    }


def drawn(rng: np.random.Generator, family: str = "T5") -> Case:
    """A random configuration."""
    gate = str(rng.choice(["", "gated-"]))
    untied = bool(rng.random() < 0.5)
    buckets = int(rng.choice([8, 16, 32]))
    unscaled = untied or bool(rng.random() < 0.3)
    return case(
        family,
        seed=int(rng.integers(1000)),
        untied=untied,
        shifted=bool(rng.random() < 0.3),
        d_model=int(rng.integers(5, 30)),
        d_kv=int(rng.integers(2, 8)),
        d_ff=int(rng.integers(1, 50)),
        num_heads=int(rng.integers(1, 5)),
        num_layers=int(rng.integers(1, 4)),
        num_decoder_layers=int(rng.integers(1, 4)),
        vocab_size=int(rng.integers(10, 90)),
        feed_forward_proj=gate + str(rng.choice(["relu", "gelu", "silu", "gelu_new", "tanh"])),
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128 if rng.random() < 0.3 else buckets // 2 + int(rng.integers(1, 9)),
        layer_norm_epsilon=float(rng.choice([1e-6, 1e-3])),
        **({"tie_word_embeddings": False} if unscaled or family == "MT5" else {}),
    )


def case(family: str = "T5", seed: int = 0, untied: bool = False, shifted: bool = False, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    config = getattr(transformers, f"{family}Config")(**{**sizes, "decoder_start_token_id": 0, **changes})
    return Case(
        config,
        f"{family}ForConditionalGeneration",
        sequence_to_sequence(config.vocab_size, seed, low=1, shifted=shifted),
        outputs=OUTPUTS,
        loss=own_loss,
        hidden=(),
        # attention logits are not divided by sqrt(d_kv): at 0.3 transformers in float32 is 2e-5 from itself in float64
        std=0.2,
        prepared=with_own_head if untied else lambda model: model,
    )


def with_own_head(model: Any) -> Any:
    """Untied: transformers 5 ties every T5 that it builds, and unties one whose file has a head of its own."""
    import torch

    generator = torch.Generator().manual_seed(model.config.vocab_size)
    weight = 0.2 * torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model
