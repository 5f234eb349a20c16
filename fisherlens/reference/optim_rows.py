"""Steps of optimizers whose statistic is the rows of one batch, with dense matrices.

``rows`` are the gradients u_n of each example's loss, ``(M, P)``, at the labels of the loss or at sampled ones; ``gradient`` is the mean
gradient of the loss, ``(P,)``; ``blocks`` are flat index tensors, such as those of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks
from fisherlens.reference.matrix import solve


def ngd_step(theta: Tensor, rows: Tensor, gradient: Tensor, *, lr: float, damping: float) -> Tensor:
    """Take a step of exact natural gradient descent: θ - lr (F + λI)⁻¹ g, F = UᵀU / M."""
    return theta - lr * solve(rows.T @ rows / len(rows), gradient, damping)


def blockwise_step(
    theta: Tensor, rows: Tensor, gradient: Tensor, blocks: Blocks, *, lr: float, damping: float
) -> Tensor:
    """Take the same step with a matrix per block: layers (TENGraD at a refresh, without clip and momentum) or units (unit-wise)."""
    u = torch.zeros_like(theta)  # (P,)
    for b in blocks:
        u[b] = solve(rows[:, b].T @ rows[:, b] / len(rows), gradient[b], damping)
    return theta - lr * u


def tengrad_step(
    theta: Tensor, rows: Tensor, gradient: Tensor, blocks: Blocks, m: Tensor | None = None, *,
    lr: float, damping: float, momentum: float = 0.9, weight_decay: float = 0.0, kl_clip: float = 1e-2
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take a step of TENGraD by its first rule (June 2021): returns θ and m. What is in no block moves along its gradient.

    P_b = (U_bᵀU_b / M + λI)⁻¹ g_b with rows of the last refresh; ν = min(1, √(κ / (lr² P·g))); m ← 0.9 m + νP; θ ← θ - lr (m + wθ).
    """
    P = gradient.clone()  # (P,)
    for b in blocks:
        P[b] = solve(rows[:, b].T @ rows[:, b] / len(rows), gradient[b], damping)
    nu = min(1.0, math.sqrt(kl_clip / max(lr**2 * (P @ gradient).item(), 1e-300)))
    m = nu * P if m is None else momentum * m + nu * P
    return theta - lr * (m + weight_decay * theta), m


def fngd_step(
    theta: Tensor, rows: Tensor, blocks: Blocks, state: Mapping[str, Any] | None = None, *,
    lr: float, damping: float, epoch_steps: int, scalar: bool = False
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Take a step of FNGD without momentum, for batches of one size M: returns θ and the state to hand to the next step.

    In the first epoch c = (K + λI)⁻¹ 1, K = U_b U_bᵀ / M, and c̄ ← (t c̄ + c)/(t + 1) by position; always θ_b ← θ_b - lr (1/M) Σ_n c̄_n u_nb.
    ``scalar``: the mean of c̄ in place of c̄.
    """
    M, state = len(rows), state or {"t": 0, "c": [0.0 for _ in blocks]}
    t, c, u = state["t"], list(state["c"]), torch.zeros_like(theta)
    for i, b in enumerate(blocks):
        if t < epoch_steps:
            fresh = solve(rows[:, b] @ rows[:, b].T / M, rows.new_ones(M), damping)  # (M,)
            c[i] = (t * c[i] + fresh) / (t + 1)
        used = c[i].mean().expand(M) if scalar else c[i]
        u[b] = rows[:, b].T @ used / M
    return theta - lr * u, {"t": t + 1, "c": c}


def reduced_rows(patches: Tensor, scores: Tensor) -> Tensor:
    """Rows of a convolution from its sums over T positions: (1/T) (Σ_t g_nt) (Σ_t a_nt)ᵀ and Σ_t g_nt, ``(M, d_o d_i + d_o)``.

    ``patches`` a, ``(M, T, d_i)``; ``scores`` g of the un-averaged loss, ``(M, T, d_o)``.
    """
    g = scores.sum(1)  # (M, d_o)
    return torch.cat([torch.einsum("no,ni->noi", g, patches.mean(1)).flatten(1), g], dim=1)
