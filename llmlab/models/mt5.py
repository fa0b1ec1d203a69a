"""mT5 (Xue et al. 2021, 2010.11934): T5 v1.1 for 101 languages.

The architecture is T5 v1.1's (see llmlab.models.t5): gated GELU, RMSNorm before each part, relative bias, no biases,
an untied head that is never scaled. What differs is the data (mC4) and the vocabulary of 250,112 pieces, which holds
most of a small model's parameters: 256 of the 300 million of mT5-small are its two tables. Languages are sampled with
probability proportional to their size to the power of 0.3, which trades the large languages for the small ones.

Cost: as T5's, and 2 V D FLOPs a target token for the head, half of mT5-small's forward pass.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from llmlab.models import t5
from llmlab.models.config import named
from llmlab.models.encoder_decoder import EncoderDecoder
from llmlab.models.family import Family, HuggingFace

_mt5 = partial(t5.t5_1_1, vocab_size=250112)

PRESETS: dict[str, EncoderDecoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "mt5-nano": t5.t5(
        embed_dim=192,
        num_layers=3,
        num_heads=6,
        head_dim=32,
        hidden_dim=512,
        activation="gelu_tanh",
        gated=True,
        scaled=False,
        embedding_std=0.07,  # logits of a tied head that nothing scales start at size one: 1/sqrt(embed_dim)
    ),
    "mt5-small": _mt5(512, 8, 6, 1024),
    "mt5-base": _mt5(768, 12, 12, 2048),
    "mt5-large": _mt5(1024, 24, 16, 2816),
    "mt5-xl": _mt5(2048, 24, 32, 5120),
    "mt5-xxl": _mt5(4096, 24, 64, 10240),
}


def preset(name: str) -> EncoderDecoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> EncoderDecoder:
    """Model of a Hugging Face config with model_type mt5; ValueError lists every attribute that is not implemented."""
    return t5.from_hf(config, "mt5")


def to_hf(model: EncoderDecoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that an mt5 config cannot express."""
    return t5.to_hf(model, "mt5")


def amended(config: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The config with its head tied or not as the checkpoint has it; see `t5.amended`."""
    return t5.amended(config, tensors, "mt5")


FAMILY = Family(
    name="mT5",
    kind="encoder-decoder",
    paper="Xue et al. 2021, 2010.11934",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("SequenceToSequence",),
    reference="transformers MT5ForConditionalGeneration",
    hugging_face=HuggingFace(
        model_type="mt5",
        config=EncoderDecoder,
        from_hf=from_hf,
        to_hf=to_hf,
        weights=t5.WEIGHTS,
        amended=amended,
    ),
)
