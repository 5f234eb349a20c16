"""Blocks of a dense layer of one position that its inputs and output scores give without a single row of U: units, and inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fisherlens.approximations.blocks import MomentBlocks, RowBlocks, factor_for_inverse, safe_in
from fisherlens.approximations.pieces import _input_norms as input_norms
from fisherlens.approximations.pieces import homogeneous_inputs
from fisherlens.linalg import lapack
from fisherlens.linalg.dense import eigenpairs, solve_factored
from fisherlens.linalg.threads import side_by_side
from fisherlens.scores.dense import DenseScores

# Bytes of signals between the two halves of a product with the inputs' blocks, and of blocks that are formed together: large enough for
# matrix products, small enough to stay in the caches (our choice).
_SIGNALS = 16 * 2**20
_TOGETHER = 16 * 2**20
# Size from which half of a block is left out when it is formed (our choice: below it products are too small).
_PACKED_FROM = 32


def matrix_of(scores: DenseScores, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """W, ``(d_o, d_i)``, and b, ``(d_o,)``, of a layer's vector ``(p,)``; None for what was not selected. Views, where v is contiguous."""
    n_weight = scores.n_weight
    weight = v[:n_weight].view(scores.d_o, scores.d_i) if n_weight else None
    return weight, v[n_weight:] if len(v) > n_weight else None


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

    def vectors_of(self, some: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """X_oᵀ y of some units for y ``(b, n, j)``, each of length 1, ``(b, d_i + 1, j)``, and U times these, ``(rows, b j)``."""
        vectors = self.inputs.T @ (self.lengths[some, :, None] * turn)
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        z = (self.inputs @ vectors).permute(1, 0, 2)[:, None] * self._scores.g[:, :, 0, some, None]  # (n, r, b, j)
        return vectors, z.reshape(self._scores.rows, -1)

    @property
    def storage_entries(self) -> int:
        return self.inputs.numel() + self.lengths.numel() + self.gram.numel()

    def _signals(self, v: Tensor) -> Tensor:
        """[W | b] times the inputs, ``(d_o, n)``."""
        weight, bias = matrix_of(self._scores, v)
        if weight is None:
            return bias[:, None].expand(-1, self._scores.n)
        z = weight @ self._scores.a[:, 0].T
        return z if bias is None else z.add_(bias[:, None])

    def _spread(self, z: Tensor, out: Tensor, v: Tensor | None = None, scale: float = 1.0) -> None:
        """Write scale · (V + Z [A | 1]) in place of [W | b], without V by default."""
        weight, bias = matrix_of(self._scores, out)
        own = (None, None) if v is None else matrix_of(self._scores, v)
        if weight is not None and own[0] is not None:
            torch.addmm(own[0], z, self._scores.a[:, 0], beta=scale, alpha=scale, out=weight)
        elif weight is not None:
            torch.mm(z, self._scores.a[:, 0], out=weight)
        if bias is not None:
            total = z.sum(1)
            bias.copy_(total if own[1] is None else total.add_(own[1]).mul_(scale))

    def product(self, v: Tensor, out: Tensor) -> None:
        for x, y in _columns(v, out):
            self._spread(self._signals(x) * self.lengths.square(), y)

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        columns = list(_columns(v, out))
        z = torch.stack([self._signals(x) * self.lengths for x, _ in columns], dim=2)  # (d_o, n, K)
        z = solve_factored(self._cholesky(damping), z.double()).to(v.dtype)
        for k, (x, y) in enumerate(columns):
            self._spread(-z[:, :, k] * self.lengths, y, x, 1 / damping)


def _columns(v: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The vectors of a question with room for the answer, each contiguous."""
    for k in range(v.shape[1]):
        x, y = v[:, k].contiguous(), out[:, k]
        if y.is_contiguous():
            yield x, y
        else:
            room = torch.empty_like(x)
            yield x, room
            y.copy_(room)


class InputBlocks(MomentBlocks):
    r"""The inputs of a dense layer, whose blocks are formed a few at a time.

    .. math:: F_{ii} = \frac{1}{W} \sum_n a_{ni}^2 \sum_r g_{nr} g_{nr}^\top

    A product needs no block, only the scores. Where many solves are wanted, :meth:`precondition` answers them roughly, from the diagonal of
    every block in the eigenbasis of their mean; a single exact one, with the determinants, forms and factors the blocks a few at a time.

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
        self._logs: tuple[float, float] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._own: tuple[float, Tensor | None, float] | None = None
        self._run = None
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

    @property
    def _step(self) -> int:
        return max(1, _TOGETHER // (4 * self.index.shape[1] ** 2))

    def chunk(self, at: slice) -> Tensor:
        """Some blocks, one matrix product for as many examples as there is room for."""
        size, squares = self.index.shape[1], self._squares.T[at]
        out = squares.new_zeros(len(squares), size**2)
        step = max(1, _TOGETHER // size**2)
        for start in range(0, len(self._g), step):
            g = self._g[start : start + step]
            out.addmm_(squares[:, start : start + step], torch.bmm(g.mT, g).flatten(1))
        return out.view(-1, size, size)

    def product(self, v: Tensor, out: Tensor) -> None:
        for x, y in _columns(v, out):
            self._product(x, y)

    def _product(self, v: Tensor, out: Tensor) -> None:
        """Gᵀ[(G [W | b]) ∘ squares] by columns of [W | b], some at a time."""
        flat, (n, r) = self._g.flatten(0, 1), self._g.shape[:2]
        (weight, bias), (to_weight, to_bias) = matrix_of(self._scores, v), matrix_of(self._scores, out)
        if weight is not None:
            step = min(weight.shape[1], max(64, _SIGNALS // (n * r * flat.itemsize)))
            room = self._scores._empty(n * r, step)
            for start in range(0, weight.shape[1], step):
                at = slice(start, min(start + step, weight.shape[1]))
                z = torch.mm(flat, weight[:, at], out=room[:, : at.stop - at.start])
                z.view(n, r, -1).mul_(self._squares[:, None, at])
                torch.mm(flat.T, z, out=to_weight[:, at])
        if bias is not None:
            z = (flat @ bias).view(n, r) * self._squares[:, -1:]
            to_bias.copy_(flat.T @ z.flatten())

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Eigenvectors Q of the mean block, and the diagonals of Qᵀ F_ii Q: ``(d_o, d_i)`` of the weights, ``(d_o,)`` of the bias."""
        flat, weights = self._g.flatten(0, 1), self._squares.mean(1)
        mean = flat.T @ (flat * weights.repeat_interleave(self._g.shape[1])[:, None])
        q = eigenpairs(mean, "The mean block")[1].to(self.dtype)
        lengths = (flat @ q).view(self._g.shape).square().sum(1)  # (n, d_o)
        diagonals = lengths.T @ self._squares
        if self._scores.layer.bias:
            return q, diagonals[:, :-1].contiguous(), diagonals[:, -1].contiguous()
        return q, diagonals, None

    def precondition(self, v: Tensor, damping: float, out: Tensor) -> None:
        """Roughly (M_b + λI)⁻¹ V: exact where the blocks are multiples of one matrix."""
        q, of_weight, of_bias = self._basis
        for x, y in _columns(v, out):
            (weight, bias), (to_weight, to_bias) = matrix_of(self._scores, x), matrix_of(self._scores, y)
            if weight is not None:
                torch.mm(q, (q.T @ weight).div_(of_weight + damping), out=to_weight)
            if bias is not None:
                to_bias.copy_(q @ ((q.T @ bias) / (of_bias + damping)))

    def solve(self, v: Tensor, damping: float, out: Tensor) -> None:
        known = self._logs is not None and self._logs[0] == damping
        if known and self._last is not None and torch.equal(self._last[0][:, : v.shape[1]], v):
            out.copy_(self._last[1][:, : v.shape[1]])  # a layer's question again, of the whole network
        elif known or not self.inverts:
            super().solve(v, damping, out)  # a second solve pays for what is kept
        else:
            self._pass(damping, v, out)
            self._last = (v.clone(), out.clone())

    def _pass(self, damping: float, v: Tensor | None = None, out: Tensor | None = None) -> float:
        """Σ_b log det(M_b + λI), and a solve on the way, keeping nothing else."""
        packed = lapack.Packed(self.index.shape[1]) if self._packs(damping) else None
        outer = None if packed is None else torch.bmm(self._g.mT, self._g).flatten(1)[:, packed.places]

        def factored(at: slice) -> float:
            index = self.index[at]
            if packed is not None:
                blocks = self._squares.T[at] @ outer
                blocks[:, packed.diagonal] += damping
                if packed.factor(blocks):
                    if v is not None:
                        solution = v[index].mT.contiguous()
                        packed.solve(blocks, solution)
                        out[index] = solution.mT
                    return 2 * blocks[:, packed.diagonal].double().log().sum().item()
            factor = factor_for_inverse(self.chunk(at), damping)
            if v is not None:
                out[index] = solve_factored(factor, v[index].to(factor.dtype)).to(v.dtype)
            return 2 * factor.diagonal(dim1=-2, dim2=-1).double().log().sum().item()

        total = sum(side_by_side(factored, self.pieces(), self.index.device))
        self._logs, self._last = (damping, total), None
        return total

    def _packs(self, damping: float) -> bool:
        """Whether only the lower triangles of blocks are formed, and factored in the dtype of the scores."""
        size = self.index.shape[1]
        traces = self._g.square().sum((1, 2)) @ self._squares
        few = len(self._g) * size**2 <= _TOGETHER
        known = size >= _PACKED_FROM and lapack.knows(self.dtype, self.index.device)
        return known and few and safe_in(self.dtype, traces.max().item(), damping)

    def log_determinant(self, damping: float) -> float:
        if not self.inverts or (self._inverse is not None and self._inverse[0] == damping):
            return super().log_determinant(damping)
        known = self._logs is not None and self._logs[0] == damping
        return (self._logs[1] if known else self._pass(damping)) - self.index.numel() * math.log(damping)

    def squared_norm(self) -> float:
        """Σ_b of the squared Frobenius norms, from N × N kernels."""
        return input_norms(self._scores).sum().item() / self._total_weight**2
