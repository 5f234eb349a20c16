"""Minimal residuals for symmetric, possibly indefinite systems, several right-hand sides at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Restarts from the true residual, where rounding made the recurrence believe in a smaller one (our choice).
_RESTARTS = 3


@dataclass(frozen=True)
class MinresResult:
    """Solution ``(P, K)``, relative residual per column (recomputed from the operator), steps and whether all converged."""

    solution: Tensor
    residual: Tensor
    steps: int
    converged: bool


def minres(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-8,
    max_steps: int = 1000,
) -> MinresResult:
    """Solve A X = B for a symmetric A by MINRES (Paige and Saunders 1975); every column has its own recurrence on shared products.

    Conjugate gradients break down where vᵀAv = 0; MINRES minimises ‖B - A X‖ over the Krylov space of a definite or indefinite A.
    ``precondition`` applies an approximate inverse that must be symmetric positive definite. scipy's ``minres`` takes one column
    at a time, CPU arrays only, and stops at a residual relative to ‖A‖‖x‖ instead of ‖b‖.
    """
    x = torch.zeros_like(rhs)
    norm_b = torch.linalg.vector_norm(rhs, dim=0)
    scale = norm_b.where(norm_b > 0, 1)
    r, steps = rhs.clone(), 0
    relative = (norm_b > 0).to(rhs.dtype)
    for _ in range(_RESTARTS + 1):
        if not (relative > tol).any() or steps >= max_steps:
            break
        correction, taken = _recurrence(product, r, precondition, tol / relative.clamp(min=tol), max_steps - steps)
        x, steps = x + correction, steps + taken
        r = rhs - product(x)
        before, relative = relative, torch.linalg.vector_norm(r, dim=0) / scale
        if not (relative < before / 2).any():
            break
    return MinresResult(x, relative, steps, bool((relative <= 10 * tol).all()))


def _recurrence(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor] | None,
    tol: Tensor,
    max_steps: int,
) -> tuple[Tensor, int]:
    """One run of the recurrence from zero; ``tol`` per column, relative to ‖rhs‖ in the norm of the preconditioner."""
    apply = precondition if precondition is not None else lambda r: r
    tiny = torch.finfo(rhs.dtype).tiny
    x, w, w_old = torch.zeros_like(rhs), torch.zeros_like(rhs), torch.zeros_like(rhs)
    r_old, r = torch.zeros_like(rhs), rhs
    y = apply(r)
    beta = (r * y).sum(0).clamp(min=0).sqrt()
    first, beta_old = beta.clone(), torch.ones_like(beta)
    active = beta > 0
    residual = beta.clone()
    cosine, sine = -torch.ones_like(beta), torch.zeros_like(beta)
    delta_bar, epsilon = torch.zeros_like(beta), torch.zeros_like(beta)
    size = torch.zeros_like(beta)  # Σ of squares of T, a bound of ‖A‖²
    steps = 0
    while active.any() and steps < max_steps:
        # Lanczos: T gains the column (beta, alpha, beta_next)
        v = (y / beta.where(active, 1)).where(active, 0)  # a finished column adds nothing
        q = product(v)
        if steps:
            q = q - (beta / beta_old.where(active, 1)) * r_old
        alpha = (v * q).sum(0)
        q = q - (alpha / beta.where(active, 1)) * r
        r_old, r, beta_old = r, q, beta
        y = apply(r)
        beta = (r * y).sum(0).clamp(min=0).sqrt()
        size = size + alpha.square() + beta.square() + beta_old.square() * (steps > 0)
        # QR of T by rotations: the last one acts on the new column, a new one removes beta
        epsilon_old = epsilon
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon, delta_bar = sine * beta, -cosine * beta
        # ‖A r‖ / ‖r‖ before this step: where it vanishes, r is in the null space and x is the least-squares solution
        active = active & (torch.hypot(gamma_bar, cosine * beta) > 100 * torch.finfo(rhs.dtype).eps * size.sqrt())
        gamma = torch.hypot(gamma_bar, beta).clamp(min=tiny)
        cosine, sine = gamma_bar / gamma, beta / gamma
        w_old, w = w, (v - epsilon_old * w_old - delta * w) / gamma
        x = x + torch.where(active, cosine * residual, 0) * w.where(active, 0)
        residual = torch.where(active, sine * residual, residual)
        steps += 1
        active = active & (residual > tol * first) & (beta > 0)
    return x, steps
