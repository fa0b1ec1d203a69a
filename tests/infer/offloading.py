"""What tests of layers in the host's memory share."""

from typing import Any

import jax
import numpy as np

from llmlab.infer.decoding import Batch, Program, Shape
from llmlab.infer.sampling import GREEDY, Needs, SamplingRows
from llmlab.infer.steps import prepare
from llmlab.nn.module import merge, split


def in_host_memory(model: Any) -> Any:
    """As `llmlab.load(path, host=True)` gives it."""
    graphdef, params = split(model)
    return merge(graphdef, jax.tree.map(np.asarray, params))


def decode_call(model: Any) -> tuple[Any, ...]:
    """What the program that writes 8 further tokens of a row is called with."""
    steps, params = prepare(model)
    batch = Batch(
        program=Program(steps, Needs.of([GREEDY]), None),
        params=params,
        prompts=[[5, 9, 2]],
        prompt_of=range(1),
        rows=SamplingRows.of([GREEDY], starts=[3], lasts=[11]),
        shape=Shape.of(3, 9, None),
        num_prompts=1,
    )
    batch.first()
    return batch.program, 8, params, batch._carry, batch.rows, batch._stop(), np.zeros(1, bool), None
