"""Chebyshev moments of a symmetric operator and the Jackson-damped density they give: the kernel polynomial method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Chebyshev moments ``values[p, j] = zᵀ T_j(X) z / ‖z‖²`` of every probe, X the operator mapped from [low, high] to [-1, 1]."""

    values: np.ndarray
    squared_norms: np.ndarray
    low: float
    high: float
    products: int
    interrupted: bool

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Eigenvalues mapped to [-1, 1], those outside to its ends."""
        return np.clip((2 * x - self.low - self.high) / (self.high - self.low), -1.0, 1.0)

    @property
    def resolution(self) -> float:
        """Standard deviation of a single eigenvalue in the middle of the interval, (high - low)/2 · π/L."""
        return (self.high - self.low) / 2 * np.pi / self.values.shape[1]


def chebyshev_moments(
    product: Product,
    probes: Tensor,
    num_products: int,
    low: float,
    high: float,
    *,
    deflated: Tensor | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> Moments:
    r"""Compute L = 2 ``num_products`` moments of every probe from ``num_products`` block products.

    .. math:: t_0 = z, \quad t_1 = X z, \quad t_{j+1} = 2 X t_j - t_{j-1}, \qquad
              \mu_{2j} = 2 t_j^\top t_j - \mu_0, \quad \mu_{2j+1} = 2 t_{j+1}^\top t_j - \mu_1

    Parameters
    ----------
    product
        ``(n, K)`` → ``(n, K)``.
    probes
        ``(probes, n)``, projected to the complement of ``deflated`` first.
    num_products
        Products per probe.
    low, high
        An interval that holds all eigenvalues.
    deflated
        Orthonormal columns ``(n, d)`` of an invariant subspace.
    tick
        Called after each block product with the number of its vectors.

    Raises
    ------
    InputError: a moment above μ_0, which no symmetric operator with its eigenvalues in the interval has. NonFiniteError: NaN or infinity.

    Notes
    -----
    Source: Weiße, Wellein, Alvermann and Fehske, Rev. Mod. Phys. 78 (2006), sections II.A to II.D.
    """
    middle, half = (low + high) / 2, (high - low) / 2

    def project(t: Tensor) -> Tensor:
        return t if deflated is None else t - (t @ deflated) @ deflated.T

    def apply(t: Tensor) -> Tensor:
        return project((product(t.T).T - middle * t) / half)

    def dots(s: Tensor, t: Tensor) -> np.ndarray:
        return (s.double() * t.double()).sum(1).cpu().numpy()

    before = project(project(probes))
    mu_0 = dots(before, before)
    found, done, interrupted = [mu_0], 0, False
    current = before
    try:
        for step in range(num_products):
            current, before = (apply(current) if step == 0 else 2 * apply(current) - before), current
            if step == 0:
                mu_1 = dots(current, before)
                found.append(mu_1)
            else:
                found += [2 * dots(before, before) - mu_0, 2 * dots(current, before) - mu_1]
            done += 1
            _check(found[-2:], mu_0, done, probes.dtype)
            tick(len(probes))
    except KeyboardInterrupt:
        interrupted = True
        if not done:
            raise
    kept = mu_0 > 0
    values = np.stack(found[: 2 * done], axis=1)
    values[kept] /= mu_0[kept, None]
    return Moments(values, mu_0, low, high, done * len(probes), interrupted)


def _check(found: list[np.ndarray], mu_0: np.ndarray, step: int, dtype: torch.dtype) -> None:
    largest = np.max([np.abs(mu) for mu in found], axis=0)
    if not np.isfinite(largest).all():
        raise NonFiniteError(
            f"A product in Chebyshev step {step} holds NaN or infinity. The operator probably overflowed: look for very large parameters or "
            "inputs, or use a float64 model."
        )
    if (largest > mu_0 * (1 + 1e4 * step * torch.finfo(dtype).eps)).any():
        raise InputError(
            f"Chebyshev moment {2 * step - 1} is {np.max(largest[mu_0 > 0] / mu_0[mu_0 > 0]):.3g} times the zeroth; at most 1 was expected of a symmetric operator "
            "with all eigenvalues in the interval found for it. The operator is probably not symmetric, or its products differ from call to "
            "call. Check that (A @ u) @ v equals u @ (A @ v), or use method='slq'."
        )


def jackson(count: int) -> np.ndarray:
    """Damping factors of ``count`` moments, which make the density non-negative (methods: section 2.4)."""
    j, angle = np.arange(count), np.pi / (count + 1)
    return ((count - j + 1) * np.cos(angle * j) + np.sin(angle * j) / np.tan(angle)) / (count + 1)


def delta_moments(x: np.ndarray, count: int) -> np.ndarray:
    """Sum of the moments T_j(x_i) of single eigenvalues in [-1, 1], ``(count,)``."""
    return np.cos(np.arange(count)[:, None] * np.arccos(x)).sum(1)


def mass_below(moments: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Integral of the damped density from -1 to each x in [-1, 1], closed form: ``(..., L)`` → ``(..., len(x))``."""
    count = moments.shape[-1]
    damped = moments * jackson(count)
    angle, j = np.arccos(x), np.arange(1, count)
    series = damped[..., 1:] @ (np.sin(j[:, None] * angle) / j[:, None])
    return damped[..., :1] * (1 - angle / np.pi) - 2 / np.pi * series


def rule_of(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Nodes ``(L,)`` and weights ``(probes, L)`` of the Gauss-Chebyshev rule with these moments, undamped: exact below degree L."""
    count = moments.values.shape[1]
    angle = np.pi * (np.arange(count) + 0.5) / count
    twice = np.where(np.arange(count) == 0, 1.0, 2.0)
    weights = (moments.values * twice) @ np.cos(np.arange(count)[:, None] * angle) / count
    nodes = (moments.low + moments.high) / 2 + (moments.high - moments.low) / 2 * np.cos(angle)
    return nodes[::-1].copy(), weights[:, ::-1].copy()
