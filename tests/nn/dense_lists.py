"""Attention over lists of keys in NumPy and float64: the whole matrix, with how often each query lists each key.

Independent of llmlab's kernels: no blocks, no running sums, the gradient from the equations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Dense:
    """softmax over listed keys, counted as often as listed; forward and backward. Arrays are (B, S, N, H)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    times: np.ndarray
    """How often each query lists each key, (B, N, S, T); with dropout's factor in `factor`."""
    scale: float
    factor: np.ndarray | float = 1.0

    def forward(self) -> np.ndarray:
        """Outputs; zeros for a query without keys."""
        group = self.q.shape[2] // self.k.shape[2]
        self.k_full, self.v_full = (np.repeat(x, group, axis=2) for x in (self.k, self.v))
        logits = np.einsum("BSNH,BTNH->BNST", self.q, self.k_full) * self.scale
        highest = np.max(np.where(self.times > 0, logits, -np.inf), axis=-1, keepdims=True)
        powers = self.times * np.exp(np.where(self.times > 0, logits - np.where(np.isfinite(highest), highest, 0), 0))
        mass = powers.sum(-1, keepdims=True)
        self.weights = powers / np.where(mass == 0, 1, mass)
        return np.einsum("BNST,BTNH->BSNH", self.weights * self.factor, self.v_full)

    def backward(self, do: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of q, k and v."""
        dweights = np.einsum("BSNH,BTNH->BNST", do, self.v_full) * self.factor
        dlogits = self.weights * (dweights - np.sum(self.weights * dweights, axis=-1, keepdims=True)) * self.scale
        dk = np.einsum("BNST,BSNH->BTNH", dlogits, self.q)
        dv = np.einsum("BNST,BSNH->BTNH", self.weights * self.factor, do)
        groups = (*self.k.shape[:3], -1, self.k.shape[3])
        dk, dv = (x.reshape(*groups[:2], groups[2], -1, groups[4]).sum(3) for x in (dk, dv))
        return np.einsum("BNST,BTNH->BSNH", dlogits, self.k_full), dk, dv


def projected(x: np.ndarray, p: Any, names: tuple[str, ...], times: np.ndarray, factor: Any = 1.0) -> Dense:
    """Attention with the queries, keys and values that these parameters make of x, scaled by 1/sqrt(H)."""
    q, k, v = (project(x, p[name]) for name in names)
    return Dense(q, k, v, times, q.shape[-1] ** -0.5, factor)


def project(x: np.ndarray, dense: Any) -> np.ndarray:
    """x W + b of a Dense layer's parameters, over its last dimension."""
    return np.tensordot(x, dense["kernel"], axes=1) + dense.get("bias", 0.0)


def project_back(x: np.ndarray, dense: Any, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of x and of the layer's parameters."""
    names = {"kernel": np.einsum("BSD,BSNH->DNH", x, dy), "bias": dy.sum((0, 1))}
    return np.einsum("BSNH,DNH->BSD", dy, dense["kernel"]), {name: names[name] for name in dense}
