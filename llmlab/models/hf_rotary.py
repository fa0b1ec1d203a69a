"""Rotary positions of Hugging Face configs, in the spellings of every version of transformers.

    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...}}       since 4.43; "type" before
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, ...}}    since 5

The first is what is written: all versions read it.
"""

from typing import Any

from llmlab.models.hf_config import Attributes
from llmlab.nn.positions import Rotary
from llmlab.nn.rotary_scaling import DynamicNTK, Linear, Llama3, RotaryScaling, YaRN

_KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "llama3")}


def rotary_from_hf(
    hf: Attributes,
    *,
    theta: float = 10_000.0,
    length: int = 2048,
    fraction: float | None = None,
    interleaved: bool = False,
) -> Rotary:
    """Rotary positions of a config; what is wrong or not implemented is noted in `hf`.

    Args:
        hf: the config's attributes.
        theta: the family's default of the base.
        length: the family's default of the longest sequence.
        fraction: the family's default of the share of a head that is rotated; None for families that rotate all.
        interleaved: whether the family rotates neighbours.
    """
    rope = hf.nested("rope_scaling", "rope_parameters")
    length = hf.integer("max_position_embeddings", length)
    # where it stands beside the rope's own attributes, transformers prefers it
    original = hf.optional("original_max_position_embeddings", int)
    theta = rope.real("rope_theta", hf.real("rope_theta", theta))
    if fraction is None:
        for part in (hf, rope):
            part.fixed("partial_rotary_factor", 1.0, 1)
    else:
        fraction = rope.real("partial_rotary_factor", hf.real("partial_rotary_factor", fraction))
        if not 0.0 < fraction <= 1.0:
            hf.problem(f"partial_rotary_factor={fraction} is not in (0, 1]")
            fraction = 1.0
    kind = rope.choice("rope_type", _KINDS, rope.choice("type", _KINDS, "default"))
    scaling = _scaling(kind, rope, length, original)
    return Rotary(theta=theta, fraction=1.0 if fraction is None else fraction, interleaved=interleaved, scaling=scaling)


def rotary_to_hf(rotary: Rotary, context_length: int | None) -> dict[str, Any]:
    """Attributes of a config for these positions and the longest sequence that the model is meant for."""
    scaling = rotary.scaling
    rope: dict[str, Any] | None = None
    length = context_length or 2048
    if isinstance(scaling, Linear):
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, DynamicNTK):
        rope = {"rope_type": "dynamic", "factor": scaling.factor}
        length = scaling.original_max_length  # what transformers scales against
    elif isinstance(scaling, YaRN):
        rope = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
            "truncate": scaling.truncate,
        }
        length = context_length or int(scaling.factor * scaling.original_max_length)
    elif isinstance(scaling, Llama3):
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
        length = context_length or int(scaling.factor * scaling.original_max_length)
    if rope is not None:
        rope = {name: value for name, value in rope.items() if value is not None}
    attributes = {"max_position_embeddings": length, "rope_theta": rotary.theta, "rope_scaling": rope}
    return attributes if rotary.fraction == 1.0 else attributes | {"partial_rotary_factor": rotary.fraction}


def _scaling(kind: str, rope: Attributes, length: int, original: int | None) -> RotaryScaling | None:
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        factor = _factor(rope, None)
        return Linear(factor=factor) if kind == "linear" else DynamicNTK(factor=factor, original_max_length=length)
    trained = original or rope.integer("original_max_position_embeddings", length)
    if kind == "yarn":
        return YaRN(
            factor=_factor(rope, length / trained),
            original_max_length=trained,
            beta_fast=rope.real("beta_fast", 32.0),
            beta_slow=rope.real("beta_slow", 1.0),
            attention_factor=_optional(rope, "attention_factor"),
            mscale=_optional(rope, "mscale"),
            mscale_all_dim=_optional(rope, "mscale_all_dim"),
            truncate=rope.flag("truncate", True),
        )
    low, high = rope.real("low_freq_factor", 1.0), rope.real("high_freq_factor", 4.0)
    if low >= high:
        rope.problem(f"low_freq_factor={low} is not below high_freq_factor={high}")
        return None
    return Llama3(
        factor=_factor(rope, None), low_frequency_factor=low, high_frequency_factor=high, original_max_length=trained
    )


def _factor(rope: Attributes, default: float | None) -> float:
    """At least 1; required where there is no default."""
    factor = rope.real("factor", default or 0.0)
    if factor < 1.0:
        rope.problem(f"factor={factor or None} is not a number from 1 up")
    return max(factor, 1.0)


def _optional(rope: Attributes, name: str) -> float | None:
    return rope.real(name, 0.0) if rope.given(name) else None
