"""Scores kept as explicit rows of U: the path of convolutions with many positions and of small layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import self_gram
from fisherlens.scores.base import LayerScores


class ExplicitScores(LayerScores):
    """A layer's scores as the matrix U_l itself, shape ``(n * r, p)``."""

    path = "explicit"

    def __init__(self, layer: LayerInfo, matrix: Tensor, r: int):
        self.layer = layer
        self.matrix = matrix
        self.r = r
        self.n = matrix.shape[0] // r
        self.dtype, self.device = matrix.dtype, matrix.device

    @property
    def nbytes(self) -> int:
        return self.matrix.numel() * self.matrix.itemsize

    def matmat(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        if z.shape[1] == 1:
            torch.mv(self.matrix.T, z[:, 0], out=out[0])
        else:
            torch.mm(z.T, self.matrix, out=out)

    def gram(self) -> Tensor:
        return self_gram(self.matrix)

    def diagonal(self) -> Tensor:
        return torch.linalg.vector_norm(self.matrix, dim=0).square()

    def columns(self, index: Tensor) -> Tensor:
        return self.matrix[:, index]

    def rows_at(self, index: Tensor) -> Tensor:
        return self.matrix[index]


class ZeroScores(LayerScores):
    """A layer that was never called: all its scores are zero, and nothing is kept."""

    path = "explicit"

    def __init__(self, layer: LayerInfo, n: int, r: int, dtype: torch.dtype, device: torch.device):
        self.layer, self.n, self.r, self.dtype, self.device = layer, n, r, dtype, device

    @property
    def nbytes(self) -> int:
        return 0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def matmat(self, v: Tensor) -> Tensor:
        return self._zeros(self.rows, v.shape[1])

    def rmatmat(self, z: Tensor, out: Tensor) -> None:
        out.zero_()

    def gram(self) -> Tensor:
        return self._zeros(self.rows, self.rows)

    def diagonal(self) -> Tensor:
        return self._zeros(self.size)

    def columns(self, index: Tensor) -> Tensor:
        return self._zeros(self.rows, len(index))

    def rows_at(self, index: Tensor) -> Tensor:
        return self._zeros(len(index), self.size)
