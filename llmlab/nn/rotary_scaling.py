"""Stretching rotary positions beyond the length a model was trained at, by changing their frequencies.

Pair i of D/2 turns by the angle position * theta^(-2i/D): a wavelength of 2 pi theta^(2i/D) positions. At positions
beyond the training length, pairs of long wavelength show angles never seen in training. The remedies, from a stretch
factor s:

    Linear   positions / s: all pairs slow down alike; nearby tokens become hard to tell apart     (Chen et al. 2023,
             2306.15595)
    NTK      theta grows so that the slowest pair slows down by s and the fastest keeps its speed  (bloc97, 2023;
             2309.00071, section 3.1); dynamically, s grows with the sequence at hand    (emozilla, 2023)
    YaRN     fast pairs stay, slow pairs slow down by s, a ramp between; logits are scaled up      (Peng et al. 2023,
             2309.00071)
    Llama3   as YaRN with another ramp and unscaled logits                                         (Llama 3 team 2024,
             2407.21783, and its released code)

Frequencies are computed once, in float64, when a model is traced.
"""

import abc
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_frequencies(theta: float, dim: int) -> np.ndarray:
    """Radians per position of each of dim/2 pairs, unscaled, float64 (Su et al. 2021, 2104.09864, equation 15)."""
    return theta ** -(np.arange(0, dim, 2) / dim)


@dataclass(frozen=True)
class RotaryScaling(abc.ABC):
    """A change of the rotary frequencies."""

    def __post_init__(self) -> None:
        for name, least in (("factor", 1.0), ("original_max_length", 1)):
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} of {type(self).__name__} is below {least}; 1 or more stretches")

    @abc.abstractmethod
    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        """Radians per position of each of dim/2 pairs, float64."""

    def frequencies_at(self, theta: float, dim: int, position_ids_BS: Int[Array, "B S"]) -> Float[Array, "#B 1 P"]:
        """Frequencies for these positions, float32; B is 1 for a scaling that does not look at them."""
        return jnp.asarray(self.frequencies(theta, dim)[None, None], jnp.float32)

    @property
    def amplitude(self) -> float:
        """Factor on the rotated queries and keys, hence its square on the logits."""
        return 1.0


@dataclass(frozen=True)
class Linear(RotaryScaling):
    """Positions are divided by the factor (position interpolation, Chen et al. 2023, 2306.15595, equation 3)."""

    factor: float
    """How much longer sequences become."""

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        return rotary_frequencies(theta, dim) / self.factor


@dataclass(frozen=True)
class NTK(RotaryScaling):
    """theta * factor^(D/(D-2)) instead of theta: "NTK-aware" interpolation (2309.00071, equation 16).

    The factor is fixed. `DynamicNTK` takes it from the length of the sequence at hand.
    """

    factor: float
    """How much the slowest pair slows down."""

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        if dim <= 2:
            raise ValueError(f"NTK scaling needs more than one rotated pair per head, not {dim} dimensions")
        return rotary_frequencies(theta * self.factor ** (dim / (dim - 2)), dim)


@dataclass(frozen=True)
class DynamicNTK(RotaryScaling):
    """NTK with the factor f L / L0 - (f - 1), where L is the length of the sequence at hand and L0 the original one.

    Up to L0 nothing changes. Beyond, a row's length is its largest position + 1, so a prefix's output depends on how
    much follows, and keys cached at a shorter length keep the frequencies of that length (as in transformers, which
    takes the longest row of the batch for all).
    """

    factor: float
    """How fast the slowest pair slows down with the length."""
    original_max_length: int
    """Length the model was trained at."""

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        if dim <= 2:
            raise ValueError(f"NTK scaling needs more than one rotated pair per head, not {dim} dimensions")
        return rotary_frequencies(theta, dim)

    def frequencies_at(self, theta: float, dim: int, position_ids_BS: Int[Array, "B S"]) -> Float[Array, "#B 1 P"]:
        length_B = jnp.maximum(jnp.max(position_ids_BS, axis=1) + 1, self.original_max_length)
        stretch_B = self.factor * (length_B / self.original_max_length) - (self.factor - 1.0)
        # (theta s^(D/(D-2)))^(-2i/D) = theta^(-2i/D) s^(-2i/(D-2)): only the second factor depends on the length
        exponents = -np.arange(0, dim, 2) / (dim - 2)
        slowed = stretch_B[:, None, None] ** jnp.asarray(exponents, jnp.float32)
        return jnp.asarray(self.frequencies(theta, dim), jnp.float32) * slowed


@dataclass(frozen=True)
class YaRN(RotaryScaling):
    """Slow pairs are interpolated, fast ones are not, and attention is sharpened (Peng et al. 2023, 2309.00071).

    The ramp is linear in the number of the pair, from the pair that turns beta_fast times within the original length
    to the one that turns beta_slow times, as in the authors' code and in released models (the paper writes it linear
    in the number of turns).
    """

    factor: float
    """How much longer sequences become."""
    original_max_length: int
    """Length the model was trained at."""
    beta_fast: float = 32.0
    """Pairs that turn at least this often within the original length keep their frequency."""
    beta_slow: float = 1.0
    """Pairs that turn at most this often are slowed down by the factor."""
    attention_factor: float | None = None
    """Factor on rotated queries and keys; None for 0.1 ln(factor) + 1 (section 3.4) or the ratio of the next two."""
    mscale: float | None = None
    """DeepSeek's numerator: 0.1 mscale ln(factor) + 1."""
    mscale_all_dim: float | None = None
    """DeepSeek's denominator: 0.1 mscale_all_dim ln(factor) + 1."""
    truncate: bool = True
    """Whether the ramp starts and ends at whole pairs."""

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        low, high = (self._pair(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001  # a ramp of no width is a step
        slowed = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
        plain = rotary_frequencies(theta, dim)
        return plain * (1.0 - slowed) + plain / self.factor * slowed

    @property
    def amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._sharpening(self.mscale) / self._sharpening(self.mscale_all_dim)
        return self._sharpening(1.0)

    def _sharpening(self, weight: float) -> float:
        return 1.0 if self.factor <= 1.0 else 0.1 * weight * math.log(self.factor) + 1.0

    def _pair(self, turns: float, theta: float, dim: int) -> float:
        """The (fractional) pair that turns this often within the original length."""
        return dim * math.log(self.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Llama3(RotaryScaling):
    """Llama 3.1's scaling: by wavelength, against the original length L.

    Wavelengths below L/high_frequency_factor stay, above L/low_frequency_factor are stretched by the factor, and in
    between the frequency is mixed linearly in the number of turns within L.
    """

    factor: float = 8.0
    """How much slower the slow pairs turn."""
    low_frequency_factor: float = 1.0
    """Turns within the original length up to which a pair is slow."""
    high_frequency_factor: float = 4.0
    """Turns within the original length from which a pair is fast."""
    original_max_length: int = 8192
    """Length the model was trained at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor={self.low_frequency_factor} is not below "
                f"high_frequency_factor={self.high_frequency_factor}; Llama 3.1 has 1 and 4"
            )

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        plain = rotary_frequencies(theta, dim)
        turns = self.original_max_length * plain / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return plain * kept + plain / self.factor * (1.0 - kept)
