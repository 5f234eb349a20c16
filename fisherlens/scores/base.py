"""What a layer's scores answer. Nothing above this package asks anything else of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import self_gram
from fisherlens.linalg.memory import Workspace

# Transient memory of a chunked contraction: large enough that the matrix products dominate, small beside any budget.
CHUNK_BYTES = 64 * 2**20


class LayerScores(ABC):
    """The columns of the score matrix U that belong to one layer, U_l of shape ``(rows, p)``.

    Rows are ordered n-major, ``(example n, score column r)``, and carry the square root of the example's weight.
    No answer is divided by the total weight W. Indices count from the layer's first parameter.

    Attributes
    ----------
    layer : LayerInfo
        The layer and its place in the flat vector.
    path : str
        ``"factors"`` or ``"explicit"``.
    n, r : int
        Examples and score columns per example; ``rows = n * r``.
    """

    layer: LayerInfo
    path: str
    n: int
    r: int
    dtype: torch.dtype
    device: torch.device
    workspace: Workspace = Workspace(limit=0)  # keeps nothing; a ScoreMatrix gives its layers a shared one

    def _empty(self, *shape: int) -> Tensor:
        return self.workspace.empty(shape, self.dtype, self.device)

    @property
    def rows(self) -> int:
        return self.n * self.r

    @property
    def size(self) -> int:
        return self.layer.size

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the representation holds."""

    @abstractmethod
    def matmat(self, v: Tensor) -> Tensor:
        """``(p, K)`` → ``(rows, K)``: U_l V."""

    @abstractmethod
    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        """Write U_lᵀ Z, for Z ``(rows, K)``, into ``out`` of shape ``(K, p)`` (its transpose)."""

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """Explicit columns of U_l, ``(rows, len(index))``."""

    @abstractmethod
    def rows_at(self, index: Tensor) -> Tensor:
        """Explicit rows of U_l, ``(len(index), p)``: for small uses and for tests."""

    @abstractmethod
    def contract(self, coefficients: Tensor) -> LayerScores:
        """One row per example, Σ_r c_nr u_nr, for coefficients ``(n, r)``: the scores at sampled labels, say."""

    def gram(self) -> Tensor:
        """``(rows, rows)``: U_l U_lᵀ, by column chunks."""
        total = torch.zeros(self.rows, self.rows, dtype=self.dtype, device=self.device)
        for chunk in self.column_chunks():
            total += self_gram(self.columns(chunk))
        return total

    def diagonal(self) -> Tensor:
        """``(p,)``: the column sums of U_l²."""
        return torch.cat([self.columns(chunk).square().sum(0) for chunk in self.column_chunks()])

    def moments(self, index: Tensor) -> Tensor:
        """``(B, s)`` indices of B blocks → ``(B, s, s)``: U_bᵀ U_b of every block."""
        num_blocks, size = index.shape
        out = torch.empty(num_blocks, size, size, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK_BYTES // max(1, self.rows * size * self.dtype.itemsize))
        for start in range(0, num_blocks, step):
            part = index[start : start + step]
            columns = self.columns(part.reshape(-1)).reshape(self.rows, -1, size).transpose(0, 1)
            out[start : start + step] = torch.bmm(columns.transpose(1, 2), columns)
        return out

    def block_rows(self, index: Tensor) -> Tensor:
        """``(B, s)`` → X of shape ``(B, m, s)`` with X_bᵀ X_b = U_bᵀ U_b and as few rows m as the layer allows."""
        columns = self.columns(index.reshape(-1)).reshape(self.rows, *index.shape)
        return columns.transpose(0, 1)

    def block_row_count(self, index: Tensor) -> int:
        """The number of rows m that :meth:`block_rows` would give, without computing them."""
        return self.rows

    def column_chunks(self) -> list[Tensor]:
        """All column indices in chunks of bounded memory."""
        step = max(1, CHUNK_BYTES // max(1, self.rows * self.dtype.itemsize))
        return list(torch.arange(self.size, device=self.device).split(step))
