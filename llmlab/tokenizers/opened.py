"""The tokenizer of a run, a model or a directory, whatever kind it is: what a student shares with its teacher."""

from dataclasses import dataclass

from llmlab.tokenizers.base import Progress, Texts, Tokenizer, TokenizerConfig
from llmlab.tokenizers.storage import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Opened(TokenizerConfig):
    """A tokenizer that is there already."""

    path: str
    """A run, a Hugging Face directory, or a directory that a tokenizer was saved to."""

    def build(self, texts: Texts | None = None, *, progress: Progress | None = None) -> Tokenizer:
        """Opens the path; there is nothing to train."""
        return load_tokenizer(self.path)
