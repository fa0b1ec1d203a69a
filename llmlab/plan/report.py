"""What a plan says, as plain data: JSON for programs, and what the tables are drawn from."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip."""

    capacity: int
    """What a program can have."""
    parameters: int
    """Of the model, as they are between steps."""
    optimizer: int
    """The optimizer's state."""
    other: int
    """What else is kept between steps: an average of the parameters, counters."""
    batch: int
    """The inputs of a step."""
    padding: int = 0
    """What the compiler adds to those, to fill its tiles."""
    temporaries: int = 0
    """Activations, gradients and everything else that lives within a step, where they are most."""
    program: int = 0
    """The code itself."""
    needed: int | None = None
    """What the compiler says it would need, where it refused to compile for want of memory."""

    @property
    def arguments(self) -> int:
        """What goes into a step, by the arrays' shapes."""
        return self.parameters + self.optimizer + self.other + self.batch

    @property
    def total(self) -> int:
        """Everything."""
        if self.needed is not None:
            return self.needed
        return self.arguments + self.padding + self.temporaries + self.program

    @property
    def fits(self) -> bool:
        """Whether the chip has that much."""
        return self.needed is None and self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a whole step, over all chips."""

    model: int
    """What the model needs: matrix products forward and backward, by its own formula."""
    compiled: int
    """What the compiled program does: matrix products, recomputed ones and kernels included."""
    kernels: int
    """Those of them that are kernels'."""

    @property
    def ratio(self) -> float:
        """Compiled to model: what rematerialisation costs."""
        return self.compiled / self.model


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind over the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    crosses_slices: bool
    """Whether it needs the slow network."""
    count: int
    """Runs in a step."""
    sent: int
    """Bytes that leave a chip in a step."""
    seconds: float
    """On its network, if that is perfectly busy."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """The roofline: seconds of a step by what takes them, and the MFU that allows."""

    compute: float
    memory: float
    interconnect: float
    between_slices: float
    mfu: float
    mfu_without_overlap: float

    @property
    def parts(self) -> dict[str, float]:
        """Name to seconds."""
        names = ("compute", "memory", "interconnect", "between_slices")
        return {name.replace("_", " "): getattr(self, name) for name in names}

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def seconds(self) -> float:
        """Of a step, if everything overlaps."""
        return max(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One experiment compiled for one topology."""

    topology: str
    num_chips: int
    mesh: dict[str, int]
    """Axis to size, of those with more than one device."""
    tokens: int
    """Of a step."""
    num_parameters: int
    memory: Memory
    flops: Flops | None = None
    """None, as all below, where the compiler ran out of memory."""
    traffic: tuple[Traffic, ...] = ()
    times: Times | None = None
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """Of jax, jaxlib and libtpu."""
    compile_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows from it added."""
        data = dataclasses.asdict(self)
        data["memory"] |= {"arguments": self.memory.arguments, "total": self.memory.total, "fits": self.memory.fits}
        if self.flops is not None:
            data["flops"]["ratio"] = self.flops.ratio
        if self.times is not None:
            data["times"] |= {"bound": self.times.bound, "seconds": self.times.seconds}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """The plan that `to_json` wrote."""

        def only(kind: type, values: dict[str, Any]) -> Any:
            names = {part.name for part in dataclasses.fields(kind)}
            return kind(**{name: value for name, value in values.items() if name in names})

        parts = dict(data)
        parts["memory"] = only(Memory, data["memory"])
        parts["flops"] = None if data["flops"] is None else only(Flops, data["flops"])
        parts["times"] = None if data["times"] is None else only(Times, data["times"])
        rows = [{**row, "axes": tuple(row["axes"])} for row in data["traffic"]]
        parts["traffic"] = tuple(only(Traffic, row) for row in rows)
        parts["warnings"] = tuple(data["warnings"])
        return only(cls, parts)
