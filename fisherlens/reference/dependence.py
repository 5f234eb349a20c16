"""Dependence between random vectors beyond correlation, and between positions that share a weight, straight from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor


def u_centred(a: Tensor) -> Tensor:
    """a_ij - row_i/(n-2) - column_j/(n-2) + total/((n-1)(n-2)) off the diagonal, 0 on it, for a zero diagonal, ``(n, n)``."""
    n = len(a)
    out = torch.zeros_like(a)  # (n, n)
    for i in range(n):
        for j in range(n):
            if i != j:
                out[i, j] = a[i, j] - (a[i].sum() + a[:, j].sum()) / (n - 2) + a.sum() / ((n - 1) * (n - 2))
    return out


def u_product(a: Tensor, b: Tensor) -> Tensor:
    """Σ_{i≠j} ã_ij b̃_ij / (n (n-3)): an unbiased estimate of the squared (distance) covariance."""
    return (u_centred(a) * u_centred(b)).sum() / (len(a) * (len(a) - 3))


def _ratio(a: Tensor, b: Tensor) -> float:
    own = u_product(a, a) * u_product(b, b)
    return (u_product(a, b) / own.sqrt()).item() if own > 0 else 0.0


def distance_correlation(x: Tensor, y: Tensor) -> float:
    """Bias-corrected squared distance correlation of n samples of two vectors, ``(n, p)`` and ``(n, q)``; may be negative."""
    return _ratio((x[:, None] - x).norm(dim=2), (y[:, None] - y).norm(dim=2))


def hsic(x: Tensor, y: Tensor) -> float:
    """Normalised unbiased HSIC with Gaussian kernels exp(-d²/2σ²), σ the (lower) median distance of two samples, or of two different ones if that is 0."""
    kernels = []
    for z in (x, y):
        d = (z[:, None] - z).norm(dim=2)  # (n, n)
        every = d[torch.triu(torch.ones_like(d), 1) > 0].sort().values
        different = every if every[(len(every) - 1) // 2] > 0 else every[every > 0]
        kernel = torch.exp(-(d**2) / (2 * different[(len(different) - 1) // 2] ** 2))
        kernels.append(kernel - torch.diag(kernel.diagonal()))
    return _ratio(*kernels)


def position_traces(u: Tensor) -> Tensor:
    """Σ_nr ⟨u_nrt, u_nrp⟩ of what each position adds to the score rows, ``(rows, T, p)`` → ``(T, T)``; their sum is W tr F."""
    return torch.stack([torch.stack([(u[:, t] * u[:, p]).sum() for p in range(u.shape[1])]) for t in range(u.shape[1])])


def position_coupling(u: Tensor) -> Tensor:
    """‖U_tᵀ U_p‖ / √(‖U_tᵀU_t‖ ‖U_pᵀU_p‖) as if every position had weights of its own, ``(T, T)``."""
    rows = u.unbind(1)  # T of (rows, p)
    norms = torch.stack([torch.stack([(a.T @ b).norm() for b in rows]) for a in rows])
    own = norms.diagonal()
    return (norms / own.outer(own).sqrt()).where(norms > 0, 0)


def false_discovery(p: Tensor) -> Tensor:
    """Benjamini and Hochberg's q of m p-values, ``(m,)``: min over the tests k that are no smaller of p_k m / #{j: p_j ≤ p_k}."""
    share = torch.stack([value * len(p) / (p <= value).sum() for value in p])
    return torch.stack([share[p >= value].min() for value in p]).clamp(max=1)
