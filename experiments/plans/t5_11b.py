"""Does T5-11B, whose feed-forward is 64 times its width, train on 64 TPU v5p chips?

Claim    In half of their memory and bound by arithmetic, with nothing computed twice: matrices this wide split well
         over eight chips, and attention with relative biases keeps no scores (llmlab.nn.kernels.relative).
Command  llmlab plan experiments/plans/t5_11b.py --topology v5p:4x4x4
Cost     two minutes on 2 CPU cores and no TPU: pip install 'llmlab[tpu]' brings the compiler
Result   holds by the compiler's own numbers; nothing was run (2026-11-26, jax 0.10.2, libtpu 0.0.42.1):

t5_11b  11.3B parameters, 1.28M tokens a step, on 64 x v5p (v5p:4x4x4; mesh data=8 x tensor=8)
memory of a chip  53.26 GiB of 95.74 GiB  fits, 44% free
   parameters    5.27 GiB   5.5%
   optimizer    10.53 GiB  11.0%
   temporaries  37.40 GiB  39.1%
model FLOPs     46.63 PFLOP  a step: 2 for each multiply-add, every key counted, 3 x forward
compiled FLOPs   48.4 PFLOP  matrix products x loop trips, 10% in kernels
ratio                 1.038  what attention's backward kernels and the optimizer's products add
collective          mesh axes       runs  leaves a chip     time
all-reduce          data             778      36.99 GiB   110 ms
all-gather          tensor         1,160      31.93 GiB  95.2 ms
collective-permute  tensor         6,912      27.00 GiB   322 ms
all-reduce          tensor         1,185      14.22 GiB  42.4 ms
reduce-scatter      tensor           384      10.50 GiB  31.3 ms
all-reduce          data + tensor    201      989.8 MiB  1.92 ms
all                                          121.61 GiB   603 ms
compute         1.65 s   compiled FLOPs / chips / 459 TFLOP/s
memory          1.13 s   bytes moved / 2,765 GB/s
interconnect    603 ms   bytes that leave a chip / (links x 90 GB/s)
bound by compute: at best 1.65 s a step, 12.2k tokens/s a chip, MFU 96.4% if everything overlaps, 46.9% if nothing does

Found by --search. Parameters split over the width as well (fsdp=8 x tensor=8, layers computed again) take 13 GiB, and
2.11 s a step: the compiler then multiplies in eight parts of 128 columns and adds each to a result in memory.
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
        model=dataclasses.replace(t5.preset("t5-11b"), execution=Execution(remat="none")),
        tokenizer=SentencePiece(vocab_size=32000, special=SpecialTokens(bos=None, unk="<unk>", extra=sentinels(100))),
        data=Packed(StandardLibrary(), corruption=SpanCorruption()),  # stands for the corpus: a plan reads none
        objective=SequenceToSequence(),
        optimizer=AdamW(peak_lr=1e-3, schedule=Cosine(warmup_steps=2000)),
        mesh=Mesh(data=8, tensor=8),
        train=Train(steps=500_000, batch_size=2048, accumulation=8, sequence_length=512, precision="bfloat16"),
    )
