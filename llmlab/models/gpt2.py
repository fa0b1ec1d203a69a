"""GPT-2 (Radford et al. 2019): the decoder that later ones are measured against.

    x --+-- LayerNorm -- attention --(+)--+-- LayerNorm -- MLP --(+)-- y
        +------------------------------|   +------------------------|

Learned absolute positions added to the embeddings, pre-norm blocks with LayerNorm, biases everywhere, a GELU (tanh
approximation) MLP four times as wide as the model, the head tied to the embedding. Against Llama: positions end at
the table's length, one matrix more in Llama's gated MLP, norms with mean and bias.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls and 4 S D in attention; 12 D^2 parameters.
"""

from llmlab.models.config import Tied, Transformer, named
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PreNorm


def gpt2(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    max_length: int = 1024,
    vocab_size: int | None = None,
    hidden_dim: int | None = None,
    dropout: float = 0.0,
) -> Transformer:
    """The GPT-2 shape at any size; `dropout` applies to embeddings, attention weights and residual branches."""
    block = Block(
        mixer=Attention(num_heads=num_heads, bias=True, output_bias=True, dropout=dropout),
        ffn=MLP(hidden_dim=hidden_dim or 4 * embed_dim, activation="gelu_tanh"),
        norm=LayerNorm(epsilon=1e-5),
        wiring=PreNorm(),
        dropout=dropout,
    )
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(block,),
        position=Learned(max_length=max_length),
        embedding_dropout=dropout,
        final_norm=LayerNorm(epsilon=1e-5),
        head=Tied(),
    )


PRESETS: dict[str, Transformer] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "gpt2-nano": gpt2(embed_dim=192, num_layers=4, num_heads=6, max_length=512),
    # the four of the paper's table 2 (sizes as later corrected by the authors)
    "gpt2-124m": gpt2(embed_dim=768, num_layers=12, num_heads=12, vocab_size=50257),
    "gpt2-355m": gpt2(embed_dim=1024, num_layers=24, num_heads=16, vocab_size=50257),
    "gpt2-774m": gpt2(embed_dim=1280, num_layers=36, num_heads=20, vocab_size=50257),
    "gpt2-1.5b": gpt2(embed_dim=1600, num_layers=48, num_heads=25, vocab_size=50257),
}


def preset(name: str) -> Transformer:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)
