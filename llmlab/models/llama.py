"""Llama 1, 2 and 3 (Touvron et al. 2023, 2302.13971 and 2307.09288; Grattafiori et al. 2024, 2407.21783).

    x --+-- RMSNorm -- attention (rotary) --(+)--+-- RMSNorm -- SwiGLU --(+)-- y
        +----------------------------------|     +---------------------|

Rotary positions inside attention, RMSNorm before each part, a SwiGLU feed-forward, no biases, an untied head (the
small Llama 3.2 models tie it). The 70B of Llama 2 and all of Llama 3 have fewer key/value heads than query heads.
Llama 3.1 stretches the rotary frequencies to 128k positions (Llama3 scaling).

Cost per token and layer: 2 D^2 (2 + 2 K/N) + 6 D F FLOPs forward in parameter matmuls and 4 S D in attention.
"""

from llmlab.models.config import Head, Tied, Transformer, Untied, named
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Llama3, Rotary
from llmlab.nn.wiring import PreNorm


def llama(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    rotary: Rotary | None = None,
    epsilon: float = 1e-5,
    head: Head | None = None,
) -> Transformer:
    """The Llama shape at any size; the head is untied by default."""
    block = Block(
        mixer=Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, position=rotary or Rotary()),
        ffn=GatedMLP(hidden_dim=hidden_dim, activation="silu"),
        norm=RMSNorm(epsilon=epsilon),
        wiring=PreNorm(),
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        final_norm=RMSNorm(epsilon=epsilon),
        head=head or Untied(),
    )


_LLAMA3 = Rotary(theta=500_000.0)
_LLAMA31 = Rotary(
    theta=500_000.0,
    scaling=Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192),
)
_LLAMA32 = Rotary(
    theta=500_000.0,
    scaling=Llama3(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_length=8192),
)

PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "llama-nano": llama(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, num_kv_heads=2, head=Tied()),
    "llama-1b": llama(
        embed_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=8192,
        vocab_size=128256,
        rotary=_LLAMA32,
        head=Tied(),
    ),
    "llama-7b": llama(embed_dim=4096, num_layers=32, num_heads=32, hidden_dim=11008, vocab_size=32000, epsilon=1e-6),
    "llama2-7b": llama(embed_dim=4096, num_layers=32, num_heads=32, hidden_dim=11008, vocab_size=32000),
    "llama2-13b": llama(embed_dim=5120, num_layers=40, num_heads=40, hidden_dim=13824, vocab_size=32000),
    "llama2-70b": llama(
        embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden_dim=28672, vocab_size=32000
    ),
    "llama3-8b": llama(
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        vocab_size=128256,
        rotary=_LLAMA3,
    ),
    "llama3.1-8b": llama(
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        vocab_size=128256,
        rotary=_LLAMA31,
    ),
    "llama3-70b": llama(
        embed_dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        hidden_dim=28672,
        vocab_size=128256,
        rotary=_LLAMA3,
    ),
    "llama3.1-405b": llama(
        embed_dim=16384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        hidden_dim=53248,
        vocab_size=128256,
        rotary=_LLAMA31,
    ),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)
