"""Scores kept as explicit rows of U: the path of convolutions with many positions and of small layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import add_self_gram
from fisherlens.scores.base import LayerScores, largest_entry

_ROWS = 64


class ExplicitScores(LayerScores):
    """A layer's scores as the matrix U_l itself, one piece ``(n * r, numel)`` per parameter.

    Pieces rather than one matrix, because a batch of rows can then be computed straight into its place.
    """

    path = "explicit"

    def __init__(self, layer: LayerInfo, pieces: Sequence[Tensor], r: int):
        self.layer = layer
        self.pieces = tuple(pieces)
        self.r = r
        self.n = pieces[0].shape[0] // r
        self.dtype, self.device = pieces[0].dtype, pieces[0].device
        stops = list(accumulate(piece.shape[1] for piece in pieces))
        self.slices = [slice(stop - piece.shape[1], stop) for stop, piece in zip(stops, pieces, strict=True)]

    def largest(self) -> float:
        return max((largest_entry(piece) for piece in self.pieces), default=0.0)

    def part(self, at: slice) -> ExplicitScores:
        rows = slice(at.start * self.r, at.stop * self.r)
        return ExplicitScores(self.layer, [piece[rows] for piece in self.pieces], self.r)

    @property
    def nbytes(self) -> int:
        return sum(piece.numel() * piece.itemsize for piece in self.pieces)

    def matmat(self, v: Tensor) -> Tensor:
        out = self.pieces[0] @ v[self.slices[0]]
        for piece, at in zip(self.pieces[1:], self.slices[1:], strict=True):
            out.addmm_(piece, v[at])
        return out

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        for piece, at in zip(self.pieces, self.slices, strict=True):
            if z.shape[1] == 1:
                torch.mv(piece.T, z[:, 0], out=out[0, at])
            else:
                torch.mm(z.T, piece, out=out[:, at])

    def add_gram(self, out: Tensor) -> None:
        for piece in self.pieces:
            add_self_gram(out, piece)

    def _diagonal(self) -> Tensor:
        # by a few rows at a time, whose squares stay in the caches: eight times faster than norms of columns
        return torch.cat([sum(rows.square().sum(0) for rows in piece.split(_ROWS)) for piece in self.pieces])

    def columns(self, index: Tensor) -> Tensor:
        out = torch.empty(self.rows, len(index), dtype=self.dtype, device=self.device)
        for piece, at in zip(self.pieces, self.slices, strict=True):
            here = (index >= at.start) & (index < at.stop)
            if here.all():
                return piece[:, index - at.start]
            out[:, here] = piece[:, index[here] - at.start]
        return out

    def rows_at(self, index: Tensor) -> Tensor:
        return torch.cat([piece[index] for piece in self.pieces], dim=1)

    def contract(self, coefficients: Tensor) -> ExplicitScores:
        c = coefficients[:, None]
        return ExplicitScores(self.layer, [torch.bmm(c, p.view(self.n, self.r, -1))[:, 0] for p in self.pieces], 1)


class ZeroScores(LayerScores):
    """A layer that was never called: all its scores are zero, and nothing is kept."""

    path = "explicit"
    spreads = False

    def __init__(self, layer: LayerInfo, n: int, r: int, dtype: torch.dtype, device: torch.device):
        self.layer, self.n, self.r, self.dtype, self.device = layer, n, r, dtype, device

    def largest(self) -> float:
        return 0.0

    def part(self, at: slice) -> ZeroScores:
        return ZeroScores(self.layer, at.stop - at.start, self.r, self.dtype, self.device)

    @property
    def nbytes(self) -> int:
        return 0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def matmat(self, v: Tensor) -> Tensor:
        return self._zeros(self.rows, v.shape[1])

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        out.zero_()

    def add_gram(self, out: Tensor) -> None:
        pass

    def _diagonal(self) -> Tensor:
        return self._zeros(self.size)

    def columns(self, index: Tensor) -> Tensor:
        return self._zeros(self.rows, len(index))

    def rows_at(self, index: Tensor) -> Tensor:
        return self._zeros(len(index), self.size)

    def contract(self, coefficients: Tensor) -> ZeroScores:
        return ZeroScores(self.layer, self.n, 1, self.dtype, self.device)
