"""The loss over batches against the model's own logits, also beyond the length that it was made for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.evals.loss import mean_loss
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import AddedPosition, ALiBi, Learned, Rotary, Sinusoidal
from llmlab.nn.wiring import PreNorm
from llmlab.objectives import NextToken


def model(position: Any) -> Any:
    own = position if isinstance(position, Rotary | ALiBi) else None
    block = Block(mixer=Attention(num_heads=2, position=own), ffn=MLP(hidden_dim=16), norm=RMSNorm(), wiring=PreNorm())
    added = position if isinstance(position, AddedPosition) else None
    return Transformer(
        vocab_size=16, embed_dim=8, num_layers=2, pattern=(block,), position=added, final_norm=RMSNorm()
    ).build(nnx.Rngs(params=0))


def batches(length: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    found = []
    for count in (3, 1):  # so that a mean of means would be wrong
        ids = rng.integers(0, 16, (2, length)).astype(np.int32)
        labels = rng.integers(0, 16, (2, length)).astype(np.int32)
        labels[:, count:] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.mark.parametrize("position", [Rotary(), ALiBi(), Sinusoidal()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_the_plain_loss_per_counted_token_at_any_length(position: Any, smoothing: float) -> None:
    built, rows = model(position), batches(32)
    terms = []
    for batch in rows:
        log_p = np.asarray(jax.nn.log_softmax(built(jnp.asarray(batch["input_ids"])).logits, -1))
        terms += [-log_p[i, j, batch["labels"][i, j]] for i, j in np.argwhere(batch["labels"] != -100)]
    found = mean_loss(built, NextToken(label_smoothing=smoothing), rows)
    assert found == pytest.approx(float(np.mean(terms)), rel=1e-5)


def test_a_learned_table_says_where_it_ends() -> None:
    with pytest.raises(ValueError, match=r"32 positions and the model 8"):
        mean_loss(model(Learned(8)), NextToken(), batches(32))


def test_nothing_to_score_is_refused() -> None:
    empty = [batch | {"labels": np.full_like(batch["labels"], -100)} for batch in batches(8)]
    with pytest.raises(ValueError, match="nothing to score"):
        mean_loss(model(Rotary()), NextToken(), empty)
