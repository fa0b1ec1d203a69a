"""What decoding needs of a model, the same for decoders and encoder-decoders.

    prefill   the positions that are given: encodes the source where there is one, fills the caches
    step      the positions that follow, one or a few of every row; everything seen so far is in the state
    project   hidden states to scores over the vocabulary

Every strategy (sampling, beams, speculation) and the engine are written over these, so none of them knows what kind of
model it decodes. All are pure functions of parameters, state and tokens, to be traced inside a compiled program:
`Steps` is static there, hashable by the model's structure; the state is a pytree with the rows of the batch in front.

A row's tokens stand at consecutive positions, which may differ between rows. Rows are padded on the right: what is
stored beyond a row's length is overwritten before anything looks at it.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.infer.cache import new_cache, new_decoder_cache
from llmlab.models.config import Transformer
from llmlab.models.decoder import DecoderModel
from llmlab.models.encoder_decoder import EncoderDecoder, EncoderDecoderModel
from llmlab.nn.config import LayerCache
from llmlab.nn.module import Params, merge, split

Inputs = Mapping[str, Array]
"""What a model is given besides the tokens that it continues, by the names of its call: a source, images."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What the rows of a batch have been given so far: all that a step reads besides parameters and tokens."""

    caches: tuple[LayerCache, ...]
    """Of every layer, first to last."""
    fixed: Any = None
    """What all steps read and none changes (which of the source is real); rows in front."""

    def take(self, row_B: Int[Array, "R"]) -> "State":
        """The state of these rows, in this order; a row may be taken more than once."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, row_B, axis=0), self)


@dataclass(frozen=True)
class Steps(abc.ABC):
    """A model taken apart for decoding; see the module's docstring."""

    graphdef: nnx.GraphDef
    """Structure of the model."""
    config: Any
    """Config of the model."""

    @property
    def max_length(self) -> int | None:
        """Positions that the model has for what it continues; None for any number."""
        return self.config.max_length

    @property
    def num_scores(self) -> int:
        """Scores that `project` gives: the size of the vocabulary."""
        return self.config.vocab_size

    @abc.abstractmethod
    def new_state(
        self, batch_size: int, length: int, dtype: jnp.dtype | type = jnp.float32, inputs: Inputs | None = None
    ) -> State:
        """Room for `length` positions of `batch_size` rows, nothing in it.

        Args:
            batch_size: rows.
            length: positions of each.
            dtype: of keys and values.
            inputs: what `prefill` will be given, or its shapes.
        """

    @abc.abstractmethod
    def prefill(
        self,
        params: Params,
        state: State,
        token_BS: Int[Array, "B S"],
        position_BS: Int[Array, "B S"],
        inputs: Inputs | None = None,
    ) -> tuple[Float[Array, "B S D"], State]:
        """Hidden states of the first tokens, and the state with them and the inputs in it."""

    @abc.abstractmethod
    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        """Hidden states of further tokens, and the state with them in it."""

    def project(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores over the vocabulary, float32."""
        return merge(self.graphdef, params).project(hidden)


class DecoderSteps(Steps):
    """A decoder: what it is given is what it continues."""

    def new_state(
        self, batch_size: int, length: int, dtype: jnp.dtype | type = jnp.float32, inputs: Inputs | None = None
    ) -> State:
        return State(new_cache(self.config, batch_size, length, dtype))

    def prefill(
        self,
        params: Params,
        state: State,
        token_BS: Int[Array, "B S"],
        position_BS: Int[Array, "B S"],
        inputs: Inputs | None = None,
    ) -> tuple[Float[Array, "B S D"], State]:
        if inputs:
            raise ValueError(f"a decoder is given tokens alone, not {', '.join(sorted(inputs))}")
        return self.step(params, state, token_BS, position_BS)

    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        model: DecoderModel = merge(self.graphdef, params)
        hidden = model.hidden_states(token_BS, position_ids=position_BS, cache=state.caches)
        assert hidden.cache is not None
        return hidden.states, replace(state, caches=hidden.cache)


class EncoderDecoderSteps(Steps):
    """An encoder-decoder: it is given a source (`input_ids`, `attention_mask`) and continues a target."""

    def new_state(
        self, batch_size: int, length: int, dtype: jnp.dtype | type = jnp.float32, inputs: Inputs | None = None
    ) -> State:
        source = _source(inputs)
        caches = new_decoder_cache(self.config, batch_size, length, source.shape[1], dtype)
        return State(caches, jnp.zeros(source.shape, bool))

    def prefill(
        self,
        params: Params,
        state: State,
        token_BS: Int[Array, "B S"],
        position_BS: Int[Array, "B S"],
        inputs: Inputs | None = None,
    ) -> tuple[Float[Array, "B S D"], State]:
        model: EncoderDecoderModel = merge(self.graphdef, params)
        source = _source(inputs)
        assert inputs is not None
        real = jnp.asarray(inputs.get("attention_mask", jnp.ones_like(source))).astype(bool)
        return self._decode(model, replace(state, fixed=real), token_BS, position_BS, model.encode(source, real).states)

    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        return self._decode(merge(self.graphdef, params), state, token_BS, position_BS, None)

    @staticmethod
    def _decode(
        model: EncoderDecoderModel, state: State, token_BS: jax.Array, position_BS: jax.Array, memory: jax.Array | None
    ) -> tuple[jax.Array, State]:
        mask = model.memory_mask(state.fixed)
        hidden = model.decode(token_BS, memory, mask, decoder_position_ids=position_BS, cache=state.caches)
        assert hidden.cache is not None
        return hidden.states, replace(state, caches=hidden.cache)


def _source(inputs: Inputs | None) -> Any:
    if inputs is None or "input_ids" not in inputs:
        raise ValueError("an encoder-decoder needs a source to decode from: give inputs with input_ids")
    return inputs["input_ids"]


_KINDS: dict[type, type[Steps]] = {Transformer: DecoderSteps, EncoderDecoder: EncoderDecoderSteps}


def prepare(model: nnx.Module) -> tuple[Steps, Params]:
    """A model taken apart for decoding, and its parameters.

    Raises:
        ValueError: a model of this kind does not write text.
    """
    config: Any = getattr(model, "config", None)
    kind = next((kind for config_type, kind in _KINDS.items() if isinstance(config, config_type)), None)
    if kind is None:
        raise ValueError(f"a model of a {type(config).__name__} does not write text; decoders and encoder-decoders do")
    graphdef, params = split(model)
    return kind(graphdef, config), params
