"""Kronecker products of two small symmetric matrices, one or a batch: products, damped solves, determinants, never the product itself.

A matrix W of shape ``(d_o, d_i)`` stands for the vector vec(W), row-major, so that (G ⊗ A) vec(W) = vec(G W Aᵀ). In a batch of B
pairs W has shape ``(..., B, d_o, d_i)``; leading axes are further vectors.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fisherlens.linalg.dense import damped_cholesky, eigenpairs, require_finite


def factored_damping(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    r"""How much damping each factor takes where both are damped apart, ``(G + γ_g I) ⊗ (A + γ_a I)``.

    .. math:: \gamma_a = \pi \sqrt\lambda, \quad \gamma_g = \sqrt\lambda / \pi, \quad
       \pi^2 = \frac{\mathrm{tr} A / d_i}{\mathrm{tr} G / d_o}

    Parameters
    ----------
    A, G
        The factors, ``(..., d_i, d_i)`` and ``(..., d_o, d_o)``.
    damping
        λ > 0.

    Returns
    -------
    γ_a and γ_g, float64 of shape ``(...)``; π = 1 where a trace is zero.

    Notes
    -----
    Source: Martens and Grosse (2015), section 6.3.
    """
    mean_a = A.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    mean_g = G.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    usual = (mean_a > 0) & (mean_g > 0)
    pi = (mean_a.where(usual, 1.0).log() / 2 - mean_g.where(usual, 1.0).log() / 2).exp()
    root = math.sqrt(damping)
    return pi * root, root / pi


# Operations of a symmetric eigendecomposition over d³: tridiagonalisation, QL, back-transformation (Golub and Van Loan).
EIGH = 9.0


class KroneckerPair:
    """G ⊗ A, symmetric and positive semi-definite; a batch of B of them where the factors have a leading axis.

    Parameters
    ----------
    G
        Left factor, ``(d_o, d_o)`` or ``(B, d_o, d_o)``.
    A
        Right factor, ``(d_i, d_i)`` or ``(B, d_i, d_i)``.
    what
        What messages call it.
    rows
        Optional X_g ``(B, m, d_o)`` and X_a ``(B, m, d_i)`` with XᵀX the factor and m well below its order, or None: the eigenvectors of
        a factor of low rank then cost d m² in place of d³.
    """

    def __init__(
        self,
        G: Tensor,
        A: Tensor,
        what: str = "A Kronecker pair",
        rows: tuple[Tensor | None, Tensor | None] = (None, None),
    ):
        self.G, self.A, self.what, self._rows = G, A, what, rows
        self.d_o, self.d_i = G.shape[-1], A.shape[-1]
        self._factors: tuple[float, Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """Pairs in the batch."""
        return self.G.shape[0] if self.G.ndim == 3 else 1

    @cached_property
    def eigen(self) -> RotatedDiagonal:
        """The same matrix in the eigenbases of its factors, float64; eigenvalues below zero are rounding and become 0."""
        g, q_g = _eigenpairs(self.G, self._rows[0], f"{self.what}: factor G")
        a, q_a = _eigenpairs(self.A, self._rows[1], f"{self.what}: factor A")
        return RotatedDiagonal(q_g, q_a, g.clamp(min=0)[..., :, None] * a.clamp(min=0)[..., None, :])

    @property
    def nbytes(self) -> int:
        """Bytes of the two factors."""
        return self.G.nbytes + self.A.nbytes

    @property
    def cholesky_flops(self) -> float:
        """Operations of the two Cholesky factors."""
        return self.count * (self.d_o**3 + self.d_i**3) / 3

    @property
    def eigen_flops(self) -> float:
        """Operations of the two eigendecompositions."""
        total = 0.0
        for d, rows in ((self.d_o, self._rows[0]), (self.d_i, self._rows[1])):
            k = d if rows is None else rows.shape[-2]
            total += EIGH * k**3 + (4 * d * k**2 if k < d else 0)
        return self.count * total

    def product(self, w: Tensor) -> Tensor:
        """G W A."""
        return _two_sided(self.G, w, self.A)

    def damped_product(self, w: Tensor, damping: float, form: str = "exact") -> Tensor:
        """What :meth:`solve` inverts: G W A + λW, or (G + γ_g) W (A + γ_a) for the factored form."""
        if form == "exact":
            return self.product(w) + damping * w
        gamma_a, gamma_g = factored_damping(self.A, self.G, damping)
        return _two_sided(_shifted(self.G, gamma_g), w, _shifted(self.A, gamma_a))

    def _cholesky(self, damping: float) -> tuple[Tensor, Tensor]:
        """Lower factors of G + γ_g and A + γ_a in float64, the last ones kept."""
        if self._factors is None or self._factors[0] != damping:
            gamma_a, gamma_g = factored_damping(self.A, self.G, damping)
            self._factors = (
                damping,
                _shifted_cholesky(self.G, gamma_g, f"{self.what}: factor G"),
                _shifted_cholesky(self.A, gamma_a, f"{self.what}: factor A"),
            )
        return self._factors[1:]

    def solve(self, w: Tensor, damping: float, form: str = "exact") -> Tensor:
        """(G ⊗ A + λI)⁻¹ W by two eigendecompositions, or (G + γ_g)⁻¹ W (A + γ_a)⁻¹ by two Cholesky factors; in float64."""
        if form == "exact":
            return self.eigen.solve(w, damping)
        left, right = self._cholesky(damping)
        half = _solve_left(left, w.double())
        return _solve_left(right, half.mT).mT.to(w.dtype)

    def log_determinant(self, damping: float, form: str = "exact") -> float:
        """Log det(I + G ⊗ A / λ), or that of (G + γ_g) ⊗ (A + γ_a) / λ, summed over the batch."""
        if form == "exact":
            return self.eigen.log_determinant(damping)
        left, right = (
            2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) for factor in self._cholesky(damping)
        )  # log det of each factor
        total = (self.d_i * left + self.d_o * right).sum().item()
        return total - self.count * self.d_o * self.d_i * math.log(damping)

    def squared_norm(self) -> float:
        """‖G‖² ‖A‖², summed over the batch."""
        return (_squared(self.G) * _squared(self.A)).sum().item()

    def diagonal(self) -> Tensor:
        """The diagonal as matrices, ``(B, d_o, d_i)``."""
        return self.G.diagonal(dim1=-2, dim2=-1)[..., :, None] * self.A.diagonal(dim1=-2, dim2=-1)[..., None, :]

    def dense(self) -> Tensor:
        """The Kronecker products themselves, ``(B, d_o d_i, d_o d_i)``: for tests and small uses."""
        return _kron(self.G, self.A)


class RotatedDiagonal:
    """(Q_G ⊗ Q_A) diag(S) (Q_G ⊗ Q_A)ᵀ with S ≥ 0, symmetric; a batch of B of them where the tensors have a leading axis.

    Parameters
    ----------
    q_g, q_a
        Matrices with orthonormal columns, ``(B, d_o, k_o)`` and ``(B, d_i, k_i)``; directions outside them have the eigenvalue 0.
    s
        Eigenvalues, ``(B, k_o, k_i)``.
    """

    def __init__(self, q_g: Tensor, q_a: Tensor, s: Tensor):
        self.q_g, self.q_a, self.s = q_g, q_a, s

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.q_g.nbytes + self.q_a.nbytes + self.s.nbytes

    @property
    def complete(self) -> bool:
        """Whether the columns span everything."""
        return all(q.shape[-1] == q.shape[-2] for q in (self.q_g, self.q_a))

    def rotate(self, w: Tensor) -> Tensor:
        """Q_Gᵀ W Q_A."""
        return _two_sided(self.q_g.mT, w, self.q_a)

    def rotate_back(self, w: Tensor) -> Tensor:
        """Q_G W Q_Aᵀ."""
        return _two_sided(self.q_g, w, self.q_a.mT)

    def _apply(self, w: Tensor, by: Tensor) -> Tensor:
        return self.rotate_back(self.rotate(w.to(self.s.dtype)) * by).to(w.dtype)

    def product(self, w: Tensor) -> Tensor:
        """The matrix times W."""
        return self._apply(w, self.s)

    def solve(self, w: Tensor, damping: float) -> Tensor:
        """(The matrix + λI)⁻¹ W."""
        if self.complete:
            return self._apply(w, 1 / (self.s + damping))
        double = w.to(self.s.dtype)
        inside = self.rotate(double)
        outside = (double - self.rotate_back(inside)) / damping
        return outside.add_(self.rotate_back(inside / (self.s + damping))).to(w.dtype)

    def log_determinant(self, damping: float) -> float:
        """Log det(I + the matrix / λ), summed over the batch."""
        return torch.log1p(self.s.double() / damping).sum().item()

    def squared_norm(self) -> float:
        """Squared Frobenius norm, summed over the batch."""
        return _squared(self.s).sum().item()

    def diagonal(self) -> Tensor:
        """The diagonal as matrices, ``(B, d_o, d_i)``."""
        return self.q_g.square() @ self.s @ self.q_a.square().mT

    def dense(self) -> Tensor:
        """The matrices themselves, ``(B, d_o d_i, d_o d_i)``: for tests and small uses."""
        q = _kron(self.q_g, self.q_a)
        return (q * self.s.flatten(-2)[..., None, :]) @ q.mT


def _eigenpairs(matrix: Tensor, rows: Tensor | None, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors in float64; with rows X, XᵀX = matrix, only those in the span of the rows."""
    if rows is None:
        return eigenpairs(matrix, what)
    require_finite(rows, what)
    q, r = torch.linalg.qr(rows.double().mT)  # orthonormal however nearly dependent the rows are
    values, vectors = eigenpairs(r @ r.mT, what)
    return values, q @ vectors


