"""What a dense symmetric matrix F ``(P, P)`` says: size, spectrum, damped solves, effective dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError
from fisherlens.reference.network import _finite


def diagonal(F: Tensor) -> Tensor:
    """F_ii, ``(P,)``."""
    return F.diagonal()


def trace(F: Tensor) -> float:
    """Σ_i F_ii: the mean squared length of the scores."""
    return F.trace().item()


def frobenius_norm(F: Tensor) -> float:
    """‖F‖ = √Σ_ij F_ij²."""
    return F.square().sum().sqrt().item()


def spectrum(F: Tensor) -> Tensor:
    """All P eigenvalues, descending."""
    return torch.linalg.eigvalsh(_finite(F + F.T, "A matrix") / 2).flip(0)


def gram(U: Tensor, total_weight: float) -> Tensor:
    """U Uᵀ / W, ``(rows, rows)``: the same non-zero eigenvalues as F."""
    return U @ U.T / total_weight


def damped(F: Tensor, damping: float) -> Tensor:
    """F + λ I."""
    if not 0 < damping < math.inf:
        raise InputError(errors.DAMPING.format(damping=damping))
    return _finite(F, "A matrix") + damping * torch.eye(len(F), dtype=F.dtype, device=F.device)


def solve(F: Tensor, v: Tensor, damping: float) -> Tensor:
    """(F + λI)⁻¹ v for ``(P,)`` or ``(P, K)``."""
    return torch.linalg.solve(damped(F, damping), v)


def effective_dimension(F: Tensor, damping: float) -> float:
    """Σ_i λ_i / (λ_i + λ) = tr F (F + λI)⁻¹: how many directions the data determine better than the damping does."""
    return solve(F, F, damping).trace().item()


def log_determinant(F: Tensor, damping: float) -> float:
    """Σ_i ln(1 + λ_i/λ) = ln det(I + F/λ)."""
    return torch.logdet(damped(F, damping) / damping).item()
