"""Blocks of one size, batched: the parts that block-diagonal approximations and optimizers are made of."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fisherlens.linalg.dense import damped_cholesky, self_gram
from fisherlens.scores.matrix import ScoreMatrix


class Blocks(Protocol):
    """What a batch of blocks answers.

    Vectors are ``(p, K)`` over the piece of the flat vector that the indices count from;
    only the blocks' own entries of ``out`` are written.
    """

    storage_entries: int
    factor_flops: float

    def product(self, v: Tensor, out: Tensor) -> None: ...

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None: ...

    def log_determinant(self, damping: float) -> float: ...

    def effective_dimension(self, damping: float) -> Tensor: ...

    def squared_norm(self) -> float: ...

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]: ...


def _kept_trace(factor: Tensor, damping: float) -> Tensor:
    """Tr M (M + λI)⁻¹ = n - λ tr (M + λI)⁻¹ from Cholesky factors ``(..., n, n)``; zero eigenvalues add nothing."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, identity.expand(factor.shape), upper=False)
    return (
        (factor.shape[-1] - damping * half.square().sum((-2, -1))).reshape(-1).clamp(min=0)
    )  # rounding of a zero block


class MomentBlocks:
    """Blocks kept as matrices, one batched Cholesky for all of them.

    Parameters
    ----------
    index
        Indices of the blocks, ``(B, s)``.
    matrices
        The blocks, ``(B, s, s)``.
    """

    def __init__(self, index: Tensor, matrices: Tensor):
        self.index, self.matrices = index, matrices
        self._factor: tuple[float, Tensor] | None = None

    @property
    def storage_entries(self) -> int:
        return self.matrices.numel()

    @property
    def factor_flops(self) -> float:
        return self.matrices.numel() * self.matrices.shape[-1] / 3

    def product(self, v: Tensor, out: Tensor) -> None:
        if self.index.shape[1] == 1:
            out[self.index[:, 0]] = self.matrices[:, 0] * v[self.index[:, 0]]
        else:
            out[self.index] = torch.bmm(self.matrices, v[self.index])

    def factor(self, damping: float) -> Tensor:
        """Cholesky factors of M_b + λI in float64, ``(B, s, s)``, the last one kept."""
        if self._factor is None or self._factor[0] != damping:
            self._factor = (damping, damped_cholesky(self.matrices, damping, f"A block of size {self.index.shape[1]}"))
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        if self.index.shape[1] == 1:
            out[self.index[:, 0]] = v[self.index[:, 0]] / (self.matrices[:, 0] + damping)
        else:
            out[self.index] = torch.cholesky_solve(v[self.index].double(), self.factor(damping)).to(v.dtype)

    def log_determinant(self, damping: float) -> float:
        """Σ_b log det(I + M_b/λ)."""
        if self.index.shape[1] == 1:
            return torch.log1p(self.matrices.double() / damping).sum().item()
        logs = self.factor(damping).diagonal(dim1=-2, dim2=-1).log()
        return (2 * logs.sum() - self.index.numel() * torch.tensor(damping, dtype=torch.float64).log()).item()

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M_b (M_b + λI)⁻¹ of each block, ``(B,)``."""
        if self.index.shape[1] == 1:
            values = self.matrices[:, 0, 0].double()
            return values / (values + damping)
        return _kept_trace(self.factor(damping), damping)

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms."""
        return torch.linalg.vector_norm(self.matrices.double()).square().item()

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.index, self.matrices, strict=True))


class SharedBlocks:
    """Blocks that are all one matrix, kept and factored once.

    Parameters
    ----------
    index
        Indices of the blocks, ``(B, s)``.
    matrix
        The matrix, ``(s, s)``.
    """

    def __init__(self, index: Tensor, matrix: Tensor):
        self.index, self.matrix = index, matrix
        self._factor: tuple[float, Tensor] | None = None

    @property
    def storage_entries(self) -> int:
        return self.matrix.numel()

    @property
    def factor_flops(self) -> float:
        return self.matrix.numel() * self.matrix.shape[0] / 3

    def _side_by_side(self, v: Tensor) -> Tensor:
        """The blocks' parts of vectors ``(p, K)`` as columns, ``(s, B K)``."""
        return v[self.index.T].flatten(1)

    def _put(self, x: Tensor, out: Tensor) -> None:
        out[self.index.T] = x.view(*self.index.T.shape, -1)

    def product(self, v: Tensor, out: Tensor) -> None:
        self._put(self.matrix @ self._side_by_side(v), out)

    def _cholesky(self, damping: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            what = f"The shared block of size {len(self.matrix)}"
            self._factor = (damping, damped_cholesky(self.matrix, damping, what))
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        self._put(torch.cholesky_solve(self._side_by_side(v).double(), self._cholesky(damping)).to(v.dtype), out)

    def log_determinant(self, damping: float) -> float:
        """Σ_b log det(I + M/λ)."""
        logs = self._cholesky(damping).diagonal().log()
        one = 2 * logs.sum() - len(self.matrix) * torch.tensor(damping, dtype=torch.float64).log()
        return len(self.index) * one.item()

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M (M + λI)⁻¹ of each block, ``(B,)``."""
        return _kept_trace(self._cholesky(damping), damping).expand(len(self.index))

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms."""
        return len(self.index) * torch.linalg.vector_norm(self.matrix.double()).square().item()

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]:
        return [(index, self.matrix) for index in self.index]


