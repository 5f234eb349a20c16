"""Steps of optimizers whose matrices are Kronecker products, dense; the factors themselves are in :mod:`fisherlens.reference.kronecker`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks
from fisherlens.reference.matrix import damped, solve


def step_with(theta: Tensor, gradient: Tensor, blocks: Blocks, matrices: Sequence[Tensor], *, lr: float, damping: float) -> Tensor:  # fmt: skip
    """Take θ_b - lr (F̂_b + λI)⁻¹ g_b for given blocks F̂_b: KFAC with exact damping (G ⊗ A), EKFAC, and any other."""
    u = torch.zeros_like(theta)  # (P,)
    for b, F_hat in zip(blocks, matrices, strict=True):
        u[b] = solve(F_hat, gradient[b], damping)
    return theta - lr * u


def ekfac_mean_block(gradient: Tensor, count: float, Q: Tensor) -> Tensor:
    """Q diag(s) Qᵀ, s = M (Qᵀ ḡ)²: EKFAC's second moments from the mean gradient of M examples alone, Q = Q_G ⊗ Q_A."""
    return Q @ torch.diag(count * (Q.T @ gradient) ** 2) @ Q.T


def recursive_inverse(Q: Tensor, columns: Tensor, beta: float) -> Tensor:
    """(β Q⁻¹ + (1 - β) V Vᵀ)⁻¹, ``(r, r)``: one update of projected Kronecker natural gradient."""
    return torch.linalg.inv(beta * torch.linalg.inv(Q) + (1 - beta) * columns @ columns.T)


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Update an inverse by BFGS, (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ with ρ = 1 / sᵀy: afterwards H y = s."""
    rho, eye = 1 / (s @ y), torch.eye(len(s), dtype=s.dtype)
    return (eye - rho * torch.outer(s, y)) @ H @ (eye - rho * torch.outer(y, s)) + rho * torch.outer(s, s)


def powell_damped(H: Tensor, s: Tensor, y: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Damp s, then y, so that 0.2 yᵀHy ≤ sᵀy and ε sᵀs ≤ sᵀy: what K-BFGS does before :func:`bfgs`."""
    sy, yHy = s @ y, y @ H @ y
    if sy < 0.2 * yHy:
        theta = 0.8 * yHy / (yHy - sy)
        s = theta * s + (1 - theta) * H @ y
    sy, ss = s @ y, s @ s
    if sy <= epsilon * ss:
        theta = (1 - epsilon) * ss / (ss - sy)
        y = theta * y + (1 - theta) * s
    return s, y


def kbfgs_first_factor(A: Tensor, mean: Tensor, damping: float) -> Tensor:
    """H_A of K-BFGS after its first batch: (A + √λ I)⁻¹, and one update with s = H_A ā, y = (A + √λ I) s."""
    M = damped(A, math.sqrt(damping))
    H = torch.linalg.inv(M)
    s = H @ mean
    return bfgs(H, s, M @ s)
