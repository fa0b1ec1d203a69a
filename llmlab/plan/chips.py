"""What TPU chips can do: the constants of the roofline, each with its source.

    docs    Google Cloud's system architecture pages, one a generation (docs.cloud.google.com/tpu/docs/v5p and so on)
    book    "How To Scale Your Model" (jax-ml.github.io/scaling-book, part 2): bandwidths as they can be reached
    libtpu  what the TPU compiler of libtpu 0.0.42 says is available to a program, when one asks for more

Peaks are vendors' figures; nobody reaches them, so a roofline is what a perfect program would take.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation."""

    name: str
    """As topologies are called: "v5p"."""
    peak_flops: float
    """Dense bfloat16 FLOP/s with float32 accumulation. (docs)"""
    memory: int
    """Bytes of main memory that a program can have. (libtpu)"""
    memory_bandwidth: float
    """Bytes per second between main memory and compute units. (docs)"""
    link_bandwidth: float
    """Bytes per second in one direction of one link of the fast network, as reached. (book)"""
    dims: int
    """Dimensions of the fast network: a chip has two links in each. (docs)"""
    wraps_at: int
    """A dimension whose size is a multiple of this is a ring; a shorter one is a line. (docs)"""
    slow_bandwidth: float
    """Bytes per second between slices, in one direction, for each chip. (docs)"""


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            peak_flops=275e12,  # docs
            memory=int(30.75 * GIB),  # libtpu, with both cores as one device; docs: 32 GiB
            memory_bandwidth=1.2e12,  # docs: 1200 GBps
            link_bandwidth=4.5e10,  # book
            dims=3,  # docs: 3D mesh, a torus from 4x4x4 on
            wraps_at=4,
            slow_bandwidth=3.125e9,  # book: 25 Gbit/s a chip
        ),
        Chip(
            name="v5e",
            peak_flops=197e12,  # docs
            memory=int(15.75 * GIB),  # libtpu; docs: 16 GB
            memory_bandwidth=8.19e11,  # docs: 819 GBps
            link_bandwidth=4.5e10,  # book; docs: 400 GBps in both directions over 4 ports, 50 in one of one
            dims=2,  # docs: 2D torus
            wraps_at=16,
            slow_bandwidth=3.125e9,  # docs: 6.4 Tbit/s a pod of 256
        ),
        Chip(
            name="v5p",
            peak_flops=459e12,  # docs
            memory=int(95.74 * GIB),  # libtpu; docs: 95 GiB
            memory_bandwidth=2.765e12,  # docs: 2765 GBps
            link_bandwidth=9e10,  # book; docs: 1200 GBps in both directions over 6 ports, 100 in one of one
            dims=3,  # docs: 3D torus
            wraps_at=4,
            slow_bandwidth=6.25e9,  # docs: 50 Gbit/s a chip
        ),
        Chip(
            name="v6e",
            peak_flops=918e12,  # docs
            memory=int(31.25 * GIB),  # libtpu; docs: 32 GB
            memory_bandwidth=1.638e12,  # docs: 1638 GBps
            link_bandwidth=9e10,  # book; docs: 800 GBps in both directions over 4 ports, 100 in one of one
            dims=2,  # docs: 2D torus
            wraps_at=16,
            slow_bandwidth=1.25e10,  # docs: 100 Gbit/s a chip
        ),
    )
}
