"""Every architecture family of llmlab, in one list."""

from llmlab.models import gpt2, llama, vit
from llmlab.models.family import Family

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
    vit.FAMILY,
)
