"""How should a budget of FLOPs be split between a model's parameters and its tokens, at the smallest scale there is?

Claim    The loss of nano models of Python's source code follows L = E + A / N^alpha + B / D^beta closely enough that
         the runs of the largest budget are predicted by the smaller ones, and the best size grows about as fast as the
         number of tokens (Hoffmann et al. 2022, 2203.15556: exponents near 0.5).
Command  llmlab scaling experiments/scaling/nano.py --workers 2
Cost     20 runs, 3.4e13 FLOPs, 37 million tokens; 4 min 18 s on 7 cores
Result   the best size grows as C^0.51 [0.42, 0.78] and tokens as C^0.59 [0.39, 0.67] (90% intervals): about as fast as
         each other. The 15 smaller runs predict the 5 largest, all within their intervals, with a mean error of 0.062
         nats: the smallest model's best is missed by 0.14 (results/nano; 2026-11-26, 7 cores, Python 3.12.3, jax
         0.11.2)

Sizes share one learning rate by muP (2203.03466), so that no size loses by another's. Its base is the width of 64. The
corpus has more tokens than the longest run sees, so no run repeats any.
"""

from llmlab.data import INDENTATION, Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer, Untied
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.mup import MuP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW, Cosine
from llmlab.study.scaling import Scaling
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def model(width: int) -> Transformer:
    """Three layers, as many heads of 16 as the width holds."""
    block = Block(
        mixer=Attention(num_heads=width // 16, head_dim=16, position=Rotary()),
        ffn=GatedMLP(hidden_dim=3 * width),
        norm=RMSNorm(),
        wiring=PreNorm(),
    )
    return Transformer(
        embed_dim=width,
        num_layers=3,
        pattern=(block,),
        embedding_std=0.1,
        final_norm=RMSNorm(),
        head=Untied(),
        mup=MuP(base_width=64, base_head_dim=16),
    )


def experiment(width: int) -> Experiment:
    """One size; the study chooses how long it is trained."""
    return Experiment(
        model=model(width),
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=0.1)),
        train=Train(steps=600, batch_size=8, sequence_length=128, evaluate_batches=24),
    )


def config() -> Experiment:
    """The base model by itself."""
    return experiment(64)


def scaling() -> Scaling:
    """Six sizes at five budgets, without the corners that nobody would train."""
    return Scaling(
        question="How should a budget be split between parameters and tokens?",
        family=[experiment(width) for width in (16, 32, 48, 64, 96, 128)],
        budgets=(2.5e11, 5e11, 1e12, 2e12, 4e12),
        tokens_per_parameter=(1.0, 300.0),
        delta=0.01,  # seeds differ by about this much in log loss
    )
