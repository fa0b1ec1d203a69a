"""BigBird's model: BERT's with answers that are no part of their question, and a deeper head for them.

question </s> text </s>      start and end of the answer are in the text, or at the first token where there is none
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.models.encoder import Encoder, EncoderModel, Output
from llmlab.models.heads import Inputs, QuestionAnswering, QuestionAnsweringHead, Targets, span_loss
from llmlab.models.outputs import Hidden, SpanOutput
from llmlab.nn.config import Norm
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import dropout, split_key
from llmlab.nn.feed_forward import ACTIVATIONS, Activation
from llmlab.nn.norms import LayerNorm

# What is subtracted from the scores of a question's tokens; transformers' number.
_BARRED = 1e6


@dataclass(frozen=True, kw_only=True)
class BigBird(Encoder):
    """A BigBird."""

    separator: int = 66
    """Token that ends the question, where there is one."""

    def build(self, rngs: nnx.Rngs) -> "BigBirdModel":
        return BigBirdModel(self, rngs=rngs)


class BigBirdModel(EncoderModel):
    """See the module's docstring."""

    config: BigBird

    def question(self, input_ids: Int[Array, "B S"]) -> Bool[Array, "B S"]:
        """The tokens up to the first separator; the first token alone where there is none."""
        end_B1 = jnp.argmax(input_ids == self.config.separator, axis=1, keepdims=True)
        return jnp.arange(input_ids.shape[1]) <= end_B1

    def default_token_types(self, input_ids: Int[Array, "B S"]) -> Int[Array, "B S"] | None:
        if not isinstance(self.config.head, QuestionAnswering):
            return None
        return 1 - self.question(input_ids).astype(jnp.int32)

    def answer(self, input_ids: Int[Array, "B S"], hidden: Hidden, targets: Targets, key: jax.Array | None) -> Output:
        if not isinstance(self.config.head, QuestionAnswering):
            return super().answer(input_ids, hidden, targets, key)
        output = super().answer(input_ids, hidden, Targets(), key)
        assert isinstance(output, SpanOutput)
        # The first token stays: it is what points to no answer.
        barred_BS = _BARRED * (self.question(input_ids) & (jnp.arange(input_ids.shape[1]) > 0))
        start_BS, end_BS = output.start_logits - barred_BS, output.end_logits - barred_BS
        loss = span_loss(start_BS, end_BS, targets)
        if loss is not None:
            loss = sum(self.auxiliary_losses(hidden.auxiliary).values(), loss)
        return dataclasses.replace(output, start_logits=start_BS, end_logits=end_BS, loss=loss)


@dataclass(frozen=True, kw_only=True)
class DeepQuestionAnswering(QuestionAnswering):
    """Spans after one more feed-forward layer: start, end = W norm(x + W_down act(W_up x)) + b."""

    hidden_dim: int
    """Width between the layer's two matrices."""
    activation: Activation = "gelu_tanh"
    """Its nonlinearity."""
    norm: Norm = LayerNorm(epsilon=1e-12)
    """Norm of its sum."""

    def build(self, inputs: Inputs, *, rngs: nnx.Rngs) -> "DeepQuestionAnsweringHead":
        return DeepQuestionAnsweringHead(self, inputs, rngs=rngs)

    def flops(self, inputs: Inputs, batch: int, length: int) -> int:
        return super().flops(inputs, batch, length) + batch * length * 4 * inputs.dim * self.hidden_dim


class DeepQuestionAnsweringHead(QuestionAnsweringHead):
    """See DeepQuestionAnswering."""

    config: DeepQuestionAnswering

    def __init__(self, config: DeepQuestionAnswering, inputs: Inputs, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, inputs, rngs=rngs)
        embed, mlp = (("embed", inputs.dim),), (("mlp", config.hidden_dim),)
        self.up = Dense(embed, mlp, bias=True, rngs=rngs)
        self.down = Dense(mlp, embed, bias=True, rngs=rngs)
        self.norm = config.norm.build(inputs.dim, rngs=rngs)

    def score(self, states_BSD: Float[Array, "B S D"], key: jax.Array | None) -> Float[Array, "B S 2"]:
        key_input, key_output = split_key(key, 2)
        h_BSF = ACTIVATIONS[self.config.activation](self.up(dropout(states_BSD, self.config.dropout, key_input)))
        y_BSD = dropout(self.down(h_BSF), self.config.dropout, key_output)
        return self.spans(self.norm(states_BSD + y_BSD))