class RowBlocks:
    """Blocks larger than their rank, kept as rows X_b with M_b = X_bᵀX_b, solved through X_b X_bᵀ.

    Parameters
    ----------
    index
        Flat indices of the blocks, ``(B, s)``.
    rows
        X, ``(B, m, s)`` with m < s, scaled so that X_bᵀX_b is the block.
    """

    def __init__(self, index: Tensor, rows: Tensor):
        self.index, self.rows = index, rows
        self.gram = torch.bmm(rows.double(), rows.double().mT)
        self._factor: tuple[float, Tensor] | None = None

    @property
    def storage_entries(self) -> int:
        return self.rows.numel() + self.gram.numel()

    @property
    def factor_flops(self) -> float:
        return self.gram.numel() * self.gram.shape[-1] / 3

    def product(self, v: Tensor, out: Tensor) -> None:
        out[self.index] = torch.bmm(self.rows.mT, torch.bmm(self.rows, v[self.index]))

    def _cholesky(self, damping: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            self._factor = (
                damping,
                damped_cholesky(self.gram, damping, f"The Gram matrix of a block of size {self.index.shape[1]}"),
            )
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        part = v[self.index]
        z = torch.cholesky_solve(torch.bmm(self.rows, part).double(), self._cholesky(damping)).to(v.dtype)
        out[self.index] = (part - torch.bmm(self.rows.mT, z)) / damping

    def log_determinant(self, damping: float) -> float:
        """Σ_b log det(I + M_b/λ)."""
        logs = self._cholesky(damping).diagonal(dim1=-2, dim2=-1).log()
        return (
            2 * logs.sum() - self.gram.shape[0] * self.gram.shape[1] * torch.tensor(damping, dtype=torch.float64).log()
        ).item()

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M_b (M_b + λI)⁻¹ of each block, ``(B,)``."""
        return _kept_trace(self._cholesky(damping), damping)

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms."""
        return torch.linalg.vector_norm(self.gram).square().item()

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]:
        return [(index, self_gram(rows.T)) for index, rows in zip(self.index, self.rows, strict=True)]


class ScoreBlock:
    """One block that is a whole layer, or the whole network: nothing but its Gram matrix is added to the captured scores.

    Parameters
    ----------
    scores
        The score matrix of the block's columns.
    total_weight
        W, the divisor of UᵀU.
    """

    def __init__(self, scores: ScoreMatrix, total_weight: float):
        self.scores, self.total_weight = scores, total_weight
        self._factor: tuple[float, Tensor] | None = None

    @property
    def storage_entries(self) -> int:
        return self.scores.rows**2

    @property
    def factor_flops(self) -> float:
        return self.scores.rows**3 / 3

    def product(self, v: Tensor, out: Tensor) -> None:
        out.copy_(self.scores.rmatmat(self.scores.matmat(v) / self.total_weight))

    def _cholesky(self, damping: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            gram = self.scores.full_gram().double() / self.total_weight
            self._factor = (damping, damped_cholesky(gram, damping, "The Gram matrix of a layer"))
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        z = torch.cholesky_solve(self.scores.matmat(v).double(), self._cholesky(damping)) / self.total_weight
        out.copy_((v - self.scores.rmatmat(z.to(v.dtype))) / damping)

    def log_determinant(self, damping: float) -> float:
        """Log det(I + M/λ)."""
        logs = self._cholesky(damping).diagonal().log()
        return (2 * logs.sum() - self.scores.rows * torch.tensor(damping, dtype=torch.float64).log()).item()

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M_b (M_b + λI)⁻¹ of each block, ``(B,)``."""
        return _kept_trace(self._cholesky(damping), damping)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the block."""
        return (torch.linalg.vector_norm(self.scores.full_gram().double()) / self.total_weight).square().item()

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]:
        index = torch.arange(self.scores.size, device=self.scores.device)
        return [(index, self.scores.dense() / self.total_weight)]
