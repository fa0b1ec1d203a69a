"""Routers: which experts see which token, with what weight.

    scores   p = softmax(W x) over the experts, or sigmoid(W x) of each

    TopK          every token takes the k experts that it scores highest (Shazeer et al. 2017, 1701.06538), weighted
                    p_e                     renormalise=False; with k=1 Switch (Fedus et al. 2021, 2101.03961)
                    p_e / sum chosen p      renormalise=True; GShard (Lepikhin et al. 2020, 2006.16668), and Mixtral:
                                            a softmax over the chosen logits alone is the same number
                    the same, of sigmoids   DeepSeek-V3 (2412.19437)
    ExpertChoice  every expert takes the tokens of a row that score it highest (Zhou et al. 2022, 2202.09368)

Top-k lets popular experts starve the others, so training adds a loss that is least, k, when all are used alike, with
f_e the mean number of choices of expert e per token and P_e its mean score:

    balance = E sum_e f_e P_e                                               Switch, equation 4

With a capacity every expert has the same number of places for a row's tokens and what finds none is dropped: shapes
are static and no expert can hold up the others, at the price of tokens that only the residual stream carries. Without,
nothing is dropped. Expert choice is balanced by construction, but a token may get no expert or many, and the choice
sees the whole row: it is for encoders, not for causal language models.

Capacities are those of a row of the batch (GShard's group), so that a result depends neither on the rows beside it nor
on the devices that share the batch. Padding takes no place and counts in no statistic.

Shapes: B batch, S sequence, E experts, K experts per token, C places of an expert for a row.
"""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.config import Auxiliary
from llmlab.nn.moe.dispatch import Assignment, Dropless, Picks, Places, place
from llmlab.sharding.rules import active_placement

Routed = tuple[Assignment, Auxiliary]


@dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
    """Decides which expert sees which token."""

    @abc.abstractmethod
    def route(self, logits_BSE: Float[Array, "B S E"], experts_per_token: int, valid_BS: Bool[Array, "B S"]) -> Routed:
        """The assignment, and statistics as sums over the real tokens of the batch."""

    def losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        """Weighted losses from the statistics of all layers."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """Loss that is least when all experts are used alike."""

    weight: float = 0.01
    """Factor on it."""
    over: Literal["layer", "model"] = "layer"
    """E sum f P of every layer, summed over the layers (Switch), or once from the means over all layers' tokens
    (transformers' Mixtral)."""

    def __call__(self, auxiliary: Auxiliary) -> Float[Array, ""]:
        """The weighted loss, from the statistics of all layers."""
        assigned_LE, score_LE = auxiliary["router_assigned"], auxiliary["router_score"]
        tokens_L1 = auxiliary["router_tokens"][:, None]
        if self.over == "model":
            assigned_LE, score_LE, tokens_L1 = (
                jnp.sum(statistic, axis=0, keepdims=True) for statistic in (assigned_LE, score_LE, tokens_L1)
            )
        tokens_L1 = jnp.maximum(tokens_L1, 1.0)
        product_LE = (assigned_LE / tokens_L1) * (score_LE / tokens_L1)
        return self.weight * assigned_LE.shape[1] * jnp.sum(product_LE)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Places of an expert for a row's tokens; what finds none is dropped."""

    factor: float = 1.25
    """Places per expert over those that even use would need, rounded up."""
    priority: Literal["position", "probability"] = "position"
    """Who comes first, among first choices and then among second ones: earlier tokens (Switch, GShard), or those that
    are surest of their first choice (batch prioritized routing, Riquelme et al. 2021, 2106.05974). The latter looks
    ahead in the row."""

    def __post_init__(self) -> None:
        if not self.factor > 0.0:
            raise ValueError(f"factor={self.factor} leaves no places; 1.0 is what even use needs, 1.25 is usual")

    def assign(
        self,
        expert_BSK: Int[Array, "B S K"],
        weight_BSK: Float[Array, "B S K"],
        num_experts: int,
        sureness_BS: Float[Array, "B S"],
        valid_BS: Bool[Array, "B S"],
    ) -> Places:
        """The choices that find a place."""
        _, length, k = expert_BSK.shape
        limits = _limits(self.factor * k / num_experts, length)
        limit_B = jnp.asarray(limits)[jnp.sum(valid_BS, axis=1)]
        order_BS = jnp.broadcast_to(jnp.arange(length), valid_BS.shape)
        if self.priority == "probability":
            order_BS = jnp.argsort(-sureness_BS, axis=1, stable=True)
        fill = partial(place, num_experts=num_experts, num_places=int(limits[-1]))
        choice_BEC, place_BSK = jax.vmap(fill)(expert_BSK, order_BS, limit_B)
        return Places(choice_BEC, place_BSK, weight_BSK)


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Every token takes the experts that it scores highest."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits."""
    renormalise: bool = True
    """Whether a token's weights are divided by their sum. With one expert per token they are then 1 and teach the
    router nothing but balance."""
    capacity: Capacity | None = None
    """None drops nothing."""
    balance: LoadBalance | None = LoadBalance()
    """Loss for even use; None for none."""

    def route(self, logits_BSE: Float[Array, "B S E"], experts_per_token: int, valid_BS: Bool[Array, "B S"]) -> Routed:
        num_experts = logits_BSE.shape[-1]
        score_BSE = jax.nn.softmax(logits_BSE) if self.score == "softmax" else jax.nn.sigmoid(logits_BSE)
        gate_BSK, expert_BSK = _top_k(score_BSE, experts_per_token, "batch", "sequence")
        expert_BSK = jnp.where(valid_BS[..., None], expert_BSK, num_experts)  # padding: none
        score_BSE = score_BSE / jnp.sum(score_BSE, axis=-1, keepdims=True)
        report = {
            "router_assigned": jnp.sum(expert_BSK[..., None] == jnp.arange(num_experts), (0, 1, 2), jnp.float32),
            "router_score": jnp.sum(score_BSE * valid_BS[..., None], axis=(0, 1)),
            "router_dropped": jnp.zeros(()),
        }
        weight_BSK = gate_BSK / jnp.sum(gate_BSK, axis=-1, keepdims=True) if self.renormalise else gate_BSK
        if self.capacity is None:
            return Dropless(expert_BSK, weight_BSK), report
        assignment = self.capacity.assign(expert_BSK, weight_BSK, num_experts, gate_BSK[..., 0], valid_BS)
        kept = jnp.sum(assignment.choice_BEC < expert_BSK[0].size, dtype=jnp.float32)
        report["router_dropped"] = jnp.sum(report["router_assigned"]) - kept
        return assignment, report

    def losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        return {} if self.balance is None else {"load_balance": self.balance(auxiliary)}


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Every expert takes the tokens of a row that score it highest, as many as give each token `experts_per_token` in
    the mean; weights are the softmax over the experts."""

    def route(self, logits_BSE: Float[Array, "B S E"], experts_per_token: int, valid_BS: Bool[Array, "B S"]) -> Routed:
        _, length, num_experts = logits_BSE.shape
        limits = _limits(experts_per_token / num_experts, length)
        score_BSE = jnp.where(valid_BS[..., None], jax.nn.softmax(logits_BSE), -1.0)
        gate_BEC, token_BEC = _top_k(score_BSE.swapaxes(1, 2), int(limits[-1]), "batch", None)
        taken_BEC = jnp.arange(limits[-1]) < jnp.asarray(limits)[jnp.sum(valid_BS, axis=1)][:, None, None]
        token_BEC = jnp.where(taken_BEC, token_BEC, length)
        chosen_BS = jnp.any(token_BEC[..., None] == jnp.arange(length), axis=(1, 2))
        return Picks(token_BEC, jnp.where(taken_BEC, gate_BEC, 0.0)), {
            "router_assigned": jnp.sum(taken_BEC * jnp.ones((num_experts, 1)), axis=(0, 2)),
            "router_score": jnp.sum(jnp.maximum(score_BSE, 0.0), axis=(0, 1)),
            "router_dropped": jnp.sum(valid_BS & ~chosen_BS, dtype=jnp.float32),
        }


def _top_k(
    score_BNM: Float[Array, "B N M"], k: int, *names: str | None
) -> tuple[Float[Array, "B N K"], Int[Array, "B N K"]]:
    """The k largest of the last dimension and their places, by each device of its own; the others' names are given.

    XLA would gather the scores of all devices on each.
    """
    placement = active_placement()
    if placement is None:
        largest, place = jax.lax.top_k(score_BNM, k)
        return largest, place
    own = placement.spec((*names, None), score_BNM.shape)
    places = placement.shard_map(lambda x: jax.lax.top_k(x, k)[1], in_specs=(own,), out_specs=own)
    place = places(jax.lax.stop_gradient(score_BNM))
    return jnp.take_along_axis(score_BNM, place, axis=-1), place


def _limits(share: float, length: int) -> np.ndarray:
    """Places of an expert in a row of 0, 1, ... `length` real tokens: that share of them, rounded up.

    A table, so that a row with padding gives as many as the row without, to the last one.
    """
    exact = share * np.arange(length + 1)
    return np.minimum(np.ceil(exact - 1e-9), np.arange(length + 1)).astype(np.int32)
