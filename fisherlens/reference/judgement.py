"""Stand-ins for a dense F judged: the two parts of their error, and what they predict for a step."""

from __future__ import annotations

import math

from torch import Tensor

from fisherlens.reference.blocks import Blocks, block, preconditioned_spectrum
from fisherlens.reference.matrix import damped, frobenius_norm, solve


def error_split(F: Tensor, F_hat: Tensor, blocks: Blocks) -> tuple[float, float]:
    """(‖F‖² - Σ_b ‖F_bb‖²)/‖F‖² and Σ_b ‖F_bb - F̂_bb‖²/‖F‖²: coupling dropped, and error within blocks."""
    total = frobenius_norm(F) ** 2
    kept = sum(frobenius_norm(block(F, b)) ** 2 for b in blocks)
    wrong = sum(frobenius_norm(block(F - F_hat, b)) ** 2 for b in blocks)
    return (total - kept) / total, wrong / total


def metric_cosine(F: Tensor, F_hat: Tensor, g: Tensor, damping: float) -> float:
    """Cosine of (F̂ + λ)⁻¹ g and (F + λ)⁻¹ g in the inner product uᵀ (F + λ) v."""
    p, p_hat, M = solve(F, g, damping), solve(F_hat, g, damping), damped(F, damping)
    return (p @ M @ p_hat / ((p @ M @ p) * (p_hat @ M @ p_hat)).sqrt()).item()


def predicted_steps(F: Tensor, F_hat: Tensor, damping: float) -> float:
    """Steps in which the slowest mode shrinks by e, each step taking it to 1 - r μ, at rate r = 2/(μ_max + μ_min)."""
    mu = preconditioned_spectrum(F, F_hat, damping)
    return -1 / math.log((1 - 2 / (mu[0] + mu[-1]) * mu).abs().max().item())
