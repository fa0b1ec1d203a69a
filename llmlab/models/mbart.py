"""mBART (Liu et al. 2020, 2001.08210): BART for many languages, pre-trained for translation.

    encoder   x --+-- LayerNorm -- attention --(+)--+-- LayerNorm -- MLP --(+)-- y   ...  LayerNorm -- memory
                  +----------------------------|     +---------------------|
    decoder   the same with cross-attention between them, each part on its own LayerNorm   ...  LayerNorm -- head

Two things differ from BART (llmlab.models.bart): each part normalises its input instead of the sum, which trains
stably at twelve layers a side and ends in one more norm per stack; and a language code ends the source and both ends
and begins the target, so that one decoder writes every language. The target is therefore its own start token:
shifting labels to the right moves their last real token to the front. One vocabulary of 250,027 pieces serves all
languages and holds 256 of the 611 million parameters. Embeddings are multiplied by sqrt(D).

Cost: as BART's, and 2 V D FLOPs a target token for the head, about half of the forward pass of mBART-large.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llmlab.models import bart
from llmlab.models.config import named
from llmlab.models.encoder_decoder import EncoderDecoder
from llmlab.models.family import Family, HuggingFace

mbart = partial(bart.bart, pre_norm=True, scale_embedding=True, decoder_start_id=None)
"""The mBART shape at any size; arguments as for `bart.bart`."""

_large = partial(mbart, embed_dim=1024, num_layers=12, num_heads=16, dropout=0.1)

PRESETS: dict[str, EncoderDecoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "mbart-nano": mbart(embed_dim=192, num_layers=3, num_heads=6, max_length=512, pad_id=0),
    "mbart-large": _large(vocab_size=250027),
    "mbart-large-50": _large(vocab_size=250054, activation="relu"),
}


def preset(name: str) -> EncoderDecoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


def from_hf(config: Mapping[str, Any]) -> EncoderDecoder:
    """Model of a Hugging Face config with model_type mbart; ValueError lists every attribute that is not
    implemented."""
    return bart.from_hf(config, "mbart")


def to_hf(model: EncoderDecoder) -> dict[str, Any]:
    """Hugging Face config of a model; ValueError lists everything that an mbart config cannot express."""
    return bart.to_hf(model, "mbart")


WEIGHTS = bart.weight_table("norm_input")

FAMILY = Family(
    name="mBART",
    kind="encoder-decoder",
    paper="Liu et al. 2020, 2001.08210",
    presets=PRESETS,
    heads=("Tied", "Untied"),
    objectives=("SequenceToSequence",),
    reference="transformers MBartForConditionalGeneration",
    hugging_face=HuggingFace(model_type="mbart", config=EncoderDecoder, from_hf=from_hf, to_hf=to_hf, weights=WEIGHTS),
)
