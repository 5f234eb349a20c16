"""Structured stand-ins for a dense F ``(P, P)``: quasi-diagonal, low rank, shared blocks, factors projected on a basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks, block


def quasi_diagonal(F: Tensor, units: Blocks, biases: Sequence[int | None]) -> Tensor:
    """F_ii, F_0i beside the bias 0 of each unit, and F_ij = F_0i F_0j / F_00 for its weights i ≠ j; without a bias the diagonal."""
    F_hat = torch.diag(F.diagonal())
    for unit, bias in zip(units, biases, strict=True):
        if bias is None or F[bias, bias] == 0:
            continue
        for i in unit.tolist():
            for j in unit.tolist():
                if i != j:
                    F_hat[i, j] = F[bias, i] * F[bias, j] / F[bias, bias]
    return F_hat


def low_rank(F: Tensor, k: int, remainder: bool = False) -> Tensor:
    """Σ_{i≤k} λ_i v_i v_iᵀ of the largest eigenvalues; with the remainder, the mean of the others on all other directions."""
    values, vectors = torch.linalg.eigh(F)  # ascending, (P,), (P, P)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = values.clone()
    kept[k:] = values[k:].mean() if remainder and k < len(F) else 0
    return vectors @ torch.diag(kept) @ vectors.T


def shared_blocks(F: Tensor, families: Sequence[Blocks]) -> Tensor:
    """Every block of a family replaced by the mean of the family; zero elsewhere. A family of one is that block."""
    F_hat = torch.zeros_like(F)
    for family in families:
        mean = torch.stack([block(F, b) for b in family]).mean(0)  # (s, s)
        for b in family:
            F_hat[b[:, None], b] = mean
    return F_hat


def projected_factor(A: Tensor, basis: Tensor) -> Tensor:
    """P (Pᵀ A P) Pᵀ + s (I - P Pᵀ), s = (tr A - tr Pᵀ A P) / (d - r) ≥ 0, for P ``(d, r)`` with orthonormal columns."""
    core, (d, r) = basis.T @ A @ basis, basis.shape  # (r, r)
    level = max(((A.trace() - core.trace()) / (d - r)).item(), 0.0) if r < d else 0.0
    return basis @ core @ basis.T + level * (torch.eye(d, dtype=A.dtype) - basis @ basis.T)
