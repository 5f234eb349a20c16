"""The smaller of the two matrices that have the non-zero spectrum of an operator, formed and in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher
from fisherlens.linalg.krylov import require_finite_block
from fisherlens.spectrum.operators import Symmetric

# A matrix of this order is formed whatever the budget says.
_ALWAYS = 2000
# Order up to which a matrix is formed from products with unit vectors, as for the dense() of operators; nothing larger is decomposed then.
DENSE_LIMIT = 5000
_COLUMNS = 64
_MEMORY = 2 * 2**30
# Products of a symmetric operator may differ from their mirror image by rounding, not by more than this share.
_SKEW = 1e-3


@dataclass(frozen=True)
class SmallerMatrix:
    """A decomposable matrix: that of the operator (``dense``), or the Gram matrix of its kept score rows; ``spent`` products formed it."""

    matrix: Tensor
    dense: bool
    spent: int

    @property
    def words(self) -> str:
        """What was decomposed, for ``method``."""
        return "dense matrix" if self.dense else "Gram matrix"


def is_dense_side(view: Symmetric) -> bool:
    """Whether the operator's own matrix is the smaller, or the only one."""
    F = view.source
    return not isinstance(F, Fisher) or F.kind == "hessian" or F.n_params <= F.n_rows


def smaller_matrix(view: Symmetric) -> SmallerMatrix:
    """Form it, within the memory budget; see the errors for what does not fit."""
    F, dense = view.source, is_dense_side(view)
    order = view.n if dense else F.n_rows
    _require_memory(view, order)
    if not isinstance(F, Fisher):
        return SmallerMatrix(_from_products(view), True, view.n)
    if F.kind == "hessian":
        return SmallerMatrix(F.matrix(what="The complete spectrum"), True, F.n_params)
    return SmallerMatrix((F.scores.dense() if dense else F.scores.gram()).double() / F.total_weight, dense, 0)


def lift_rows(view: Symmetric, z: Tensor) -> Tensor:
    """Uᵀ Z/√W for Z on the kept score rows, ``(rows, K)`` → ``(P, K)``."""
    scores = view.source.scores
    return scores.rmatmat(embed_rows(view, z)) / view.source.total_weight**0.5


def embed_rows(view: Symmetric, z: Tensor) -> Tensor:
    """Vectors on the kept score rows as vectors on all of them; the others carry no weight."""
    scores = view.source.scores
    if scores.kept is None:
        return z
    whole = torch.zeros(scores.rows, z.shape[1], dtype=z.dtype, device=z.device)
    whole[scores.kept] = z
    return whole


def multiply_rows(view: Symmetric, z: Tensor) -> Tensor:
    """U Uᵀ Z/W on the kept score rows."""
    scores = view.source.scores
    out = scores.matmat(scores.rmatmat(embed_rows(view, z))) / view.source.total_weight
    return out if scores.kept is None else out[scores.kept]


def _from_products(view: Symmetric) -> Tensor:
    out = torch.empty(view.n, view.n, dtype=torch.float64, device=view.device)
    for start in range(0, view.n, _COLUMNS):
        stop = min(start + _COLUMNS, view.n)
        unit = torch.zeros(view.n, stop - start, dtype=view.dtype, device=view.device)
        unit[start:stop].fill_diagonal_(1)
        out[:, start:stop] = view.product(unit)
    require_finite_block(out, "A product with the operator")
    skew, size = (out - out.T).abs().max().item(), out.abs().max().item()
    if skew > _SKEW * size:
        raise InputError(
            f"The operator must be symmetric; its entries (i, j) and (j, i) differ by up to {skew:.1e}, where the largest entry is {size:.1e}. "
            "Make the callable a symmetric map, such as (A v + Aᵀ v)/2, and one that does not change between calls."
        )
    return out


def _require_memory(view: Symmetric, order: int) -> None:
    F = view.source
    needed = 3 * order**2 * 8  # the matrix, its symmetric copy and the solver's workspace
    if not isinstance(F, Fisher):
        if order > DENSE_LIMIT or needed > max(_MEMORY, 24 * _ALWAYS**2):
            raise MemoryBudgetError(
                f"The complete spectrum of {type(F).__name__} takes {order} products, one per parameter, and a matrix of {order} x {order}, "
                f"{readable_bytes(needed)} with workspace; the cap is {DENSE_LIMIT} parameters. fl.top_eigenvalues finds the leading eigenvalues without the "
                "matrix, and fl.spectral_density the distribution of all of them; a BlockDiagonal is decomposed block by block."
            )
        return
    if needed <= F.memory or order <= _ALWAYS:
        return
    if F.kind == "hessian":
        raise MemoryBudgetError(
            f"The complete spectrum of a Hessian needs the matrix itself, {order} x {order}, {readable_bytes(needed)} with workspace, over the budget of "
            f"{readable_bytes(F.memory)}. Look at one layer with F.restrict(name), at both ends with fl.top_eigenvalues, or raise memory=."
        )
    fit = int((F.memory / 24) ** 0.5)
    raise MemoryBudgetError(
        f"The complete spectrum needs the smaller of {F.n_params} x {F.n_params} (dense) and {F.n_rows} x {F.n_rows} (Gram), {readable_bytes(needed)} with "
        f"workspace, over the budget of {readable_bytes(F.memory)}. An order of {fit} would fit: about {max(1, fit // F.n_columns)} examples, or "
        "kind='mc' with one column each, or raise memory=. fl.top_eigenvalues(F, k) finds the leading eigenvalues, and fl.spectral_density(F) the "
        "distribution, without the matrix."
    )
