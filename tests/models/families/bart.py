"""BART of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from typing import Any

import numpy as np

from tests.models.references import Case, own_loss, sequence_to_sequence

OUTPUTS = ("logits", "encoder_last_hidden_state")


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    sides: dict[str, Any] = {"decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 20}
    return {
        "bart": case(),
        "bart-scaled": case(scale_embedding=True, activation_function="relu", shifted=True, **sides),
        "bart-untied": case(tie_word_embeddings=False),
    }


def drawn(rng: np.random.Generator, family: str = "Bart") -> Case:
    """A random configuration."""
    heads, decoder_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    return case(
        family,
        seed=int(rng.integers(1000)),
        shifted=bool(rng.random() < 0.3),
        d_model=heads * decoder_heads * int(rng.integers(3, 5)),
        encoder_layers=int(rng.integers(1, 4)),
        decoder_layers=int(rng.integers(1, 4)),
        encoder_attention_heads=heads,
        decoder_attention_heads=decoder_heads,
        encoder_ffn_dim=int(rng.integers(1, 40)),
        decoder_ffn_dim=int(rng.integers(1, 40)),
        vocab_size=int(rng.integers(10, 90)),
        activation_function=str(rng.choice(["gelu", "relu", "silu", "gelu_new", "tanh"])),
        scale_embedding=bool(rng.random() < 0.5),
        tie_word_embeddings=bool(rng.random() < 0.6),
    )


def case(family: str = "Bart", seed: int = 0, shifted: bool = False, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "d_model": 16, "max_position_embeddings": 16, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **changes})
    return Case(
        config,
        f"{family}ForConditionalGeneration",
        # no padding token among the real ones: torch gives its embedding no gradient
        sequence_to_sequence(config.vocab_size, seed, low=3, pad_id=1, start_id=2, shifted=shifted),
        outputs=OUTPUTS,
        loss=own_loss,
        hidden=(),
        equal={} if config.tie_word_embeddings else {"model.shared.weight": "model.encoder.embed_tokens.weight"},
        prepared=prepared,
    )


def prepared(model: Any) -> Any:
    """A bias of the logits that is not zero."""
    import torch

    generator = torch.Generator().manual_seed(model.config.vocab_size)
    model.final_logits_bias = 0.3 * torch.randn(model.final_logits_bias.shape, generator=generator)
    return model
