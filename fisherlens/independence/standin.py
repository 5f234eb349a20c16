"""Stand-ins as a judgement sees them: with their damping, whole or put together from layers, and with the norms of F inside their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.approximations.block_diagonal import precondition_of, product_of, solve_of
from fisherlens.approximations.pieces import squared_block_norms
from fisherlens.fisher import Fisher
from fisherlens.partitions import Partition


class Matrix(Protocol):
    """What a judgement asks of a stand-in, a subset of :class:`fisherlens.approximations.Approximation`."""

    def _product(self, v: Tensor) -> Tensor: ...

    def _solve(self, v: Tensor, damping: float) -> Tensor: ...

    def log_determinant(self, damping: float) -> float: ...

    def squared_norm(self) -> float: ...

    def within_block_error(self) -> float: ...


@dataclass(frozen=True, eq=False)
class StandIn:
    """One stand-in for one target.

    Attributes
    ----------
    name
        As results call it.
    matrix
        The stand-in, restricted to the target.
    sizes
        Parameters in each of its blocks there.
    exact_blocks
        Whether its blocks are those of F, so that nothing but couplings is lost.
    by_layers
        Whether its blocks are those of F on whole layers.
    """

    name: str
    matrix: Any
    sizes: Any
    exact_blocks: bool
    by_layers: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is F itself: one exact block."""
        return self.exact_blocks and len(self.sizes) == 1

    def product(self, v: Tensor, damping: float) -> Tensor:
        """The damped matrix that :meth:`solve` inverts, times V: (F̂ + λ) V unless the stand-in damps in a form of its own."""
        own = getattr(self.matrix, "damped_product", None)
        return own(v, damping) if own is not None else self.matrix._product(v).add_(v, alpha=damping)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(F̂ + λ)⁻¹ V."""
        return self.matrix._solve(v, damping)

    @property
    def preconditions(self) -> bool:
        """Whether a rough solve is much cheaper than a solve."""
        return getattr(self.matrix, "preconditions", False)

    def precondition(self, v: Tensor, damping: float) -> Tensor:
        """Roughly (F̂ + λ)⁻¹ V, where the stand-in says that it preconditions."""
        return self.matrix.precondition(v, damping)

    @property
    def damps_as_usual(self) -> bool:
        """Whether the damped matrix is F̂ + λI; KFAC's factored damping is not."""
        return not hasattr(self.matrix, "damped_product") or getattr(self.matrix, "damping", None) == "exact"


class Parts:
    """A matrix that is block-diagonal over layers, put together from what was built for each of them.

    Parameters
    ----------
    F
        The Fisher of the whole.
    parts
        Layer → its matrix.
    """

    def __init__(self, F: Fisher, parts: Mapping[str, Matrix]):
        self._parts = [(slice(layer.start, layer.stop), parts[layer.name]) for layer in F.layout.layers]
        self.shape = F.shape

    def _apply(self, v: Tensor, act: Any, each: Any) -> Tensor:
        """``each`` of the blocks of block-diagonal parts, straight into the answer; ``act`` of the others."""
        out = torch.empty(v.shape[::-1], dtype=v.dtype, device=v.device).T
        for at, part in self._parts:
            if isinstance(part, BlockDiagonal):
                part.apply(v[at], out[at], each)
            else:
                out[at] = act(part, v[at])
        return out

    def _product(self, v: Tensor) -> Tensor:
        return self._apply(v, lambda part, piece: part._product(piece), product_of)

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        return self._apply(v, lambda part, piece: part._solve(piece, damping), solve_of(damping))

    @property
    def preconditions(self) -> bool:
        """Whether that of a layer does."""
        return any(getattr(part, "preconditions", False) for _, part in self._parts)

    def precondition(self, v: Tensor, damping: float) -> Tensor:
        """Roughly (F̂ + λ)⁻¹ V."""
        return self._apply(v, lambda part, piece: part._solve(piece, damping), precondition_of(damping))

    def log_determinant(self, damping: float) -> float:
        """Log det(I + F̂/λ)."""
        return sum(part.log_determinant(damping) for _, part in self._parts)

    def squared_norm(self) -> float:
        """‖F̂‖²."""
        return sum(part.squared_norm() for _, part in self._parts)

    def within_block_error(self) -> float:
        """Σ_b ‖F_bb - F̂_bb‖²."""
        return sum(part.within_block_error() for _, part in self._parts)

    def dense(self) -> Tensor:
        """The matrix."""
        return torch.block_diag(*[part.dense() for _, part in self._parts])


def inside_layers(partition: Partition) -> bool:
    """Whether no block crosses layers."""
    return all(group.layer is not None for group in partition.groups)


def on_layers(F: Fisher, partition: Partition) -> bool:
    """Whether every block is a whole layer."""
    return all(
        group.layer is not None and len(group) == 1 and group.size == F.layout.layer(group.layer).size
        for group in partition.groups
    )


def squared_norm_of_blocks(F: Fisher, partition: Partition, layer: str | None) -> float:
    """Σ_b ‖F_bb‖² over the blocks of a partition of F, or over their parts in one layer."""
    if layer is not None:
        info, own = F.layout.layer(layer), partition.restrict(layer)
        if own.num_blocks == 1 and own.largest_block == info.size:
            return F.restrict(layer).frobenius_norm() ** 2
        return sum(squared_block_norms(F, group).sum().item() for group in own.groups)
    if not inside_layers(partition):
        return BlockDiagonal(F, partition).squared_norm()
    return sum(squared_norm_of_blocks(F, partition, name) for name in F.layout.layer_names)
