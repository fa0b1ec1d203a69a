"""Random numbers of one row: a function of (seed, split, row number) and nothing else.

What is drawn for a row does not depend on the batch, the host or the run it is in, so a run on other hosts, or one
that is resumed, sees the same corruption of the same row.

Everything is made of Philox's 64-bit outputs (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
numpy promises that stream for all its versions, unlike the distributions of its Generator.
"""

import math

import numpy as np
from jaxtyping import Float64, Int64


class Draws:
    """The random numbers of a key, one after the other."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def uniform(self, count: int) -> Float64[np.ndarray, " count"]:
        """Numbers in [0, 1), multiples of 2^-53."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> Int64[np.ndarray, " count"]:
        """Integers in [0, limit), equally likely up to limit * 2^-53."""
        return (self.uniform(count) * limit).astype(np.int64)

    def one_below(self, limit: int) -> int:
        """One integer in [0, limit)."""
        return int(self.below(limit, 1)[0])

    def one(self) -> float:
        """One number in [0, 1)."""
        return float(self.uniform(1)[0])

    def permutation(self, length: int) -> Int64[np.ndarray, " length"]:
        """range(length) in a random order."""
        return np.argsort(self._bits.random_raw(length), kind="stable").astype(np.int64)

    def geometric(self, p: float, count: int) -> Int64[np.ndarray, " count"]:
        """Numbers of trials up to the first success of probability p: 1, 2, ..."""
        if p >= 1:
            return np.ones(count, np.int64)
        return 1 + np.floor(np.log1p(-self.uniform(count)) / math.log1p(-p)).astype(np.int64)

    def poisson(self, mean: float, count: int) -> Int64[np.ndarray, " count"]:
        """Poisson counts, by inversion of their distribution function."""
        last = int(mean + 12 * math.sqrt(mean) + 20)  # beyond it lies less than 2^-53
        terms = [-mean + k * math.log(mean) - math.lgamma(k + 1) for k in range(last)]
        return np.searchsorted(np.cumsum(np.exp(terms)), self.uniform(count), side="right").astype(np.int64)
