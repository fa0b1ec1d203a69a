"""Llama of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

import dataclasses
from typing import Any

import numpy as np

from tests.models.references import Case, causal


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    gqa = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_act": "gelu"}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    return {
        "llama": dataclasses.replace(case(), respell=old_rope),
        "llama-gqa-tied": case(**gqa, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
        "llama-bfloat16-shards": dataclasses.replace(case(num_key_value_heads=1), dtype="bfloat16", shard_size="4KB"),
        "llama-rope-linear": dataclasses.replace(scaled("linear", factor=3.0), respell=old_rope),
        "llama-rope-dynamic": scaled("dynamic", factor=2.0, max_position_embeddings=8),
        "llama-rope-yarn": scaled("yarn", factor=2.0, original_max_position_embeddings=8, beta_fast=2.0),
        "llama-rope-llama3": dataclasses.replace(scaled("llama3", factor=8.0, **llama3), respell=old_rope),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(2, 7))
    rope = random_rope(rng)
    return case(
        seed=int(rng.integers(1000)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * int(rng.integers(5, 9)),
        head_dim=head_dim,
        num_hidden_layers=int(rng.integers(1, 5)),
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(2, 90)),
        hidden_act=str(rng.choice(["silu", "gelu", "relu", "gelu_pytorch_tanh"])),
        attention_bias=bool(rng.random() < 0.5),
        mlp_bias=bool(rng.random() < 0.5),
        rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
        rope_parameters=rope,
        # sequences have 12 tokens: a dynamic scaling must have something to scale
        max_position_embeddings=8 if rope["rope_type"] == "dynamic" else 16,
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def case(seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(**{**sizes, **heads, **changes})
    return Case(config, "LlamaForCausalLM", causal(config.vocab_size, seed))


def scaled(rope_type: str, max_position_embeddings: int = 16, **parameters: Any) -> Case:
    """Frequencies matter most in wide heads, and early when theta is small."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **parameters}
    sizes = {"head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": max_position_embeddings}
    return case(**sizes, rope_parameters=rope)


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 4 wrote them: rope_theta beside rope_scaling, "type" inside it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config


def random_rope(rng: np.random.Generator) -> dict[str, Any]:
    """Rotary positions of any kind."""
    rope: dict[str, Any] = {"rope_type": str(rng.choice(["default", "linear", "dynamic", "yarn", "llama3"]))}
    rope["rope_theta"] = float(rng.choice([50.0, 10_000.0, 500_000.0]))
    if rope["rope_type"] != "default":
        rope["factor"] = float(rng.choice([1.0, 2.0, 5.5]))
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = int(rng.integers(4, 16))
        optional = {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False}
        rope.update({name: value for name, value in optional.items() if rng.random() < 0.4})
        if rng.random() < 0.3:
            rope.update(mscale=0.7, mscale_all_dim=1.1)
    if rope["rope_type"] == "llama3":
        rope.update(low_freq_factor=1.0, high_freq_factor=float(rng.choice([2.0, 4.0])))
        rope["original_max_position_embeddings"] = int(rng.integers(4, 16))
    return rope
