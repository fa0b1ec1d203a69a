"""Random models against transformers itself, in both directions; needs the parity extra."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmlab.models.huggingface import load_hf, save_hf
from llmlab.models.weights import flatten
from llmlab.nn.module import split

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed (the parity extra)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the parity extra)")

HERE = Path(__file__).parent
# Of the reference's largest value. Some random models are badly conditioned: the worst measured is 1.3e-5, where
# transformers in float32 is 7e-6 from itself in float64.
CLAIM = 1e-4


def neighbour(name: str) -> ModuleType:
    """A file beside this one: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixtures = neighbour("make_fixtures")
comparison = neighbour("test_huggingface")


def random_gpt2(rng: np.random.Generator) -> Any:
    heads = int(rng.integers(1, 5))
    return fixtures.gpt2(
        n_head=heads,
        n_embd=heads * int(rng.integers(5, 9)),
        n_layer=int(rng.integers(1, 5)),
        n_inner=None if rng.random() < 0.5 else int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(2, 90)),
        activation_function=str(rng.choice(["gelu_new", "gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh"])),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
        scale_attn_weights=bool(rng.random() < 0.7),
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def random_rope(rng: np.random.Generator) -> dict[str, Any]:
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


def random_llama(rng: np.random.Generator) -> Any:
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(2, 7))
    rope = random_rope(rng)
    return fixtures.llama(
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


def drawn(family: str, seed: int) -> Any:
    """A random model of transformers, in float32."""
    rng = np.random.default_rng(seed)
    config = random_gpt2(rng) if family == "gpt2" else random_llama(rng)
    config._attn_implementation = "eager"
    return fixtures.randomised(transformers.AutoModelForCausalLM.from_config(config), seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_models_have_the_logits_and_gradients_of_transformers(family, seed, tmp_path):
    theirs = drawn(family, seed)
    theirs.save_pretrained(tmp_path)
    inputs = fixtures.reference(theirs, *fixtures.batch(theirs.config.vocab_size, seed))
    comparison.assert_equals_reference(load_hf(tmp_path), inputs, family, CLAIM)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
@pytest.mark.parametrize("seed", range(100, 103))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exports_load_in_transformers_and_give_the_same_logits(family, seed, max_shard_bytes, tmp_path):
    drawn(family, seed).save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert {name: problems for name, problems in report.items() if problems} == {}
    assert next(opened.parameters()).dtype == torch.float32
    input_ids, attention_mask, labels = fixtures.batch(opened.config.vocab_size, seed)
    inputs = fixtures.reference(opened, input_ids, attention_mask, labels)
    comparison.assert_equals_reference(model, inputs, family, CLAIM)
    opened.save_pretrained(tmp_path / "back")
    again = load_hf(tmp_path / "back")
    for name, leaf in flatten(split(model)[1]).items():
        np.testing.assert_array_equal(leaf, flatten(split(again)[1])[name])
