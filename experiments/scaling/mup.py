"""Does the learning rate that is best for a narrow model serve a wide one, if the model is parametrised by muP?

Claim    In the standard parametrisation AdamW's best learning rate falls with width; under muP it stays where it is, so
         that a width of 32 can be tuned in place of one of 256 (Yang et al. 2022, 2203.03466).
Command  llmlab scaling experiments/scaling/mup.py --workers 2
Cost     84 runs of 150 steps: 4 widths, 6 rates, 2 seeds; 3 min 19 s on 7 cores
Result   as claimed in direction: the best rate moves as width^-0.92 [-1.73, -0.10] in the standard parametrisation and
         as width^-0.13 [-0.79, +0.53] under muP. At the rate of width 32 the width of 256 loses 0.56 and 0.06 nats,
         with two seeds too few to tell these from zero (intervals to 1.81 and 0.47; results/mup; 2026-11-26, 7 cores,
         Python 3.12.3, jax 0.11.2)

At the base width, 32, both arms are the same model to the bit: its runs are trained once.
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
from llmlab.study.transfer import Transfer
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train

BASE = 32


def experiment(width: int, mup: MuP | None) -> Experiment:
    """Two layers, as many heads of 16 as the width holds."""
    block = Block(
        mixer=Attention(num_heads=width // 16, head_dim=16, position=Rotary()),
        ffn=GatedMLP(hidden_dim=3 * width),
        norm=RMSNorm(),
        wiring=PreNorm(),
    )
    return Experiment(
        model=Transformer(
            embed_dim=width,
            num_layers=2,
            pattern=(block,),
            embedding_std=0.1,
            final_norm=RMSNorm(),
            head=Untied(),
            mup=mup,
        ),
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=0.1)),
        train=Train(
            steps=150, batch_size=8, sequence_length=64, evaluate_every=0, evaluate_batches=24, checkpoint_every=0
        ),
    )


def standard(width: int) -> Experiment:
    """The parametrisation of every other experiment."""
    return experiment(width, None)


def mup(width: int) -> Experiment:
    """The same model at the base width, and its wider relatives."""
    return experiment(width, None if width == BASE else MuP(base_width=BASE, base_head_dim=16))


def config() -> Experiment:
    """The base model."""
    return standard(BASE)


def scaling() -> Transfer:
    """Both parametrisations, four widths, rates a factor of two apart."""
    return Transfer(
        question="Does the best learning rate of width 32 serve width 256?",
        arms={"standard": standard, "muP": mup},
        widths=(32, 64, 128, 256),
        learning_rates=(2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3),
        seeds=2,
    )
