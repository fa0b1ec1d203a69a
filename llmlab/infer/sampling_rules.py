"""What a request may ask of sampling: one frozen value, checked when it is made.

What the numbers do is told in `llmlab.infer.sampling`, which turns the requests of a batch into arrays.
"""

import math
from dataclasses import dataclass

_COLDEST = 1e-6  # below, scores divided by the temperature leave float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one request are drawn; see `llmlab.infer.sampling` for what each number means."""

    temperature: float = 1.0
    """Divides the scores: 0 is greedy, below 1 sharper, above 1 flatter."""
    top_k: int | None = None
    """Draw among the k most probable tokens only."""
    top_p: float | None = None
    """Draw among the most probable tokens whose mass reaches p only."""
    min_p: float | None = None
    """Draw among tokens that are at least this many times as probable as the most probable one only."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of prompt and text less probable; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token that the new text has."""
    frequency_penalty: float = 0.0
    """Subtracted from the score of a token for each time that the new text has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its score."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that are never drawn."""
    forced_ids: tuple[int, ...] = ()
    """The new text begins with these tokens."""
    forced_last_id: int | None = None
    """The token at the last place that `max_new_tokens` leaves, if the text gets there."""
    seed: int = 0
    """Same seed, same text."""
    logprobs: int | None = None
    """Report log-probabilities: of the token, and of this many most probable ones; None for none."""

    def __post_init__(self) -> None:
        _check_distribution(self)
        _check_penalties(self)
        _check_tokens(self)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is not in 0 ... 2^64 - 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} is negative; 0 reports the token's own, None nothing")


def _check_distribution(sampling: Sampling) -> None:
    temperature, top_k, top_p, min_p = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not a number from 0 on; 0 is greedy, 1 the model's own")
    if 0 < temperature < _COLDEST:
        raise ValueError(f"temperature={temperature} is too small to divide by; use 0 (greedy), or {_COLDEST} and more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is not positive; 1 is greedy, leave it out for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]; 0.9 is usual, leave it out for all tokens")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} is not in [0, 1]; 0.05 to 0.1 is usual, leave it out for all tokens")


def _check_penalties(sampling: Sampling) -> None:
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(
            f"repetition_penalty={sampling.repetition_penalty} is not positive; 1 is off, 1.2 discourages repetition"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(value := getattr(sampling, name)):
            raise ValueError(f"{name}={value} is not a finite number; 0 is off, up to 2 is usual")


def _check_tokens(sampling: Sampling) -> None:
    biased = [index for index, _ in sampling.logit_bias]
    if len(set(biased)) < len(biased):
        twice = next(index for index in biased if biased.count(index) > 1)
        raise ValueError(f"logit_bias names token {twice} twice; give the sum once")
    for index, value in sampling.logit_bias:
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"logit_bias adds {value} to token {index}; give a finite number, or ban it with -inf")
    last = () if sampling.forced_last_id is None else (sampling.forced_last_id,)
    named = (*biased, *sampling.banned_ids, *sampling.forced_ids, *last)
    if negative := [index for index in named if not 0 <= index < 2**31]:
        raise ValueError(f"token {negative[0]} is not an id; ids run from 0 to the vocabulary's size less 1")


def check_vocabulary(sampling: Sampling, num_tokens: int) -> None:
    """Raises ValueError where a request names a token, or asks for more log-probabilities, than there are."""
    last = () if sampling.forced_last_id is None else (sampling.forced_last_id,)
    groups = {
        "logit_bias": tuple(index for index, _ in sampling.logit_bias),
        "banned_ids": sampling.banned_ids,
        "forced_ids": sampling.forced_ids,
        "forced_last_id": last,
    }
    for name, ids in groups.items():
        if beyond := [index for index in ids if index >= num_tokens]:
            raise ValueError(f"{name} names token {beyond[0]}; ids run from 0 to {num_tokens - 1}")
    if len(set(sampling.banned_ids)) >= num_tokens:
        raise ValueError(f"banned_ids names all {num_tokens} tokens; leave one to be drawn")
    if sampling.logprobs is not None and sampling.logprobs > num_tokens:
        raise ValueError(f"logprobs={sampling.logprobs} is more than the {num_tokens} tokens of the vocabulary")


GREEDY = Sampling(temperature=0)
"""The most probable token, always."""
