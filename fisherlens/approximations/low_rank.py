"""The Fisher on its leading eigenvectors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.approximations.base import Approximation
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError, readable_bytes, user_level
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.fisher.checks import check_seed
from fisherlens.linalg.dense import eigenpairs, noise_floor
from fisherlens.linalg.lanczos import block_lanczos
from fisherlens.partitions import partition as make_partition

# Order up to which the smaller side is decomposed completely, a second or so in float64 (our choice).
_EXACT_ORDER = 2000
METHODS = ("auto", "exact", "lanczos")


class LowRank(Approximation):
    r"""Best approximation of F of rank k, its leading eigenpairs; with ``remainder`` the mean of the others on the complement.

    .. math:: \hat F = V \Lambda V^\top + \rho (I - V V^\top), \qquad
       \rho = 0 \;\text{ or }\; \rho = \frac{\mathrm{tr} F - \sum_{i \le k} \lambda_i}{P - k}

    It is one block: no coupling is dropped, and all its error is within. Among all matrices of rank k it has the smallest error,
    ‖F - F̂‖² = Σ_{i>k} λ_i²; the remainder lowers that by ρ² (P - k) and preserves the trace.

    Parameters
    ----------
    F
        The Fisher operator.
    k
        Eigenpairs, 1 to P. Those that cannot be told from zero are left out: :attr:`rank` says how many there are.
    remainder
        Whether the complement gets the mean eigenvalue ρ that is left there. Without, a solve divides by λ alone there.
    method
        ``"exact"``: the complete spectrum of the smaller of F and its Gram matrix. ``"lanczos"``: block Lanczos on products. ``"auto"``:
        exact up to an order of 2,000 of that side (our choice).
    tol, max_matvecs, seed
        Of Lanczos: the residual norm relative to λ_1, the budget of products (None for max(1000, 50 k)), and the seed of an own generator of
        its start.

    Attributes
    ----------
    values, vectors
        λ_i ``(rank,)`` descending, float64, and V ``(P, rank)`` with orthonormal columns.
    level
        ρ.

    Raises
    ------
    InputError: k outside 1..P, an unknown method. MemoryBudgetError: the vectors, or the matrix of ``"exact"``, over the budget of F.

    Warns
    -----
    ConvergenceWarning: Lanczos spent its budget; F̂ is then F projected on what it found.

    Notes
    -----
    Cost: the eigendecomposition and a half-product per pair, or about 50 products for k = 10; k P numbers; a solve is 4 k P operations.
    Values below the noise floor n ε λ_1 (n: order of that side, ε: of the dtype of F) are left out.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.LowRank(F, 8).rank  # three examples of two classes: F has rank 3
    3
    """

    def __init__(
        self,
        F: Fisher,
        k: int,
        *,
        remainder: bool = False,
        method: str = "auto",
        tol: float = 1e-6,
        max_matvecs: int | None = None,
        seed: int = 0,
    ):
        require_fisher(F)
        k = _check_rank(k, F.n_params)
        budget = _check_options(remainder, method, tol, max_matvecs, k)
        needed = 3 * F.n_params * k * 8
        if needed > F.memory and F.n_params > _EXACT_ORDER:
            fit = max(1, F.memory // (24 * F.n_params))
            raise MemoryBudgetError(
                f"{k} eigenvectors of {F.n_params} parameters take {readable_bytes(needed)} with workspace, over the budget of "
                f"{readable_bytes(F.memory)}. Take k <= {fit}, or raise memory= of the Fisher."
            )
        order = min(F.n_params, F.scores.rows)
        if method == "exact" or (method == "auto" and order <= _EXACT_ORDER):
            values, vectors = _decomposed(F, k)
        else:
            values, vectors = _iterated(F, k, tol, budget, check_seed(seed))
        left, room = F.trace() - values.sum().item(), F.n_params - len(values)
        level = max(left / room, 0.0) if remainder and room else 0.0
        self._take(F, f"low-rank {k}", values, vectors, level)
        self._captured = values  # v_iᵀ F v_i

    def _take(self, F: Fisher, name: str, values: Tensor, vectors: Tensor, level: float) -> None:
        super().__init__(F, name, make_partition(F, {"all": torch.arange(F.n_params, device="cpu")}))
        self.values, self.vectors, self.level = values, vectors.to(F.dtype), level
        self._captured: Tensor | None = None

    @property
    def rank(self) -> int:
        """Eigenpairs kept: at most k, fewer where F has fewer eigenvalues above its noise floor."""
        return len(self.values)

    def on_layer(self, layer: str) -> LowRank:
        """The block of F̂ that belongs to one layer, decomposed again, as a stand-in for ``F.restrict(layer)``."""
        info, part = self.layout.layer(layer), object.__new__(type(self))
        at, above = slice(info.start, info.stop), (self.values - self.level).clamp(min=0)
        own, size, _ = torch.linalg.svd(self.vectors[at].double() * above.sqrt(), full_matrices=False)
        above = size.square()
        kept = above > noise_floor(above, len(above), torch.float64)
        part._take(self._fisher.restrict(layer), self.name, above[kept] + self.level, own[:, kept], self.level)
        return part

    @property
    def storage_bytes(self) -> int:
        """Bytes of vectors and values."""
        return self.vectors.numel() * self.dtype.itemsize + self.values.numel() * 8

    @property
    def solve_flops(self) -> float:
        """One division per eigenvalue."""
        return float(self.rank)

    def _spread(self, v: Tensor, along: Tensor, beside: float) -> Tensor:
        """V diag(along) Vᵀ v + beside · (I - V Vᵀ) v, projected twice so that little of V is left in the second part."""
        c = self.vectors.T @ v
        out = self.vectors @ (along.to(v.dtype)[:, None] * c)
        if beside:
            rest = v - self.vectors @ c
            rest -= self.vectors @ (self.vectors.T @ rest)
            out += beside * rest
        return out

    def _product(self, v: Tensor) -> Tensor:
        return self._spread(v, self.values, self.level)

    def _solve(self, v: Tensor, damping: float) -> Tensor:
        return self._spread(v, 1 / (self.values + damping), 1 / (self.level + damping))

    def _log_determinant(self, damping: float) -> float:
        beside = math.log1p(self.level / damping)
        return torch.log1p(self.values / damping).sum().item() + (self.n_params - self.rank) * beside

    def diagonal(self) -> Tensor:
        """F̂_ii, flat ``(P,)``."""
        above = (self.values - self.level).to(self.dtype)
        return self.vectors.square() @ above + self.level

    def squared_norm(self) -> float:
        """Σ λ_i² + ρ² (P - rank)."""
        return self.values.square().sum().item() + self.level**2 * (self.n_params - self.rank)

    def within_block_error(self) -> float:
        """‖F - F̂‖² = ‖F‖² - 2 ⟨F, F̂⟩ + ‖F̂‖², with ‖F‖ from the smaller of F and its Gram matrix."""
        F = self._fisher
        if self._captured is None:
            images = F.scores.matmat(self.vectors)
            self._captured = images.double().square().sum(0) / F.total_weight
        inner = ((self.values - self.level) * self._captured).sum().item() + self.level * F.trace()
        return max(F.frobenius_norm() ** 2 - 2 * inner + self.squared_norm(), 0.0)


def _check_rank(k: Any, n_params: int) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an int, the number of eigenpairs; got {k!r} of type {type(k).__name__}.")
    if not 1 <= k <= n_params:
        raise InputError(
            f"k must be between 1 and the number of parameters, {n_params}; got {k}. F has at most that many eigenvectors: for all of F, use F itself."
        )
    return int(k)


def _check_options(remainder: Any, method: Any, tol: Any, max_matvecs: Any, k: int) -> int:
    """Refuse options out of range; returns the budget of products."""
    if not isinstance(remainder, bool):
        raise TypeError(f"remainder must be True or False; got {remainder!r}.")
    if method not in METHODS:
        hint = errors.nearest(str(method), METHODS)
        raise InputError(errors.UNKNOWN_NAME.format(what="method", name=method, hint=hint))
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise InputError(
            f"tol must be a number between 0 and 1, the residual relative to the largest eigenvalue; got {tol!r}."
        )
    if max_matvecs is None:
        return max(1000, 50 * k)
    if isinstance(max_matvecs, bool) or not isinstance(max_matvecs, int) or max_matvecs < 2:
        raise InputError(f"max_matvecs must be an integer >= 2, the budget of products; got {max_matvecs!r}.")
    return max_matvecs


def _decomposed(F: Fisher, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs above the noise floor from the complete spectrum of the smaller side."""
    scores, order = F.scores, min(F.n_params, F.scores.rows)
    if order > _EXACT_ORDER and 3 * order**2 * 8 > F.memory:
        raise MemoryBudgetError(
            f"method='exact' decomposes a matrix of order {order}, {readable_bytes(3 * order**2 * 8)} with workspace, over the budget of "
            f"{readable_bytes(F.memory)}. Use method='lanczos', which needs products only, or raise memory= of the Fisher."
        )
    dense = scores.size <= scores.rows
    matrix = (scores.dense() if dense else scores.full_gram()).double() / F.total_weight
    values, vectors = eigenpairs(matrix, "F" if dense else "The Gram matrix of F")
    kept = slice(0, min(k, int((values > noise_floor(values, order, F.dtype)).sum())))
    if dense:
        return values[kept], vectors[:, kept]
    return values[kept], _lifted(F, vectors[:, kept])


