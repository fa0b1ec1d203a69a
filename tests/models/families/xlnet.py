"""XLNet of transformers: committed cases and random ones."""

# pyright: reportMissingImports=false
# transformers comes with the parity extra only.

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.models.references import Case, Inputs, own_loss

LENGTH, TARGETS, MEMORY = 10, 3, 5
# Rows of a batch, an even number for bi_data: first and one past the last real token.
ROWS = ((0, 10), (0, 7), (4, 10), (2, 9))


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    old = {"clamp_len": 3, "bi_data": True, "ff_activation": "relu", "layer_norm_eps": 1e-3}
    return {
        "xlnet": case(),
        "xlnet-permutation": case(parts=("mask", "segments", "order")),
        "xlnet-memory": case(parts=("segments", "order", "memory"), mem_len=8, reuse_len=6),
        "xlnet-both-directions": case(parts=("mask", "order"), tie_word_embeddings=False, **old),
        "xlnet-classes": headed("XLNetForSequenceClassification", num_labels=3, summary_type="mean"),
        "xlnet-spans": headed("XLNetForQuestionAnsweringSimple"),
        "xlnet-causal": case(parts=("segments", "memory"), attn_type="uni", same_length=True, mem_len=4),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    if rng.random() < 0.3:
        summary = {"summary_type": str(rng.choice(["last", "first", "mean"])), "summary_activation": "relu"}
        labels = {"num_labels": int(rng.integers(1, 5)), **summary}
        model = str(rng.choice(["XLNetForSequenceClassification", "XLNetForQuestionAnsweringSimple"]))
        return headed(model, int(rng.integers(1000)), **(labels if "Sequence" in model else {}))
    heads = int(rng.integers(1, 5))
    causal = bool(rng.random() < 0.25)
    # transformers adds no mask to the causal one: their shapes differ
    parts = ("segments", "memory") if causal else ("mask", "segments", "order", "memory")
    return case(
        seed=int(rng.integers(1000)),
        parts=tuple(part for part in parts if rng.random() < 0.6),
        n_head=heads,
        d_model=2 * heads * int(rng.integers(3, 6)),
        n_layer=int(rng.integers(1, 5)),
        d_inner=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(2, 90)),
        ff_activation=str(rng.choice(["gelu", "relu", "silu", "gelu_new"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
        attn_type="uni" if causal else "bi",
        same_length=bool(rng.random() < 0.5),
        bi_data=bool(rng.random() < 0.5),
        clamp_len=int(rng.choice([-1, 2, 7])),
        mem_len=None if rng.random() < 0.3 else int(rng.integers(1, 20)),
        reuse_len=None if rng.random() < 0.5 else int(rng.integers(1, LENGTH)),
        tie_word_embeddings=bool(rng.random() < 0.5),
    )


def case(seed: int = 0, parts: tuple[str, ...] = ("mask",), **changes: Any) -> Case:
    """A model of tiny sizes but for the changes; `parts` names what its call has besides tokens."""
    import transformers

    sizes = {"vocab_size": 53, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}
    config = transformers.XLNetConfig(**{**sizes, **changes})
    inputs = batch(config, seed, parts)
    outputs = ("logits", "mems") if "memory" in parts else ("logits",)
    return Case(config, "XLNetLMHeadModel", inputs, outputs=outputs, call=call)


def headed(model: str, seed: int = 0, **changes: Any) -> Case:
    """A model with a head that is no language model's; its loss is its own."""
    base = case(seed, ("mask", "segments"), **changes)
    rng = np.random.default_rng(seed)
    inputs = {name: value for name, value in base.inputs.items() if name != "labels"}
    if model == "XLNetForSequenceClassification":
        numbers, classes = rng.normal(size=len(ROWS)), rng.integers(0, base.config.num_labels, len(ROWS))
        inputs["labels"] = numbers.astype(np.float32) if base.config.num_labels == 1 else classes.astype(np.int32)
        return Case(base.config, model, inputs, loss=own_loss, hidden=())
    for name in ("start_positions", "end_positions"):
        inputs[name] = rng.integers(0, LENGTH, len(ROWS)).astype(np.int32)
    return Case(base.config, model, inputs, outputs=("start_logits", "end_logits"), loss=own_loss, hidden=())


def batch(config: Any, seed: int, parts: tuple[str, ...]) -> Inputs:
    """Tokens and labels, and the parts: padding on both sides, text segments, an order with targets, a memory."""
    rng = np.random.default_rng(seed)
    shape = (len(ROWS), LENGTH)
    inputs: Inputs = {"input_ids": rng.integers(0, config.vocab_size, shape).astype(np.int32)}
    rows = ROWS if "mask" in parts else ((0, LENGTH),) * len(ROWS)
    real = np.array([[first <= place < last for place in range(LENGTH)] for first, last in rows])
    labels = np.where(real & (rng.random(shape) < 0.5), rng.integers(0, config.vocab_size, shape), -100)
    if "mask" in parts:
        inputs["attention_mask"] = real.astype(np.int32)
    if "segments" in parts:
        inputs["token_type_ids"] = (np.arange(LENGTH) > rng.integers(2, 8, (len(ROWS), 1))).astype(np.int32)
    if "order" in parts:
        # when[b, i]: how early token i comes; a token sees what comes earlier
        when = np.argsort(rng.random(shape), axis=1)
        inputs["perm_mask"] = (when[:, :, None] <= when[:, None, :]).astype(np.float32)
        late = np.argsort(np.where(real, -when, LENGTH), axis=1)[:, :TARGETS]
        inputs["target_mapping"] = np.eye(LENGTH, dtype=np.float32)[late]
        labels = rng.integers(0, config.vocab_size, late.shape)
        labels[0, -1] = -100
    if "memory" in parts:
        inputs["mems"] = rng.normal(size=(config.n_layer, len(ROWS), MEMORY, config.d_model)).astype(np.float32)
    labels[0, 0] = config.vocab_size - 1
    return inputs | {"labels": labels.astype(np.int32)}


def call(model: Any, inputs: dict[str, Any]) -> Any:
    """transformers has a list of memories with the sequence in front."""
    import torch

    if "mems" in inputs:
        inputs = inputs | {"mems": [layer.transpose(0, 1) for layer in inputs["mems"]]}
    output = model(**inputs)
    mems = None if output.mems is None else torch.stack(list(output.mems)).transpose(1, 2)
    return SimpleNamespace(logits=output.logits, mems=mems)
