"""What decoding needs of a model, whatever its kind.

    prefill   the positions that are given: reads the source or the images where there are some, fills the caches
    step      the positions that follow, one or a few of every row; everything seen so far is in the state
    project   hidden states to scores of the token after each

Every strategy (sampling, beams, speculation) and the engine are written over these, so none of them knows what kind of
model it decodes. All are pure functions of parameters, state and tokens, to be traced inside a compiled program:
`Steps` is static there, hashable by the model's structure; the state is a pytree with the rows of the batch in front.
A long prompt may be cut: `prefill` takes its beginning and `step` the rest, with the same result.

A row's tokens stand at consecutive positions from 0 on, which may differ between rows, and padding stands at position
-1: it is stored nowhere and nothing sees it. So it is the positions alone that tell where a row's text is, and a prompt
padded on the left, on the right or not at all gives the same. Going back to an earlier position takes back what
followed; a state that forgets (a sliding window, sums) must be told how far that will be (`rewind`).
"""

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.infer.cache import Storage, new_cache, new_decoder_cache, of_layers
from llmlab.infer.unstacked import unstacked
from llmlab.models.config import Transformer
from llmlab.models.decoder import DecoderModel
from llmlab.models.encoder_decoder import EncoderDecoder, EncoderDecoderModel
from llmlab.models.heads import MaskedLM
from llmlab.models.outputs import Hidden
from llmlab.models.paligemma import PaliGemma, PaliGemmaModel
from llmlab.models.permutation import PermutationModel, PermutationTransformer
from llmlab.models.reversible import ReversibleTransformer
from llmlab.models.visual_decoder import VisualDecoder, VisualDecoderModel
from llmlab.nn.config import LayerCache, Room
from llmlab.nn.module import Params, merge

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

    @functools.cached_property
    def _hash(self) -> int:
        return hash((type(self), self.graphdef, self.config))

    def __hash__(self) -> int:
        return self._hash  # asked for at every call of a compiled program, and 0.06 ms for each layer

    @property
    def max_length(self) -> int | None:
        """Positions that the model has for what it continues; None for any number."""
        return self.config.max_length

    @property
    def num_scores(self) -> int:
        """Scores that `project` gives: the size of the vocabulary."""
        return self.config.vocab_size

    @classmethod
    def check(cls, config: Any) -> None:
        """Raise ValueError where a model of this config, though of the kind, does not write text."""
        return

    @abc.abstractmethod
    def new_state(
        self,
        batch_size: int,
        length: int,
        dtype: Storage = jnp.float32,
        inputs: Inputs | None = None,
        rewind: int = 0,
    ) -> State:
        """Room for `length` positions of `batch_size` rows, nothing in it.

        Args:
            batch_size: rows.
            length: positions of each.
            dtype: storage of keys and values: float32, bfloat16 or int8.
            inputs: what `prefill` will be given, or its shapes.
            rewind: how many positions may be taken back at a time.

        Raises:
            ValueError: a layer has no cache; the message says why.
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
        self,
        batch_size: int,
        length: int,
        dtype: Storage = jnp.float32,
        inputs: Inputs | None = None,
        rewind: int = 0,
    ) -> State:
        return State(new_cache(self.config, batch_size, length, dtype, rewind))

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
        return _after(model.hidden_states(token_BS, position_ids=position_BS, cache=state.caches), state)


class ReversibleSteps(DecoderSteps):
    """A causal reversible model: a decoder with two residual streams."""

    @classmethod
    def check(cls, config: ReversibleTransformer) -> None:
        if not config.causal or not isinstance(config.head, MaskedLM):
            raise ValueError(
                f"a reversible model with causal={config.causal} and head={type(config.head).__name__} does not write "
                "text; one with causal=True and a MaskedLM head does"
            )


class PermutationSteps(DecoderSteps):
    """A permutation language model, from left to right: its states are those of the places that it predicts."""

    @classmethod
    def check(cls, config: PermutationTransformer) -> None:
        if not isinstance(config.head, MaskedLM):
            raise ValueError(
                f"a permutation model with head={type(config.head).__name__} does not write text; MaskedLM does"
            )

    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        model: PermutationModel = merge(self.graphdef, params)
        return _after(model.next_states(token_BS, position_BS, state.caches), state)


class EncoderDecoderSteps(Steps):
    """An encoder-decoder: it is given a source (`input_ids`, `attention_mask`) and continues a target.

    The source may be padded on either side: its tokens' positions are counted from the first real one.
    """

    def new_state(
        self,
        batch_size: int,
        length: int,
        dtype: Storage = jnp.float32,
        inputs: Inputs | None = None,
        rewind: int = 0,
    ) -> State:
        source = _given(inputs, "input_ids", "an encoder-decoder needs a source to decode from")
        caches = new_decoder_cache(self.config, batch_size, length, source.shape[1], dtype, rewind)
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
        source = _given(inputs, "input_ids", "an encoder-decoder needs a source to decode from")
        assert inputs is not None
        real = jnp.asarray(inputs.get("attention_mask", jnp.ones_like(source))).astype(bool)
        source_position_BT = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        memory = model.encode(source, real, source_position_BT).states
        return self._decode(model, replace(state, fixed=real), token_BS, position_BS, memory)

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
        return _after(hidden, state)


class PaliGemmaSteps(Steps):
    """A decoder with images among its tokens: it is given `pixel_values`, and a prompt with places for them.

    What `prefill` is given sees itself in both directions (where there are `token_type_ids`, what has type 0), so it
    cannot be cut: image and prompt come in one call.
    """

    @property
    def num_scores(self) -> int:
        return self.config.text.vocab_size

    def new_state(
        self,
        batch_size: int,
        length: int,
        dtype: Storage = jnp.float32,
        inputs: Inputs | None = None,
        rewind: int = 0,
    ) -> State:
        return State(new_cache(self.config.text, batch_size, length, dtype, rewind))

    def prefill(
        self,
        params: Params,
        state: State,
        token_BS: Int[Array, "B S"],
        position_BS: Int[Array, "B S"],
        inputs: Inputs | None = None,
    ) -> tuple[Float[Array, "B S D"], State]:
        model: PaliGemmaModel = merge(self.graphdef, params)
        pixels = _given(inputs, "pixel_values", "a vision-language model needs images")
        assert inputs is not None
        types = inputs.get("token_type_ids")
        return _after(model.prefill(token_BS, pixels, position_BS, state.caches, types), state)

    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        model: PaliGemmaModel = merge(self.graphdef, params)
        return _after(model.text.hidden_states(token_BS, position_ids=position_BS, cache=state.caches), state)


class VisualDecoderSteps(Steps):
    """A decoder that looks at images: it is given `pixel_values` (B, I, H, W, C), and `image_attention_mask` (B, S, I)
    where not every token sees all of them.

    Tokens that follow see what the last token of `prefill` sees. A prompt can be cut where its parts see the same
    images, or given to `prefill` part by part, the later ones with an `image_attention_mask` alone.
    """

    @property
    def num_scores(self) -> int:
        return self.config.vocab_size + self.config.additional_tokens

    def new_state(
        self,
        batch_size: int,
        length: int,
        dtype: Storage = jnp.float32,
        inputs: Inputs | None = None,
        rewind: int = 0,
    ) -> State:
        config: VisualDecoder = self.config
        pixels = _given(inputs, "pixel_values", "a vision-language model needs images")
        room = Room(
            batch_size=batch_size,
            length=length,
            dtype=dtype,
            memory_length=pixels.shape[1] * config.tokens_per_image,
            rewind=rewind,
        )
        return State(of_layers(config, config.embed_dim, room), jnp.ones((batch_size, pixels.shape[1]), bool))

    def prefill(
        self,
        params: Params,
        state: State,
        token_BS: Int[Array, "B S"],
        position_BS: Int[Array, "B S"],
        inputs: Inputs | None = None,
    ) -> tuple[Float[Array, "B S D"], State]:
        inputs = inputs or {}
        seen = inputs.get("image_attention_mask")
        seen_BSI = self._as_before(state, token_BS) if seen is None else jnp.asarray(seen).astype(bool)
        last_B11 = jnp.argmax(position_BS, axis=1)[:, None, None]
        by_last_BI = jnp.take_along_axis(seen_BSI, last_B11, axis=1)[:, 0]
        some_B1 = jnp.any(position_BS >= 0, axis=1, keepdims=True)
        state = replace(state, fixed=jnp.where(some_B1, by_last_BI, state.fixed))
        return self._states(params, state, token_BS, position_BS, seen_BSI, inputs.get("pixel_values"))

    def step(
        self, params: Params, state: State, token_BS: Int[Array, "B S"], position_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], State]:
        return self._states(params, state, token_BS, position_BS, self._as_before(state, token_BS), None)

    @staticmethod
    def _as_before(state: State, token_BS: jax.Array) -> jax.Array:
        """Every token sees what the last one saw."""
        return jnp.broadcast_to(state.fixed[:, None], (*token_BS.shape, state.fixed.shape[1]))

    def _states(
        self,
        params: Params,
        state: State,
        token_BS: jax.Array,
        position_BS: jax.Array,
        seen_BSI: jax.Array,
        pixels: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        model: VisualDecoderModel = merge(self.graphdef, params)
        hidden = model.hidden_states(token_BS, pixels, seen_BSI, position_ids=position_BS, cache=state.caches)
        return _after(hidden, state)


def _after(hidden: Hidden, state: State) -> tuple[jax.Array, State]:
    """The states, and the state with this call's caches."""
    assert hidden.cache is not None
    return hidden.states, replace(state, caches=hidden.cache)


def _given(inputs: Inputs | None, name: str, need: str) -> Any:
    if inputs is None or name not in inputs:
        raise ValueError(f"{need}: give inputs with {name}")
    return inputs[name]


_KINDS: dict[type, type[Steps]] = {
    Transformer: DecoderSteps,
    ReversibleTransformer: ReversibleSteps,
    PermutationTransformer: PermutationSteps,
    EncoderDecoder: EncoderDecoderSteps,
    PaliGemma: PaliGemmaSteps,
    VisualDecoder: VisualDecoderSteps,
}


def prepare(model: nnx.Module) -> tuple[Steps, Params]:
    """A model taken apart for decoding, and its parameters: the model's own or, out of their stacks, copies of them.

    The copies are made once for a model and given up with it; see `llmlab.infer.unstacked`.

    Raises:
        ValueError: a model of this kind does not write text.
    """
    config: Any = getattr(model, "config", None)
    kind = next((kind for config_type, kind in _KINDS.items() if isinstance(config, config_type)), None)
    if kind is None:
        raise ValueError(f"a model of a {type(config).__name__} does not write text; decoders and encoder-decoders do")
    kind.check(config)
    graphdef, params = unstacked(model)
    return kind(graphdef, config), params