def _lifted(F: Fisher, z: Tensor) -> Tensor:
    """Orthonormal eigenvectors Uᵀ z of F from eigenvectors z of the Gram matrix, in order."""
    images = F.scores.rmatmat(z.to(F.dtype).contiguous()).double()
    q, r = torch.linalg.qr(images / torch.linalg.vector_norm(images, dim=0))
    return q * r.diagonal().sign()


def _iterated(F: Fisher, k: int, tol: float, budget: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same by block Lanczos, on the score rows where these are kept and fewer than the parameters."""
    scores, wanted = F.scores, min(k, F.rank_bound)
    by_rows = F.plan.kept and scores.rows < F.n_params

    def on_rows(z: Tensor) -> Tensor:
        return scores.matmat(scores.rmatmat(z.contiguous())) / F.total_weight

    order = scores.rows if by_rows else F.n_params
    found = block_lanczos(
        on_rows if by_rows else F._product,
        order,
        wanted,
        dtype=F.dtype,
        device=F.device,
        tol=tol,
        max_products=budget,
        seed=seed,
    )
    residual = torch.linalg.vector_norm(
        found.images.double() - found.values.to(F.device)[:, None] * found.vectors.double(), dim=1
    )
    settled = int((residual <= tol * found.scale).sum())
    if not found.settled or settled < wanted:
        warnings.warn(
            f"LowRank: {settled} of {wanted} eigenpairs met tol={tol:g} within {found.products} products. F̂ is F projected on the subspace that was "
            "found, which need not be the leading one. Raise max_matvecs or tol, or take a smaller k.",
            ConvergenceWarning,
            stacklevel=user_level(),
        )
    values = found.values.to(F.device)
    above = values > noise_floor(values, order, F.dtype)
    values, vectors = values[above], found.vectors[above].T
    if not by_rows:
        return values, vectors
    # on the side of the parameters the pairs are those of VᵀFV, which differs where they have not converged
    images = found.images[above].double() / values.sqrt()[:, None]
    values, turn = eigenpairs(images @ images.T, "F on the subspace found")
    return values, _lifted(F, vectors) @ turn
