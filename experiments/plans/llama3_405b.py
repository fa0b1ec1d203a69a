"""Do 1,024 TPU v5p chips hold Llama 3.1 405B in training?

Claim    They do: 4.9 TB of parameters and moments are a twentieth of their memory, split 128 times by rows of matrices
         and 8 times by columns.
Command  llmlab plan experiments/plans/llama3_405b.py --topology v5p:8x8x16
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-25, jax 0.10.2, libtpu 0.0.42.1):

llama3_405b  406B parameters, 4.19M tokens a step, on 1024 x v5p (v5p:8x8x16; mesh fsdp=128 x tensor=8)
memory of a chip  28.39 GiB of 95.74 GiB  fits, 70% free
   parameters    1.48 GiB   1.5%
   optimizer     2.95 GiB   3.1%
   temporaries  23.92 GiB  25.0%
model FLOPs     11.01 EFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  14.17 EFLOP  matrix products x loop trips, 11% in kernels
ratio                 1.287  what rematerialisation, attention's backward kernels and the optimizer's products add
collective          mesh axes       runs  leaves a chip     time
all-gather          tensor           758     665.80 GiB   3.97 s
collective-permute  tensor         3,402     425.25 GiB   5.07 s
reduce-scatter      tensor           252     220.50 GiB   1.32 s
all-gather          fsdp           2,274     188.03 GiB   561 ms
all-reduce          fsdp             258      72.25 GiB   215 ms
reduce-scatter      fsdp             378      58.60 GiB   175 ms
all-reduce          fsdp + tensor    129       7.84 GiB  15.6 ms
all-reduce          tensor            12       1.75 GiB  10.4 ms
all                                         1640.02 GiB  11.34 s
compute        30.14 s   compiled FLOPs / chips / 459 TFLOP/s
memory          4.17 s   bytes moved / 2,765 GB/s
interconnect   11.34 s   bytes that leave a chip / (links x 90 GB/s)
bound by compute: at best 30.14 s a step, 136 tokens/s a chip, MFU 77.7% if everything overlaps, 51.3% if nothing does
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
    """Llama 3.1 405B (Grattafiori et al. 2024, 2407.21783, table 4), four million tokens a step."""
    return Experiment(
        model=dataclasses.replace(llama.preset("llama3.1-405b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=128256, kind="bpe"),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        objective=NextToken(chunk=2048),
        optimizer=AdamW(peak_lr=8e-5, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=1, fsdp=128, tensor=8),
        train=Train(steps=500_000, batch_size=512, sequence_length=8192, precision="bfloat16"),
    )
