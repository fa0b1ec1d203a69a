"""Which devices a collective joins, in the notations of optimized HLO, and which mesh axes that is.

    {{0,1},{2,3}}                                   every group written out
    [2,4]<=[8]                                      0 to 7 in order, cut into 2 groups of 4
    [4,4]<=[8,2]T(1,0)                              0 to 15 as 8 x 2, transposed, cut into 4 groups of 4
    mesh['a'=2,'b'=4] {'b'}                         devices as a 2 x 4 mesh, a group along each row
    mesh['a'=8] {'a':(2)4}                          the same along a part of an axis: after 2, of size 4
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}     with the devices of the mesh in another order
    {}                                              one group of all

Numbers are positions in the mesh, flattened: device i of `mesh.devices.flat`.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Groups = list[list[int]]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")


def parse_groups(attributes: str, num_devices: int) -> Groups:
    """The replica groups of an instruction's attributes.

    Raises:
        ValueError: they are in a notation that is not known here.
    """
    text = attributes.partition("replica_groups=")[2]
    if not text or text.startswith("{}"):
        return [list(range(num_devices))]
    if text.startswith("{{"):
        listed = text[: text.index("}}") + 1]
        return [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", listed)]
    if iota := _IOTA.match(text):
        shape = _numbers(iota[1])
        return _iota(iota[2], iota[3]).reshape(shape[0], -1).tolist()
    if mesh := _MESH.match(text):
        return _along(mesh)
    raise ValueError(f"replica groups in an unknown notation: {text[:120]}")


def parse_pairs(attributes: str) -> Groups:
    """Pairs (from, to) of a collective-permute."""
    text = attributes.partition("source_target_pairs=")[2]
    return [_numbers(pair) for pair in re.findall(r"\{(\d+,\s*\d+)\}", text[: text.find("}}") + 1])]


def axes_of(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that members of a group differ in, in the order of the mesh.

    Args:
        groups: positions in the flattened mesh.
        sizes: axis name to size, in the order of the mesh.
    """
    shape = tuple(sizes.values())
    varies = np.zeros(len(shape), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), shape), axis=-1)
        varies |= (places != places[:1]).any(axis=0)
    return tuple(name for name, differs in zip(sizes, varies, strict=True) if differs)


def _along(mesh: re.Match[str]) -> Groups:
    """Groups along axes (or parts of axes) of a mesh."""
    named = re.findall(r"'([^']*)'=(\d+)", mesh[1])
    sizes = {name: int(size) for name, size in named}
    total = math.prod(sizes.values())
    devices = np.arange(total) if mesh[2] is None else _iota(mesh[2], mesh[3])
    parts: list[tuple[str, int, bool]] = []  # (axis, size, whether a group runs along it), axes cut where needed
    wanted = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _parts(mesh[4])]
    for name, size in sizes.items():
        mine = [(before, length) for axis, before, length in wanted if axis == name]
        cuts = sorted({1, size, *(b for b, _ in mine), *(b * n for b, n in mine)})
        for low, high in itertools.pairwise(cuts):
            parts.append((name, high // low, any(b <= low and high <= b * n for b, n in mine)))
    grid = devices.reshape([size for _, size, _ in parts] or [1])
    inside = [i for i, (_, _, along) in enumerate(parts) if along]
    outside = [i for i in range(len(parts)) if i not in inside]
    group_size = math.prod(parts[i][1] for i in inside)
    return grid.transpose([*outside, *inside] or [0]).reshape(-1, group_size).tolist()


def _parts(text: str) -> list[tuple[str, str, str]]:
    return re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", text)


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid if order is None else grid.transpose(_numbers(order))).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
