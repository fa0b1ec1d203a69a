"""Does T5-11B, whose feed-forward is 64 times its width, train on 64 TPU v5p chips?

Claim    It fits with room, and main memory is what bounds it: relative biases keep its attention from the splash
         kernel, so scores pass through memory.
Command  llmlab plan experiments/plans/t5_11b.py --topology v5p:4x4x4
Cost     a minute on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-26, jax 0.10.2, libtpu 0.0.42.1):

t5_11b  11.3B parameters, 1.28M tokens a step, on 64 x v5p (v5p:4x4x4; mesh fsdp=8 x tensor=8)
memory of a chip  16.81 GiB of 95.74 GiB  fits, 82% free
   parameters   674.0 MiB   0.7%
   optimizer     1.32 GiB   1.4%
   temporaries  14.74 GiB  15.4%
model FLOPs     46.63 PFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs  58.03 PFLOP  matrix products x loop trips
ratio                 1.244  what rematerialisation, attention's backward kernels and the optimizer's products add
collective          mesh axes       runs  leaves a chip     time
all-gather          tensor           241      52.55 GiB   157 ms
collective-permute  tensor         1,080      33.75 GiB   403 ms
all-reduce          tensor           197      18.90 GiB  56.4 ms
reduce-scatter      tensor            48      10.50 GiB  31.3 ms
collective-permute  fsdp           6,273       5.60 GiB  66.8 ms
all-gather          fsdp             891       3.21 GiB  9.56 ms
all-reduce          fsdp              52      719.3 MiB   2.1 ms
all-reduce          fsdp + tensor     27      123.7 MiB  0.24 ms
all                                          125.33 GiB   726 ms
compute         1.98 s   compiled FLOPs / chips / 459 TFLOP/s
memory          2.55 s   bytes moved / 2,765 GB/s
interconnect    726 ms   bytes that leave a chip / (links x 90 GB/s)
bound by memory: at best 2.55 s a step, 7,845 tokens/s a chip, MFU 62.2% if everything overlaps, 30.2% if nothing does
"""

import dataclasses

from llmlab.data import Packed, SpanCorruption, StandardLibrary, sentinels
from llmlab.experiment import Experiment
from llmlab.models import t5
from llmlab.nn.stack import Execution
from llmlab.objectives import SequenceToSequence
from llmlab.optim import AdamW, Cosine
from llmlab.sharding import Mesh
from llmlab.tokenizers import SentencePiece, SpecialTokens
from llmlab.training.config import Train


def config() -> Experiment:
    """T5-11B (Raffel et al. 2020, 1910.10683): 2,048 rows of 512 tokens, spans to be told."""
    return Experiment(
        model=dataclasses.replace(t5.preset("t5-11b"), execution=Execution(remat="full")),
        tokenizer=SentencePiece(vocab_size=32000, special=SpecialTokens(bos=None, unk="<unk>", extra=sentinels(100))),
        data=Packed(StandardLibrary(), corruption=SpanCorruption()),  # stands for the corpus: a plan reads none
        objective=SequenceToSequence(),
        optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=1, fsdp=8, tensor=8),
        train=Train(steps=500_000, batch_size=2048, sequence_length=512, precision="bfloat16"),
    )
