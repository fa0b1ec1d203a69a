"""The mesh: how many devices each kind of parallelism gets.

    axis       splits                                                       what travels
    data       rows of the batch over replicas of the model                 gradients, once a step
    fsdp       rows of the batch; the state of training with them           a layer's parameters and gradients
    expert     rows of the batch; experts of a mixture with them            tokens of the mixture, twice
    tensor     matrices by columns and rows, heads, the vocabulary          activations, four times a layer
    sequence   tokens of a row                                              keys and values, or heads, in each attention
    pipeline   layers                                                       activations between stages

The loss and the gradient do not depend on the mesh, only what they cost. Sizes multiply to the number of devices. The
order of the axes is that of the network: data crosses slices first, tensor and sequence stay among neighbours.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmlab.sharding.rules import DEFAULT_RULES, Context, Placement, Rules, ScheduleName

if TYPE_CHECKING:
    from collections.abc import Sequence


AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""Names of the mesh axes, slowest network first."""

Zero = Literal[1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices for each parallel axis; one of them may be -1, which takes the devices that are left."""

    data: int = -1
    """Replicas of the model, each seeing its own rows of the batch."""
    fsdp: int = 1
    """Like data, with the state of training split over it (see zero)."""
    tensor: int = 1
    """Matrices split by columns and rows."""
    sequence: int = 1
    """Activations split along the sequence."""
    expert: int = 1
    """Experts of a mixture spread out; its devices share the batch."""
    pipeline: int = 1
    """Layers spread out, and the vocabulary shared by all stages."""
    zero: Zero = 3
    """What fsdp splits (ZeRO): 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    context: Context = "ring"
    """How attention meets keys of other devices where the sequence is split: keys go around in a ring, or heads are
    exchanged for tokens (all_to_all; sequence must divide the query heads that tensor leaves to a device)."""
    schedule: ScheduleName = "1f1b"
    """Order of a pipeline's work: 1f1b keeps few activations, gpipe recomputes nothing unless execution.remat asks."""
    interleave: int = 1
    """Chunks of layers that a pipeline stage has: more chunks, a smaller bubble, more traffic."""
    slices: int = 1
    """Groups of devices that only a slow network joins (TPU slices); the data axis, else fsdp, is split over them."""
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Rows of the table from logical axis names to mesh axes that replace those of llmlab.sharding.DEFAULT_RULES."""

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if bad := {name: size for name, size in sizes.items() if size < 1 and size != -1}:
            raise ValueError(f"mesh sizes {bad} are not positive; use a count of devices, or -1 to fill")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh has -1 on several axes ({sizes}); only one axis can take what is left")
        if self.slices < 1:
            raise ValueError(f"mesh.slices={self.slices} is not positive; 1 is for devices of one fast network")
        if self.interleave < 1:
            raise ValueError(f"mesh.interleave={self.interleave} is not positive; 1 gives a stage one chunk of layers")
        if unknown := sorted({axis for axes in self.rules.values() for axis in axes} - set(AXES)):
            raise ValueError(f"mesh.rules names mesh axes {unknown} that there are not; use {', '.join(AXES)}")

    @property
    def table(self) -> Rules:
        """Logical axis name to mesh axes, the rows of `rules` in place of the default ones."""
        return {**DEFAULT_RULES, **self.rules}

    @property
    def num_devices(self) -> int | None:
        """Devices that the sizes ask for; None where an axis takes what is left."""
        sizes = self.sizes().values()
        return None if -1 in sizes else math.prod(sizes)

    def sizes(self) -> dict[str, int]:
        """Axis name to size as written, -1 included."""
        return {name: getattr(self, name) for name in AXES}

    def resolve(self, num_devices: int) -> dict[str, int]:
        """Axis name to size on this many devices, -1 filled in.

        Raises:
            ValueError: the axes do not multiply to `num_devices`; the message says what would.
        """
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        fill = next((name for name, size in sizes.items() if size == -1), None)
        if fill is None:
            if fixed != num_devices:
                shape = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1"
                raise ValueError(
                    f"mesh {shape} needs {fixed} devices and there are {num_devices}; "
                    f"set one axis to -1 to fill, or choose sizes whose product is {num_devices}"
                )
            return sizes
        if num_devices % fixed:
            divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
            raise ValueError(
                f"{num_devices} devices cannot be split over mesh axes of product {fixed}; "
                f"the product of the axes other than {fill} must be one of {divisors}"
            )
        return {**sizes, fill: num_devices // fixed}

    def build(self, devices: "Sequence[Any] | None" = None) -> Placement:
        """The jax mesh over `devices` (default: all), every axis in Auto mode, with the rules.

        Raises:
            ValueError: the sizes do not fit the devices, or the slices do not fit data and fsdp.
        """
        import jax

        devices = jax.devices() if devices is None else devices
        sizes = self.resolve(len(devices))
        mesh = jax.sharding.Mesh(
            arranged(sizes, devices, self._shared_out(sizes)),
            tuple(sizes),
            # Auto: the compiler places collectives from our constraints; Explicit would put shardings in types.
            axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        )
        return Placement(
            mesh, self.table, zero=self.zero, context=self.context, schedule=self.schedule, interleave=self.interleave
        )

    def _shared_out(self, sizes: dict[str, int]) -> dict[str, int]:
        """How many slices each axis crosses: data as many as it can, fsdp the rest."""
        crossed, left = dict.fromkeys(sizes, 1), self.slices
        for name in ("data", "fsdp"):
            crossed[name] = math.gcd(left, sizes[name])
            left //= crossed[name]
        if left > 1:
            raise ValueError(
                f"mesh.slices={self.slices} cannot be shared out over data={sizes['data']} and fsdp={sizes['fsdp']}; "
                f"their product must be a multiple of {self.slices}"
            )
        return crossed


def arranged(sizes: dict[str, int], devices: "Sequence[Any]", crossed: dict[str, int]) -> np.ndarray:
    """The devices in the shape of the mesh: neighbours on the fast network along the last axes.

    Args:
        sizes: axis name to size.
        devices: as many as the sizes multiply to.
        crossed: axis name to the number of slices that it crosses; inside a slice it is `size / crossed`. Devices that
            name no slice (CPUs, GPUs) are taken in order.
    """
    from jax.experimental import mesh_utils

    inside = tuple(sizes[name] // crossed[name] for name in sizes)
    across = tuple(crossed.values())
    if math.prod(across) == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    if any(getattr(device, "slice_index", None) is not None for device in devices):
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    blocks = np.asarray(devices).reshape(*across, *inside)
    paired = [axis for pair in zip(range(len(sizes)), range(len(sizes), 2 * len(sizes)), strict=True) for axis in pair]
    return blocks.transpose(paired).reshape(tuple(sizes.values()))
