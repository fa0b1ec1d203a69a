"""BigBird of transformers: committed cases and random ones.

transformers draws random blocks in training only. Some cases ask its attention for that, and carry the blocks that it
draws then from the number of each layer; in the others it takes the first block, as it does when it evaluates.
"""

# pyright: reportMissingImports=false
# torch and transformers come with the parity extra only.

from dataclasses import replace
from typing import Any

import numpy as np

from tests.models.encoder_cases import HEADS, encoder_case, random_labels
from tests.models.references import Case

# More than (5 + 2) blocks of 3, and no multiple of them.
LENGTH, BLOCK = 31, 3
SEPARATOR = 2
# Without tied embeddings transformers 5 keeps a bias that nothing reads; before, both biases were one.
UNREAD = {"cls.predictions.bias": "cls.predictions.decoder.bias"}


def cases() -> dict[str, Case]:
    """Fixtures by name."""
    untied = {"tie_word_embeddings": False, "use_bias": False, "hidden_act": "relu"}
    return {
        "big-bird-masked": case("ForMaskedLM", random=True),
        "big-bird-masked-untied": case("ForMaskedLM", **untied),
        "big-bird-full": case("ForPreTraining", attention_type="original_full"),
        "big-bird-classes": case("ForSequenceClassification", num_labels=3),
        "big-bird-spans": case("ForQuestionAnswering", random=True),
    }


def drawn(rng: np.random.Generator) -> Case:
    """A random configuration."""
    ending, heads = str(rng.choice(HEADS)), int(rng.integers(1, 5))
    block, num_random = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    return case(
        ending,
        seed=int(rng.integers(1000)),
        random=bool(rng.random() < 0.5),
        question=bool(rng.random() < 0.5),
        length=(5 + 2 * num_random) * block + int(rng.integers(-2, 20)),
        block_size=block,
        num_random_blocks=num_random,
        num_attention_heads=heads,
        hidden_size=heads * int(rng.integers(4, 9)),
        num_hidden_layers=int(rng.integers(1, 4)),
        intermediate_size=int(rng.integers(1, 50)),
        vocab_size=int(rng.integers(6, 90)),
        type_vocab_size=int(rng.integers(2, 4)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu", "gelu_new"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-3])),
        tie_word_embeddings=bool(rng.random() < 0.5),
        use_bias=bool(rng.random() < 0.5),
        **random_labels(rng, ending),
    )


def case(
    ending: str, seed: int = 0, *, random: bool = False, question: bool = True, length: int = LENGTH, **changes: Any
) -> Case:
    """A model of tiny sizes but for the changes; `random` blocks, and for a model that answers a question in front."""
    import transformers

    sizes = {"vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 20, "max_position_embeddings": 80, "pad_token_id": 0, "sep_token_id": SEPARATOR}
    config = transformers.BigBirdConfig(
        **{**sizes, **more, "block_size": BLOCK, "num_random_blocks": 1, "hidden_act": "gelu_new", **changes}
    )
    lm = ending in ("ForMaskedLM", "ForPreTraining") and not config.tie_word_embeddings
    answers = ending == "ForQuestionAnswering"
    # Token 0 is padding: transformers gives its row no gradient. The token types of an answer follow from the question.
    made = encoder_case(
        config,
        "BigBird",
        ending,
        seed,
        token_types=0 if answers else config.type_vocab_size,
        pooled=True,
        equal=UNREAD if lm else {},
        low=SEPARATOR + 1,
        length=length,
    )
    if answers and question:
        made.inputs["input_ids"][:, 4] = SEPARATOR
    sparse = config.attention_type == "block_sparse" and length > (5 + 2 * config.num_random_blocks) * config.block_size
    if not (random and sparse):
        return made
    name = "draws.random_blocks"
    inputs = made.inputs | {name: random_blocks(config, length)}
    return replace(made, inputs=inputs, hidden=(*made.hidden, name), call=with_random_blocks)


def random_blocks(config: Any, length: int) -> np.ndarray:
    """What the layers of transformers draw in training, (layers, heads, blocks, random blocks)."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    attention = BigBirdBlockSparseAttention(config).train()
    padded = -(-length // config.block_size) * config.block_size
    lengths, numbers = attention._get_rand_attn_plan(padded, config.block_size, config.num_random_blocks)
    layers = []
    for layer in range(config.num_hidden_layers):
        np.random.seed(layer)  # noqa: NPY002  where transformers draws from
        heads = attention._bigbird_block_rand_mask_with_head(
            padded, padded, config.block_size, config.block_size, config.num_attention_heads, lengths, numbers
        )
        layers.append(np.stack(heads))
    return np.stack(layers).astype(np.int32)


def with_random_blocks(model: Any, inputs: dict[str, Any]) -> Any:
    """Calls a model whose attention, and nothing else, believes that it is being trained; it has no dropout."""
    for layer in model.base_model.encoder.layer:
        layer.attention.self.training = True
    return model(**inputs)
