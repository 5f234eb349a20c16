"""Blocks of a dense F: their couplings, what dropping these costs, and what the data tell about each block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlens.reference.matrix import (
    damped,
    effective_dimension,
    frobenius_norm,
    log_determinant,
    solve,
    spectrum,
    trace,
)

Blocks = Sequence[Tensor]


def block(F: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """F_ij, the rows of one block and the columns of another (by default the same)."""
    return F[rows][:, rows if columns is None else columns]


def block_diagonal(F: Tensor, blocks: Blocks) -> Tensor:
    """F with every coupling between blocks set to zero, ``(P, P)``."""
    F_b = torch.zeros_like(F)
    for b in blocks:
        F_b[b[:, None], b] = block(F, b)
    return F_b


def coupling(F: Tensor, blocks: Blocks) -> Tensor:
    """ρ_ij = ‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖), ``(B, B)`` in [0, 1]; 0 where a block is zero. ρ² is linear CKA, uncentred."""
    norms = torch.stack([torch.stack([block(F, i, j).norm() for j in blocks]) for i in blocks])  # (B, B)
    own = norms.diagonal()  # (B,)
    return (norms / own.outer(own).sqrt()).where(norms > 0, 0)


def coupling_noise_floor(F: Tensor, blocks: Blocks, num_data: int, num_columns: int) -> Tensor:
    """√(tr F_ii tr F_jj / (N R ‖F_ii‖ ‖F_jj‖)), ``(B, B)``: the coupling that N R rows give to uncorrelated blocks.

    R = C - 1 for exact categorical. Its square is the mean of ρ² over random rotations of the rows of one block.
    """
    size = torch.stack([block(F, b).trace() for b in blocks])  # (B,)
    own = torch.stack([block(F, b).norm() for b in blocks])  # (B,)
    return (size.outer(size) / (num_data * num_columns * own.outer(own))).sqrt().where(own.outer(own) > 0, 0)


def permuted_block(U: Tensor, total_weight: float, rows: Tensor, columns: Tensor, order: Tensor) -> Tensor:
    """F_ij with example n of block i paired with example order[n] of block j, for one score row per example."""
    return U[:, rows].T @ U[order][:, columns] / total_weight


def energy_captured(F: Tensor, blocks: Blocks) -> float:
    """Σ_b ‖F_bb‖² / ‖F‖², in [1/B, 1]; 1 for F = 0."""
    return _ratio(sum(frobenius_norm(block(F, b)) ** 2 for b in blocks), frobenius_norm(F) ** 2, 1.0)


def energy_noise_floor(F: Tensor, blocks: Blocks) -> float:
    """Mean energy of a random partition of these sizes s: [D + (‖F‖² - D) Σ s(s-1) / P(P-1)] / ‖F‖², D = Σ F_ii²."""
    D, total = F.diagonal().square().sum().item(), frobenius_norm(F) ** 2
    together = _ratio(
        sum(math.comb(len(b), 2) for b in blocks), math.comb(len(F), 2)
    )  # chance that i and j share a block
    return _ratio(D + (total - D) * together, total, 1.0)


def natural_gradient_cosine(F: Tensor, F_hat: Tensor, g: Tensor, damping: float) -> float:
    """Euclidean cosine between the natural gradients (F̂ + λ)⁻¹ g and (F + λ)⁻¹ g."""
    p, p_hat = solve(F, g, damping), solve(F_hat, g, damping)
    return _ratio((p @ p_hat).item(), (p.norm() * p_hat.norm()).item(), math.nan)


def decrease_ratio(F: Tensor, F_hat: Tensor, g: Tensor, damping: float) -> float:
    """η = (g·p̂)² / [(p̂ᵀ (F + λ) p̂) (g·p)] in (0, 1]: the decrease kept, at the best length of p̂."""
    p, p_hat = solve(F, g, damping), solve(F_hat, g, damping)
    return _ratio((g @ p_hat).item() ** 2, (p_hat @ damped(F, damping) @ p_hat * (g @ p)).item(), math.nan)


def preconditioned_spectrum(F: Tensor, F_hat: Tensor, damping: float) -> Tensor:
    """Eigenvalues μ of M = (F̂ + λ)^-½ (F + λ) (F̂ + λ)^-½, descending: in (0, B], mean 1, for blocks."""
    values, vectors = torch.linalg.eigh(damped(F_hat, damping))  # (P,), (P, P)
    inverse_root = vectors / values.sqrt() @ vectors.T
    return spectrum(inverse_root @ damped(F, damping) @ inverse_root)


def condition_number(F: Tensor, F_hat: Tensor, damping: float) -> float:
    """μ_max / μ_min of M."""
    mu = preconditioned_spectrum(F, F_hat, damping)
    return (mu[0] / mu[-1]).item()


def gaussian_kl(F: Tensor, F_hat: Tensor, damping: float) -> float:
    """KL(N(0, (F̂+λ)⁻¹) ‖ N(0, (F+λ)⁻¹)) = ½ [tr (F̂+λ)⁻¹(F+λ) - P + ln det(F̂+λ) - ln det(F+λ)] in nat.

    For the block-diagonal part of F the trace equals P, and what is left is the total correlation between the blocks.
    """
    ratio = solve(F_hat, damped(F, damping), damping).trace().item()
    return (ratio - len(F) + log_determinant(F_hat, damping) - log_determinant(F, damping)) / 2


def _ratio(over: float, under: float, otherwise: float = 0.0) -> float:
    return over / under if under > 0 else otherwise


def information(F: Tensor, theta: Tensor, blocks: Blocks, damping: float, num_data: int) -> dict[str, Tensor]:
    """Measure each block, ``(B,)`` per entry.

    ``information`` tr F_bb; ``share`` of tr F; ``saliency`` ½ Σ θ_i² F_ii; ``effective_dimension``
    tr F_bb (F_bb + λ)⁻¹; ``std_bound`` √(((F + λ)⁻¹)_ii / N), the Cramér–Rao width, root mean square over the block.
    """
    told = torch.stack([block(F, b).trace() for b in blocks])  # (B,)
    variance = torch.linalg.inv(damped(F, damping)).diagonal() / num_data  # (P,)
    return {
        "information": told,
        "share": told / told.new_tensor(trace(F) or 1.0),
        "saliency": torch.stack([(theta[b] ** 2 * F.diagonal()[b]).sum() / 2 for b in blocks]),
        "effective_dimension": told.new_tensor([effective_dimension(block(F, b), damping) for b in blocks]),
        "std_bound": torch.stack([variance[b].mean().sqrt() for b in blocks]),
    }
