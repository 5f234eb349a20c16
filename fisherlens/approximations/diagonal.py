"""The diagonal of the Fisher: every coupling between two parameters dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.approximations.base import Approximation
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.partitions import partition as make_partition


class Diagonal(Approximation):
    r"""Diagonal of F, exact: what Adam-like methods and elastic weight consolidation keep.

    .. math:: \hat F = \mathrm{diag}(F_{11}, \dots, F_{PP}), \qquad F_{ii} = \frac{1}{W} \sum_{nr} u_{nri}^2

    Squares are averaged over score rows, never averages squared. The same as ``BlockDiagonal(F, "diagonal")``, without a batch of
    1 × 1 blocks.

    Parameters
    ----------
    F
        The Fisher operator.

    Notes
    -----
    Cost: one diagonal of F, 2 N dᵢ dₒ operations for a dense layer of one position; P numbers.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> D = fl.Diagonal(F)
    >>> bool(abs(D.trace() - F.trace()) < 1e-6)
    True
    """

    def __init__(self, F: Fisher):
        require_fisher(F)
        self._take(F, F.diagonal())

    def _take(self, F: Fisher, values: Tensor) -> None:
        super().__init__(F, "diagonal", make_partition(F, "diagonal"))
        self._values = values

    def on_layer(self, layer: str) -> Diagonal:
        """The entries of one layer, as a stand-in for ``F.restrict(layer)``."""
        info, part = self.layout.layer(layer), object.__new__(type(self))
        part._take(self._fisher.restrict(layer), self._values[info.start : info.stop])
        return part

    @property
    def storage_bytes(self) -> int:
        """Bytes of P numbers."""
        return self.n_params * self.dtype.itemsize

    @property
    def solve_flops(self) -> float:
        """One addition per parameter."""
        return float(self.n_params)

    def _product(self, v: Tensor) -> Tensor:
        return self._values[:, None] * v

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        return v / (self._values + damping)[:, None]

    def _log_determinant(self, damping: float) -> float:
        return torch.log1p(self._values.double() / damping).sum().item()

    def diagonal(self) -> Tensor:
        """The diagonal of F itself, flat ``(P,)``."""
        return self._values.clone()

    def squared_norm(self) -> float:
        """Σ_i F_ii²."""
        return self._values.double().square().sum().item()

    def within_block_error(self) -> float:
        """0: the entries are those of F."""
        return 0.0
