"""A named TPU topology, and its devices as the compiler knows them, on a machine that has none.

`v5p:4x4x4` is a slice of 64 v5p chips, wired as a cube. libtpu (the `tpu` extra) brings the compiler and the
description of every topology; nothing of it needs a TPU. It is loaded in a process of its own (`ENVIRONMENT` says
how), since it must not meet the backend that the caller computes on.
"""

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

from llmlab.plan.chips import CHIPS, Chip

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # what runs at all runs there
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for the metadata server of a cloud machine
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compile at once; there is no TPU to quarrel about
    "XLA_FLAGS": "",  # the caller's are for another backend
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is kept is the answer, not the program
    # Warnings of the compiler, of which what the partitioner gives up on is one, to stderr and not to files in /tmp.
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}
"""For the process that compiles."""

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
"""Slices of chips that are wired in two dimensions."""

_EXAMPLES = {"v4": "v4:4x4x4", "v5e": "v5e:4x8", "v5p": "v5p:4x4x4", "v6e": "v6e:16x16"}


@dataclass(frozen=True)
class Topology:
    """Some slices of one shape."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a slice."""
    num_slices: int = 1
    """Slices of that shape, joined by the slow network."""

    @classmethod
    def parse(cls, name: str, num_slices: int = 1) -> "Topology":
        """The topology of a name like "v5p:4x4x4".

        Raises:
            ValueError: the chip is unknown, or has no slice of that shape; the message says what there is.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        if found is None or found[1] not in CHIPS:
            raise ValueError(
                f"--topology {name!r} is not one; name a chip and the shape of a slice, such as "
                f"{', '.join(_EXAMPLES.values())}"
            )
        chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
        if len(shape) != chip.dims:
            raise ValueError(
                f"--topology {name}: {chip.name} chips are wired in {chip.dims} dimensions and this has {len(shape)}; "
                f"write it like {_EXAMPLES[chip.name]}"
            )
        topology = cls(chip, shape, num_slices)
        if problem := topology._problem():
            raise ValueError(f"--topology {name}: {problem}")
        return topology

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.num_slices

    def devices(self) -> list[Any]:
        """The devices, slice after slice. Only in a process whose environment has `ENVIRONMENT`.

        Raises:
            ValueError: libtpu is not installed, or knows no such slice.
        """
        import jax
        from jax.experimental import topologies

        check_compiler()
        options: dict[str, Any] = {} if self.num_slices == 1 else {"num_slices": self.num_slices}
        if self.chip.name == "v4":
            # both cores of a chip as one device, as jax sees them on a v4
            options["chip_config_name"] = "megacore"
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--topology {self.name}: the TPU compiler does not know it: {error}") from None
        assert len(found) == self.num_chips, (len(found), self.num_chips)
        return list(found)

    def _problem(self) -> str | None:
        """What is wrong with the shape, or None."""
        if min(self.shape) < 1:
            return "sizes are positive"
        if self.chip.dims == 2:
            if tuple(sorted(self.shape)) in _FLAT:
                return None
            several = "; more chips are several slices: --mesh.slices 2" if max(self.shape) > 16 else ""
            return f"slices are {', '.join('x'.join(map(str, shape)) for shape in _FLAT)}{several}"
        large = math.prod(self.shape) > 16
        bad = [size for size in self.shape if size % 4 and (large or size not in (1, 2))]
        small = (1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)
        if bad and tuple(sorted(self.shape)) not in {tuple(sorted(shape)) for shape in small}:
            return f"slices are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 in every dimension; {bad[0]} is none"
        return None


def check_compiler() -> None:
    """Raises ValueError, saying how to get it, where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu, the TPU compiler, is not installed; pip install 'llmlab[tpu]' brings the one that fits this jax "
            "(Linux on x86-64; no TPU is needed)"
        )
