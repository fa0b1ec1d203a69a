"""Every architecture family of llmlab, in one list."""

from llmlab.models import (
    bert,
    clip,
    distilbert,
    gemma,
    gpt2,
    llama,
    longformer,
    roberta,
    siglip,
    vit,
    xlnet,
)
from llmlab.models.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    longformer.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    gemma.FAMILY,
    siglip.FAMILY,
    vit.FAMILY,
    clip.FAMILY,
    xlnet.FAMILY,
)
