"""What verification claims on a quadratic loss, from the definitions: which learning rates are stable, and how steps grow at one."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_rate(F: Tensor, preconditioner: Tensor | None = None) -> float:
    """Largest r for which δ ← δ - r P⁻¹Fδ does not grow: 2 over the largest eigenvalue of P⁻¹F; P = I by default."""
    step = F if preconditioner is None else torch.linalg.solve(preconditioner, F)  # (P, P), similar to a symmetric one
    return 2 / torch.linalg.eigvals(step).real.max().item()


def energies(F: Tensor, start: Tensor, rate: float, steps: int, preconditioner: Tensor | None = None) -> list[float]:
    """δᵀFδ before each of some steps δ ← δ - r P⁻¹Fδ."""
    delta, found = start, []
    for _ in range(steps):
        found.append((delta @ F @ delta).item())
        g = F @ delta
        delta = delta - rate * (g if preconditioner is None else torch.linalg.solve(preconditioner, g))
    return found
