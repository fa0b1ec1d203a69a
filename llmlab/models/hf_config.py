"""Reading and writing the `config.json` of Hugging Face directories without overlooking anything.

An attribute changes what a model computes, or it does not. `Attributes` hands out those that a family implements,
knows those that never matter, and reports every other one, together with every bad value, in one error: a model that
loads is the model that the config describes.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from llmlab.models.config import ModelConfig
from llmlab.models.encoder_decoder import EncoderDecoder, Side
from llmlab.nn.attention import Attention, head_width
from llmlab.nn.config import Block, Mixer
from llmlab.nn.feed_forward import Activation
from llmlab.nn.lsh import ChunkedAttention
from llmlab.nn.stack import Execution

T = TypeVar("T")

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "identity",
}
"""Hugging Face's activations (several names for one function) and llmlab's. The first name is the one written."""

# What any config may hold without changing the logits of a causal language model: bookkeeping, training
# conveniences, what calls return, defaults of text generation, labels of classification heads.
IRRELEVANT = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_name_or_path",
        "_num_labels",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    ]
)
# What any config may hold with one value only; another one changes the model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}


class Attributes:
    """The attributes of a Hugging Face config, each taken by name; `finish` reports what was left and what was bad."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self._config = config
        self._name = name
        self._taken: set[str] = set()
        self._problems: list[str] = []
        self._nested: list[Attributes] = []
        self._irrelevant: Collection[str] = ()

    def common(self, **but: Any) -> None:
        """Take what any config may hold with one value only; `but` names other values that this family has there."""
        for name, allowed in _FIXED.items():
            self.fixed(name, *((but[name],) if name in but else allowed))

    def architecture(self, table: Mapping[str, T]) -> T:
        """What the table gives for the model class that the config names; its first entry where none is named."""
        names = self.optional("architectures", list) or [next(iter(table))]
        for name in names:
            if name not in table:
                self.problem(f"architectures names {name}; implemented are {', '.join(table)}")
        return table.get(names[0], next(iter(table.values())))

    def nested(self, *names: str) -> "Attributes":
        """Attributes of the first of these objects that is there and not empty; its problems are reported by this."""
        found = [(name, value) for name in names if (value := self.optional(name, dict))]
        name, value = found[0] if found else (names[0], {})
        inner = Attributes(value, name)
        self._nested.append(inner)
        return inner

    def submodel(self, name: str, *irrelevant: str) -> "Attributes":
        """Attributes of this object, the config of a part that is a model of its own (a tower of CLIP)."""
        inner = self.nested(name)
        inner._irrelevant = IRRELEVANT | set(irrelevant)
        inner.common()
        return inner

    def problem(self, message: str) -> None:
        """Note something that `finish` will report."""
        self._problems.append(message)

    def given(self, name: str) -> bool:
        """Whether the attribute is there and not null."""
        return self._config.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive number; required when there is no default."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(f"{name}={value!r} is not a positive integer" if name in self._config else f"{name} is absent")
            return default or 1
        return value

    def real(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            self.problem(f"{name}={value!r} is not a number from 0 up")
            return default
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            self.problem(f"{name}={value!r} is neither true nor false")
            return default
        return value

    def choice(self, name: str, table: Mapping[str, T], default: str) -> T:
        """What the table gives for the attribute's value."""
        value = self._take(name, default)
        if not isinstance(value, str) or value not in table:
            self.problem(f"{name}={value!r} is not implemented; implemented are {', '.join(table)}")
            return table[default]
        return table[value]

    def optional(self, name: str, kind: type[T], default: T | None = None) -> T | None:
        """A value of this type, or None."""
        value = self._take(name, default)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.problem(f"{name}={value!r} is not of type {kind.__name__}")
            return default
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """An attribute that llmlab implements for these values only."""
        value = self._take(name, allowed[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            self.problem(f"{name}={value!r} is not implemented; implemented is {allowed[0]!r}")

    def finish(self, *irrelevant: str) -> None:
        """Raise ValueError for every attribute that was bad, or that nothing took and that is not irrelevant."""
        problems = self._all_problems(IRRELEVANT | set(irrelevant))
        if problems:
            listed = "\n  ".join(problems)
            raise ValueError(
                f"llmlab does not implement this {self._name} config: {len(problems)} attributes differ from what it "
                f"knows\n  {listed}\nRemove an attribute only if it does not change what the model computes"
            )

    def _all_problems(self, irrelevant: Collection[str]) -> list[str]:
        unknown = [f"{name}={value!r} is unknown" for name, value in self._config.items()]
        known = [name in self._taken or name in irrelevant for name in self._config]
        inner = [f"{part._name}.{problem}" for part in self._nested for problem in part._all_problems(part._irrelevant)]
        return self._problems + [one for one, fine in zip(unknown, known, strict=True) if not fine] + inner

    def _take(self, name: str, default: Any) -> Any:
        self._taken.add(name)
        value = self._config.get(name, default)
        # null in a config means the default, as it does for the classes of transformers
        return default if value is None else value


def activation_to_hf(activation: Activation) -> str:
    """Hugging Face's name of an activation."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == activation)


@runtime_checkable
class Layered(Protocol):
    """A model config with one stack of layers."""

    @property
    def embed_dim(self) -> int:
        """Width of the residual stream."""
        ...

    def layers(self) -> tuple[Block, ...]:
        """The block of every layer, first to last."""
        ...


def block_of(model: Layered | Side, family: str, embed_dim: int | None = None) -> Block:
    """The one block that all layers of a model, or of one side of it (`embed_dim` wide), share.

    Raises:
        ValueError: layers differ, which no family of identical layers can express.
    """
    dim = embed_dim if isinstance(model, Side) else model.embed_dim
    assert dim is not None
    layers = [canonical_block(block, dim) for block in model.layers()]
    different = [str(i) for i, block in enumerate(layers) if block != layers[0]]
    if different:
        raise ValueError(f"{family} has identical layers; these differ from layer 0: {', '.join(different)}")
    return layers[0]


class Inexpressible(ValueError):
    """A family is made of the model's parts, but some of their values have no place in its config."""

    def __init__(self, message: str, differences: list[tuple[str, Any, Any]]) -> None:
        super().__init__(message)
        self.differences = differences
        """Dotted path, the model's value and the family's."""


def check_same(model: ModelConfig, expressed: ModelConfig, family: str) -> None:
    """Raise Inexpressible, with all differences, unless a family's config expresses all that the model computes."""
    found = differences(_canonical(model), _canonical(expressed))
    if found:
        listed = "\n  ".join(f"{path}: {ours!r}, in {family} {theirs!r}" for path, ours, theirs in found)
        raise Inexpressible(f"a {family} config cannot express this model:\n  {listed}", found)


def differences(first: Any, second: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted path and both values of every field in which two config trees differ."""
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    elif dataclasses.is_dataclass(first) and type(first) is type(second):
        names = [field.name for field in dataclasses.fields(first)]
        pairs = [(f"{path}.{name}", getattr(first, name), getattr(second, name)) for name in names]
    else:
        return [] if first == second else [(path.removeprefix("."), first, second)]
    return [found for name, a, b in pairs for found in differences(a, b, name)]


def canonical_block(block: Block, dim: int) -> Block:
    """The block with defaults that depend on others spelled out, and without what changes no result."""
    cross = None if block.cross is None else _canonical_mixer(block.cross, dim)
    return dataclasses.replace(block, mixer=_canonical_mixer(block.mixer, dim), cross=cross)


def _canonical_mixer(mixer: Mixer, dim: int) -> Mixer:
    if not isinstance(mixer, Attention | ChunkedAttention) or (mixer.head_dim is None and dim % mixer.num_heads):
        return mixer
    if isinstance(mixer, ChunkedAttention):
        return dataclasses.replace(mixer, head_dim=head_width(dim, mixer.num_heads, mixer.head_dim))
    head_dim = mixer.resolved_head_dim(dim)
    return dataclasses.replace(
        mixer,
        num_kv_heads=mixer.num_kv_heads or mixer.num_heads,
        head_dim=head_dim,
        scale=1 / math.sqrt(head_dim) if mixer.scale is None else mixer.scale,
        kernel="auto",
    )


def _canonical(model: ModelConfig) -> ModelConfig:
    """The config, and those of its parts, without what changes no result."""
    changes: dict[str, Any] = {"execution": Execution(), "context_length": None}
    if isinstance(model, Layered):
        layers = tuple(canonical_block(block, model.embed_dim) for block in model.layers())
        changes["pattern"] = layers if any(block != layers[0] for block in layers) else layers[:1]
    names = [field.name for field in dataclasses.fields(model)]
    parts = {name: _canonical(part) for name in names if isinstance(part := getattr(model, name), ModelConfig)}
    if isinstance(model, EncoderDecoder):
        for name, side in (("encoder", model.encoder), ("decoder", model.decoder)):
            block = canonical_block(side.layers()[0], model.embed_dim)
            changes[name] = dataclasses.replace(side, pattern=(block,))
    return dataclasses.replace(model, **parts, **{name: value for name, value in changes.items() if name in names})
