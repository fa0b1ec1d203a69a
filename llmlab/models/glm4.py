"""GLM-4-0414 (Team GLM 2025): GLM with a norm on both sides of each part.

    x --+-- RMSNorm -- attention (half rotary) -- RMSNorm --(+)--+-- RMSNorm -- SwiGLU -- RMSNorm --(+)-- y
        +--------------------------------------------------|     +--------------------------------|

The second norm bounds what a part adds to the residual stream, however its weights grow (Ding et al. 2021, 2105.13290,
where it is called Sandwich). It costs memory traffic, no FLOPs worth counting. All else is GLM's; see glm.py.
"""

from collections.abc import Mapping
from typing import Any

from llmlab.models.config import Tied, Transformer, named
from llmlab.models.family import Family, HuggingFace
from llmlab.models.glm import glm, read, weights, written
from llmlab.models.hf_config import check_same
from llmlab.nn.wiring import Sandwich

PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "glm4-nano": glm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, wiring=Sandwich(), head=Tied()),
    "glm4-9b": glm(
        embed_dim=4096,
        num_layers=40,
        num_heads=32,
        hidden_dim=13696,
        head_dim=128,
        vocab_size=151552,
        context_length=32768,
        epsilon=1e-5,
        wiring=Sandwich(),
    ),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> Transformer:
    """Model of a Hugging Face config with model_type glm4; ValueError lists every attribute not implemented."""
    return read(config, "glm4", "Glm4", Sandwich())


def to_hf(model: Transformer) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that a glm4 config cannot express."""
    config = written(model, "glm4", "Glm4")
    check_same(model, from_hf(config), "glm4")
    return config


WEIGHTS = weights(
    {
        "input_layernorm": "mixer_branch.norm_input",
        "post_self_attn_layernorm": "mixer_branch.norm_output",
        "post_attention_layernorm": "ffn_branch.norm_input",
        "post_mlp_layernorm": "ffn_branch.norm_output",
    }
)

FAMILY = Family(
    name="GLM-4-0414",
    kind="decoder",
    paper="Team GLM 2025",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("NextToken", "PrefixLM"),
    reference="transformers Glm4ForCausalLM",
    hugging_face=HuggingFace(model_type="glm4", from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
