"""Do 1,024 TPU v5p chips hold PaLM 540B in training?

Claim    They do: 6.5 TB of parameters and moments are split 1,024 ways, and the parallel blocks with one key/value
         head leave arithmetic as the bound.
Command  llmlab plan experiments/plans/palm_540b.py --topology v5p:8x8x16
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-25, jax 0.10.2, libtpu 0.0.42.1):

palm_540b  540B parameters, 2.1M tokens a step, on 1024 x v5p (v5p:8x8x16; mesh fsdp=128 x tensor=8)
memory of a chip  24.60 GiB of 95.74 GiB  fits, 74% free
   parameters    1.99 GiB   2.1%
   optimizer     3.99 GiB   4.2%
   temporaries  18.58 GiB  19.4%
model FLOPs     6.874 EFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  8.529 EFLOP  matrix products x loop trips, 2% in kernels
ratio                 1.241  what rematerialisation, attention's backward kernels and the optimizer's products add
collective          mesh axes       runs  leaves a chip       time
all-gather          fsdp           1,653     252.17 GiB     752 ms
all-gather          tensor           356     182.42 GiB     1.09 s
collective-permute  tensor         2,124     149.34 GiB     1.78 s
reduce-scatter      fsdp             828     127.96 GiB     382 ms
reduce-scatter      tensor           236     116.16 GiB     693 ms
all-reduce          fsdp + tensor    121      17.57 GiB    34.9 ms
all-reduce          tensor           124       4.21 GiB    25.1 ms
collective-permute  fsdp              26      248.0 MiB    2.89 ms
all-reduce          fsdp             238       33.1 MiB  0.0963 ms
all                                          850.10 GiB     4.76 s
compute        18.15 s   compiled FLOPs / chips / 459 TFLOP/s
memory          2.11 s   bytes moved / 2,765 GB/s
interconnect    4.76 s   bytes that leave a chip / (links x 90 GB/s)
bound by compute: at best 18.15 s a step, 113 tokens/s a chip, MFU 80.6% if everything overlaps, 58.5% if nothing does
"""

import dataclasses

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models import palm
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Cosine
from llmlab.sharding import Mesh
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """PaLM 540B (Chowdhery et al. 2022, 2204.02311), two million tokens a step; Adam in place of its Adafactor."""
    return Experiment(
        model=dataclasses.replace(palm.preset("palm-540b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=256000),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        objective=NextToken(chunk=1024),
        optimizer=AdamW(peak_lr=1e-4, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=1, fsdp=128, tensor=8),
        train=Train(steps=500_000, batch_size=1024, sequence_length=2048, precision="bfloat16"),
    )
