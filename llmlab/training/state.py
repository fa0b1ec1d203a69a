"""The state of a training run: everything that changes from one step to the next, as one tree of arrays.

Parameters and optimizer state are float32 whatever the precision of the arithmetic: at a learning rate of 1e-4 most
updates are smaller than bfloat16's spacing (1/128 of a weight), and would round to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llmlab.nn.module import Axes, Params
from llmlab.optim.transformation import state_axes
from llmlab.sharding import Placement
from llmlab.sharding.memory import HOST, check_host_memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, 1710.03740, section 3.2).

    Gradients below 6e-8 are zero in float16, so the loss is multiplied by `scale` and the gradients divided by it. A
    step whose gradients are not finite is skipped and halves the scale; GROWTH_INTERVAL good steps in a row double it.
    """

    scale: Float[Array, ""]
    """Factor on the loss."""
    good_steps: Int[Array, ""]
    """Finite steps since the scale last changed."""

    INITIAL = 2.0**15
    MINIMUM = 1.0
    GROWTH_INTERVAL = 2000

    @classmethod
    def initial(cls) -> "LossScale":
        """The scale that a run starts with."""
        return cls(scale=jnp.asarray(cls.INITIAL, jnp.float32), good_steps=jnp.zeros((), jnp.int32))

    def after(self, finite: jax.Array) -> "LossScale":
        """The scale after a step whose gradients were finite, or were not."""
        grow = finite & (self.good_steps + 1 >= self.GROWTH_INTERVAL)
        grown = jnp.where(grow, 2 * self.scale, self.scale)
        return LossScale(
            scale=jnp.where(finite, grown, jnp.maximum(self.scale / 2, self.MINIMUM)),
            good_steps=jnp.where(finite & ~grow, self.good_steps + 1, 0),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step takes and returns."""

    step: Int[Array, ""]
    """Steps done."""
    params: Params
    """Float32 parameters."""
    optimizer_state: Any
    """The optimizer's own, e.g. moments."""
    ema: Params | None
    """Exponential moving average of the parameters, where one is kept."""
    loss_scale: LossScale | None
    """Loss scaling, in float16 only."""


def new_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    precision: str = "float32",
    loss_scaling: str = "dynamic",
    ema: bool = False,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Copies: two names for one buffer (the same zero, the parameters) cannot both be donated to a step.
        optimizer_state=jax.tree.map(jnp.copy, optimizer.init(params)),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        loss_scale=LossScale.initial() if precision == "float16" and loss_scaling == "dynamic" else None,
    )


def make_initialise(
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    *,
    precision: str = "float32",
    loss_scaling: str = "dynamic",
    ema: bool = False,
    layout: TrainState | None = None,
) -> Callable[[jax.Array], TrainState]:
    """The jitted way from a key to the state before the first step, computed where it will live: no device ever holds
    more than its share. The same key gives the same numbers on every layout.

    Args:
        init_params: key to freshly drawn parameters.
        optimizer: its state is initialised too.
        precision: "float16" adds loss scaling,
        loss_scaling: unless this is "none".
        ema: whether to keep an average of the parameters.
        layout: shardings of every array, from `Layout.of`; None for the default device.
    """

    def init(key: jax.Array) -> TrainState:
        return new_state(init_params(key), optimizer, precision=precision, loss_scaling=loss_scaling, ema=ema)

    # The key is an argument: of a constant the compiler would try to draw the weights itself.
    return jax.jit(init, out_shardings=layout)


def initialise(
    init_params: Callable[[jax.Array], Params], optimizer: optax.GradientTransformation, *, seed: int, **settings: Any
) -> TrainState:
    """The state before the first step of a seed; other arguments as for `make_initialise`."""
    return make_initialise(init_params, optimizer, **settings)(jax.random.key(seed))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every array of training lives; the leaves are NamedShardings."""

    state: TrainState
    """Between steps."""
    gradients: Any
    """The sum over the batch."""
    update: Any
    """Parameters and gradients while the optimizer works: as its state is."""
    axes: Axes
    """Logical names of the parameters' dimensions."""
    optimizer: Any = None
    """The optimizer's state while it works, in the devices' own memory, where it is not there between steps."""

    @classmethod
    def of(cls, state: TrainState, axes: Axes, placement: Placement, *, offload_optimizer: bool = False) -> "Layout":
        """By the logical names of dimensions.

        Args:
            state: arrays or shapes.
            axes: tuple of logical axis names for every parameter.
            placement: devices, rules, and what ZeRO splits.
            offload_optimizer: the optimizer's state is in the host's memory between steps.

        Raises:
            ValueError: the devices do not reach the host's memory.
        """
        replicated = NamedSharding(placement.mesh, PartitionSpec())
        params = placement.of_params.shardings(axes, state.params)
        update = placement.shardings(axes, state.params)
        optimizer_axes = state_axes(state.optimizer_state, axes)
        optimizer = placement.shardings(optimizer_axes, state.optimizer_state)
        between, working = optimizer, None
        if offload_optimizer:
            check_host_memory(placement.mesh.devices.flat, "train.offload_optimizer")
            working = optimizer
            # Counters stay: they are a few bytes, and decide things.
            between = jax.tree.map(
                lambda x, s: s.with_memory_kind(HOST) if x.ndim else s, state.optimizer_state, optimizer
            )
        where: dict[str, Any] = {
            "step": replicated,
            "params": params,
            "optimizer_state": between,
            "ema": None if state.ema is None else update,
            "loss_scale": jax.tree.map(lambda _: replicated, state.loss_scale),
        }
        gradients = placement.of_gradients.shardings(axes, state.params)
        return cls(state=TrainState(**where), gradients=gradients, update=update, axes=axes, optimizer=working)


def abstract(state: TrainState, layout: TrainState | None) -> TrainState:
    """Shapes, types and shardings of a state, which compilation and restoring want without its arrays."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    if layout is None:
        return shapes
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
