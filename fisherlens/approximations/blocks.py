"""Blocks of one size, batched: the parts that block-diagonal approximations and optimizers are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fisherlens.linalg import lapack, memory
from fisherlens.linalg.dense import cholesky_in_place, damped_cholesky, self_gram, solve_factored
from fisherlens.linalg.threads import side_by_side
from fisherlens.scores.matrix import ScoreMatrix

# Blocks are factored in chunks of this size in float64, whose temporaries stay in the caches (our choice).
_CHUNK_BYTES = 8 * 2**20
# Rounding of a block's trace, relative to the damping, up to which its inverse is taken in its own dtype: relative error 1e-3 at most.
_SAFE = 1e-3
# Size from which two triangular solves are faster than a product with the inverse, which then is not taken (measured on the CPU for 801).
_LARGE = 256


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


def safe_in(dtype: torch.dtype, trace: float, damping: float) -> bool:
    """Whether blocks of this trace may be factored in this dtype: their inverses then are accurate enough."""
    return trace * torch.finfo(dtype).eps <= _SAFE * damping


def factor_for_inverse(matrices: Tensor, damping: float) -> Tensor:
    """Cholesky factors of M_b + λI, in the dtype of the blocks where λ is large enough for that, else in float64; lower triangles."""
    damped = matrices.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    if safe_in(matrices.dtype, diagonal.sum(-1).max().item(), damping):
        diagonal += damping
        factor, definite = cholesky_in_place(damped)
        if definite:
            return factor
    return damped_cholesky(matrices, damping, f"A block of size {matrices.shape[-1]}")


def _log_determinants(factor: Tensor) -> float:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).double().log().sum().item()


def _times(matrices: Tensor, x: Tensor) -> Tensor:
    """Symmetric blocks ``(B, s, s)`` times ``(B, s, K)``; a single vector from the left, which is twice as fast as from the right."""
    return torch.bmm(x.mT, matrices).mT if x.shape[2] == 1 else torch.bmm(matrices, x)


def _run_of(index: Tensor) -> slice | None:
    """The piece of a vector that blocks fill, one after another and in order, or None."""
    start = int(index[0, 0]) if index.numel() else 0
    flat = index.flatten()
    neighbours = bool((flat == torch.arange(start, start + len(flat), device=index.device)).all())
    return slice(start, start + len(flat)) if neighbours else None


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
        self._run = _run_of(index)
        self._factor: tuple[float, Tensor] | None = None
        self._inverse: tuple[float, Tensor, float] | None = None
        self._own: tuple[float, Tensor | None, float] | None = None
        self.inverts = False

    @property
    def storage_entries(self) -> int:
        return self.matrices.numel()

    @property
    def factor_flops(self) -> float:
        return self.matrices.numel() * self.matrices.shape[-1] / 3

    @property
    def held_entries(self) -> int:
        """Numbers held once inverses have been taken."""
        return 2 * self.matrices.numel()

    def prefer_inverses(self) -> None:
        """Solve by explicit inverses in the dtype of the blocks, which pays for many solves and takes the room of the blocks once more.

        A solve is then one pass over the inverses instead of two, serial ones, over float64 factors; its relative error is that of the
        dtype times the condition number of the damped blocks. Of large blocks factors in that dtype do the same.
        """
        self.inverts = self.index.shape[1] > 1

    def inverse(self, damping: float) -> tuple[Tensor, float]:
        """(M_b + λI)⁻¹ and Σ_b log det(M_b + λI), from the factors of a chunk of blocks at a time."""
        if self._inverse is None or self._inverse[0] != damping:
            inverse = self._room()

            def invert(at: slice) -> float:
                factor = factor_for_inverse(self.chunk(at), damping)
                inverse[at] = torch.cholesky_inverse(factor)
                return _log_determinants(factor)

            logs = side_by_side(invert, self.pieces(), self.index.device)
            self._inverse = (damping, inverse, sum(logs))
        return self._inverse[1:]

    def own_factor(self, damping: float) -> tuple[Tensor | None, float]:
        """Factors in the dtype of the blocks, with the sum of log determinants: None where blocks are small, or too uneven for that."""
        if self._own is None or self._own[0] != damping:
            here = self.index.shape[1] >= _LARGE and lapack.knows(self.dtype, self.index.device)
            factors = self._room() if here else None

            def factorise(at: slice) -> float | None:
                factors[at] = self.chunk(at)
                diagonal = factors[at].diagonal(dim1=-2, dim2=-1)
                safe = safe_in(self.dtype, diagonal.sum(-1).max().item(), damping)
                diagonal += damping
                return _log_determinants(factors[at]) if safe and lapack.factor(factors[at]) else None

            logs = side_by_side(factorise, self.pieces(), self.index.device) if here else [None]
            good = None not in logs
            self._own = (damping, factors.mT, sum(logs)) if good else (damping, None, math.nan)
        return self._own[1:]

    def _room(self) -> Tensor:
        return memory.zeros((*self.index.shape, self.index.shape[1]), self.dtype, self.index.device)

    @property
    def dtype(self) -> torch.dtype:
        """That of the blocks."""
        return self.matrices.dtype

    def chunk(self, at: slice) -> Tensor:
        """The matrices of some blocks."""
        return self.matrices[at]

    def pieces(self) -> list[slice]:
        """Blocks that are factored together: a few at a time."""
        count = len(self.index)
        return [slice(start, min(start + self._step, count)) for start in range(0, count, self._step)]

    def chunks(self) -> Iterator[Tensor]:
        """The matrices, a few at a time."""
        return (self.chunk(at) for at in self.pieces())

    @property
    def _step(self) -> int:
        return max(1, _CHUNK_BYTES // (8 * self.index.shape[1] ** 2))

    def _take(self, v: Tensor) -> Tensor:
        """The blocks' own entries of vectors ``(p, K)``, ``(B, s, K)``; a view where the blocks are a run of neighbours."""
        return v[self.index] if self._run is None else v[self._run].unflatten(0, self.index.shape)

    def _put(self, x: Tensor, out: Tensor) -> None:
        if self._run is None:
            out[self.index] = x
        else:
            out[self._run].unflatten(0, self.index.shape).copy_(x)

    def product(self, v: Tensor, out: Tensor) -> None:
        part = self._take(v)
        self._put(self.matrices * part if self.index.shape[1] == 1 else _times(self.matrices, part), out)

    def factor(self, damping: float) -> Tensor:
        """Cholesky factors of M_b + λI in float64, ``(B, s, s)``, the last one kept."""
        if self._factor is None or self._factor[0] != damping:
            what = f"A block of size {self.index.shape[1]}"
            factor = torch.cat([damped_cholesky(some, damping, what) for some in self.chunks()])
            self._factor = (damping, factor)
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        part = self._take(v)
        if self.index.shape[1] == 1:
            self._put(part / (self.matrices + damping), out)
        elif self.inverts:
            factor, _ = self.own_factor(damping)
            self._put(_times(self.inverse(damping)[0], part) if factor is None else solve_factored(factor, part), out)
        else:
            self._put(torch.cholesky_solve(part.double(), self.factor(damping)).to(v.dtype), out)

    def log_determinant(self, damping: float) -> float:
        """Σ_b log det(I + M_b/λ)."""
        if self.index.shape[1] == 1:
            return torch.log1p(self.matrices.double() / damping).sum().item()
        if self.inverts:
            factor, logs = self.own_factor(damping)
            return (self.inverse(damping)[1] if factor is None else logs) - self.index.numel() * math.log(damping)
        logs = self.factor(damping).diagonal(dim1=-2, dim2=-1).log()
        return (2 * logs.sum() - self.index.numel() * math.log(damping)).item()

    def cut(self, index: Tensor) -> Tensor | None:
        """The matrices of finer blocks ``(b, t)``, each of which lies inside one of these; None where one does not."""
        size = int(max(self.index.max(), index.max())) + 1
        owner, place = (torch.full((size,), -1, device=self.index.device) for _ in range(2))
        blocks, entries = (torch.arange(n, device=self.index.device) for n in self.index.shape)
        owner[self.index], place[self.index] = blocks[:, None], entries
        of = owner[index]
        if (of < 0).any() or (of != of[:, :1]).any():
            return None
        rows = place[index]
        return self.matrices[of[:, :1, None], rows[:, :, None], rows[:, None, :]]

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M_b (M_b + λI)⁻¹ of each block, ``(B,)``."""
        if self.index.shape[1] == 1:
            values = self.matrices[:, 0, 0].double()
            return values / (values + damping)
        return _kept_trace(self.factor(damping), damping)

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms."""
        return sum(torch.linalg.vector_norm(x).item() ** 2 for x in self.chunks())

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
        one = 2 * logs.sum() - len(self.matrix) * math.log(damping)
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
            what = f"The Gram matrix of a block of size {self.index.shape[1]}"
            self._factor = (damping, damped_cholesky(self.gram, damping, what))
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        part = v[self.index]
        z = torch.cholesky_solve(torch.bmm(self.rows, part).double(), self._cholesky(damping)).to(v.dtype)
        out[self.index] = (part - torch.bmm(self.rows.mT, z)) / damping

    def log_determinant(self, damping: float) -> float:
        """Σ_b log det(I + M_b/λ)."""
        logs = self._cholesky(damping).diagonal(dim1=-2, dim2=-1).log()
        return (2 * logs.sum() - self.gram.shape[0] * self.gram.shape[1] * math.log(damping)).item()

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

    def factor(self, damping: float) -> Tensor:
        """Cholesky factor of the Gram matrix over W, damped, in float64; the last one is kept."""
        if self._factor is None or self._factor[0] != damping:
            gram = self.scores.full_gram().double() / self.total_weight
            self._factor = (damping, damped_cholesky(gram, damping, "The Gram matrix of a layer"))
        return self._factor[1]

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        z = torch.cholesky_solve(self.scores.matmat(v).double(), self.factor(damping)) / self.total_weight
        out.copy_((v - self.scores.rmatmat(z.to(v.dtype))) / damping)

    def log_determinant(self, damping: float) -> float:
        """Log det(I + M/λ)."""
        logs = self.factor(damping).diagonal().log()
        return (2 * logs.sum() - self.scores.rows * math.log(damping)).item()

    def effective_dimension(self, damping: float) -> Tensor:
        """Tr M_b (M_b + λI)⁻¹ of each block, ``(B,)``."""
        return _kept_trace(self.factor(damping), damping)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the block."""
        return (torch.linalg.vector_norm(self.scores.full_gram().double()) / self.total_weight).square().item()

    def matrices_at(self) -> list[tuple[Tensor, Tensor]]:
        index = torch.arange(self.scores.size, device=self.scores.device)
        return [(index, self.scores.dense() / self.total_weight)]
