"""What a model is given for each prompt, by its kind: tokens to continue, a source to read, images to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlab.infer.steps import EncoderDecoderSteps, PaliGemmaSteps, Steps
from llmlab.tokenizers import Tokenizer

Prompt = str | Sequence[int]
"""Text, or tokens as they are to be given."""

# Inputs with a number for each token of the prompt; they are padded as it is.
_PER_TOKEN = ("token_type_ids", "image_attention_mask")


@dataclass(frozen=True)
class Given:
    """What the model is given for one prompt."""

    ids: tuple[int, ...]
    """What it continues."""
    source: tuple[int, ...] | None = None
    """What an encoder-decoder reads."""
    inputs: Mapping[str, Any] | None = None
    """What else, without a dimension for rows."""


def read_prompts(
    steps: Steps,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    inputs: Mapping[str, Any] | None,
    start_id: int | None,
) -> list[Given]:
    """What the model is given for each prompt."""
    if isinstance(steps, EncoderDecoderSteps):
        if inputs:
            raise ValueError(f"an encoder-decoder's source is the prompt; leave out inputs {', '.join(sorted(inputs))}")
        start = steps.config.decoder_start_id if start_id is None else start_id
        if start is None:
            raise ValueError(
                "the model has no decoder_start_id: its targets begin with tokens of their own; give start_id"
            )
        return [Given((start,), tuple(source_tokens(tokenizer, prompt))) for prompt in prompts]
    if start_id is not None:
        raise ValueError(f"start_id={start_id} begins the target of an encoder-decoder; put it into the prompt here")
    for name, array in (inputs or {}).items():
        if len(array) != len(prompts):
            raise ValueError(f"inputs: {name} has {len(array)} rows for {len(prompts)} prompts; give one for each")
    rows: list[Mapping[str, Any]] = [
        {name: array[number] for name, array in (inputs or {}).items()} for number in range(len(prompts))
    ]
    return [
        Given(tuple(_continued(steps, tokenizer, prompt, row)), inputs=row or None)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _continued(steps: Steps, tokenizer: Tokenizer, prompt: Prompt, inputs: Mapping[str, Any]) -> list[int]:
    """Tokens that the model continues; a PaliGemma's text stands after its images and ends with a line break."""
    if not isinstance(steps, PaliGemmaSteps) or not isinstance(prompt, str):
        return start_tokens(tokenizer, prompt)
    shape = np.shape(inputs.get("pixel_values", 0.0))
    num_images = shape[0] if len(shape) == 4 else len(shape) // 3
    places = [steps.config.image_token_id] * (num_images * steps.config.vision.length)
    return [*places, *start_tokens(tokenizer, prompt), *tokenizer.encode("\n")]


def start_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Tokens that the model continues: bos where the tokenizer has one, then the prompt."""
    if not isinstance(prompt, str):
        if not len(prompt):
            raise ValueError("a prompt has no tokens; give at least one to start from")
        return [int(index) for index in prompt]
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = first + tokenizer.encode(prompt)
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]  # what stands before a document where documents end with eos and have no bos
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer has no bos or eos token to start from; give a prompt")
    return ids


def source_tokens(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Tokens that an encoder reads: the text in the tokenizer's own frame, with eos at its end."""
    if not isinstance(prompt, str):
        ids = [int(index) for index in prompt]
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
            ids = [*ids, tokenizer.eos_id]
    if not ids:
        raise ValueError("a source has no tokens, and the tokenizer no eos; give it some")
    return ids


def stacked(given: Sequence[Given], num_rows: int, length: int, source_length: int) -> Mapping[str, Any] | None:
    """What else the model is given, as arrays with a row for each prompt; rows that fill up repeat the first.

    Args:
        given: of each prompt.
        num_rows: rows of the arrays.
        length: what the prompts are padded to.
        source_length: what sources are padded to; 0 where there are none.
    """
    if source_length:
        ids, mask = (np.zeros((num_rows, source_length), np.int32) for _ in range(2))
        mask[:, 0] = 1  # a row that is not there: attention must have something to see
        for row, one in enumerate(given):
            source = one.source or ()
            ids[row, : len(source)], mask[row, : len(source)] = source, 1
        return {"input_ids": ids, "attention_mask": mask}
    if not given[0].inputs:
        return None
    rows = [*given, *[given[0]] * (num_rows - len(given))]
    return {name: np.stack([_padded(name, row, length) for row in rows]) for name in given[0].inputs}


def _padded(name: str, given: Given, length: int) -> np.ndarray:
    assert given.inputs is not None
    array = np.asarray(given.inputs[name])
    if name not in _PER_TOKEN:
        return array
    return np.pad(array[:length], [(0, max(0, length - len(array))), *[(0, 0)] * (array.ndim - 1)])


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list, of one where one was given."""
    many: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    is_one = len(many) > 0 and all(isinstance(one, (int, np.integer)) for one in many)
    return [many] if is_one else many
