"""What do 128 TPU v5p chips make of Mixtral 8x7B, one expert a device of the expert axis?

Claim    It fits in a fifth of the memory, tokens sent to their experts by all-to-all, and as long as experts are used
         evenly, arithmetic bounds the step as it does without a mixture: experts' products do the rows that there are,
         whatever room there is for more.
Command  llmlab plan experiments/plans/mixtral_8x7b.py --topology v5p:4x4x8
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-26, jax 0.10.2, libtpu 0.0.42.1):

mixtral_8x7b  46.7B parameters, 1.05M tokens a step, on 128 x v5p (v5p:4x4x8; mesh fsdp=16 x expert=8)
memory of a chip  15.05 GiB of 95.74 GiB  fits, 84% free
   parameters    1.69 GiB   1.8%
   optimizer     3.37 GiB   3.5%
   temporaries   9.93 GiB  10.4%
model FLOPs     86.96 PFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  119.1 PFLOP  matrix products x loop trips, 90% in kernels
ratio                 1.369  what rematerialisation, attention's backward kernels and the optimizer's products add
collective          mesh axes      runs  leaves a chip      time
ragged-all-to-all   expert          192      52.50 GiB    313 ms
all-gather          fsdp            803      27.18 GiB   81.1 ms
all-reduce          fsdp             65      13.13 GiB   39.1 ms
reduce-scatter      fsdp            193       5.89 GiB   17.6 ms
all-reduce          fsdp + expert   133      497.1 MiB  0.965 ms
all-reduce          expert          129      307.6 MiB   1.79 ms
collective-permute  fsdp              2       29.3 MiB  0.341 ms
all                                          99.51 GiB    454 ms
compute         2.03 s   compiled FLOPs / chips / 459 TFLOP/s
memory          547 ms   bytes moved / 2,765 GB/s
interconnect    454 ms   bytes that leave a chip / (links x 90 GB/s)
bound by compute: at best 2.03 s a step, 4,043 tokens/s a chip, MFU 73.0% if everything overlaps, 48.9% if nothing
"""

import dataclasses

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models import mixtral
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Cosine
from llmlab.sharding import Mesh
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """Mixtral 8x7B (Jiang et al. 2024, 2401.04088): two rows of 4,096 tokens a chip."""
    return Experiment(
        model=dataclasses.replace(mixtral.preset("mixtral-8x7b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=32000, kind="bpe"),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        objective=NextToken(chunk=4096),
        optimizer=AdamW(peak_lr=1e-4, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=1, fsdp=16, expert=8),
        train=Train(steps=500_000, batch_size=256, sequence_length=4096, precision="bfloat16"),
    )
