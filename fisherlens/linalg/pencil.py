"""Extreme eigenvalues of a pair of symmetric positive definite operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse.linalg

# Up to this order LAPACK's dense solver is both faster and exact.
DENSE_ORDER = 256


def largest_ratio(
    a: Callable[[Tensor], Tensor],
    m: Callable[[Tensor], Tensor],
    m_inverse: Callable[[Tensor], Tensor],
    order: int,
    like: Tensor,
    *,
    tol: float = 1e-3,
    max_products: int = 2000,
) -> tuple[float, bool]:
    """Largest μ of A x = μ M x by ARPACK (Lanczos in the M inner product), and whether it met ``tol`` (relative).

    The start vector comes from an own generator: ARPACK would take it from global random state.
    """
    import scipy.sparse.linalg  # here, because it would double the time of ``import fisherlens``

    def wrap(product: Callable[[Tensor], Tensor]) -> scipy.sparse.linalg.LinearOperator:
        def apply(v: np.ndarray) -> np.ndarray:
            tensor = torch.as_tensor(v.reshape(-1), dtype=like.dtype, device=like.device)
            return product(tensor).double().cpu().numpy()

        return scipy.sparse.linalg.LinearOperator((order, order), matvec=apply, dtype=np.float64)

    start = np.random.default_rng(0).standard_normal(order)
    options: dict[str, Any] = {
        "k": 1,
        "which": "LA",
        "v0": start,
        "tol": tol,
        "ncv": min(order, 24),
        "return_eigenvectors": False,
    }
    try:
        values = scipy.sparse.linalg.eigsh(
            wrap(a), M=wrap(m), Minv=wrap(m_inverse), maxiter=max_products // 24, **options
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        values = error.eigenvalues
        return (float(values.max()) if len(values) else float("nan")), False
    return float(values.max()), True


def dense_extremes(a: Tensor, m: Tensor) -> tuple[float, float]:
    """Smallest and largest μ of A x = μ M x for matrices, by LAPACK in float64."""
    import scipy.linalg

    values = scipy.linalg.eigh(a.double().cpu().numpy(), m.double().cpu().numpy(), eigvals_only=True)
    return float(values[0]), float(values[-1])
