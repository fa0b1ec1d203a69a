"""Reformer of transformers: committed cases and random ones. The rotations that transformers draws from `hash_seed`
are an input of ours."""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

import dataclasses
from typing import Any

import numpy as np

from tests.models.encoder_cases import encoder_case, random_labels
from tests.models.references import Case, Inputs, causal

HASH_SEED = 7
LENGTH = 12  # of the batches


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    rounds = {"num_hashes": 3, "num_buckets": [2, 4]}
    sides = {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1, "local_num_chunks_before": 2}
    return {
        "reformer-causal": case("ModelWithLMHead"),
        # chunks of 4 and 8: 12 tokens are padded to 16
        "reformer-causal-rounds": case("ModelWithLMHead", attn_layers=["lsh"] * 3, lsh_attn_chunk_length=8, **rounds),
        "reformer-masked": case("ForMaskedLM", num_hashes=2, hidden_act="gelu", layer_norm_eps=1e-3, **sides),
        "reformer-masked-local": case("ForMaskedLM", attn_layers=["local"] * 2, axial_pos_embds=False),
        # neither is cut into chunks
        "reformer-masked-short": case("ForMaskedLM", lsh_attn_chunk_length=16, local_attn_chunk_length=12),
        "reformer-classes": case("ForSequenceClassification", num_labels=3, lsh_attn_chunk_length=8),
        "reformer-spans": case(
            "ForQuestionAnswering", attn_layers=["lsh", "local", "local"], chunk_size_feed_forward=4
        ),
        "reformer-bare": case("Model", is_decoder=True, num_buckets=6, attention_head_size=5),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending = str(
        rng.choice(["ModelWithLMHead", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "Model"])
    )
    dims, decoder = [int(rng.integers(1, 9)) for _ in range(2)], ending == "ModelWithLMHead" or rng.random() < 0.3
    after = 0 if decoder else 1
    return case(
        ending,
        seed=int(rng.integers(1000)),
        is_decoder=bool(decoder and ending != "ForMaskedLM"),
        hidden_size=4 + sum(dims),
        axial_pos_embds_dim=[dims[0], 4 + dims[1]],
        axial_pos_shape=[[4, 4], [2, 8], [8, 3]][rng.integers(3)],
        axial_pos_embds=bool(rng.random() < 0.7),
        attn_layers=[str(kind) for kind in rng.choice(["local", "lsh"], int(rng.integers(1, 5)))],
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_size=int(rng.integers(2, 7)),
        feed_forward_size=int(rng.integers(1, 40)),
        vocab_size=int(rng.integers(3, 90)),
        hidden_act=str(rng.choice(["relu", "gelu", "silu"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
        chunk_size_feed_forward=int(rng.choice([0, 2])),
        num_hashes=int(rng.integers(1, 4)),
        num_buckets=[None, 2, 6, [2, 2], [4, 2, 2]][rng.integers(5)],
        lsh_attn_chunk_length=int(rng.choice([2, 4, 6, 12])),
        local_attn_chunk_length=int(rng.choice([2, 4, 6, 12])),
        lsh_num_chunks_before=int(rng.integers(0, 3)),
        lsh_num_chunks_after=int(rng.integers(0, 2)) * after,
        local_num_chunks_before=int(rng.integers(0, 3)),
        local_num_chunks_after=int(rng.integers(0, 2)) * after,
        **random_labels(rng, ending),
    )


def case(ending: str, seed: int = 0, **changes: Any) -> Case:
    """A model of tiny sizes but for the changes."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    layers = {"attn_layers": ["local", "lsh"], "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4}
    more = {"feed_forward_size": 20, "max_position_embeddings": 24, "num_buckets": 4, "hash_seed": HASH_SEED}
    axial = {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [6, 10]}
    # the layers run as in training, see `call`
    still = {f"{name}_prob": 0.0 for name in ("hidden_dropout", "lsh_attention_probs_dropout")}
    still |= {"local_attention_probs_dropout_prob": 0.0, "is_decoder": ending == "ModelWithLMHead"}
    # with a cache, the buckets that the backward pass takes up again are cut to the length before padding
    still["use_cache"] = False
    config = transformers.ReformerConfig(**{**sizes, **layers, **more, **axial, **still, **changes})
    rotations = drawn_rotations(config)
    if ending == "ModelWithLMHead":
        made = Case(config, "ReformerModelWithLMHead", causal(config.vocab_size, seed) | rotations)
        hidden = ("labels", *rotations)
    else:
        made, hidden = encoder_case(config, "Reformer", ending, seed, extra=rotations), tuple(rotations)
    if ending == "ForSequenceClassification":
        # A first token that is padding would see nothing but padding, also what transformers pads to whole chunks.
        made.inputs["attention_mask"][:, 0] = 1
    return dataclasses.replace(made, hidden=hidden, call=call, prepared=without_bias, std=0.2)


def drawn_rotations(config: Any) -> Inputs:
    """What transformers draws in every layer that hashes."""
    import torch

    chunks = {"lsh": config.lsh_attn_chunk_length, "local": config.local_attn_chunk_length}
    used = [chunks[kind] for kind in set(config.attn_layers)]
    length = -(-LENGTH // (whole := int(np.lcm.reduce(used)))) * whole if min(used) < LENGTH else LENGTH
    if "lsh" not in config.attn_layers or length <= chunks["lsh"]:
        return {}
    buckets = config.num_buckets
    if buckets is None:  # few enough here to be one factor
        buckets = 2 ** ((2 * (length // chunks["lsh"])).bit_length() - 1)
        assert buckets <= 2 * max(int((config.max_position_embeddings // chunks["lsh"]) ** 0.5), chunks["lsh"])
    columns = (sum(buckets) if isinstance(buckets, list) else buckets) // 2
    torch.manual_seed(HASH_SEED)
    shape = (config.num_attention_heads, config.attention_head_size, config.num_hashes, columns)
    return {"draws.lsh_rotations": torch.randn(shape).numpy()}


def without_bias(model: Any) -> Any:
    """The bias of the language model's head, which nothing reads, as zeros."""
    if hasattr(model, "lm_head"):
        model.lm_head.bias.data.zero_()
    return model


def call(model: Any, inputs: dict[str, Any]) -> Any:
    """The backward pass of transformers' layers runs in training only; the model in training pads no inputs."""
    base = getattr(model, "reformer", model)
    for layer in base.encoder.layers:
        layer.train()
    return model(**inputs)
