"""Steps of optimizers, read from their algorithm boxes, with dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks
from fisherlens.reference.matrix import solve


def cw_ngd_step(
    theta: Tensor, rows: Tensor, blocks: Blocks, state: Mapping[str, Any] | None = None, norm: Tensor | None = None, *,
    lr: float = 1e-3, damping: float = 1e-7, ema: float = 0.99, gradient_ema: float = 0.9, momentum: float = 0.0
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """Take a step of component-wise natural gradient descent: returns θ and the state to hand to the next step.

    H_b ← 0.99 H_b + 0.01 mean_n g_nb g_nbᵀ and m ← 0.9 m + 0.1 ḡ, divided by 1 - 0.99^t and 1 - 0.9^t when used; then
    θ_b ← θ_b - lr (Ĥ_b + λI)⁻¹ m̂_b, without a square root. Normalisation layers (``norm``: their flat indices, outside
    the blocks) move by m̂ / (√ĥ + 1e-8), h ← 0.99 h + 0.01 ḡ². ``rows``: g_n, gradients of each example's loss, true
    labels, ``(M, P)``. Source: released variant of arXiv 2210.05268 (github.com/tranvansang/cw-ngd); the 1e-8 is ours.
    """
    state = state or {"t": 0, "m": 0.0, "h": 0.0, "u": 0.0, "H": [0.0 for _ in blocks]}
    t, mean = state["t"] + 1, rows.mean(0)  # (P,)
    m = gradient_ema * state["m"] + (1 - gradient_ema) * mean  # (P,)
    h = ema * state["h"] + (1 - ema) * mean**2  # (P,)
    m_hat, h_hat = m / (1 - gradient_ema**t), h / (1 - ema**t)
    H, u = [], torch.zeros_like(theta)  # (P,)
    for b, old in zip(blocks, state["H"], strict=True):
        moment = rows.new_zeros(len(b), len(b))  # (s, s)
        for g in rows[:, b]:  # (s,)
            moment += torch.outer(g, g) / len(rows)
        H.append(ema * old + (1 - ema) * moment)
        u[b] = solve(H[-1] / (1 - ema**t), m_hat[b], damping)
    if norm is not None:
        u[norm] = m_hat[norm] / (h_hat[norm].sqrt() + 1e-8)
    u = u + momentum * state["u"]
    return theta - lr * u, {"t": t, "H": H, "m": m, "h": h, "u": u}
