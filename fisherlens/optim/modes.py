"""Axes of tensors: contractions with all other axes, products along one axis, and tensors cut into blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fisherlens.optim.averages import Averages


@dataclass(eq=False)
class AxisAverages(Averages):
    """What one axis of B tensors of one shape has gathered, and the matrix that was last made of it."""

    layer: str
    L: Tensor  # (B, n, n)
    root: Tensor  # (B, n, n)
    weight: float = 0.0  # how much of L is data: 1 - ρ^t, or 1 after a warm start; the number of terms of a sum
    inversions: int = 0


def contraction(x: Tensor, axis: int) -> Tensor:
    """Σ x_i x_j over all axes of each tensor but one, for B tensors in a batch: (B, n, n)."""
    rows = x.movedim(axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)
    return rows @ rows.mT


def along(x: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """Multiply one axis of B tensors in a batch by a matrix each."""
    moved = x.movedim(axis + 1, 1)
    return (matrices @ moved.reshape(len(x), x.shape[axis + 1], -1)).view(moved.shape).movedim(1, axis + 1)


@dataclass(frozen=True)
class Cut:
    """Blocks of one shape, in one corner of a tensor whose axes are cut into runs of ``sizes``."""

    at: tuple[slice, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    def take(self, x: Tensor) -> Tensor:
        """The blocks as a batch, (B, ...)."""
        pairs = [length for pair in zip(self.counts, self.sizes, strict=True) for length in pair]
        order = (*range(0, len(pairs), 2), *range(1, len(pairs), 2))
        return x[self.at].reshape(pairs).permute(order).reshape(-1, *self.sizes)

    def put(self, blocks: Tensor, out: Tensor) -> None:
        """Write the blocks back to where they came from."""
        k = len(self.sizes)
        order = [axis for pair in zip(range(k), range(k, 2 * k), strict=True) for axis in pair]
        where = out[self.at]
        where.copy_(blocks.view(*self.counts, *self.sizes).permute(order).reshape(where.shape))


def cuts(shape: Sequence[int], size: int) -> list[Cut]:
    """Cut every axis into runs of ``size`` and a shorter one at its end: all blocks, those of one shape together."""
    axes = []
    for n in shape:
        whole = n // size
        parts = [(slice(0, whole * size), whole, size)] if whole else []
        axes.append(parts + ([(slice(whole * size, n), 1, n - whole * size)] if n % size else []))
    return [Cut(*(tuple(column) for column in zip(*corner, strict=True))) for corner in itertools.product(*axes)]
