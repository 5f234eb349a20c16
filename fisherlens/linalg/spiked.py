"""Symmetric matrices that are free on a small basis and a multiple of the identity outside it, and Kronecker products of two of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherlens.linalg.dense import eigenpairs
from fisherlens.linalg.kronecker import factored_damping

Function = Callable[[Tensor, Tensor], Tensor]


class Spiked:
    r"""A batch of matrices :math:`B\,\mathrm{diag}(b)\,B^\top + s (I - B B^\top)`, positive semi-definite.

    Parameters
    ----------
    basis
        B, orthonormal columns, ``(count, d, r)`` float64.
    values
        Eigenvalues b on it, ``(count, r)``, descending.
    trace
        Trace of the whole, ``(count,)``: what the values leave of it is spread evenly outside the basis, never below 0.
    """

    def __init__(self, basis: Tensor, values: Tensor, trace: Tensor):
        self.basis, self.values = basis, values
        self.size, self.rank = basis.shape[1], basis.shape[2]
        if self.outside:
            self.level = ((trace - values.sum(-1)) / self.outside).clamp(min=0)
        else:
            self.level = values[:, 0]  # stands for nothing; a solve must not magnify the rounding that is left there

    @property
    def outside(self) -> int:
        """Dimensions outside the basis, d - r."""
        return self.size - self.rank

    @property
    def entries(self) -> int:
        """Numbers held."""
        return self.basis.numel() + self.values.numel() + self.level.numel()

    @property
    def spectrum(self) -> Tensor:
        """The r values and then the level, ``(count, r + 1)``."""
        return torch.cat([self.values, self.level[:, None]], dim=1)

    @property
    def multiplicity(self) -> Tensor:
        """How often each entry of :attr:`spectrum` is an eigenvalue, ``(r + 1,)``."""
        return torch.tensor([1.0] * self.rank + [self.outside], dtype=torch.float64, device=self.basis.device)

    def trace(self) -> Tensor:
        """The traces, ``(count,)``."""
        return self.spectrum @ self.multiplicity

    def diagonal(self) -> Tensor:
        """The diagonals, ``(count, d)``."""
        above = (self.values - self.level[:, None])[..., None]
        return (self.basis.square() @ above)[..., 0] + self.level[:, None]

    def dense(self) -> Tensor:
        """The matrices, ``(count, d, d)``."""
        above = (self.values - self.level[:, None])[:, None]
        identity = torch.eye(self.size, dtype=self.basis.dtype, device=self.basis.device)
        return (self.basis * above) @ self.basis.mT + self.level[:, None, None] * identity


def spiked(
    matrix: Tensor, rank: int, *, power_steps: int | None = 1, generator: torch.Generator, what: str = "the matrix"
) -> Spiked:
    """The spiked matrix of a batch ``(count, d, d)``: all of it on a basis of dimension ``rank``, the mean of its trace outside.

    The basis is orthonormalised after each of ``power_steps`` products with a random start, or, with None, spanned by the leading
    eigenvectors. With a rank of d or more the matrix is itself.
    """
    count, d = matrix.shape[:2]
    matrix, rank = matrix.double(), min(rank, d)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    if rank == d or power_steps is None:
        values, basis = eigenpairs(matrix, what)
        return Spiked(basis[..., :rank], values[..., :rank].clamp(min=0), trace)
    start = torch.randn(count, d, rank, generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(start.to(matrix.device))[0]
    for _ in range(power_steps):
        basis = torch.linalg.qr(matrix @ basis)[0]
    values, turn = eigenpairs(basis.mT @ matrix @ basis, what)
    return Spiked(basis @ turn, values.clamp(min=0), trace)


class SpikedPair:
    """G ⊗ A of two batches of spiked matrices: any function of it by its values on (r + 1)² eigenvalue products.

    A matrix W of shape ``(..., count, d_o, d_i)`` stands for the vector vec(W), row-major, so that (G ⊗ A) vec(W) = vec(G W A).
    """

    def __init__(self, G: Spiked, A: Spiked):
        self.G, self.A = G, A

    def _grid(self, function: Function) -> Tensor:
        """f(g, a) of every pair of distinct eigenvalues, ``(count, r_G + 1, r_A + 1)``; the last of each stands for what is outside."""
        return function(self.G.spectrum[:, :, None], self.A.spectrum[:, None, :])

    def apply(self, w: Tensor, function: Function) -> Tensor:
        """f(G ⊗ A) W: inside both bases, inside one and outside both, each by its own value; in float64."""
        f, left, right = self._grid(function), self.G.basis, self.A.basis
        x = w.double()
        rows, columns = left.mT @ x, x @ right  # (…, r_G, d_i), (…, d_o, r_A)
        both = rows @ right
        rows, columns = rows - both @ right.mT, columns - left @ both  # inside one basis and outside the other
        x = x - left @ (rows + both @ right.mT) - columns @ right.mT  # outside both
        inside = left @ ((f[:, :-1, :-1] * both) @ right.mT + f[:, :-1, -1:] * rows)
        return (inside + (f[:, -1:, :-1] * columns) @ right.mT + f[:, -1:, -1:] * x).to(w.dtype)

    def total(self, function: Function) -> float:
        """Tr f(G ⊗ A), summed over the batch."""
        weight = self.G.multiplicity[:, None] * self.A.multiplicity
        return (self._grid(function) * weight).sum().item()

    def _gammas(self, damping: float) -> tuple[Tensor, Tensor]:
        """γ_a and γ_g, from the traces alone, in the shape of the grid."""
        means = [(factor.trace() / factor.size)[:, None, None] for factor in (self.A, self.G)]
        gamma_a, gamma_g = factored_damping(*means, damping)
        return gamma_a[:, None, None], gamma_g[:, None, None]

    def _damped(self, damping: float, form: str) -> Function:
        """The eigenvalues that a solve divides by: g a + λ, or (g + γ_g)(a + γ_a)."""
        if form == "exact":
            return lambda g, a: g * a + damping
        gamma_a, gamma_g = self._gammas(damping)
        return lambda g, a: (g + gamma_g) * (a + gamma_a)

    def product(self, w: Tensor) -> Tensor:
        """G W A."""
        return self.apply(w, torch.mul)

    def damped_product(self, w: Tensor, damping: float, form: str = "exact") -> Tensor:
        """What :meth:`solve` inverts: G W A + λW, or (G + γ_g) W (A + γ_a) for the factored form."""
        return self.apply(w, self._damped(damping, form))

    def solve(self, w: Tensor, damping: float, form: str = "exact") -> Tensor:
        """(G ⊗ A + λI)⁻¹ W, or (G + γ_g)⁻¹ W (A + γ_a)⁻¹."""
        damped = self._damped(damping, form)
        return self.apply(w, lambda g, a: 1 / damped(g, a))

    def log_determinant(self, damping: float, form: str = "exact") -> float:
        """Log det(I + G ⊗ A / λ), or that of (G + γ_g) ⊗ (A + γ_a) / λ, summed over the batch."""
        if form == "exact":
            return self.total(lambda g, a: torch.log1p(g * a / damping))
        damped = self._damped(damping, form)
        return self.total(lambda g, a: (damped(g, a) / damping).log())

    def squared_norm(self) -> float:
        """Squared Frobenius norm, summed over the batch."""
        return self.total(lambda g, a: (g * a).square())

    def diagonal(self) -> Tensor:
        """The diagonals as matrices, ``(count, d_o, d_i)``."""
        return self.G.diagonal()[:, :, None] * self.A.diagonal()[:, None, :]
