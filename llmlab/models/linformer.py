"""Linformer (Wang et al. 2020, 2006.04768): BERT's encoder with attention to a fixed number of mixtures of the row.

    x --+-- Linformer attention --(+)-- LayerNorm --+-- MLP --(+)-- LayerNorm -- y
        +--------------------------|                +----------|

    attention = softmax(Q (E K)^T / sqrt(H)) (F V)        E, F: k x S, learned with the rest

Post-norm blocks, learned positions, segment types and heads are BERT's (models/bert.py); what differs is that a query
attends to k mixtures of all tokens and not to the tokens (nn/linformer.py).

Cost per token and layer: 24 D^2 FLOPs forward in parameter matmuls, and 8 k D in attention where softmax takes 4 S D:
cheaper from S = 2 k on. 2 k S more parameters a layer, one and the same matrix for keys and values if they share it.
What it trades: the length is fixed when the model is built, nothing can be causal, and a row holds one document.
"""

from dataclasses import replace

from llmlab.models.bert import bert
from llmlab.models.config import named
from llmlab.models.encoder import Encoder
from llmlab.models.family import Family
from llmlab.models.heads import EncoderHead, MaskedLM
from llmlab.nn.linformer import LinformerAttention, Sharing


def linformer(
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    max_length: int = 512,
    projected: int = 256,
    sharing: Sharing = "headwise",
    hidden_dim: int | None = None,
    vocab_size: int | None = None,
    dropout: float = 0.0,
    head: EncoderHead | None = MaskedLM(),  # noqa: B008  frozen
) -> Encoder:
    """The Linformer shape at any size."""
    model = bert(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        max_length=max_length,
        vocab_size=vocab_size,
        dropout=dropout,
        pooler=None,
        head=head,
    )
    mixer = LinformerAttention(
        num_heads=num_heads,
        max_length=max_length,
        projected=projected,
        sharing=sharing,
        bias=True,
        output_bias=True,
        dropout=dropout,
    )
    return replace(model, pattern=tuple(replace(block, mixer=mixer) for block in model.pattern))


PRESETS: dict[str, Encoder] = {
    # a laptop's model; its vocabulary follows the tokenizer
    "linformer-nano": linformer(embed_dim=192, num_layers=4, num_heads=6, max_length=1024, projected=64),
    # the paper's, section 5: RoBERTa-base with k of 128 and 256, keys and values sharing a projection
    "linformer-base-k128": linformer(
        embed_dim=768, num_layers=12, num_heads=12, projected=128, sharing="key-value", vocab_size=50265, dropout=0.1
    ),
    "linformer-base-k256": linformer(
        embed_dim=768, num_layers=12, num_heads=12, projected=256, sharing="key-value", vocab_size=50265, dropout=0.1
    ),
}


def preset(name: str) -> Encoder:
    """The preset of this name; an unknown name lists those there are."""
    return named(PRESETS, name)


FAMILY = Family(
    name="Linformer",
    kind="encoder",
    paper="Wang et al. 2020 (2006.04768)",
    presets=PRESETS,
    heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "None"),
    objectives=("MaskedToken", "Classification", "TokenClassification", "QuestionAnswering"),
    reference="the paper's equations in float64 (tests)",
)
