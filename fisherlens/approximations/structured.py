"""Blocks of a dense layer of one position that its inputs and output scores give without a single row of U: units, and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fisherlens.approximations.blocks import MomentBlocks, RowBlocks
from fisherlens.approximations.pieces import _input_norms as input_norms
from fisherlens.approximations.pieces import homogeneous_inputs
from fisherlens.scores.dense import DenseScores


class UnitBlocks(RowBlocks):
    r"""The units of a dense layer, kept as its inputs and the lengths of their scores.

    .. math:: F_{oo} = \frac{1}{W} \sum_n s_{no} a_n a_n^\top, \quad s_{no} = \sum_r g_{nro}^2, \qquad
       K_o = \frac{1}{W} (A A^\top) \circ \sqrt{s_o} \sqrt{s_o}^\top

    A product is two matrix products with the inputs that all units share, a solve goes through the N × N kernels K_o.

    Parameters
    ----------
    index
        Places of [W | b] in the layer's vector, ``(d_o, d_i + 1)``.
    scores
        The layer's scores, of one position.
    total_weight
        W.
    """

    def __init__(self, index: Tensor, scores: DenseScores, total_weight: float):
        self.index, self._scores = index, scores
        self.inputs = homogeneous_inputs(scores)[:, 0]
        self.lengths = torch.linalg.vector_norm(scores.g[:, :, 0], dim=1).T / total_weight**0.5  # (d_o, n)
        inner = self.inputs.double() @ self.inputs.double().T
        self.gram = inner * (self.lengths[:, :, None] * self.lengths[:, None, :]).double()
        self._factor: tuple[float, Tensor] | None = None

    @property
    def rows(self) -> Tensor:
        """X, ``(d_o, n, d_i + 1)``; formed anew."""
        return self.lengths[:, :, None] * self.inputs

    @property
    def storage_entries(self) -> int:
        return self.inputs.numel() + self.lengths.numel() + self.gram.numel()

    def _matrix(self, v: Tensor) -> Tensor:
        """[W | b] of vectors ``(p, K)``, ``(K, d_o, d_i + 1)``."""
        n_weight, d_o = self._scores.n_weight, self._scores.d_o
        pieces = []
        if n_weight:
            pieces.append(v[:n_weight].T.reshape(v.shape[1], d_o, -1))
        if v.shape[0] > n_weight:
            pieces.append(v[n_weight:].T[:, :, None])
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def _put(self, x: Tensor, out: Tensor) -> None:
        n_weight = self._scores.n_weight
        d_i = self._scores.d_i if n_weight else 0
        if n_weight:
            out[:n_weight] = x[:, :, :d_i].reshape(len(x), -1).T
        if out.shape[0] > n_weight:
            out[n_weight:] = x[:, :, -1].T

    def product(self, v: Tensor, out: Tensor) -> None:
        z = (self._matrix(v) @ self.inputs.T) * self.lengths.square()
        self._put(z @ self.inputs, out)

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        part = self._matrix(v)
        z = (part @ self.inputs.T) * self.lengths  # (K, d_o, n)
        z = torch.cholesky_solve(z.permute(1, 2, 0).double(), self._cholesky(damping)).permute(2, 0, 1).to(v.dtype)
        self._put((part - (z * self.lengths) @ self.inputs) / damping, out)


class InputBlocks(MomentBlocks):
    r"""The inputs of a dense layer, whose blocks are formed a few at a time.

    .. math:: F_{ii} = \frac{1}{W} \sum_n a_{ni}^2 \sum_r g_{nr} g_{nr}^\top

    Parameters
    ----------
    index
        Places of [W | b] in the layer's vector by input, ``(d_i + 1, d_o)``.
    scores
        The layer's scores, of one position.
    total_weight
        W.
    """

    def __init__(self, index: Tensor, scores: DenseScores, total_weight: float):
        self.index, self._scores, self._total_weight = index, scores, total_weight
        self._squares = homogeneous_inputs(scores)[:, 0].square() / total_weight  # (n, d_i + 1)
        self._g = scores.g[:, :, 0]  # (n, r, d_o)
        self._factor: tuple[float, Tensor] | None = None
        self._inverse: tuple[float, Tensor, float] | None = None
        self.inverts = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the scores."""
        return self._g.dtype

    @cached_property
    def matrices(self) -> Tensor:
        """The blocks, ``(d_i + 1, d_o, d_o)``; formed where somebody asks for all of them."""
        return torch.cat(list(self.chunks()))

    @property
    def storage_entries(self) -> int:
        return self.index.numel() * self.index.shape[1]

    @property
    def held_entries(self) -> int:
        """Numbers held once inverses have been taken: these."""
        return self.storage_entries

    @property
    def factor_flops(self) -> float:
        return self.storage_entries * self.index.shape[1] / 3

    def chunks(self) -> Iterator[Tensor]:
        """The blocks, a few at a time, each chunk one matrix product."""
        outer = torch.bmm(self._g.mT, self._g).flatten(1)
        size = self.index.shape[1]
        for some in self._squares.T.split(self._step):
            yield (some @ outer).view(-1, size, size)

    def product(self, v: Tensor, out: Tensor) -> None:
        n, r, inputs = *self._g.shape[:2], self.index.shape[0]
        flat = self._g.flatten(0, 1)
        part = v[self.index]  # (inputs, d_o, K)
        weights = self._squares.T[:, :, None]  # (inputs, n, 1)
        for k in range(part.shape[2]):
            z = (part[:, :, k] @ flat.T).view(inputs, n, r) * weights
            out[self.index, k] = z.flatten(1) @ flat

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms, from N × N kernels."""
        return input_norms(self._scores).sum().item() / self._total_weight**2
