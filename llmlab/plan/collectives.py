"""Every collective of a compiled step: its kind, the mesh axes it runs over, how often, and what it sends.

Bytes are those that leave a chip, by the algorithms that send least (a ring's, or better ones of the same volume).
With n chips in a group and B bytes of the whole array:

    all-gather           (n - 1)/n B         of the gathered array
    reduce-scatter       (n - 1)/n B         of the array before it is scattered
    all-reduce         2 (n - 1)/n B         a reduce-scatter and an all-gather
    all-to-all           (n - 1)/n B         of what a chip holds
    collective-permute             B         from a chip that sends to another

A group whose chips are in s slices reduces inside each slice first, so that the slow network carries the share of one
chip: the formula with s for n and B s/n for B. The rest, the formula with n/s for n, stays on the fast one.

What the TPU compiler makes of collectives is seen through: an all-reduce and the slice that each chip takes of it, put
into one "all-reduce-scatter" fusion, is a reduce-scatter; a collective that is started in one fusion, carried through
others beside their arithmetic, and finished in a third, is one. Between slices it writes a send to the hosts, which
says what they do with it (all-reduce, all-gather, ...) among the chips of the same place in their slices.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmlab.plan.groups import Groups, axes_of, parse_groups, parse_pairs
from llmlab.plan.hlo import Module, Run

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_BETWEEN_KINDS = {"ONE_TO_ONE": "collective-permute"}
_FACTOR = {"all-reduce": 2, "collective-permute": 0}  # of (n - 1)/n; others have 1


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program."""

    kind: str
    """One of KINDS."""
    axes: tuple[str, ...]
    """Mesh axes that its groups run along."""
    times: int
    """How often it runs in a step."""
    group_size: int
    """Chips that take part together."""
    num_slices: int
    """Slices that a group's chips are in; 1 where it stays on the fast network."""
    full_bytes: int
    """Of the whole array (B above), for one run."""
    groups: Groups
    """Positions in the mesh of the chips of each group."""
    source: str
    """Where in the program it comes from."""
    gathers: bool = False
    """Whether it is an all-reduce of shares put into zeros: a gather that sends twice as much as an all-gather."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave a chip in one run, on both networks."""
        return self.fast_bytes + self.slow_bytes

    @property
    def fast_bytes(self) -> float:
        """Those on the network inside a slice."""
        if self.kind == "collective-permute" and self.num_slices > 1:
            return 0.0
        return sent(self.kind, self.group_size // self.num_slices, self.full_bytes)

    @property
    def slow_bytes(self) -> float:
        """Those on the network between slices."""
        if self.num_slices == 1:
            return 0.0
        share = self.full_bytes * self.num_slices / self.group_size
        return sent(self.kind, self.num_slices, self.full_bytes if self.kind == "collective-permute" else share)


def sent(kind: str, group_size: int, full_bytes: float) -> float:
    """Bytes that leave a chip, by the table above."""
    if kind == "collective-permute":
        return full_bytes
    return _FACTOR.get(kind, 1) * (group_size - 1) / group_size * full_bytes


def collectives(module: Module, sizes: Mapping[str, int], slice_of: Sequence[int] = ()) -> list[Collective]:
    """The collectives of a module whose groups have more than one chip.

    Args:
        module: the compiled program.
        sizes: mesh axis to size, in the order of the mesh that it was compiled for.
        slice_of: slice of each position in the mesh; () for one slice.
    """
    seen: set[tuple[str, str, str]] = set()
    found = []
    for run in module.runs():
        kind = _kind(run)
        if kind is None:
            continue
        channel = run.instruction.attributes.partition("channel_id=")[2].partition(",")[0]
        if run.fusion is not None and channel:
            # A started, carried and finished collective is written three times, with one channel.
            key = (run.caller, kind, channel)
            if key in seen:
                continue
            seen.add(key)
        collective = _collective(kind, run, sizes, slice_of)
        if collective.group_size > 1:
            found.append(collective)
    return found


def total_sent(found: Iterable[Collective]) -> float:
    """Bytes that leave a chip in a step."""
    return sum(collective.times * collective.sent_bytes for collective in found)


def _kind(run: Run) -> str | None:
    if run.instruction.opcode == "send":
        between = _BETWEEN.search(run.instruction.attributes)
        return None if between is None else _BETWEEN_KINDS.get(between[1], between[1].lower().replace("_", "-"))
    opcode = run.instruction.opcode.removesuffix("-start")
    if opcode not in KINDS:
        return None
    if opcode == "all-reduce" and run.fusion is not None:
        users = run.computation.users.get(run.instruction.name, [])
        if any(user.opcode == "dynamic-slice" for user in users):
            return "reduce-scatter"
    return opcode


def _collective(kind: str, run: Run, sizes: Mapping[str, int], slice_of: Sequence[int]) -> Collective:
    instruction = run.instruction
    num_devices = math.prod(sizes.values())
    if instruction.opcode == "send":
        return _between_slices(kind, run, sizes, slice_of)
    if kind == "collective-permute":
        groups = [pair for pair in parse_pairs(instruction.attributes) if pair[0] != pair[1]]
        group_size = 2 if groups else 1
    else:
        groups = parse_groups(instruction.attributes, num_devices)
        group_size = max(map(len, groups))
    # An all-reduce may take float32 and add bfloat16: its result says what travels.
    shapes = instruction.shapes if kind == "all-reduce" else run.computation.operand_shapes(instruction)
    held = sum(shape.bytes for shape in shapes)
    num_slices = max((len({slice_of[i] for i in group}) for group in groups), default=1) if slice_of else 1
    return Collective(
        kind=kind,
        axes=axes_of(groups, sizes),
        times=run.times,
        group_size=group_size,
        num_slices=num_slices,
        full_bytes=held * group_size if kind == "all-gather" else held,
        groups=groups,
        source=instruction.source,
        gathers=kind == "all-reduce" and any("dynamic-update-slice" in name for name in instruction.operands),
    )


def _between_slices(kind: str, run: Run, sizes: Mapping[str, int], slice_of: Sequence[int]) -> Collective:
    """What the hosts do with what each chip sends them, among the chips of one place in their slices."""
    members: dict[int, list[int]] = {}
    for chip, number in enumerate(slice_of):
        members.setdefault(number, []).append(chip)
    groups = [list(group) for group in zip(*members.values(), strict=True)]
    num_slices = max(1, len(members))
    held = run.computation.operand_shapes(run.instruction)[0].bytes
    return Collective(
        kind=kind,
        axes=axes_of(groups, sizes) if num_slices > 1 else (),
        times=run.times,
        group_size=2 if kind == "collective-permute" else num_slices,
        num_slices=2 if kind == "collective-permute" else num_slices,
        full_bytes=held * num_slices if kind == "all-gather" else held,
        groups=groups,
        source=run.instruction.source,
    )
