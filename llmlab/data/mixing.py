"""Which source each row comes from, when several are mixed by weight.

A random draw per row would have the right proportions only on average. Here the rows are dealt out: of any first n
rows, source i has received its share w_i n up to less than ceil(log2(number of sources)) rows, exactly, for ever.
Two sources with weights p and 1 - p are dealt by Bresenham's rule: row r goes to the first where floor(p (r + 1)) is
greater than floor(p r), and it is then that source's row floor(p r), so that the position in each source is known
without walking there. More sources are a balanced tree of such pairs. All in integers: nothing is rounded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Pair:
    share: Fraction
    """Of the rows that reach this pair, the part that goes left."""
    left: "_Node"
    right: "_Node"


_Node = _Pair | int  # an int is a source's number


class Dealer:
    """Deals rows out to sources by weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        check_weights(weights)
        exact = [Fraction(repr(weight)) for weight in weights]  # 0.1 as written, not the nearest binary fraction
        self._root = _tree(exact, 0)

    def deal(self, row: int) -> tuple[int, int]:
        """The source that row comes from, and which of that source's rows it is."""
        node = self._root
        while isinstance(node, _Pair):
            numerator, denominator = node.share.numerator, node.share.denominator
            before, after = row * numerator // denominator, (row + 1) * numerator // denominator
            if after > before:
                node, row = node.left, before
            else:
                node, row = node.right, row - before
        return node, row

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each source has received."""
        counts: list[int] = []
        pending = [(self._root, rows)]
        while pending:
            node, reached = pending.pop()
            if isinstance(node, _Pair):
                left = reached * node.share.numerator // node.share.denominator
                pending += [(node.right, reached - left), (node.left, left)]
            else:
                counts.append(reached)
        return counts


def check_weights(weights: Sequence[float]) -> None:
    """Raises a ValueError unless there is a weight and all are positive and finite."""
    if not weights:
        raise ValueError("a mixture of no sources has no rows; give it at least one part")
    for weight in weights:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight={weight} must be positive and finite; leave out a source that is not wanted")


def _tree(weights: Sequence[Fraction], first: int) -> _Node:
    if len(weights) == 1:
        return first
    half = len(weights) // 2
    share = Fraction(sum(weights[:half]), sum(weights))
    return _Pair(share, _tree(weights[:half], first), _tree(weights[half:], first + half))
