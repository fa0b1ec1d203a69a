"""How fast a step could be: the slowest of arithmetic, memory and networks, if each were perfectly busy.

    compute         FLOPs of a chip / peak FLOP/s
    memory          bytes moved by a chip / memory bandwidth
    interconnect    sum over collectives of the bytes that leave a chip / bandwidth of the links that they can use
    between slices  the same over the slow network

    bound           the longest of them, if they overlap perfectly; their sum, if they do not at all
    MFU allowed     model FLOPs / (chips x peak FLOP/s x that time)

Links: a group of chips that differ in a dimension of the torus uses that dimension's links: two where it is a ring, as
data goes both ways around, one where it is a line, whose ends have one neighbour. A group along several dimensions
uses the links of all. (Roofline: Williams, Waterman and Patterson 2009.)
"""

from collections.abc import Sequence

from llmlab.plan.collectives import Collective
from llmlab.plan.groups import Groups
from llmlab.plan.report import Times
from llmlab.plan.topology import Topology
from llmlab.plan.work import Work


def roofline(
    topology: Topology, done: Work, found: Sequence[Collective], model_flops: int, coords: Sequence[Sequence[int]]
) -> Times:
    """The roofline of a step.

    Args:
        topology: chips and their network.
        done: FLOPs and bytes of a chip.
        found: collectives.
        model_flops: what the model needs, over all chips.
        coords: place in its slice of the chip at each position of the flattened mesh.
    """
    chip = topology.chip
    times = {
        "compute": done.flops / chip.peak_flops,
        "memory": done.traffic / chip.memory_bandwidth,
        "interconnect": sum(seconds(collective, topology, coords) for collective in found),
        "between_slices": sum(c.times * c.slow_bytes for c in found) / chip.slow_bandwidth,
    }
    ideal = model_flops / (topology.num_chips * chip.peak_flops)
    return Times(
        **times, mfu=ideal / max(*times.values(), 1e-12), mfu_without_overlap=ideal / max(sum(times.values()), 1e-12)
    )


def seconds(collective: Collective, topology: Topology, coords: Sequence[Sequence[int]]) -> float:
    """Of all runs of a collective in a step, on the fast network."""
    if not collective.fast_bytes:
        return 0.0
    links = num_links(collective.groups, topology, coords, both_ways=collective.kind != "collective-permute")
    return collective.times * collective.fast_bytes / (links * topology.chip.link_bandwidth)


def num_links(groups: Groups, topology: Topology, coords: Sequence[Sequence[int]], *, both_ways: bool = True) -> int:
    """Links in one direction that a chip can send on at once, for a collective of these groups."""
    links = 0
    for dim, size in enumerate(topology.shape):
        if any(len({coords[chip][dim] for chip in group}) > 1 for group in groups[:64]):
            ring = both_ways and size % topology.chip.wraps_at == 0
            links += 2 if ring else 1
    return max(1, links if both_ways else 1)
