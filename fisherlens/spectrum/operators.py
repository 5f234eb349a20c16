"""One view of everything that has a spectrum: a Fisher, a Hessian, an approximation, or a plain callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.fisher import Fisher
from fisherlens.linalg.precision import OwnPrecision

Product = Callable[[Tensor], Tensor]


class Operator(OwnPrecision):
    """A symmetric operator given as a plain callable, for every spectrum function.

    Parameters
    ----------
    matvec
        v ``(n,)`` → A v ``(n,)``; with ``block=True`` also V ``(n, K)`` → A V ``(n, K)`` in one call.
    n
        Order of the operator.
    dtype, device
        Of the vectors that ``matvec`` takes and gives.
    block
        Whether ``matvec`` takes blocks of vectors; without, a block is a loop over its columns.
    psd
        Whether no eigenvalue is negative. Only what needs it (logarithms, effective dimension, Nyström) asks.

    Raises
    ------
    InputError, NonFiniteError: an answer of another shape or dtype, or with NaN or infinity; found at the product.

    Examples
    --------
    >>> d = torch.arange(1.0, 5.0, dtype=torch.float64)
    >>> A = Operator(lambda v: d * v, 4, torch.float64)
    >>> A @ torch.ones(4, dtype=torch.float64)
    tensor([1., 2., 3., 4.], dtype=torch.float64)
    """

    kind = "callable"

    def __init__(
        self,
        matvec: Product,
        n: int,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        *,
        block: bool = False,
        psd: bool = False,
    ):
        if not callable(matvec):
            raise TypeError(f"matvec must be a callable v -> A v; got {type(matvec).__name__}.")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InputError(f"n must be an integer >= 1, the order of the operator; got {n!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype must be torch.float32 or torch.float64, that of the vectors; got {dtype!r}.")
        self.matvec, self.n_params, self.dtype, self.device = matvec, n, dtype, torch.device(device)
        self.block, self.psd = block, psd
        self.shape = (n, n)

    def __repr__(self) -> str:
        return f"Operator(n={self.n_params}, {str(self.dtype).removeprefix('torch.')}, {self.device}, psd={self.psd})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """A v for ``(n,)`` or a block ``(n, K)``."""
        if v.ndim not in (1, 2) or v.shape[0] != self.n_params:
            raise InputError(
                f"A @ v takes v of shape ({self.n_params},) or ({self.n_params}, K); got {tuple(v.shape)}."
            )
        if v.ndim == 1 or self.block:
            return self._answer(v)
        out = torch.empty_like(v)
        for k in range(v.shape[1]):  # each is copied: a callable may write all its answers into one tensor
            out[:, k] = self._answer(v[:, k].contiguous())
        return out

    def _answer(self, v: Tensor) -> Tensor:
        counted, shape = (
            not v.is_inference(),
            v.shape,
        )  # a tensor of inference mode does not count what is written into it
        before = v._version if counted else 0
        out = self.matvec(v)
        if counted and v._version != before:
            raise InputError(
                "The callable of the operator wrote into the vector that it was given, which the caller goes on to use. Let it return a new tensor: A @ v or "
                "v * d rather than v.mul_(d)."
            )
        if not isinstance(out, Tensor) or out.shape != shape or out.dtype != self.dtype:
            found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"The callable of the operator must map a {self.dtype} tensor of shape {tuple(shape)} to one of the same; it gave {found}. "
                "Check n and dtype, or convert inside the callable; a callable for blocks of vectors needs block=True."
            )
        if not torch.isfinite(out).all():
            raise NonFiniteError(
                "The callable of the operator gave NaN or infinity. Look at where it overflows, or use float64."
            )
        return out.detach()


@dataclass(frozen=True)
class Symmetric:
    """What an estimator of spectra asks of an operator.

    Where an operator knows its score rows and they are fewer than its parameters, estimators may work on the row side, U Uᵀ/W of
    order ``rows``, which has the same non-zero eigenvalues: a product there costs the same and its vectors are shorter.

    Attributes
    ----------
    source
        What the user gave; recorded in results.
    n, dtype, device
        Order, and dtype and device of its vectors.
    product
        ``(n, K)`` → ``(n, K)``.
    psd
        Whether no eigenvalue is negative (but for rounding).
    rank_bound
        No more eigenvalues than this are non-zero; n where nothing is known.
    rows
        Order of the row side, or None where there is none, or it is not smaller.
    row_product
        ``(rows, K)`` → ``(rows, K)``: U Uᵀ Z / W.
    lift
        ``(rows, K)`` → ``(n, K)``: Uᵀ Z / √W, which takes an eigenvector of the row side to √λ times one of the operator.
    """

    source: Any
    n: int
    dtype: torch.dtype
    device: torch.device
    product: Product
    psd: bool
    rank_bound: int
    rows: int | None = None
    row_product: Product | None = None
    lift: Product | None = None


def as_symmetric(operator: Any) -> Symmetric:
    """View a Fisher, a Hessian, an :class:`Operator`, or an approximation (``@``, ``shape``, ``dtype``, ``device``)."""
    if isinstance(operator, Fisher):
        return _of_fisher(operator)
    missing = [name for name in ("shape", "dtype", "device", "__matmul__") if not hasattr(operator, name)]
    if missing or isinstance(operator, Tensor):
        raise TypeError(
            f"Expected a fisherlens.Fisher, one of its approximations, or fl.Operator(matvec, n, dtype, device); got {type(operator).__name__}. Of a model, build "
            "the operator first: F = fl.Fisher(model, data, likelihood=...). A matrix A enters as fl.Operator(lambda v: A @ v, len(A), A.dtype, A.device, block=True)."
        )
    n = int(operator.shape[0])
    psd = bool(getattr(operator, "psd", True))  # approximations of a Fisher are semi-definite
    return Symmetric(operator, n, operator.dtype, torch.device(operator.device), lambda v: operator @ v, psd, n)


def _of_fisher(F: Fisher) -> Symmetric:
    if F.kind == "hessian":
        return Symmetric(F, F.n_params, F.dtype, F.device, lambda v: F @ v, False, F.n_params)
    facts = {"source": F, "n": F.n_params, "dtype": F.dtype, "device": F.device, "psd": True}
    rows = F.scores.rows
    if rows >= F.n_params or F.plan.streamed or F.plan.linearised:
        # streamed scores answer a fused product in one pass; two halves would be two
        return Symmetric(product=lambda v: F @ v, rank_bound=F.rank_bound, **facts)
    return Symmetric(
        product=lambda v: F @ v,
        rank_bound=F.rank_bound,
        rows=rows,
        row_product=lambda z: F.scores.matmat(F.scores.rmatmat(z)) / F.total_weight,
        lift=lambda z: F.scores.rmatmat(z) / F.total_weight**0.5,
        **facts,
    )
