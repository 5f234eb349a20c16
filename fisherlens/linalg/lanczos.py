"""Block Lanczos with thick restart: extreme eigenpairs of a symmetric operator that is known by its products only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.linalg.krylov import Krylov, Metric, Product, require_finite_block
from fisherlens.linalg.ritz import rounding

# Share of the block steps so far that a search for missed copies takes. From a random start a Krylov space needs about
# log(4n)/(log(4n) + log(1/tol²)) of the steps to see an eigenvalue that it needed all of them to settle: 0.35 at n = 10⁶, tol = 1e-6.
_SEARCH = 0.4
# That share is asymptotic: runs of fewer steps are searched by as many again (few distinct eigenvalues, say).
_FULL_SEARCH = 10
# Bytes of basis vectors before a restart, where the caller names no number of them (our choice).
BASIS_BYTES = 2**30
# Vectors of one product at the end, when residuals are recomputed.
_AT_ONCE = 32
_CORRECTIONS = 3


@dataclass(frozen=True)
class Selection:
    r"""Which eigenvalues are wanted.

    ``"largest"`` and ``"smallest"`` are ends of the real line, ``"magnitude"`` is the largest \\|λ\\|; ``"positive"`` the smallest of a
    semi-definite operator above ``floor`` times its norm, with what cannot be told from zero behind them.
    """

    which: str = "largest"
    floor: float = 0.0

    def order(self, theta: Tensor, scale: float) -> Tensor:
        """Places of ascending values in the order of preference."""
        if self.which == "largest":
            return torch.arange(len(theta) - 1, -1, -1, device=theta.device)
        if self.which == "magnitude":
            return theta.abs().argsort(descending=True, stable=True)
        zeros = self.zeros(theta, scale)
        places = torch.arange(len(theta), device=theta.device)
        return torch.cat([places[zeros:], places[:zeros].flip(0)])

    def zeros(self, theta: Tensor, scale: float) -> int:
        """How many of ascending values are passed over because they cannot be told from zero."""
        return int((theta <= self.floor * scale).sum()) if self.which == "positive" else 0


@dataclass(frozen=True)
class LanczosResult:
    r"""What a run found, in the order of preference.

    Attributes
    ----------
    values
        Ritz values, ``(k',)`` float64, with k' ≤ k.
    vectors, images
        Ritz vectors in rows ``(k', n)``, orthonormal (in B, if given), and the operator's products with them, recomputed at the end.
    scale, skew
        Norm of the operator to a few digits; largest \\|uᵀ(A v) - vᵀ(A u)\\| seen, which is its own rounding.
    products, steps
        Products spent, the last ones included; blocks of them.
    complete
        Whether the basis spans the whole space, so that every eigenvalue is known.
    settled
        Whether the k wanted met the tolerance and a search for missed copies, where one was needed, found none.
    interrupted
        Whether Ctrl-C ended the run.
    """

    values: Tensor
    vectors: Tensor
    images: Tensor
    scale: float
    skew: float
    products: int
    steps: int
    complete: bool
    settled: bool
    interrupted: bool


def block_lanczos(
    product: Product,
    n: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    selection: Selection | None = None,
    block: int = 4,
    tol: float = 1e-6,
    relative: bool = False,
    max_products: int = 1000,
    max_basis: int | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    on_products: Callable[[int], None] | None = None,
) -> LanczosResult:
    r"""Find k extreme eigenpairs of a symmetric operator by block Lanczos with thick restart.

    With an orthonormal basis V of the Krylov space and T = VᵀAV, eigenpairs (θ, y) of T give Ritz pairs (θ, V y), and

    .. math:: A V = V T + Q S, \qquad \|A V y - \theta V y\| = \|S y\|.

    With a metric B the operator is B⁻¹A and inner products are uᵀBv, which solves A x = θ B x.

    Parameters
    ----------
    product
        ``(n, K)`` → ``(n, K)``, in ``dtype`` on ``device``.
    n, k
        Order of the operator; pairs wanted (no more than n are returned).
    dtype, device
        Of the vectors; the projected problem is float64 on the CPU.
    selection
        Which eigenvalues; None for the largest.
    block
        Vectors per product. A block of at least k holds every copy of a repeated eigenvalue with probability one; after a smaller one has
        settled, fresh random vectors search for missed copies.
    tol, relative
        Stop when all residuals are below tol times the operator's norm, or with ``relative`` tol times \|θ\| of each pair; never below
        5 ε times the norm, and with half of tol, so that the recomputed residuals meet it.
    max_products
        Budget of products, at least 2, those that recompute the residuals included. A run that spends it returns what it has.
    max_basis
        Basis vectors before a restart, at least 3 (k + block); None for as many as fit 1 GiB, at most 300 or 4 (k + block).
    metric
        B and its inverse.
    seed
        Of an own generator for the start block and the refills.
    on_products
        Called with the number of products after each block.

    Raises
    ------
    InputError: the operator is not symmetric, or B not positive definite. NonFiniteError: a product holds NaN or infinity.

    Notes
    -----
    Every block is orthogonalised twice against the whole basis. A direction shorter than 10 ε times the operator's norm is a breakdown: the
    Krylov space is exhausted, which is normal as a Fisher has rank ≤ N R. A random direction takes its place, which finds repeated
    eigenvalues and zeros. Restart of Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000); the rest is derived.
    Cost: the products, 4 m n FLOPs per basis vector of m, and m n floats.
    """
    k = min(k, n)
    selection = selection or Selection()
    block = max(1, min(block, n, max_products // 8))  # a small budget is better spent on steps than on width
    bytes_each = n * dtype.itemsize * (1 if metric is None else 2)
    if max_basis is None:
        max_basis = min(max(300, 4 * (k + block)), BASIS_BYTES // bytes_each)
    capacity = min(n, max(max_basis, 3 * (k + block)))
    krylov = Krylov(n, dtype, torch.device(device), capacity=capacity, metric=metric, seed=seed)
    run = _Run(krylov, product, k, selection, tol, relative, max_products, on_products or (lambda spent: None))
    krylov.start(block)
    run.iterate(searched=block >= k)
    return run.result()


class _Run:
    """The decisions of one run: when to test, restart, search, correct and stop."""

    def __init__(
        self,
        krylov: Krylov,
        product: Product,
        k: int,
        selection: Selection,
        tol: float,
        relative: bool,
        budget: int,
        on_products: Callable[[int], None],
    ):
        self.krylov, self.product, self.k, self.selection = krylov, product, k, selection
        self.tol, self.relative, self.budget, self.on_products = tol, relative, budget, on_products
        self.spent = self.steps = 0
        self.unit: float | None = None
        self.settled = self.interrupted = False
        self.pairs: tuple[Tensor, Tensor, Tensor] | None = None  # values, vectors, images

    def iterate(self, searched: bool) -> None:
        """Run until the recomputed residuals hold what the recurrence promised, or the budget ends."""
        for correction in range(_CORRECTIONS + 1):
            self.settled = self._grow(searched or bool(correction))
            missed = self._recompute()
            if self.interrupted or not self.settled or not missed or correction == _CORRECTIONS:
                break
            if self.spent + 2 * self.k > self.budget:
                break
            self.krylov.correct(*self.pairs)

    def _multiply(self, rows: Tensor) -> Tensor:
        """A X in units of ``unit``: squares of very large or small products would leave the range of float32."""
        images = self.product(rows.T)
        require_finite_block(images, "A product with the operator")
        if self.unit is None:
            most = images.abs().max().item()
            self.unit = 1.0 if most == 0 or 1e-8 < most < 1e8 else 2.0 ** math.floor(math.log2(most))
        images = images if self.unit == 1 else images / self.unit
        self.spent += len(rows)
        self.on_products(self.spent)
        return images

    def _grow(self, searched: bool) -> bool:
        """Grow the basis until the wanted pairs settle; returns whether they did."""
        krylov, first, next_test, until, settling = self.krylov, self.steps, 0, 0, 0
        target: Tensor | None = None  # values before a search, which it should not change by more than their residuals
        drift = 0.0
        while len(krylov.pending):
            after = krylov.size + len(krylov.pending)
            if self.spent + len(krylov.pending) + min(self.k, after) > self.budget:
                return False
            try:
                krylov.absorb(self._multiply(krylov.pending))
            except KeyboardInterrupt:
                if not krylov.size:
                    raise  # nothing to return yet
                self.interrupted = True
                return False
            self.steps += 1
            full = krylov.size + len(krylov.pending) > krylov.capacity
            if krylov.size < max(self.k, next_test) and len(krylov.pending) and not full:
                continue
            next_test = krylov.size + krylov.size // 20
            theta, y = krylov.ritz()
            order = self.selection.order(theta, krylov.scale)
            wanted = order[: self.k]
            values, estimate = theta[wanted], krylov.estimate(y[:, wanted])
            reached = len(wanted) == self.k and bool((estimate <= self._goal(values, 0.5)).all())
            if reached and (searched or not len(krylov.pending)):
                return True
            if reached and self.steps >= until:
                slack, drift = drift + estimate.max().item() + self._rounding(), estimate.max().item()
                if target is not None and bool(((values - target).abs() <= slack).all()):
                    return True
                count = len(krylov.pending) * (1 if target is None else 2)
                settling = self.steps - first if target is None else settling
                target, until = values, self.steps + max(math.ceil(_SEARCH * settling), min(settling, _FULL_SEARCH))
                count = min(count, self.k)
                if krylov.size + 2 * count > krylov.capacity:
                    krylov.restart(values, y[:, wanted])
                krylov.refresh(count)
                next_test = 0
            elif full:
                kept = self._kept(theta, order)
                if kept is None:
                    return False
                krylov.restart(theta[kept], y[:, kept])
                next_test = 0
        return krylov.size >= self.k

    def _kept(self, theta: Tensor, order: Tensor) -> Tensor | None:
        """Places of the Ritz values that survive a restart: the wanted, half of the others, and zeros that would only come back."""
        zeros = self.selection.zeros(theta, self.krylov.scale)
        most = self.krylov.capacity - 2 * len(self.krylov.pending)
        count = min(zeros + self.k + (len(theta) - zeros - self.k) // 2, most)
        if not zeros:
            return order[:count]
        return torch.arange(count, device=theta.device) if count >= zeros + self.k else None

    # --- tolerances --------------------------------------------------------------------------------------------------

    def _rounding(self) -> float:
        return rounding(self.krylov.n, self.krylov.dtype, self.krylov.scale, self.krylov.skew)

    def _goal(self, values: Tensor, share: float) -> Tensor:
        scale = self.krylov.scale
        goal = share * self.tol * (values.abs() if self.relative else torch.full_like(values, scale))
        return goal.clamp(min=5 * self.krylov.eps * scale)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _recompute(self) -> bool:
        """Products with the wanted Ritz vectors themselves; returns whether a residual is larger than was promised."""
        krylov = self.krylov
        theta, y = krylov.ritz()
        wanted = self.selection.order(theta, krylov.scale)[: self.k]
        values, vectors = theta[wanted], krylov.vectors(y[:, wanted])
        pieces = []
        for piece in vectors.split(_AT_ONCE):
            try:
                pieces.append(self._multiply(piece).T)
            except KeyboardInterrupt:  # once more, then it is done; a second Ctrl-C ends it without a result
                self.interrupted = True
                pieces.append(self._multiply(piece).T)
        images = torch.cat(pieces)
        self.pairs = values, vectors, images
        residual = krylov.residual_norms(*self.pairs)
        return bool((residual > self._goal(values, 1.0) + self._rounding()).any())

    def result(self) -> LanczosResult:
        """What there is now."""
        krylov, (values, vectors, images), unit = self.krylov, self.pairs, self.unit
        return LanczosResult(
            values * unit,
            vectors,
            images if unit == 1 else images * unit,
            scale=krylov.scale * unit,
            skew=krylov.skew * unit,
            products=self.spent,
            steps=self.steps,
            complete=krylov.size == krylov.n,
            settled=self.settled,
            interrupted=self.interrupted,
        )
