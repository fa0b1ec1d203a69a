"""Do 512 TPU v5p chips train BLOOM 176B, vocabulary of a quarter of a million and all?

Claim    They do, in a quarter of their memory; activations that travel along the tensor axis take half of the time that
         arithmetic does. ALiBi is part of the splash kernel's products.
Command  llmlab plan experiments/plans/bloom_176b.py --topology v5p:8x8x8
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-26, jax 0.10.2, libtpu 0.0.42.1):

bloom_176b  176B parameters, 2.1M tokens a step, on 512 x v5p (v5p:8x8x8; mesh fsdp=64 x tensor=8)
memory of a chip  21.79 GiB of 95.74 GiB  fits, 77% free
   parameters    1.29 GiB   1.3%
   optimizer     2.57 GiB   2.7%
   temporaries  17.90 GiB  18.7%
model FLOPs     2.269 EFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  2.798 EFLOP  matrix products x loop trips, 3% in kernels
ratio                 1.233  what rematerialisation, attention's backward kernels and the optimizer's products add
collective          mesh axes       runs  leaves a chip      time
all-gather          tensor           422     328.19 GiB    1.96 s
all-reduce          tensor           147     215.91 GiB    1.29 s
collective-permute  tensor         1,890     206.72 GiB    2.47 s
all-gather          fsdp             841      79.96 GiB    238 ms
reduce-scatter      fsdp             422      41.33 GiB    123 ms
all-reduce          fsdp + tensor    144      13.39 GiB   26.6 ms
collective-permute  fsdp              10      120.6 MiB    1.4 ms
all-reduce          fsdp             353       82.9 MiB  0.242 ms
all                                          885.69 GiB    6.10 s
compute        11.90 s   compiled FLOPs / chips / 459 TFLOP/s
memory          2.00 s   bytes moved / 2,765 GB/s
interconnect    6.10 s   bytes that leave a chip / (links x 90 GB/s)
bound by compute: at best 11.90 s a step, 344 tokens/s a chip, MFU 81.1% if everything overlaps, 48.3% if nothing does
"""

import dataclasses

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models import bloom
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Cosine
from llmlab.sharding import Mesh
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """BLOOM (Scao et al. 2022, 2211.05100): two rows of 2,048 tokens a chip."""
    return Experiment(
        model=dataclasses.replace(bloom.preset("bloom-176b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=250000, kind="bpe"),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        objective=NextToken(chunk=1024),
        optimizer=AdamW(peak_lr=6e-5, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=1, fsdp=64, tensor=8),
        train=Train(steps=500_000, batch_size=1024, sequence_length=2048, precision="bfloat16"),
    )
