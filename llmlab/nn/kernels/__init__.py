"""Attention kernels behind one call; each equals `reference`."""

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.dispatch import Kernel, attention, choose, lacks
from llmlab.nn.kernels.scoring import Scoring

__all__ = ["Bias", "Kernel", "Scoring", "attention", "choose", "lacks"]
