"""Do 256 small chips (v5e) pretrain Llama 3 8B on rows of 8,192 tokens?

Claim    They do, with every layer computed twice: a row of 8,192 tokens a chip takes half of its 16 GB, and arithmetic
         is what bounds the step.
Command  llmlab plan experiments/plans/llama3_8b.py --topology v5e:16x16
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-25, jax 0.10.2, libtpu 0.0.42.1):

llama3_8b  8.03B parameters, 2.1M tokens a step, on 256 x v5e (v5e:16x16; mesh data=8 x fsdp=32)
memory of a chip  8.03 GiB of 15.75 GiB  fits, 49% free
   parameters   957.3 MiB   5.9%
   optimizer     1.87 GiB  11.9%
   temporaries   5.19 GiB  33.0%
model FLOPs     121.5 PFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  165.4 PFLOP  matrix products x loop trips, 30% in kernels
ratio                 1.362  what rematerialisation, attention's backward kernels and the optimizer's products add
collective      mesh axes    runs  leaves a chip     time
all-gather      fsdp          646      31.14 GiB   186 ms
all-reduce      fsdp           69      16.30 GiB  97.2 ms
reduce-scatter  fsdp          160       8.23 GiB  49.1 ms
all-reduce      data + fsdp    35       1.95 GiB  11.6 ms
all-reduce      data           33      837.6 MiB  9.76 ms
all                                    58.44 GiB   354 ms
compute         3.28 s   compiled FLOPs / chips / 197 TFLOP/s
memory          730 ms   bytes moved / 819 GB/s
interconnect    354 ms   bytes that leave a chip / (links x 45 GB/s)
bound by compute: at best 3.28 s a step, 2,498 tokens/s a chip, MFU 73.4% if everything overlaps, 55.2%
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
    """Llama 3 8B (Grattafiori et al. 2024, 2407.21783): a row of 8,192 tokens a chip."""
    return Experiment(
        model=dataclasses.replace(llama.preset("llama3-8b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=128256, kind="bpe"),
        data=Packed(StandardLibrary()),  # stands for the corpus: a plan reads none
        objective=NextToken(chunk=2048),
        optimizer=AdamW(peak_lr=3e-4, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=8, fsdp=32),
        train=Train(steps=500_000, batch_size=256, sequence_length=8192, precision="bfloat16"),
    )
