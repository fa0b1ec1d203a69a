"""An architecture family as an entry of the catalogue: where it comes from, its sizes, its way to Hugging Face."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llmlab.models.config import ModelConfig, Transformer
from llmlab.models.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A family's way to and from Hugging Face directories."""

    model_type: str
    """What `config.json` calls the family."""
    from_hf: Callable[[Mapping[str, Any]], Any]
    """Model config from the contents of config.json; ValueError lists every attribute that is not implemented."""
    to_hf: Callable[[Any], dict[str, Any]]
    """Contents of config.json; ValueError with the differences if the family cannot express the model."""
    weights: WeightTable
    """Which tensor is which parameter."""
    config: type[ModelConfig] = Transformer
    """Class of the configs that `to_hf` takes."""
    amended: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] | None = None
    """The config with what only the names of the checkpoint's tensors tell, where its own words do not."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture family."""

    name: str
    """As papers spell it: "GPT-2"."""
    kind: str
    """Encoder, decoder, encoder-decoder, vision or vision-language."""
    paper: str
    """First author, year and arXiv number."""
    presets: Mapping[str, ModelConfig]
    """Configs by name, published sizes and a nano."""
    heads: tuple[str, ...]
    """What can stand on top: class names of head configs."""
    objectives: tuple[str, ...]
    """Objectives that train it: class names."""
    reference: str
    """What it is verified against."""
    hugging_face: HuggingFace | None = None
    """None where the reference has no such directory."""
