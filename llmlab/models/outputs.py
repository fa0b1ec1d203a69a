"""What models return: small dataclasses whose fields have the field's usual names."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Cache, LayerCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hidden:
    """What `hidden_states` returns: the input of a head, and what else the stack gives."""

    states: Float[Array, "B S D"]
    """Input of the head."""
    cache: tuple[Cache | LayerCache, ...] | None = None
    """Keys and values with this call's positions stored, when a cache was given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalOutput:
    """What a causal language model returns."""

    logits: Float[Array, "B S V"]
    """Scores of the next token, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    cache: tuple[Cache | LayerCache, ...] | None = None
    """Keys and values with this call's positions stored, when a cache was given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderDecoderOutput:
    """What an encoder-decoder returns."""

    logits: Float[Array, "B S V"]
    """Scores of the next target token, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """The decoder's output, input of the head."""
    encoder_last_hidden_state: Float[Array, "B T D"]
    """The encoder's output, which cross-attention looks at."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, by side and name, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder without a head returns."""

    last_hidden_state: Float[Array, "B S D"]
    """Output of the last layer, after the final norm where there is one."""
    pooled: Float[Array, "B P"] | None = None
    """Summary of each row by the pooler; None without one."""
    loss: None = None
    """Nothing is answered, so nothing is lost."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenOutput:
    """What an encoder returns that scores every token: masked language model, token classifier."""

    logits: Float[Array, "B S C"]
    """Scores of every token over the vocabulary or the labels, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreTrainingOutput:
    """What BERT returns in pretraining."""

    logits: Float[Array, "B S V"]
    """Scores of every token over the vocabulary, float32."""
    seq_relationship_logits: Float[Array, "B 2"]
    """Scores of (second sentence follows the first, second sentence is a random one), float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the masked language model's head."""
    pooled: Float[Array, "B P"]
    """Input of the next sentence's head."""
    loss: Float[Array, ""] | None = None
    """Sum of the mean cross-entropies of those targets that were given, plus the layers' own losses."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceOutput:
    """What a classifier of whole sequences (or images) returns."""

    logits: Float[Array, "B C"]
    """Scores of every row over the labels, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Output of the last layer."""
    pooled: Float[Array, "B P"]
    """Summary of each row, input of the classifier."""
    loss: Float[Array, ""] | None = None
    """Loss of the head's problem type plus the layers' own losses, when labels were given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpanOutput:
    """What extractive question answering returns."""

    start_logits: Float[Array, "B S"]
    """Scores of every token as the answer's first, float32."""
    end_logits: Float[Array, "B S"]
    """Scores of every token as the answer's last, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    loss: Float[Array, ""] | None = None
    """Mean of both cross-entropies plus the layers' own losses, when positions were given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionOutput:
    """What an encoder of images returns."""

    last_hidden_state: Float[Array, "B S D"]
    """State of every token after the last norm."""
    pooled: Float[Array, "B P"] | None = None
    """The image as one vector, when the model pools."""
    logits: Float[Array, "B C"] | None = None
    """Scores of the classes, float32, when the model has a head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy, when labels were given."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PermutationOutput:
    """What a permutation language model returns; P is the number of targets, or of tokens where none are named."""

    last_hidden_state: Float[Array, "B P D"]
    """Input of the head."""
    logits: Float[Array, "B P V"] | None = None
    """Scores over the vocabulary, float32; None without a head."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    mems: Float[Array, "L B M D"] | None = None
    """Memory for the next segment, when one was given or asked for; without gradient."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairOutput:
    """What two towers that compare images with texts return."""

    image_embeds: Float[Array, "I D"]
    """Images in the common space, float32, of length one."""
    text_embeds: Float[Array, "T D"]
    """Texts in the common space, float32, of length one."""
    logits_per_image: Float[Array, "I T"]
    """Scaled cosines of every image with every text."""
    logits_per_text: Float[Array, "T I"]
    """The same, transposed."""
    logit_scale: Float[Array, ""]
    """What cosines were multiplied with: the inverse temperature."""
    loss: Float[Array, ""] | None = None
    """Symmetric cross-entropy, where there are as many images as texts: text i is image i's."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionLanguageOutput:
    """What a language model that sees images returns."""

    logits: Float[Array, "B S V"]
    """Scores of the next token, float32."""
    last_hidden_state: Float[Array, "B S D"]
    """Input of the head."""
    image_hidden_states: Float[Array, "I N E"]
    """States of all images' tokens, as the language model sees them."""
    loss: Float[Array, ""] | None = None
    """Mean cross-entropy over the counted labels plus the layers' own losses, when labels were given."""
    auxiliary: Auxiliary = field(default_factory=dict)
    """What the layers report, every array with a leading dimension of layers."""
