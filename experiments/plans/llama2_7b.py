"""Can 64 TPU v5p chips pretrain Llama 2 7B at a million tokens a step, and what would hold them back?

Claim    With the state split over 32 chips, two such groups, and only matrices' outputs kept, a step takes half of the
         memory and is bound by arithmetic: networks and memory leave room for an MFU of 70% and more.
Command  llmlab plan experiments/plans/llama2_7b.py --topology v5p:4x4x4
Cost     half a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-26, jax 0.10.2, libtpu 0.0.42.1):

memory of a chip  47.85 GiB of 95.74 GiB  fits, 50% free
  parameters   803.3 MiB   optimizer 1.57 GiB   temporaries 45.47 GiB (by arithmetic: 49.8)   program 28.7 MiB

model FLOPs     48.32 PFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  53.95 PFLOP  matrix products x loop trips, 23% in kernels (splash attention)
ratio                 1.116  what rematerialisation and attention's backward kernels add

collective      mesh axes    runs  leaves a chip      time  network
all-gather      fsdp          579      23.85 GiB   47.4 ms  in a slice
reduce-scatter  fsdp          161       8.35 GiB   16.6 ms  in a slice
all-reduce      fsdp           33       7.14 GiB   14.2 ms  in a slice
all-reduce      data + fsdp    35      493.2 MiB  0.958 ms  in a slice
all-reduce      data           33      393.8 MiB   2.29 ms  in a slice

compute        1.84 s    compiled FLOPs / chips / 459 TFLOP/s
memory         361 ms    bytes moved / 2,765 GB/s
interconnect  81.5 ms    bytes that leave a chip / (links x 90 GB/s)
bound by compute: 1.84 s a step at best, 8,921 tokens/s a chip, MFU 89.6% if everything overlaps, 72.2% if nothing does

Two choices matter more than the rest. --mesh.data 1 --mesh.fsdp 64 leaves a chip 64 of 4,096 rows of a matrix, less
than the 128 of a tile, and the compiler gathers with all-reduces that send twice as much. And an objective that scores
a row in chunks gathers the head for each of them: with the default chunk, 241 times a step.
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
