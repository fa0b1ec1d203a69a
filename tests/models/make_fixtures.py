"""Write the Hugging Face directories and reference values that the tests of this folder compare with.

    python tests/models/make_fixtures.py            (needs the parity extra: torch and transformers)

Each folder of `fixtures/` is a tiny model of random weights as `transformers` saves it, and `reference.safetensors`:
what `transformers` computes with it in float32 on inputs with no padding, padding on the right and padding on the
left: logits, and the gradient of the mean cross-entropy for every parameter. Two runs write the same files.
"""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SEQUENCE = 12
# Rows of a batch: real tokens, then where the padding is.
ROWS = ((SEQUENCE, "right"), (8, "right"), (7, "left"))


@dataclass(frozen=True)
class Case:
    """A model to write."""

    config: transformers.PreTrainedConfig
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    respell: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """Rewrites config.json as older versions of transformers spelled it."""


def gpt2(**changes: Any) -> transformers.GPT2Config:
    sizes = {"vocab_size": 53, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 40}
    return transformers.GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})


def llama(**changes: Any) -> transformers.LlamaConfig:
    sizes = {"vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 16}
    return transformers.LlamaConfig(**{**sizes, **heads, **changes})


def scaled(rope_type: str, max_position_embeddings: int = 16, **parameters: Any) -> transformers.LlamaConfig:
    """Frequencies matter most in wide heads, and early when theta is small."""
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **parameters}
    sizes = {"head_dim": 16, "num_key_value_heads": 1, "max_position_embeddings": max_position_embeddings}
    return llama(**sizes, rope_parameters=rope)


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 4 wrote them: rope_theta beside rope_scaling, "type" inside it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return config


CASES = {
    "gpt2": Case(gpt2()),
    "gpt2-untied": Case(
        gpt2(tie_word_embeddings=False, activation_function="relu", scale_attn_weights=False, layer_norm_epsilon=1e-3)
    ),
    "llama": Case(llama(), respell=old_rope),
    "llama-gqa-tied": Case(
        llama(
            tie_word_embeddings=True,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
        )
    ),
    "llama-bfloat16-shards": Case(llama(num_key_value_heads=1), dtype=torch.bfloat16, shard_size="4KB"),
    "llama-rope-linear": Case(scaled("linear", factor=3.0), respell=old_rope),
    "llama-rope-dynamic": Case(scaled("dynamic", factor=2.0, max_position_embeddings=8)),
    "llama-rope-yarn": Case(scaled("yarn", factor=2.0, original_max_position_embeddings=8, beta_fast=2.0)),
    "llama-rope-llama3": Case(
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
        respell=old_rope,
    ),
}


def write(name: str, case: Case) -> None:
    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    model = randomised(transformers.AutoModelForCausalLM.from_config(case.config), seed=len(name))
    model.to(case.dtype).save_pretrained(directory, max_shard_size=case.shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    config = case.respell(json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    input_ids, attention_mask, labels = batch(case.config.vocab_size)
    save_file(reference(opened, input_ids, attention_mask, labels), directory / "reference.safetensors")


def randomised(model: Any, seed: int) -> Any:
    """The model with every parameter drawn: gains of one and biases of zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = parameter.ndim == 1 and name.endswith("weight")
        # 0.3 of a unit: logits of size one, attention that is neither flat nor one-hot
        parameter.data = 1 + 0.3 * noise if gain else 0.3 * noise
    return model


def batch(vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask, and labels (the next token; -100 where this or the next one is padding), rows as in ROWS."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, vocab_size, (len(ROWS), SEQUENCE))
    attention_mask = np.zeros_like(input_ids)
    for row, (real, padding) in enumerate(ROWS):
        start = SEQUENCE - real if padding == "left" else 0
        attention_mask[row, start : start + real] = 1
    labels = np.full_like(input_ids, -100)
    counted = attention_mask[:, :-1] * attention_mask[:, 1:] == 1
    labels[:, :-1][counted] = input_ids[:, 1:][counted]
    return input_ids, attention_mask, labels


def reference(
    model: Any, input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Inputs, and what transformers makes of them: logits, loss, gradient for every parameter."""
    model.eval()
    model.zero_grad()
    logits = model(torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten())
    loss.backward()
    return {
        "input_ids": input_ids.astype(np.int32),
        "attention_mask": attention_mask.astype(np.int32),
        "labels": labels.astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy().reshape(1),
        **{f"gradient.{name}": p.grad.numpy().copy() for name, p in model.named_parameters()},
    }


if __name__ == "__main__":
    for name, case in CASES.items():
        write(name, case)
