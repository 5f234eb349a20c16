"""Diagonal of a symmetric operator from block products, with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherlens.linalg.probes import (
    MIN_PROBES,
    Estimate,
    Probes,
    Product,
    Unit,
    finite,
    leave_one_out,
    leave_out,
    orthonormal_range,
    sketched,
    split,
    wide,
)

DIAGONAL_METHODS = ("hutch++", "hutchinson", "xdiag")


def diagonal(product: Product, probes: Probes, num_matvecs: int, method: str) -> Estimate:
    """Estimate the diagonal of A, ``(n,)``, by one of :data:`DIAGONAL_METHODS`.

    Parameters
    ----------
    product, probes
        The operator, ``(n, K)`` → ``(n, K)``, and where its random vectors come from.
    num_matvecs
        Products to spend.
    method
        ``hutchinson``: Σ z ⊙ Az / Σ z ⊙ z over Gaussian probes (Bekas, Kokiopoulou and Saad 2007). ``hutch++``: exact for the part of A on a
        sketched range, the same on the rest. ``xdiag``: leave-one-out over random signs (Epperly, Tropp and Webber 2024), with an
        indicative error.
    """
    unit = Unit(product)
    if method == "xdiag":
        return unit.undo(xdiag(unit, probes, num_matvecs))
    return unit.undo(_by_regression(unit, probes, num_matvecs, method))


def _by_regression(product: Product, probes: Probes, num_matvecs: int, method: str) -> Estimate:
    """Gaussian probes, alone or beside a sketched range."""
    sketch, k = split(num_matvecs) if method == "hutch++" else (0, num_matvecs)
    sketch = min(sketch, probes.n)
    known, q = 0.0, None
    if sketch:
        q = orthonormal_range(product, probes.gaussian(sketch))
        aq = finite(wide(product(q.to(probes.dtype))))
        known = (q * (2 * aq - q @ (q.T @ aq))).sum(1)  # diag of A - (I - QQᵀ) A (I - QQᵀ)
        if sketch == probes.n:
            return Estimate(known, torch.zeros_like(known), math.inf, 2 * sketch)
    z = probes.gaussian(k)
    x = z if q is None else (wide(z) - q @ (q.T @ wide(z))).to(z.dtype)
    y = finite(wide(product(x)))
    if q is not None:
        y = y - q @ (q.T @ y)
    slope, sem = regression(wide(z), y)
    return Estimate(known + slope, sem, max(k - 1.0, 0.0), 2 * sketch + k)


def regression(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and its standard error of every row of y = R z on that row of z, through the origin.

    With Gaussian z the row y_a = R_aa z_a + Σ_b≠a R_ab z_b is a regression with independent Gaussian errors, so that Student's t with
    k - 1 degrees of freedom holds exactly, for every operator and number of probes k.
    """
    k = z.shape[1]
    square = z.square().sum(1)
    slope = (z * y).sum(1) / square
    if k < MIN_PROBES:
        return slope, torch.full_like(slope, math.nan)
    residual = (y - slope[:, None] * z).square().sum(1)
    return slope, (residual / (k - 1) / square).sqrt()


def xdiag(product: Product, probes: Probes, num_matvecs: int) -> Estimate:
    """Diagonal from a sketch and probes that change roles, each left out in turn; the error is indicative, see :func:`traces.xtrace`."""
    k = max(1, min(num_matvecs // 2, probes.n))
    omega = probes.signs(k)
    q, r, aq, whole = sketched(product, omega)
    known = (q * aq).sum(1)  # diag QQᵀA
    if whole or k == probes.n:
        return Estimate(known, torch.zeros_like(known), math.inf, 2 * k)
    s = leave_out(r)
    left_out = q @ s
    samples = known[:, None] - left_out * (aq @ s) + wide(omega) * left_out * (s * r).sum(0)
    return leave_one_out(samples.T, 2 * k)
