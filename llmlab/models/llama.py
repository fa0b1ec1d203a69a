"""Llama 1, 2 and 3 (Touvron et al. 2023, 2302.13971 and 2307.09288; Grattafiori et al. 2024, 2407.21783).

    x --+-- RMSNorm -- attention (rotary) --(+)--+-- RMSNorm -- SwiGLU --(+)-- y
        +----------------------------------|     +---------------------|

Rotary positions inside attention, RMSNorm before each part, a SwiGLU feed-forward, no biases, an untied head (the
small Llama 3.2 models tie it). The 70B of Llama 2 and all of Llama 3 have fewer key/value heads than query heads.
Llama 3.1 stretches the rotary frequencies to 128k positions (Llama3 scaling).

Cost per token and layer: 2 D^2 (2 + 2 K/N) + 6 D F FLOPs forward in parameter matmuls and 4 S D in attention.
"""

from llmlab.models.config import Head, Tied, Transformer, Untied
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
        mixer=Attention(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, position=rotary or Rotary()
        ),
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
