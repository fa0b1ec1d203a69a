"""What an optimizer knows about a parameter: its place in the model and what its dimensions mean.

Layers are stored stacked: the array called stack.blocks.0.ffn.up.kernel with axes ("layers", "embed", "mlp") holds as
many matrices as there are layers. Whatever an optimizer does to a whole matrix (a norm, a root mean square, an
orthogonalisation), it must do to each of them, as if they were stored apart. The logical axis names tell.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# Leading dimensions of these names count parameters that are independent of each other.
_STACKED = ("layers", "experts")
_HEADS = ("heads", "kv_heads")


@dataclass(frozen=True)
class Parameter:
    """One array of the model."""

    path: str
    """Dotted path, "stack.blocks.0.ffn.up.kernel"."""
    axes: tuple[str, ...]
    """Logical names of its dimensions, ("layers", "embed", "mlp")."""

    @property
    def kind(self) -> str:
        """The last name of the path decides: "norm" (scale), "bias" (bias), "embedding" (table), else "weight"."""
        kinds = {"scale": "norm", "bias": "bias", "table": "embedding"}
        return kinds.get(self.path.rpartition(".")[2], "weight")

    @property
    def num_stacked(self) -> int:
        """How many leading dimensions count separate parameters."""
        return next((i for i, name in enumerate(self.axes) if name not in _STACKED), len(self.axes))

    @property
    def own_axes(self) -> tuple[str, ...]:
        """Names of the dimensions of one of the stacked parameters."""
        return self.axes[self.num_stacked :]

    @property
    def matrix_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Dimensions (of the whole array) that are the rows and the columns of each stacked matrix.

        (embed, heads, head_dim) is a matrix from embed to heads x head_dim, (heads, head_dim, embed) the other way
        round: a matrix of more than two dimensions is split at embed, or between heads x head_dim and the rest.
        None for vectors (norms and biases, whatever their number of dimensions) and where names do not tell.
        """
        own, first = self.own_axes, self.num_stacked
        if len(own) < 2 or self.kind in ("norm", "bias"):
            return None
        if len(own) == 2 or own[0] == "embed":
            split = 1
        elif own[-1] == "embed":
            split = len(own) - 1
        elif len(own) == 3 and own[1] in _HEADS and own[2] == "head_dim":
            split = 1
        elif len(own) == 3 and own[0] in _HEADS and own[1] == "head_dim":
            split = 2
        else:
            return None
        dims = tuple(range(first, len(self.axes)))
        return dims[:split], dims[split:]


def describe(axes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree of parameters of a tree of axis names (nested dicts, the leaves tuples)."""
    return {
        name: describe(value, f"{prefix}{name}.")
        if isinstance(value, Mapping)
        else Parameter(f"{prefix}{name}", tuple(value))
        for name, value in axes.items()
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts with its dotted path."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def select(tree: Mapping[str, Any], keep: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts whose dotted path is to be kept, in their places; no empty dicts."""
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inner := select(value, keep, f"{prefix}{name}."):
                kept[name] = inner
        elif keep(f"{prefix}{name}"):
            kept[name] = value
    return kept


def merge(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of two selections of it."""
    merged = dict(left)
    for name, value in right.items():
        merged[name] = merge(merged[name], value) if isinstance(value, Mapping) and name in merged else value
    return merged


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern with * and ? names a dotted path, or something that holds it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")
