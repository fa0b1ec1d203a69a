"""Tokenizers: bytes, SentencePiece and the Hugging Face library behind one protocol.

    tokenizer = SentencePiece(vocab_size=1024).build(lambda: iter(documents))
    ids = tokenizer.encode("def main():")
    assert tokenizer.decode(ids) == "def main():"
    tokenizer.save("runs/mine/tokenizer")
    tokenizer = load_tokenizer("runs/mine")
    batch = tokenizer(["one text", "another, longer text"], padding="longest")  # input_ids, attention_mask

The libraries are imported when a tokenizer is trained or opened, not here.
"""

from llmlab.tokenizers.base import Tokenizer, TokenizerConfig
from llmlab.tokenizers.byte_level import Bytes, BytesTokenizer
from llmlab.tokenizers.huggingface import ByteLevelBPE, HuggingFace, HuggingFaceTokenizer, WordPiece
from llmlab.tokenizers.opened import Opened
from llmlab.tokenizers.padding import Encoding, pad
from llmlab.tokenizers.sentencepiece import SentencePiece, SentencePieceTokenizer
from llmlab.tokenizers.special import SpecialTokens
from llmlab.tokenizers.storage import load_tokenizer
from llmlab.tokenizers.streaming import StreamDecoder, decode_stream

__all__ = [
    "ByteLevelBPE",
    "Bytes",
    "BytesTokenizer",
    "Encoding",
    "HuggingFace",
    "HuggingFaceTokenizer",
    "Opened",
    "SentencePiece",
    "SentencePieceTokenizer",
    "SpecialTokens",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "WordPiece",
    "decode_stream",
    "load_tokenizer",
    "pad",
]
