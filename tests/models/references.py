"""How transformers is asked what a model computes: shared by the fixtures and by the live comparison.

A `Case` is a model of random weights and a batch. Its reference values are what transformers computes in float32: the
outputs by name, the training loss, and the gradient of the loss for every parameter.

torch and transformers are imported inside functions only: they come with the parity extra, and the committed fixtures
must be readable without them.
"""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
SEQUENCE = 12
# Rows of a batch: real tokens, then where the padding is.
ROWS = ((SEQUENCE, "right"), (8, "right"), (7, "left"))

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model of transformers and what it is called with."""

    config: Any
    """Its transformers config."""
    model: str
    """Its class in transformers."""
    inputs: Inputs
    """What the llmlab model is called with, labels included, by llmlab's (mostly the field's) names."""
    outputs: tuple[str, ...] = ("logits",)
    """Fields of the output that must agree."""
    loss: Callable[[Any, Mapping[str, Any]], Any] = field(default_factory=lambda: cross_entropy)
    """Loss from transformers' output and the inputs as tensors; see `cross_entropy` and `own_loss`."""
    saved: Callable[[str], str] = lambda name: name
    """Name in checkpoints of a parameter of the transformers model, which may spell its modules in a new way."""
    parts: Callable[[str, Any], Mapping[str, Any]] = lambda name, gradient: {name: gradient}
    """What checkpoints hold of a parameter, by name, where that is several tensors (experts)."""
    hidden: tuple[str, ...] = ("labels",)
    """Inputs that transformers is not called with."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """llmlab's name of an input -> transformers' name, where they differ."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """llmlab's name of an output -> transformers' name, where they differ."""
    call: Callable[[Any, dict[str, Any]], Any] | None = None
    """Calls the transformers model with keyword tensors, where that takes more than model(**inputs) (a fixed draw)."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments for transformers, not arrays."""
    dtype: str = "float32"
    """Of the saved weights."""
    shard_size: str = "1GB"
    """Largest file."""
    respell: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """Rewrites config.json as older versions of transformers spelled it."""
    attention: str = "eager"
    """Attention implementation that transformers uses."""
    equal: Mapping[str, str] = field(default_factory=dict)
    """Parameter that nothing reads -> the one that it is set to, as checkpoints of older versions have it."""
    prepared: Callable[[Any], Any] = lambda model: model
    """Changes the model of transformers, its random weights drawn, where its class cannot be asked to (untie)."""
    std: float = 0.3
    """Size of the random weights: logits of size one, attention that is neither flat nor one-hot."""


def cross_entropy(output: Any, inputs: Mapping[str, Any]) -> Any:
    """Mean cross-entropy of the logits at the labels, which stand where they are predicted; -100 is not counted."""
    import torch

    return torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), inputs["labels"].flatten())


def own_loss(output: Any, inputs: Mapping[str, Any]) -> Any:
    """The loss that transformers computed itself; the case must not hide the labels then (`hidden=()`)."""
    return output.loss