def _two_sided(left: Tensor, w: Tensor, right: Tensor) -> Tensor:
    """L W R of every W: the vectors go into one matrix product per pair, where broadcasting would copy L and R for each."""
    b = "b" if left.ndim == 3 else ""
    half = torch.einsum(f"...{b}oi,{b}ij->...{b}oj", w, right)
    return torch.einsum(f"{b}op,...{b}pj->...{b}oj", left, half)


def _solve_left(factor: Tensor, w: Tensor) -> Tensor:
    """(C Cᵀ)⁻¹ W of every W, the vectors as further columns."""
    leading = w.ndim - factor.ndim
    if not leading:
        return torch.cholesky_solve(w, factor)
    columns = w.flatten(0, leading - 1).movedim(0, -2)  # (B, d_o, K, d_i)
    solved = torch.cholesky_solve(columns.flatten(-2), factor).unflatten(-1, columns.shape[-2:])
    return solved.movedim(-2, 0).reshape(w.shape)


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + shift.to(matrix.dtype)[..., None, None] * identity


def _squared(matrix: Tensor) -> Tensor:
    return matrix.double().square().sum((-2, -1))


def _kron(left: Tensor, right: Tensor) -> Tensor:
    both = left[..., :, None, :, None] * right[..., None, :, None, :]
    return both.reshape(*left.shape[:-2], left.shape[-2] * right.shape[-2], left.shape[-1] * right.shape[-1])


def _shifted_cholesky(matrix: Tensor, shift: Tensor, what: str) -> Tensor:
    """Cholesky factors of M_b + shift_b I in float64 for a batch: the shift of each is its own."""
    if matrix.ndim == 2:
        return damped_cholesky(matrix, shift.item(), what)
    return torch.stack([damped_cholesky(one, own.item(), what) for one, own in zip(matrix, shift, strict=True)])
