"""Every architecture family of llmlab, in one list."""

from llmlab.models import (
    bart,
    bert,
    big_bird,
    clip,
    distilbert,
    gemma,
    gpt2,
    llama,
    longformer,
    mbart,
    mobilebert,
    mt5,
    paligemma,
    roberta,
    siglip,
    t5,
    vit,
    xlnet,
)
from llmlab.models.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    mobilebert.FAMILY,
    longformer.FAMILY,
    big_bird.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    gemma.FAMILY,
    siglip.FAMILY,
    vit.FAMILY,
    clip.FAMILY,
    paligemma.FAMILY,
    xlnet.FAMILY,
    t5.FAMILY,
    mt5.FAMILY,
    bart.FAMILY,
    mbart.FAMILY,
)
