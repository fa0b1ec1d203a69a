"""The mesh: how many devices each kind of parallelism gets.

data      replicas of the model, each with its own rows of the batch
fsdp      like data, but parameters, gradients and optimizer state are split over it (ZeRO-3)
tensor    matrices split by columns and rows
sequence  activations split along the sequence
expert    experts of a mixture spread out
pipeline  layers spread out
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import jax


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices for each parallel axis; one of them may be -1, which takes the devices that are left."""

    data: int = -1
    """Replicas of the model, each seeing its own rows of the batch."""
    fsdp: int = 1
    """Like data, with parameters and optimizer state split over it (ZeRO-3)."""
    tensor: int = 1
    """Matrices split by columns and rows."""
    sequence: int = 1
    """Activations split along the sequence."""
    expert: int = 1
    """Experts of a mixture spread out."""
    pipeline: int = 1
    """Layers spread out."""

    def __post_init__(self) -> None:
        sizes = self.sizes()
        if bad := {name: size for name, size in sizes.items() if size < 1 and size != -1}:
            raise ValueError(f"mesh sizes {bad} are not positive; use a count of devices, or -1 to fill")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"mesh has -1 on several axes ({self}); only one axis can take what is left")

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The mesh axes in order, slowest interconnect first."""
        return tuple(field.name for field in fields(self))

    def sizes(self) -> dict[str, int]:
        """Axis name to size as written, -1 included."""
        return {name: getattr(self, name) for name in self.axis_names}

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

    def build(self, devices: "Sequence[Any] | None" = None) -> "jax.sharding.Mesh":
        """The jax mesh over `devices` (default: all), every axis in Auto mode."""
        import jax

        devices = jax.devices() if devices is None else devices
        sizes = self.resolve(len(devices))
        return jax.make_mesh(
            tuple(sizes.values()),
            tuple(sizes),
            # Auto: the compiler places collectives from our constraints; Explicit would put shardings in types.
            axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
            devices=devices,
        )
