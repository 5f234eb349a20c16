"""Solves with F + λI: directly through the smaller of its two sides, or by conjugate gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherlens.errors import ConvergenceWarning, NumericalWarning, user_level
from fisherlens.linalg.cg import conjugate_gradients
from fisherlens.linalg.dense import damped_cholesky
from fisherlens.linalg.precision import OwnPrecision
from fisherlens.scores import ScoreMatrix

# Order up to which a float64 Cholesky factor is taken for granted: 6000² doubles are 275 MiB (our choice).
DIRECT_LIMIT = 6000


class Preconditioner(Protocol):
    """Anything that solves approximately: ``solve(v, damping)``."""

    def solve(self, v: Tensor, damping: float) -> Tensor: ...


class Solver(OwnPrecision):
    """Damped solves and determinants of F = UᵀU/W, from one float64 Cholesky factor that is kept for the last damping.

    Parameters
    ----------
    scores
        U.
    total_weight
        W.
    """

    def __init__(self, scores: ScoreMatrix, total_weight: float):
        self.scores, self.total_weight = scores, total_weight
        self.dense_side = scores.size <= scores.rows
        self.order = min(scores.size, scores.rows)
        self._kept: tuple[float, Tensor] | None = None

    @property
    def direct(self) -> bool:
        """Whether the smaller side is small enough to factor."""
        return self.order <= DIRECT_LIMIT

    def factor(self, damping: float) -> Tensor:
        """Cholesky factor of UᵀU/W + λI or U Uᵀ/W + λI, the smaller one, in float64."""
        if self._kept is None or self._kept[0] != damping:
            matrix = self.scores.dense() if self.dense_side else self.scores.full_gram()
            matrix = matrix.double() / self.total_weight
            top = torch.linalg.matrix_norm(matrix).item()
            if math.isfinite(top) and damping < torch.finfo(self.scores.dtype).eps * top:
                warnings.warn(
                    f"The damping {damping:g} is below the rounding error of {self.scores.dtype} scores (ε ‖F‖ = "
                    f"{torch.finfo(self.scores.dtype).eps * top:.1e}), so directions of small eigenvalues are noise. Raise the damping, or use "
                    "model.double().",
                    NumericalWarning,
                    stacklevel=user_level(),
                )
            self._kept = (damping, damped_cholesky(matrix, damping, "F" if self.dense_side else "The Gram matrix of F"))
        return self._kept[1]

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(F + λI)⁻¹ V for ``(P, K)``: Cholesky of F, or Woodbury (1/λ)[V - Uᵀ(U Uᵀ + WλI)⁻¹ U V]."""
        factor = self.factor(damping)
        if self.dense_side:
            return torch.cholesky_solve(v.double(), factor).to(v.dtype)
        z = torch.cholesky_solve(self.scores.matmat(v).double(), factor) / self.total_weight
        return (v - self.scores.rmatmat(z.to(v.dtype))) / damping

    def solve_row_space(self, d: Tensor, damping: float) -> Tensor:
        """(F + λI)⁻¹ Uᵀd/W = Uᵀ(U Uᵀ/W + λI)⁻¹ d/W, which has none of Woodbury's cancellation; d is ``(rows,)``."""
        z = torch.cholesky_solve(d.double()[:, None], self.factor(damping)) / self.total_weight
        return self.scores.rmatmat(z.to(self.scores.dtype))[:, 0]

    def log_determinant(self, damping: float) -> float:
        """Log det(I + F/λ)."""
        return 2 * self.factor(damping).diagonal().log().sum().item() - self.order * math.log(damping)

    def inverse_diagonal(self, damping: float) -> Tensor:
        """Diagonal of (F + λI)⁻¹, float64 ``(P,)``.

        With L Lᵀ = U Uᵀ/W + λI: (F + λI)⁻¹ = (1/λ)[I - (L⁻¹U)ᵀ(L⁻¹U)/W], so one triangular solve over columns in chunks.
        """
        factor = self.factor(damping)
        if self.dense_side:
            return torch.cholesky_inverse(factor).diagonal().clone()
        pieces = []
        for layer in self.scores.layers:
            for chunk in layer.column_chunks():
                half = torch.linalg.solve_triangular(factor, layer.columns(chunk).double(), upper=False)
                pieces.append((1 - half.square().sum(0) / self.total_weight) / damping)
        return torch.cat(pieces).clamp(min=0)

    def iterate(
        self,
        product: Callable[[Tensor], Tensor],
        v: Tensor,
        damping: float,
        preconditioner: Preconditioner | None,
        tol: float | None,
        max_steps: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Conjugate gradients on ``product`` (F + λI), with a warning where they end early."""
        goal = tol if tol is not None else (1e-10 if v.dtype == torch.float64 else 1e-5)
        precondition = None if preconditioner is None else lambda r: preconditioner.solve(r, damping)
        found = conjugate_gradients(product, v, precondition=precondition, tol=goal, max_steps=max_steps)
        if not found.converged:
            warnings.warn(
                f"Conjugate gradients ended after {found.steps} steps with relative residual {found.residual.max().item():.1e} "
                f"(wanted {goal:.0e}). The partial solution is returned; pass a preconditioner, more max_steps or a larger damping.",
                ConvergenceWarning,
                stacklevel=user_level(),
            )
        return found.solution, {
            "method": "cg",
            "steps": found.steps,
            "residual": found.residual,
            "converged": found.converged,
        }
