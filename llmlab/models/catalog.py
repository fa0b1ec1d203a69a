"""Every architecture family of llmlab, in one list."""

from llmlab.models import bert, gpt2, llama, vit, xlnet
from llmlab.models.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    vit.FAMILY,
    xlnet.FAMILY,
)
