"""Mixture of experts: a feed-forward of many MLPs, of which a token meets only a few (Shazeer et al. 2017, 1701.06538).

    x --+-- router -- which experts, with what weight --------+
        |                                                     |
        +-- sorted by expert -- MLP_1 ... MLP_E -- back again -(x)-- y = sum over the chosen e of g_e MLP_e(x)

Parameters grow with E, time with k: E MLPs are stored, k are computed for a token, so a model can know more at equal
FLOPs. The price: memory for all parameters; experts that get few tokens run matmuls of few rows; and training must see
to it that they are all used (see routing.py). The router costs 2 D E FLOPs a token.

Shared experts (DeepSeekMoE, Dai et al. 2024, 2401.06066) see every token, so that the others need not all learn what
every token needs. The router's z-loss (ST-MoE, Zoph et al. 2022, 2202.08906, equation 5) is the mean of
(log sum exp of the logits)^2: it keeps logits small, where rounding is fine. Jitter (Switch) multiplies the router's
input by uniform noise in [1 - jitter, 1 + jitter] in training, to try experts that are nearly chosen.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Context, FeedForward
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, split_key
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.moe.experts import Experts
from llmlab.nn.moe.routing import Router, TopK
from llmlab.nn.mup import MuP
from llmlab.sharding import shard
from llmlab.sharding.rules import active_placement


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(FeedForward):
    """Many MLPs, each token sent to a few."""

    num_experts: int
    """How many there are."""
    experts_per_token: int
    """How many see a token; with ExpertChoice, in the mean."""
    expert: FeedForward
    """One of them: MLP or GatedMLP."""
    router: Router = TopK()
    """Which experts see which token."""
    shared: FeedForward | None = None
    """A feed-forward beside them that sees every token; None for none."""
    z_loss: float = 0.0
    """Weight of the router's z-loss, summed over the layers; 0.001 in ST-MoE."""
    jitter: float = 0.0
    """Noise on the router's input in training; 0.01 in Switch."""
    router_scale: float = 1.0
    """Factor on the router's logits, whose matrix starts larger by its inverse root: muP's 1 / width."""

    def __post_init__(self) -> None:
        if not isinstance(self.expert, MLP | GatedMLP):
            raise ValueError(f"expert={self.expert} cannot be stacked; use MLP or GatedMLP")
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is not from 1 to num_experts={self.num_experts}"
            )
        check_rate("jitter", self.jitter)
        if not self.router_scale > 0:
            raise ValueError(f"router_scale={self.router_scale} is not positive; 1.0 leaves the router's logits alone")

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "MixtureOfExpertsLayer":
        return MixtureOfExpertsLayer(self, dim, rngs=rngs, depth=depth)

    def under_mup(self, mup: MuP, dim: int) -> "MixtureOfExperts":
        # From embed to a fixed number of experts: an output matrix.
        shared = None if self.shared is None else self.shared.under_mup(mup, dim)
        return dataclasses.replace(self, router_scale=self.router_scale / mup.width_ratio(dim), shared=shared)

    def losses(self, auxiliary: Auxiliary) -> dict[str, Float[Array, ""]]:
        losses = self.router.losses(auxiliary)
        if self.z_loss > 0.0:
            mean_L = auxiliary["router_z"] / jnp.maximum(auxiliary["router_tokens"], 1.0)
            losses["router_z"] = self.z_loss * jnp.sum(mean_L)
        return losses

    def idle_parameters(self, dim: int) -> int:
        assert isinstance(self.expert, MLP | GatedMLP)
        matrices = 3 if isinstance(self.expert, GatedMLP) else 2
        return (self.num_experts - self.experts_per_token) * matrices * dim * self.expert.hidden_dim


class MixtureOfExpertsLayer(nnx.Module):
    """See MixtureOfExperts."""

    def __init__(self, config: MixtureOfExperts, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        assert isinstance(config.expert, MLP | GatedMLP)
        self.config = config
        gain = 1 / math.sqrt(config.router_scale)
        self.router = Dense((("embed", dim),), (("router", config.num_experts),), bias=False, rngs=rngs, gain=gain)
        self.experts = Experts(config.expert, config.num_experts, dim, rngs=rngs, depth=depth)
        self.shared = config.shared.build(dim, rngs=rngs, depth=depth) if config.shared is not None else None

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context | None = None, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B S D"], Auxiliary]:
        _check_division(self.config.num_experts)
        key_jitter, key_experts, key_shared = split_key(key, 3)
        valid_BS = None if context is None else context.valid
        if valid_BS is None:
            valid_BS = jnp.ones(x_BSD.shape[:2], bool)
        logits_BSE = self.logits(x_BSD, key_jitter)
        assignment, report = self.config.router.route(logits_BSE, self.config.experts_per_token, valid_BS)
        y_BSD = assignment.apply(self.experts, x_BSD, key_experts)
        auxiliary = report | {
            "router_tokens": jnp.sum(valid_BS, dtype=jnp.float32),
            "router_z": jnp.sum(jnp.square(jax.nn.logsumexp(logits_BSE, axis=-1)) * valid_BS),
        }
        if self.shared is not None:
            shared_BSD, more = self.shared(x_BSD, context, key_shared)
            y_BSD, auxiliary = y_BSD + shared_BSD, auxiliary | more
        return y_BSD, auxiliary

    def logits(self, x_BSD: Float[Array, "B S D"], key: jax.Array | None = None) -> Float[Array, "B S E"]:
        """The router's, in float32: what decides between experts must not be rounded to bfloat16 (Switch, 2.4)."""
        x_BSD = x_BSD.astype(jnp.float32)
        if key is not None and self.config.jitter > 0.0:
            jitter = self.config.jitter
            x_BSD = x_BSD * jax.random.uniform(key, x_BSD.shape, jnp.float32, 1.0 - jitter, 1.0 + jitter)
        kernel_DE = self.router.kernel[...].astype(jnp.float32)
        if self.config.router_scale != 1.0:
            x_BSD = x_BSD * self.config.router_scale
        return shard(jnp.einsum("bsd,de->bse", x_BSD, kernel_DE), "batch", "sequence", None)


def _check_division(num_experts: int) -> None:
    """Raise ValueError unless every device of the active mesh can own as many experts."""
    placement = active_placement()
    if placement is None:
        return
    axes = tuple(axis for axis in placement.rules.get("experts", ()) if placement.sizes[axis] > 1)
    parts = math.prod(placement.sizes[axis] for axis in axes)
    if num_experts % parts:
        divisors = ", ".join(str(d) for d in range(1, num_experts + 1) if num_experts % d == 0)
        raise ValueError(
            f"num_experts={num_experts} is not divisible by the {parts} devices of mesh axis {' x '.join(axes)}; use "
            f"{divisors} devices, or {parts * max(1, num_experts // parts)} or {parts * (num_experts // parts + 1)} "
            "experts"
        )
