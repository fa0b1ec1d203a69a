"""Every architecture family of llmlab, in one list."""

from llmlab.models import bert, distilbert, gpt2, llama, longformer, roberta, vit, xlnet
from llmlab.models.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    longformer.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    vit.FAMILY,
    xlnet.FAMILY,
)
