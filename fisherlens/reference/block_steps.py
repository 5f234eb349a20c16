"""What claims on training predict, from a dense F: removals, block steps in function space, and steps along stale directions."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks, block_diagonal
from fisherlens.reference.matrix import damped, solve


def removal_divergence(F: Tensor, theta: Tensor, index: Tensor) -> float:
    """½ θ_bᵀ F_bb θ_b: the divergence, to second order, when the parameters b are set to zero."""
    theta_b = theta[index]  # (s,)
    return (theta_b @ F[index][:, index] @ theta_b / 2).item()


def best_step(F: Tensor, g: Tensor, direction: Tensor, damping: float) -> Tensor:
    """α d with α = g·d/(dᵀ(F + λ)d): where the quadratic model is lowest along -d."""
    return (g @ direction) / (direction @ damped(F, damping) @ direction) * direction


def shared_way(F: Tensor, g: Tensor, blocks: Blocks, damping: float, metric: Tensor) -> float:
    """1 - ‖p - α p_b‖²/‖p‖² in uᵀMu: with M = F + λ the decrease ratio, with M = F what divergences of short steps measure."""
    p = solve(F, g, damping)
    gap = p - best_step(F, g, solve(block_diagonal(F, blocks), g, damping), damping)
    return 1 - ((gap @ metric @ gap) / (p @ metric @ p)).item()


def promised_decrease(F: Tensor, g: Tensor, direction: Tensor, damping: float) -> float:
    """(g·d)²/(2 dᵀ(F + λ)d): how far the quadratic model falls along -d."""
    step = best_step(F, g, direction, damping)
    return (g @ step - step @ damped(F, damping) @ step / 2).item()


def linear_gaussian_loss(F: Tensor, g: Tensor, delta: Tensor) -> float:
    """ℓ(θ + δ) - ℓ(θ) = g·δ + ½ δᵀFδ, exact where the outputs are linear in θ and the likelihood is Gaussian."""
    return torch.add(g @ delta, delta @ F @ delta, alpha=0.5).item()
