"""What does it take to pretrain Llama 2 7B on 64 TPU v5p chips?

TBD
"""

import dataclasses

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models import llama
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Cosine
from llmlab.sharding import Mesh
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """Llama 2's recipe (Touvron et al. 2023, 2307.09288, section 2.2), in steps of a million tokens instead of four."""
    return Experiment(
        model=dataclasses.replace(llama.preset("llama2-7b"), execution=Execution(remat="dots")),
        tokenizer=SentencePiece(vocab_size=32000, kind="bpe"),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        # The whole row is scored at once: each chunk gathers the head anew.
        objective=NextToken(chunk=4096),
        optimizer=AdamW(peak_lr=3e-4, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=2, fsdp=32),
        train=Train(steps=500_000, batch_size=256, sequence_length=4096, precision="bfloat16"),
    )
