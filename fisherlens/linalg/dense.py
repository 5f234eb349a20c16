"""Dense symmetric matrices: Gram products, eigenvalues and Cholesky factors that never fail silently."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError, NumericalWarning, user_level
from fisherlens.linalg import lapack
from fisherlens.linalg.threads import side_by_side

# Matrices that are factored on one thread together, in float64, and numbers from which solves are worth several (our choices).
_PIECE_BYTES = 8 * 2**20
_SHARED = 2**21


def require_finite(matrix: Tensor, what: str) -> None:
    """Raise where a matrix holds NaN or infinity: LAPACK may answer with finite numbers even then."""
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(
            f"{what} holds NaN or infinity, so a decomposition of it would be meaningless. The scores probably overflowed: "
            "look for very large parameters or inputs, or use a float64 model."
        )


def self_gram(rows: Tensor, tile: int = 256) -> Tensor:
    """Symmetric product X Xᵀ, shape ``(m, m)``, with the upper triangle mirrored rather than computed."""
    m = rows.shape[0]
    if m <= tile:
        return rows @ rows.T
    out = rows.new_empty(m, m)
    for i in range(0, m, tile):
        block = rows[i : i + tile]
        torch.mm(block, rows[: i + tile].T, out=out[i : i + tile, : i + tile])
        out[:i, i : i + tile] = out[i : i + tile, :i].T
    return out


def add_self_gram(out: Tensor, rows: Tensor, tile: int = 256) -> None:
    """Add X Xᵀ to the lower triangle of ``out``, in place; what stands above the tiles of the diagonal is left for :func:`mirror`."""
    for i in range(0, len(rows), tile):
        out[i : i + tile, : i + tile].addmm_(rows[i : i + tile], rows[: i + tile].T)


def mirror(out: Tensor, tile: int = 64) -> Tensor:
    """Copy the lower triangle of a square matrix onto the upper one, in place."""
    for i in range(0, len(out), tile):
        corner = out[i : i + tile, i : i + tile]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        out[:i, i : i + tile] = out[i : i + tile, :i].T
    return out


def _symmetric(matrix: Tensor, what: str) -> Tensor:
    require_finite(matrix, what)
    matrix = matrix.double() if matrix.device.type != "mps" else matrix.cpu().double()
    return (matrix + matrix.mT) / 2  # LAPACK reads one triangle only


def eigenvalues(matrix: Tensor, what: str = "the matrix") -> Tensor:
    """All eigenvalues of a symmetric matrix, descending, computed in float64."""
    symmetric = _symmetric(matrix, what)
    try:
        return torch.linalg.eigvalsh(symmetric).flip(-1)
    except torch.linalg.LinAlgError:
        _warn_fallback(symmetric, what)
        return torch.linalg.eigvalsh(symmetric.cpu()).flip(-1).to(symmetric.device)


def eigenpairs(matrix: Tensor, what: str = "the matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors in columns, in float64; ``(..., n, n)`` is a batch."""
    symmetric = _symmetric(matrix, what)
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        _warn_fallback(symmetric, what)
        values, vectors = (x.to(symmetric.device) for x in torch.linalg.eigh(symmetric.cpu()))
    return values.flip(-1), vectors.flip(-1)


def _warn_fallback(matrix: Tensor, what: str) -> None:
    warnings.warn(
        f"The eigensolver on {matrix.device} failed for {what} of shape {tuple(matrix.shape)}; computed on the CPU in float64 instead.",
        NumericalWarning,
        stacklevel=user_level(),
    )


def noise_floor(values: Tensor, order: int, dtype: torch.dtype) -> float:
    """Eigenvalues below n ε λ_max cannot be told from zero (n: order, ε: of the dtype that accumulated the entries)."""
    top = values.abs().max().item() if values.numel() else 0.0
    return order * torch.finfo(dtype).eps * top


def _factor_of_copy(matrix: Tensor, damping: float) -> Tensor | None:
    """Factors of M + damping I in float64 with a single copy; None where LAPACK is not at hand, or not content."""
    if not matrix.numel() or not lapack.knows(torch.float64, matrix.device):
        return None
    n = matrix.shape[-1]
    damped = torch.empty(matrix.shape, dtype=torch.float64, device="cpu").copy_(matrix)
    if not torch.isfinite(damped.sum()):  # also in the triangle that is not read
        return None
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    pieces = damped.view(-1, n, n).split(max(1, _PIECE_BYTES // (8 * n**2)))
    definite = all(side_by_side(lapack.factor, pieces, damped.device))
    return damped.mT.tril_() if definite else None


def damped_cholesky(matrix: Tensor, damping: float, what: str = "the matrix") -> Tensor:
    """Lower Cholesky factor of M + damping I in float64, for one matrix or a batch ``(..., n, n)``.

    A positive semi-definite matrix can lose definiteness to rounding; then 10 ε tr(M)/n is added once (with a
    warning) before giving up. Source of the retry: our choice, a few units of the rounding error of the trace.
    """
    factor = _factor_of_copy(matrix, damping)
    if factor is not None:
        return factor
    symmetric = _symmetric(matrix, what)
    n = symmetric.shape[-1]
    identity = torch.eye(n, dtype=symmetric.dtype, device=symmetric.device)
    factor, info = torch.linalg.cholesky_ex(symmetric + damping * identity)
    if (info == 0).all():
        return factor
    trace = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    jitter = 10 * torch.finfo(symmetric.dtype).eps * trace / n + (trace == 0)
    factor, info = torch.linalg.cholesky_ex(symmetric + (damping + jitter) * identity)
    if (info != 0).any():
        raise NonFiniteError(
            f"{what} + {damping:g} I is not positive definite, even with 10 ε tr/n added. The damping is below the rounding error of the "
            "matrix: raise it, or use a float64 model."
        )
    warnings.warn(
        f"{what} + {damping:g} I was not positive definite in float64; 10 ε tr/n was added. Raise the damping.",
        NumericalWarning,
        stacklevel=user_level(),
    )
    return factor


def solve_factored(factor: Tensor, b: Tensor) -> Tensor:
    """Solve L Lᵀ X = B for lower factors ``(..., n, n)`` and few columns ``(..., n, K)``; batches several times faster than torch.cholesky_solve."""
    if factor.dim() == 3 and factor.numel() >= _SHARED and torch.get_num_threads() > 1 and factor.device.type == "cpu":
        step = -(-len(factor) // torch.get_num_threads())
        pieces = list(zip(factor.split(step), b.split(step), strict=True))
        return torch.cat(side_by_side(lambda piece: _solve_factored(*piece), pieces, factor.device))
    return _solve_factored(factor, b)


def _solve_factored(factor: Tensor, b: Tensor) -> Tensor:
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def cholesky_in_place(matrices: Tensor) -> tuple[Tensor, bool]:
    """Lower factors of symmetric matrices ``(B, n, n)``, in their memory, and whether all of them are positive definite.

    Above the diagonal the factors hold what was there: they are for triangular solves and determinants. On the CPU each is one call of
    LAPACK without the copies that torch makes of every batch (measured for n = 256: 2.7 times faster).
    """
    if not matrices.is_contiguous() or not lapack.knows(matrices.dtype, matrices.device):
        factor, info = torch.linalg.cholesky_ex(matrices.mT)
        return factor, not bool(info.any())
    definite = lapack.factor(matrices)
    return matrices.mT, definite  # a symmetric matrix is its own transpose, which is the order that LAPACK wants
