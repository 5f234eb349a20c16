"""What every structured stand-in for the Fisher answers, so that one judgement and one optimizer serve all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from fisherlens.errors import MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, check_damping, require_fisher
from fisherlens.linalg.precision import OwnPrecision
from fisherlens.partitions import Partition

Vector = Tensor | Mapping[str, Tensor]


class Approximation(OwnPrecision, ABC):
    r"""A symmetric positive semi-definite stand-in F̂ for F, zero outside the blocks of a partition.

    The error splits in two, which have no entry in common:

    .. math:: \|F - \hat F\|^2 = \underbrace{\|F\|^2 - \sum_b \|F_{bb}\|^2}_{\text{dropped coupling}}
       + \underbrace{\sum_b \|F_{bb} - \hat F_{bb}\|^2}_{\text{within blocks}}

    Parameters
    ----------
    F
        The Fisher operator that is approximated.
    name
        As results and messages call it.
    partition
        The blocks outside which F̂ is zero.

    Attributes
    ----------
    shape, layout, dtype, device
        Those of F.
    """

    def __init__(self, F: Fisher, name: str, partition: Partition):
        require_fisher(F)
        self._fisher, self.name, self.partition = F, name, partition
        self.shape, self.layout, self.dtype, self.device = F.shape, F.layout, F.dtype, F.device

    # --- what a structure adds; vectors are (P, K), damping is checked -----------------------------------------------

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """F̂ V."""

    @abstractmethod
    def _solve(self, v: Tensor, damping: float) -> Tensor:
        """(F̂ + λI)⁻¹ V, to the precision of the dtype."""

    @abstractmethod
    def _log_determinant(self, damping: float) -> float:
        """Log det(I + F̂/λ), which zero eigenvalues do not change."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """F̂_ii, flat ``(P,)``."""

    @abstractmethod
    def squared_norm(self) -> float:
        """‖F̂‖², the squared Frobenius norm."""

    @abstractmethod
    def within_block_error(self) -> float:
        """Σ_b ‖F_bb - F̂_bb‖², squared Frobenius norms, in nat²."""

    @abstractmethod
    def on_layer(self, layer: str) -> Approximation:
        """The block of F̂ that belongs to one layer, as a stand-in for ``F.restrict(layer)``."""

    @property
    @abstractmethod
    def storage_bytes(self) -> int:
        """Bytes that F̂ holds, scores that it shares with F not counted."""

    @property
    @abstractmethod
    def solve_flops(self) -> float:
        """Floating-point operations that prepare a solve for one damping: factorisations, decompositions."""

    # --- the same for all --------------------------------------------------------------------------------------------

    @property
    def n_params(self) -> int:
        """Parameters covered, P."""
        return self.shape[0]

    def __matmul__(self, v: Vector) -> Vector:
        """F̂ v, in the form of v."""
        return self._fisher._answer(v, self._product)

    def solve(self, v: Vector, damping: float) -> Vector:
        """(F̂ + λI)⁻¹ v, in the form of v."""
        damping = check_damping(damping)
        return self._fisher._answer(v, lambda flat: self._solve(flat, damping))

    def log_determinant(self, damping: float) -> float:
        """Log det(I + F̂/λ)."""
        return self._log_determinant(check_damping(damping))

    def trace(self) -> float:
        """Tr F̂ in nat."""
        return self.diagonal().double().sum().item()

    def dense(self, max_params: int = 5000) -> Tensor:
        """The matrix, ``(P, P)``; refused above ``max_params``."""
        if self.n_params > max_params:
            size = readable_bytes(self.n_params**2 * self.dtype.itemsize)
            raise MemoryBudgetError(
                f"{type(self).__name__}.dense() of {self.n_params} parameters would take {size}; raise max_params to allow it."
            )
        return self._dense()

    def _dense(self) -> Tensor:
        return self._product(torch.eye(self.n_params, dtype=self.dtype, device=self.device))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, P={self.n_params}, {readable_bytes(self.storage_bytes)})"
