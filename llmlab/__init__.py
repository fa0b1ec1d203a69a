"""llmlab: a research lab for language models in JAX and Flax.

    model = llmlab.load("runs/quickstart-1a2b3c4d")        # a run, a checkpoint or a Hugging Face directory
    tokenizer = llmlab.load_tokenizer("runs/quickstart-1a2b3c4d")
    print(llmlab.generate(model, tokenizer, ["def main("]))

The names below are imported when they are first used, so that `import llmlab` and `llmlab --help` cost milliseconds
and not the seconds that importing jax takes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.experiment import Experiment as Experiment
    from llmlab.infer.generate import generate as generate
    from llmlab.models.huggingface import save_hf as save_hf
    from llmlab.models.huggingface import with_head as with_head
    from llmlab.runs import Run as Run
    from llmlab.runs import load as load
    from llmlab.runs import load_config as load_config
    from llmlab.runs import train as train
    from llmlab.tokenizers import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "Experiment": "llmlab.experiment",
    "Run": "llmlab.runs",
    "generate": "llmlab.infer.generate",
    "load": "llmlab.runs",
    "load_config": "llmlab.runs",
    "load_tokenizer": "llmlab.tokenizers",
    "save_hf": "llmlab.models.huggingface",
    "train": "llmlab.runs",
    "with_head": "llmlab.models.huggingface",
}

__all__ = [
    "Experiment",
    "Run",
    "__version__",
    "generate",
    "load",
    "load_config",
    "load_tokenizer",
    "save_hf",
    "train",
    "with_head",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llmlab' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
