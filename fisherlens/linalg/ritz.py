"""Ritz pairs with the bounds that their residuals prove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.linalg.krylov import Metric
from fisherlens.linalg.probes import wide

Interval = tuple[float, float]


def rounding(order: int, dtype: torch.dtype, scale: float, skew: float = 0.0) -> float:
    """Error that a product in this dtype may add to an eigenvalue: 4 √n ε times the norm, or the skew part that was measured, if larger.

    A sum of n rounded terms errs by about √n ε/2; 4 √n ε also holds for short sums and for the solver (our choice, tested on random matrices).
    """
    return max(4 * order**0.5 * torch.finfo(dtype).eps * scale, skew)


@dataclass(frozen=True)
class RitzPairs:
    """Rayleigh-Ritz on recomputed products.

    Attributes
    ----------
    values
        Descending, ``(k,)`` float64.
    vectors, images
        In rows, ``(k, n)`` float64 or the dtype of the operator; orthonormal, and the products with them.
    overlap
        Rᵀ B⁻¹ R of the residuals R = A X - B X Θ, ``(k, k)`` float64: its diagonal holds the squared residual norms.
    """

    values: Tensor
    vectors: Tensor
    images: Tensor
    overlap: Tensor

    @property
    def residual_norm(self) -> Tensor:
        """‖A x - λ B x‖, in the norm of B⁻¹ if there is a B."""
        return self.overlap.diagonal().clamp(min=0).sqrt()


def rayleigh_ritz(vectors: Tensor, images: Tensor, metric: Metric | None = None) -> RitzPairs:
    """Best pairs in the span of some vectors (rows), from their products; inner products in float64."""
    x, ax = wide(vectors), wide(images)
    bx = x if metric is None else wide(metric.rows(vectors))
    gram, form = (x @ bx.T).cpu().double(), (x @ ax.T).cpu().double()
    factor = torch.linalg.cholesky((gram + gram.T) / 2)
    half = torch.linalg.solve_triangular(factor, (form + form.T) / 2, upper=False)
    small = torch.linalg.solve_triangular(factor, half.T, upper=False)
    theta, y = torch.linalg.eigh((small + small.T) / 2)
    theta, y = theta.flip(0), y.flip(1)
    turn = torch.linalg.solve_triangular(factor.T, y, upper=True).T.to(x)
    x, ax, bx = turn @ x, turn @ ax, turn @ bx
    residual = ax - theta.to(x)[:, None] * bx
    dual = residual if metric is None else wide(metric.solve_rows(residual.to(vectors.dtype)))
    overlap = (residual @ dual.T).cpu().double()
    return RitzPairs(theta, x.to(vectors.dtype), ax.to(vectors.dtype), (overlap + overlap.T) / 2)


# Widening of bounds where no gap separates a Ritz value from eigenvalues that were not computed; see ``bounds`` (our choice).
_UNSEPARATED = 10


def bounds(
    values: np.ndarray,
    overlap: np.ndarray,
    allowance: float,
    rest: Sequence[Interval],
    *,
    end: str = "",
    resolution: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Two-sided bounds of the eigenvalues that belong to Ritz values, rank by rank.

    .. math:: |\lambda_i - \theta_i| \le \min(\rho, \rho^2/\mathrm{gap}) + \delta

    Values whose intervals touch are one cluster, as each of them could mean the same eigenvalue; ρ is then the spectral norm of the cluster's
    residual block, which bounds as many eigenvalues as there are values (Kahan; Parlett 1998, theorem 11.5.1). The second form needs a
    gap to everything else, which is certified where the other clusters and the intervals of ``rest`` leave one (Kato and Temple; Mathias
    1998). Without a gap, as for the last value asked for, an eigenvalue that is not resolved yet may lie closer than its residual tells: the
    residual of a mixture of close eigenvectors is their weighted spread, so the bound there is 10 ρ, and no less than ``resolution``. At an end
    of the spectrum one side needs no residual: the i-th largest eigenvalue is never below the i-th largest Ritz value (Cauchy).

    Parameters
    ----------
    values
        Ritz values, descending, ``(k,)``.
    overlap
        Inner products of the residuals, ``(k, k)``.
    allowance
        δ, what rounding of the operator adds.
    rest
        Intervals that hold all other eigenvalues; empty if there are none.
    end
        ``"largest"`` or ``"smallest"`` where the values are the first of that end; else empty.
    resolution
        Spacing below which the iteration that found the values may have left eigenvalues together.

    Returns
    -------
    Lower and upper bounds, ``(k,)`` each.
    """
    groups = [[i] for i in range(len(values))]

    def span(group: list[int]) -> tuple[float, float, float]:
        radius = max(np.linalg.eigvalsh(overlap[np.ix_(group, group)])[-1], 0.0) ** 0.5
        return values[group[-1]] - radius - allowance, values[group[0]] + radius + allowance, radius

    spans = [span(group) for group in groups]
    at = 0
    while at + 1 < len(groups):
        if spans[at][0] > spans[at + 1][1]:
            at += 1
            continue
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
        spans[at : at + 2] = [span(groups[at])]
        at = max(at - 1, 0)
    below, above = np.empty(len(values)), np.empty(len(values))
    for c, (group, (_, _, radius)) in enumerate(zip(groups, spans, strict=True)):
        low, high = values[group[-1]], values[group[0]]
        others = [*rest, *(other[:2] for d, other in enumerate(spans) if d != c)]
        gap = min((max(low - stop, start - high) for start, stop in others), default=np.inf)
        below[group] = above[group] = (
            min(radius, radius**2 / gap) if gap > 0 else max(_UNSEPARATED * radius, resolution)
        )
    if end == "largest":
        below[:] = 0
    if end == "smallest":
        above[:] = 0
    return values - below - allowance, values + above + allowance
