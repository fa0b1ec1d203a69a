"""Replica groups in every notation, and the mesh axes they run along."""

import numpy as np
import pytest

from llmlab.plan.groups import Groups, axes_of, parse_groups, parse_pairs

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
PLACES = np.arange(16).reshape(2, 4, 2)


def along(*dims: int) -> Groups:
    """The groups of a mesh along these dimensions, by numpy."""
    others = [dim for dim in range(3) if dim not in dims]
    size = int(np.prod([PLACES.shape[dim] for dim in dims]))
    return PLACES.transpose([*others, *dims]).reshape(-1, size).tolist()


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("{{0,2,4,6},{8,10,12,14},{1,3,5,7},{9,11,13,15}}, x=1", (1,)),
        ("[8,2]<=[16]", (2,)),
        ("[4,4]<=[2,4,2]T(0,2,1)", (1,)),
        ("[8,2]<=[2,8]T(1,0), dimensions={0}", (0,)),
        ("mesh['a'=2,'b'=4,'c'=2] {'b'}, dimensions={1}", (1,)),
        ("mesh['a'=2,'b'=8] {'b'}", (1, 2)),
        ("mesh['a'=16] {'a':(2)4}", (1,)),
        ("mesh['a'=4,'b'=4], device_ids=([2,4,2]T(1,0,2)) {'a'}", (1,)),
        ("mesh['a'=2,'b'=8] {'a','b':(4)2}", (0, 2)),
        ("{}", (0, 1, 2)),
    ],
)
def test_every_notation_gives_the_groups_of_the_mesh(text: str, dims: tuple[int, ...]) -> None:
    groups = parse_groups(f"channel_id=1, replica_groups={text}", 16)
    assert sorted(map(sorted, groups)) == sorted(map(sorted, along(*dims)))
    assert axes_of(groups, SIZES) == tuple(list(SIZES)[dim] for dim in dims)


def test_pairs_of_a_permute_are_read_and_their_axis_found() -> None:
    pairs = parse_pairs('source_target_pairs={{0,2},{2,4},{4,6},{6,0}}, metadata={op_name="{9,9}"}')
    assert pairs == [[0, 2], [2, 4], [4, 6], [6, 0]]
    assert axes_of(pairs, SIZES) == ("fsdp",)


def test_a_notation_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown notation"):
        parse_groups("replica_groups=@somewhere", 4)
