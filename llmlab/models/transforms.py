"""How one layer's tensors are laid out in a checkpoint and in llmlab: invertible rearrangements.

A transform maps a tuple of checkpoint tensors to a tuple of llmlab leaves and back. Nothing is computed, numbers
only move, so that going there and back is exact and gradients travel by the same maps. Sizes come from the leaves'
shapes, so one table serves every size of a family.

    Identity     the same array                                 norms, embeddings
    Linear       torch.nn.Linear, (out, in)                     kernel (*in, *out)
    Conv1D       GPT-2's linear layer, (in, out)                kernel (*in, *out)
    Conv2D       torch.nn.Conv2d over patches, (out, in, h, w)  kernel (h, w, in, out)
    Vector       (n,)                                           bias (*out) with n = product(out)
    Leading      (1, 1, n)                                      (n,): class tokens, positions
    Axis         (1, n, 1, d)                                   (n, d): vectors along one axis of a grid
    OutputFirst  (out, *in)                                     kernel (*in, out)
    Fused        one tensor, parts side by side along an axis   one leaf for each part
    FusedByHead  one tensor, (heads, parts, head_dim) rows      one leaf (*in, heads, head_dim) for each part
    Stacked      one tensor for each expert                     one leaf with a leading dimension
"""

import abc
import math
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]
Arrays = tuple[np.ndarray, ...]


class Transform(abc.ABC):
    """An invertible map between the checkpoint tensors and the llmlab leaves of one table row."""

    def names(self, patterns: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, ...]:
        """The checkpoint's tensor names, given those of the row and the shapes of the leaves."""
        return patterns

    @abc.abstractmethod
    def tensor_shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        """Shapes of the checkpoint tensors for leaves of these shapes."""

    @abc.abstractmethod
    def to_leaves(self, tensors: Arrays, shapes: tuple[Shape, ...]) -> Arrays:
        """Leaves of these shapes from checkpoint tensors."""

    @abc.abstractmethod
    def to_tensors(self, leaves: Arrays) -> Arrays:
        """Checkpoint tensors from leaves."""


class One(Transform):
    """A transform of exactly one tensor to exactly one leaf; subclasses say what happens to it."""

    @abc.abstractmethod
    def tensor_shape(self, shape: Shape) -> Shape:
        """Shape of the tensor for a leaf of this shape."""

    @abc.abstractmethod
    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """The leaf of this shape."""

    @abc.abstractmethod
    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor of this leaf."""

    def tensor_shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        (shape,) = shapes
        return (self.tensor_shape(shape),)

    def to_leaves(self, tensors: Arrays, shapes: tuple[Shape, ...]) -> Arrays:
        (tensor,), (shape,) = tensors, shapes
        return (self.to_leaf(tensor, shape),)

    def to_tensors(self, leaves: Arrays) -> Arrays:
        (leaf,) = leaves
        return (self.to_tensor(leaf),)


@dataclass(frozen=True)
class Identity(One):
    """The same array on both sides."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return shape

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf


@dataclass(frozen=True)
class Linear(One):
    """(out, in) to a kernel whose first `num_inputs` dimensions multiply to in and whose others to out."""

    num_inputs: int = 1
    """Leading dimensions of the kernel that are contracted: 1 for a projection into heads, 2 for one out of them."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.num_inputs :]), math.prod(shape[: self.num_inputs])

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.T.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(math.prod(leaf.shape[: self.num_inputs]), -1).T


@dataclass(frozen=True)
class Conv1D(One):
    """(in, out) to a kernel whose first `num_inputs` dimensions multiply to in and whose others to out."""

    num_inputs: int = 1
    """Leading dimensions of the kernel that are contracted."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[: self.num_inputs]), math.prod(shape[self.num_inputs :])

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(math.prod(leaf.shape[: self.num_inputs]), -1)


@dataclass(frozen=True)
class Conv2D(One):
    """(out, in, height, width), a convolution with a stride of its size, to a patch kernel (height, width, in, out)."""

    def tensor_shape(self, shape: Shape) -> Shape:
        height, width, channels, out = shape
        return out, channels, height, width

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.transpose(2, 3, 1, 0)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose(3, 2, 0, 1)


