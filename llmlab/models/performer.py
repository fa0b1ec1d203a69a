"""Performer (Choromanski et al. 2020, 2009.14794): a Transformer whose attention is linear in the length.

    x --+-- LayerNorm -- FAVOR+ --(+)--+-- LayerNorm -- MLP --(+)-- y        softmax(q k^T) v  estimated by
        +---------------------------|  +--------------------|              phi(q) (sum phi(k) v^T),  M random features

Nothing else changes (nn/favor.py has the equations), so that a trained Transformer's weights can be taken over and
fine-tuned for a little. As an encoder it sums over the whole row, as a decoder over what came before, in chunks; both
honour padding and documents in a packed row. Blocks are pre-norm, positions sinusoidal, both as in the models that the
paper trained.

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls, and 8 M D in attention where softmax takes 4 S D:
cheaper from S = 2 M on, 512 tokens for the usual 256 features, and its memory is O(S M) from the first. What it
trades: attention is an estimate, poor where it should be sharp, and the features are the same in every layer of a
model unless redrawn (`draws`). To decode, a layer keeps sums instead of keys and values: M (D + N) numbers for N heads,
however long the text is.
"""

from llmlab.models.config import Head, ModelConfig, Tied, Transformer, named
from llmlab.models.encoder import Encoder
from llmlab.models.family import Family
from llmlab.models.heads import EncoderHead, MaskedLM
from llmlab.nn.config import Block
from llmlab.nn.favor import FavorAttention, Feature
from llmlab.nn.feed_forward import MLP, Activation
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import AddedPosition, Sinusoidal
from llmlab.nn.wiring import PreNorm


def block(
    *,
    num_heads: int,
    hidden_dim: int,
    causal: bool,
    num_features: int = 256,
    feature: Feature = "softmax",
    activation: Activation = "gelu",
    dropout: float = 0.0,
) -> Block:
    """A layer of a Performer."""
    return Block(
        mixer=FavorAttention(num_heads=num_heads, causal=causal, num_features=num_features, feature=feature),
        ffn=MLP(hidden_dim=hidden_dim, activation=activation, dropout=dropout),
        norm=LayerNorm(),
        wiring=PreNorm(),
        dropout=dropout,
    )


def decoder(
    layer: Block,
    *,
    embed_dim: int,
    num_layers: int,
    vocab_size: int | None = None,
    position: AddedPosition | None = None,
    head: Head | None = None,
) -> Transformer:
    """A causal Performer; the head is tied by default."""
    return Transformer(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(layer,),
        position=position or Sinusoidal(),
        embedding_dropout=layer.dropout,
        final_norm=LayerNorm(),
        head=head or Tied(),
    )


def encoder(
    layer: Block,
    *,
    embed_dim: int,
    num_layers: int,
    vocab_size: int | None = None,
    position: AddedPosition | None = None,
    head: EncoderHead | None = MaskedLM(),  # noqa: B008  frozen
) -> Encoder:
    """A Performer that sees both sides."""
    return Encoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        pattern=(layer,),
        position=position or Sinusoidal(),
        embedding_dropout=layer.dropout,
        final_norm=LayerNorm(),
        head=head,
    )


def _nano(causal: bool) -> Block:
    return block(num_heads=6, hidden_dim=768, causal=causal, num_features=64)


def _protein(causal: bool) -> Block:
    return block(num_heads=8, hidden_dim=1024, causal=causal, feature="relu", dropout=0.1)


def _image() -> Block:
    return block(num_heads=8, hidden_dim=2048, causal=True, dropout=0.1)


PRESETS: dict[str, ModelConfig] = {
    # a laptop's models; their vocabulary follows the tokenizer
    "performer-nano": decoder(_nano(causal=True), embed_dim=192, num_layers=4),
    "performer-encoder-nano": encoder(_nano(causal=False), embed_dim=192, num_layers=4),
    # the paper's, section 4: proteins (20 amino acids and a few special tokens) seen from the left and from both
    # sides, and images pixel by pixel
    "performer-proteins": decoder(_protein(causal=True), embed_dim=512, num_layers=36, vocab_size=32),
    "performer-encoder-proteins": encoder(_protein(causal=False), embed_dim=512, num_layers=36, vocab_size=32),
    "performer-imagenet64": decoder(_image(), embed_dim=512, num_layers=6, vocab_size=256),
}


def preset(name: str) -> ModelConfig:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


FAMILY = Family(
    name="Performer",
    kind="encoder or decoder",
    paper="Choromanski et al. 2020 (2009.14794)",
    presets=PRESETS,
    heads=("Tied", "Untied", "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
    objectives=("NextToken", "MaskedToken", "Classification", "TokenClassification", "QuestionAnswering"),
    reference="the paper's equations in float64 (tests)",
)
