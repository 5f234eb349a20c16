"""Conjugate gradients for several right-hand sides at once, on the device of the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CGResult:
    """Solution ``(P, K)``, relative residual per column (recomputed from the operator), steps and whether all converged."""

    solution: Tensor
    residual: Tensor
    steps: int
    converged: bool


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-8,
    max_steps: int = 1000,
) -> CGResult:
    """Solve A X = B for a symmetric positive definite A; every column runs its own recurrence on shared products.

    scipy's ``cg`` takes one column at a time and CPU arrays only; products of a block cost far less than of its columns.
    """
    x = torch.zeros_like(rhs)
    r = rhs.clone()
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = (r * z).sum(0)
    norm_b = torch.linalg.vector_norm(rhs, dim=0)
    active = norm_b > 0
    steps = 0
    while active.any() and steps < max_steps:
        q = product(p)
        curvature = (p * q).sum(0)
        active = active & (curvature > 0)
        alpha = torch.where(active, rz / curvature.where(active, 1), 0)
        x += alpha * p
        r -= alpha * q
        steps += 1
        active = active & (torch.linalg.vector_norm(r, dim=0) > tol * norm_b)
        z = r if precondition is None else precondition(r)
        rz_new = (r * z).sum(0)
        p = z + torch.where(active, rz_new / rz.where(rz != 0, 1), 0) * p
        rz = rz_new
    residual = torch.linalg.vector_norm(product(x) - rhs, dim=0) / norm_b.where(norm_b > 0, 1)
    return CGResult(x, residual, steps, bool((residual <= 10 * tol).all()))