def squares(*names: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Sum of the outputs' mean squares: for models that have no loss of their own (see comparison.evaluated)."""
    return lambda output, inputs: sum(getattr(output, name).square().mean() for name in names)


def channels_first(model: Any, inputs: dict[str, Any]) -> Any:
    """Calls a model of transformers, whose images have channels before height and width, with llmlab's images."""
    return model(**inputs | {"pixel_values": inputs["pixel_values"].movedim(-1, -3)})


def tokens(
    vocab_size: int, seed: int = 0, *, low: int = 0, pad_id: int | None = None, length: int = SEQUENCE
) -> Inputs:
    """`input_ids` from `low` up and `attention_mask`, rows as in ROWS; padding has `pad_id` where that matters."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(low, vocab_size, (len(ROWS), length)).astype(np.int32)
    attention_mask = np.zeros_like(input_ids)
    for row, (real, padding) in enumerate(ROWS):
        real = real * length // SEQUENCE
        start = length - real if padding == "left" else 0
        attention_mask[row, start : start + real] = 1
    if pad_id is not None:
        input_ids = np.where(attention_mask == 1, input_ids, pad_id).astype(np.int32)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def causal(vocab_size: int, seed: int = 0, **options: Any) -> Inputs:
    """Tokens, mask, and labels: the next token, -100 where this or the next one is padding."""
    inputs = tokens(vocab_size, seed, **options)
    labels = np.full_like(inputs["input_ids"], -100)
    counted = inputs["attention_mask"][:, :-1] * inputs["attention_mask"][:, 1:] == 1
    labels[:, :-1][counted] = inputs["input_ids"][:, 1:][counted]
    return inputs | {"labels": labels}


def masked(vocab_size: int, seed: int = 0, **options: Any) -> Inputs:
    """Tokens, mask, and labels at about a third of the real tokens."""
    inputs = tokens(vocab_size, seed, **options)
    rng = np.random.default_rng(seed + 1)
    chosen = (rng.random(inputs["input_ids"].shape) < 0.35) & (inputs["attention_mask"] == 1)
    chosen[0, 0] = True
    labels = np.where(chosen, rng.integers(0, vocab_size, chosen.shape), -100).astype(np.int32)
    return inputs | {"labels": labels}


def sequence_to_sequence(
    vocab_size: int, seed: int = 0, *, low: int = 0, pad_id: int = 0, start_id: int | None = 0, shifted: bool = False
) -> Inputs:
    """Source and target of other lengths, the source padded on both sides (rows as in ROWS), the target on the right.

    With `shifted`, no decoder inputs: the model is to shift the labels, which are real tokens above `pad_id` then.
    """
    source = tokens(vocab_size, seed, low=low, pad_id=pad_id)
    rng = np.random.default_rng(seed + 1)
    labels = rng.integers(low, vocab_size, (len(ROWS), SEQUENCE - 3)).astype(np.int32)
    mask = np.zeros_like(labels)
    for row, real in enumerate((SEQUENCE - 3, 5, 7)):
        mask[row, :real] = 1
        labels[row, real:] = -100
    if shifted:
        return source | {"labels": labels}
    first = labels[:, :1] * 0 + (start_id or 0)
    target = np.concatenate([first, np.where(labels == -100, pad_id, labels)[:, :-1]], axis=1).astype(np.int32)
    return source | {"decoder_input_ids": target, "decoder_attention_mask": mask, "labels": labels}


def randomised(model: Any, seed: int, std: float = 0.3) -> Any:
    """The model with every parameter drawn: gains of one and biases of zero would hide mistakes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.3 * noise if gain else std * noise
    return model


def build(case: Case, seed: int) -> Any:
    """The case's model of transformers with random weights."""
    import transformers

    case.config._attn_implementation = case.attention
    model = randomised(getattr(transformers, case.model)(case.config), seed, case.std)
    for copy, original in case.equal.items():
        model.get_parameter(copy).data = model.get_parameter(original).data.clone()
    return case.prepared(model)


def opened(case: Case, directory: Path) -> Any:
    """The model that transformers opens from a directory; what it reports as missing or unexpected is an error."""
    import torch
    import transformers

    model, report = getattr(transformers, case.model).from_pretrained(
        directory, dtype=torch.float32, attn_implementation=case.attention, output_loading_info=True
    )
    problems = {name: problem for name, problem in report.items() if problem}
    assert not problems, problems
    return model


def reference(model: Any, case: Case) -> Inputs:
    """`input.*`, and what transformers makes of them: `output.*`, `loss`, and `gradient.*` for every parameter."""
    import torch

    model.eval()
    model.zero_grad()
    tensors = {name: torch.from_numpy(_torch_kind(value)) for name, value in case.inputs.items()}
    called = {case.renamed.get(name, name): value for name, value in tensors.items() if name not in case.hidden}
    called |= case.kwargs
    output = model(**called) if case.call is None else case.call(model, called)
    loss = case.loss(output, tensors)
    loss.backward()
    values = {name: getattr(output, case.fields.get(name, name)).detach().numpy() for name in case.outputs}
    whole = {case.saved(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {part: gradient for name, grad in whole.items() for part, gradient in case.parts(name, grad).items()}
    return {
        **{f"input.{name}": value for name, value in case.inputs.items()},
        **{f"output.{name}": value.copy() for name, value in values.items()},
        "loss": loss.detach().numpy().reshape(1),
        **{f"gradient.{name}": gradient.numpy().copy() for name, gradient in gradients.items()},
    }


def _torch_kind(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int64) if array.dtype == np.int32 else array


def write(name: str, case: Case) -> None:
    """The fixture of a case: the model as transformers saves it, and `reference.safetensors`. Repeatable."""
    import torch

    directory = FIXTURES / name
    shutil.rmtree(directory, ignore_errors=True)
    model = build(case, seed=len(name))
    model.to(getattr(torch, case.dtype)).save_pretrained(directory, max_shard_size=case.shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    config = case.respell(json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(reference(opened(case, directory), case), directory / "reference.safetensors")
