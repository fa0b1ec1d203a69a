"""The numbers of a study, in one place to import from. NumPy arrays in, floats and small dataclasses out.

A study trains every arm with the same seeds: one seed gives both arms the same data order and the same initialisation
of the parameters that they share. What a seed adds to a run's loss is therefore largely common to both arms and
cancels in the difference d_i = variant_i - baseline_i. Everything here is about those n differences, not about two
independent groups: with n = 5 the paired test often sees what the unpaired one cannot.

Which question each number answers, and where it is computed:

    how large is the difference?                  mean_difference, t_interval, bca_interval             paired.py
    could it be luck?                             paired_t, sign_flip, holm (several variants)          paired.py
    is it small enough not to matter?             equivalence (two one-sided tests)                     paired.py
    what could this study not have seen?          minimum_detectable_effect, seeds_to_settle            power.py
    does it reach the loss sooner?                steps_to_target, speed_up, band                       curves.py
    does it need a carefully tuned rate?          learning_rate_sensitivity                             curves.py
    do the changes help each other?               interactions                                          factorial.py
    so, is the claim right?                       decide, decide_all                                    verdict.py
    may I stop adding seeds now?                  confidence_sequence, decide_sequentially              sequential.py

A large p-value is not evidence of no difference: for that, name the margin that would matter and test equivalence.
"""

from llmlab.study.curves import (
    Band,
    LearningRateSensitivity,
    SpeedUp,
    StepsToTarget,
    band,
    learning_rate_sensitivity,
    speed_up,
    steps_to_target,
)
from llmlab.study.factorial import Effect, interactions
from llmlab.study.paired import (
    bca_interval,
    claim_p_values,
    equivalence,
    holm,
    mean_difference,
    paired_t,
    sign_flip,
    sign_flip_method,
    t_interval,
)
from llmlab.study.power import claim_power, minimum_detectable_effect, seeds_to_settle

__all__ = [
    "Band",
    "Effect",
    "LearningRateSensitivity",
    "SpeedUp",
    "StepsToTarget",
    "band",
    "bca_interval",
    "claim_p_values",
    "claim_power",
    "equivalence",
    "holm",
    "interactions",
    "learning_rate_sensitivity",
    "mean_difference",
    "minimum_detectable_effect",
    "paired_t",
    "seeds_to_settle",
    "sign_flip",
    "sign_flip_method",
    "speed_up",
    "steps_to_target",
    "t_interval",
]