@dataclass(frozen=True)
class Leading(One):
    """(1, ..., 1, *shape) to a leaf of that shape: tensors that broadcast over a batch."""

    ones: int
    """Dimensions of size one in front."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return (1,) * self.ones + shape

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(self.tensor_shape(leaf.shape))


@dataclass(frozen=True)
class Axis(One):
    """(1, ..., n, ..., 1, d) to a leaf (n, d): vectors along one axis of a grid of positions."""

    before: int = 0
    """Dimensions of size one in front."""
    after: int = 0
    """Dimensions of size one between both."""

    def tensor_shape(self, shape: Shape) -> Shape:
        num, dim = shape
        return (*(1,) * self.before, num, *(1,) * self.after, dim)

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(self.tensor_shape(leaf.shape))


@dataclass(frozen=True)
class Vector(One):
    """A flat vector to a leaf of any shape, such as a bias (heads, head_dim)."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(-1)


@dataclass(frozen=True)
class OutputFirst(One):
    """(out, *in) to a kernel (*in, out): an output projection that is written as it is read, heads unjoined."""

    def tensor_shape(self, shape: Shape) -> Shape:
        return (shape[-1], *shape[:-1])

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return np.moveaxis(tensor, 0, -1)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        return np.moveaxis(leaf, -1, 0)


@dataclass(frozen=True)
class Fused(Transform):
    """One tensor that holds several parts side by side, such as query, key and value; each part becomes a leaf."""

    part: One
    """What happens to each part."""
    axis: int
    """Axis of the tensor along which the parts lie."""

    def tensor_shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        parts = [self.part.tensor_shape(shape) for shape in shapes]
        fused = list(parts[0])
        fused[self.axis] = sum(part[self.axis] for part in parts)
        return (tuple(fused),)

    def to_leaves(self, tensors: Arrays, shapes: tuple[Shape, ...]) -> Arrays:
        (tensor,) = tensors
        widths = [self.part.tensor_shape(shape)[self.axis] for shape in shapes]
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=self.axis)
        return tuple(self.part.to_leaf(part, shape) for part, shape in zip(parts, shapes, strict=True))

    def to_tensors(self, leaves: Arrays) -> Arrays:
        return (np.concatenate([self.part.to_tensor(leaf) for leaf in leaves], axis=self.axis),)


@dataclass(frozen=True)
class FusedByHead(Transform):
    """One tensor that holds the parts of every head side by side, (heads * parts * head_dim, in) or a vector of as
    many; each part becomes a leaf (in, heads, head_dim), or (heads, head_dim)."""

    def tensor_shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        rows = sum(math.prod(shape[-2:]) for shape in shapes)
        return ((rows, *shapes[0][:-2]),)

    def to_leaves(self, tensors: Arrays, shapes: tuple[Shape, ...]) -> Arrays:
        (tensor,), (heads, head_dim) = tensors, shapes[0][-2:]
        rows = tensor.reshape(heads, len(shapes), head_dim, -1)
        return tuple(rows[:, i].transpose(2, 0, 1).reshape(shape) for i, shape in enumerate(shapes))

    def to_tensors(self, leaves: Arrays) -> Arrays:
        parts = [leaf.reshape(-1, *leaf.shape[-2:]).transpose(1, 2, 0) for leaf in leaves]
        rows = np.stack(parts, axis=1).reshape(-1, parts[0].shape[-1])
        return (rows if leaves[0].ndim == 3 else rows[:, 0],)


@dataclass(frozen=True)
class Stacked(Transform):
    """One tensor for each expert; the leaf stacks them along its first dimension."""

    part: One
    """What happens to each tensor."""
    placeholder: str = "{expert}"
    """What stands for the number in the tensors' name."""

    def names(self, patterns: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, ...]:
        (pattern,), (shape,) = patterns, shapes
        return tuple(pattern.replace(self.placeholder, str(i)) for i in range(shape[0]))

    def tensor_shapes(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        (shape,) = shapes
        return (self.part.tensor_shape(shape[1:]),) * shape[0]

    def to_leaves(self, tensors: Arrays, shapes: tuple[Shape, ...]) -> Arrays:
        (shape,) = shapes
        return (np.stack([self.part.to_leaf(tensor, shape[1:]) for tensor in tensors]),)

    def to_tensors(self, leaves: Arrays) -> Arrays:
        (leaf,) = leaves
        return tuple(self.part.to_tensor(part) for part in leaf)
