"""The host's memory as a second place for arrays of a device: larger by a factor of about ten, and slower.

A TPU or GPU can read pages of its host that the operating system promises not to move ("pinned"), at tens of gigabytes
a second, while it computes. What is needed once a step (the optimizer's moments: two thirds of the bytes of Adam's
state) or long after it was made (activations, which wait for the backward pass) can live there. It pays where memory is
what limits: a step takes at least as long as its traffic, 8 bytes a parameter and direction for Adam's moments.
"""

from collections.abc import Iterable
from typing import Any

HOST = "pinned_host"
"""Name of the memory kind."""
DEVICE = "device"
"""The memory kind of arrays that say nothing else."""


def check_host_memory(devices: Iterable[Any], setting: str) -> None:
    """Checks that devices can reach pinned memory of their host.

    Args:
        devices: jax devices.
        setting: what asks for it, for the message.

    Raises:
        ValueError: one of them cannot.
    """
    for device in devices:
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if HOST not in kinds:
            raise ValueError(
                f"{setting} needs memory of kind {HOST!r}, which {device.device_kind} devices do not have (they have "
                f"{', '.join(kinds) or 'none'}); leave it out on this hardware"
            )
