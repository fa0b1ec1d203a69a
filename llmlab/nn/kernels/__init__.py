"""Attention kernels behind one call; each equals `reference`."""

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.dispatch import Kernel, attention

__all__ = ["Bias", "Kernel", "attention"]
