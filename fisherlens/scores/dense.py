"""Scores of a dense layer, kept as its inputs and its output scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import mirror, self_gram
from fisherlens.scores.base import CHUNK_BYTES, LayerScores, largest_entry

# Bytes of signals between the two halves of a product that stay in a core's caches (our choice; 4 to 16 MiB measured alike).
_CACHED = 8 * 2**20
# Bytes of V that are brought into another order at a time, so that they are still in the cache when they are used (1 to 4 MiB measured alike).
_COPIED = 2 * 2**20
# Score rows of a tile of a Gram matrix: 4 MB in float32, so that its second factor meets it in the cache (our choice).
_TILE = 1024


class DenseScores(LayerScores):
    """Row (n, r) of a dense layer is Σ_t g_nrt ⊗ a_nt (weight) and Σ_t g_nrt (bias); only a and g are kept.

    Parameters
    ----------
    layer
        The layer; a weight or bias that was not selected is left out of the rows.
    inputs
        a, shape ``(n, t, d_i)``; t = 1 for a plain dense layer, more for leading axes or repeated uses.
    outputs
        g, shape ``(n, r, t, d_o)``: output scores of the r columns.
    """

    path = "factors"

    def __init__(self, layer: LayerInfo, inputs: Tensor, outputs: Tensor):
        self.layer = layer
        self.a, self.g = inputs, outputs
        self.n, self.r, self.t, self.d_o = outputs.shape
        self.d_i = inputs.shape[-1]
        self.dtype, self.device = outputs.dtype, outputs.device
        self.n_weight = self.d_o * self.d_i if layer.weight else 0
        self.width = self.t * self.d_o

    def largest(self) -> float:
        return self.t * largest_entry(self.g) * max(1.0 if self.layer.bias else 0.0, largest_entry(self.a))

    def part(self, at: slice) -> DenseScores:
        return DenseScores(self.layer, self.a[at], self.g[at])

    @property
    def nbytes(self) -> int:
        return (self.a.numel() + self.g.numel()) * self.g.itemsize

    def matmat(self, v: Tensor) -> Tensor:
        n, t, k, d_o = self.n, self.t, v.shape[1], self.d_o
        g = self.g.reshape(n, self.r, t * d_o)
        if k == 1:
            h = self._outputs(v[:, 0]).reshape(n, 1, t * d_o)
            return torch.bmm(h, g.mT).view(self.rows, 1)
        z = torch.zeros(n, self.r, k, dtype=self.dtype, device=self.device)
        if self.layer.weight and t == 1 and v.stride(0) != 1:
            self._by_units(v, z)
        elif self.layer.weight:
            a = self.a.reshape(n, t, self.d_i)
            weight = v[: self.n_weight].T
            # vectors that are contiguous one by one are taken where they lie
            weight = (weight if v.stride(0) == 1 else weight.contiguous()).unflatten(1, (d_o, self.d_i))
            for i, m, h in self._signals(k):
                inputs = a[i : i + m].reshape(m * t, self.d_i).expand(k, -1, -1)
                torch.bmm(inputs, weight.mT, out=h.view(k, m * t, d_o))
                torch.bmm(g[i : i + m], h.permute(1, 2, 0), out=z[i : i + m])
        if self.layer.bias:
            z += (self.g.sum(2) if t > 1 else self.g[:, :, 0]) @ v[self.n_weight :]
        return z.view(self.rows, k)

    def _by_units(self, v: Tensor, z: Tensor) -> None:
        """Add the weight's part of U V to z ``(n, r, K)``: V is copied, a few units at a time, into a matrix that stays in the cache."""
        w = v[: self.n_weight].reshape(self.d_o, self.d_i, -1)
        k, a = w.shape[2], self.a[:, 0]
        step = max(1, _COPIED // max(1, self.d_i * k * self.dtype.itemsize))
        for o in range(0, self.d_o, step):
            part = w[o : o + step]
            m = len(part)
            beside = self._empty(self.d_i, m, k).copy_(part.transpose(0, 1))
            h = torch.mm(a, beside.view(self.d_i, m * k), out=self._empty(self.n, m * k))
            z.baddbmm_(self.g[:, :, 0, o : o + step], h.view(self.n, m, k))

    def _signals(self, k: int) -> Iterator[tuple[int, int, Tensor]]:
        """Chunks of examples (start, number) with room for k signals at the layer's outputs, ``(k, m, t d_o)``, that stays in the caches.

        One position leaves nothing to gain: its matrix products are large and their operands are read once.
        """
        per_example = k * self.t * self.d_o * self.dtype.itemsize
        step = self.n if self.t == 1 else max(1, min(self.n, _CACHED // per_example))
        room = self._empty(k * step * self.t * self.d_o)
        for i in range(0, self.n, step):
            m = min(step, self.n - i)
            yield i, m, room[: k * m * self.t * self.d_o].view(k, m, self.t * self.d_o)

    def _outputs(self, v: Tensor) -> Tensor:
        """Change of the layer's outputs along one vector, ``(n * t, d_o)``."""
        a = self.a.reshape(self.n * self.t, self.d_i)
        bias = v[self.n_weight :] if self.layer.bias else None
        if not self.layer.weight:
            return bias.expand(self.n * self.t, self.d_o)
        weight = v[: self.n_weight].view(self.d_o, self.d_i)
        out = torch.mm(a, weight.T, out=self._empty(self.n * self.t, self.d_o))
        return out if bias is None else out.add_(bias)  # addmm would first fill `out` with the bias

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        n, t, k, d_o = self.n, self.t, z.shape[1], self.d_o
        g, a = self.g.reshape(n, self.r, t * d_o), self.a.reshape(n, t, self.d_i)
        z = z.view(n, self.r, k)
        weight = out[:, : self.n_weight].view(k, d_o, self.d_i) if self.layer.weight else None
        bias = out[:, self.n_weight :]
        for i, m, h in self._signals(k):
            torch.bmm(z[i : i + m].mT, g[i : i + m], out=h.transpose(0, 1))
            each = h.view(k, m * t, d_o)
            if weight is not None:
                inputs = a[i : i + m].reshape(m * t, self.d_i).expand(k, -1, -1)
                if i == 0:
                    torch.bmm(each.mT, inputs, out=weight)
                else:
                    torch.baddbmm(weight, each.mT, inputs, out=weight)
            if self.layer.bias:
                bias.copy_(each.sum(1)) if i == 0 else bias.add_(each.sum(1))

    def add_gram(self, out: Tensor) -> None:
        if self.t > 1:
            out += self._position_gram()
            return
        inner = self.a.new_zeros(self.n, self.n)
        if self.layer.weight:
            inner = self_gram(self.a[:, 0])
        if self.layer.bias:
            inner = inner + 1
        g = self.g.reshape(self.rows, self.d_o)
        some = max(1, _TILE // self.r)
        for j in range(0, self.n, some):
            right = slice(j * self.r, min(j + some, self.n) * self.r)
            wide = inner[:, j : j + some].repeat_interleave(self.r, dim=1)  # long inner loops: r is small
            for i in range(j, self.n, some):
                left = slice(i * self.r, min(i + some, self.n) * self.r)
                tile = g[left] @ g[right].T
                tile.view(-1, self.r, tile.shape[1]).mul_(wide[i : i + some, None])
                out[left, right] += tile

    def _position_gram(self) -> Tensor:
        """By positions, or from explicit rows of some units where that is cheaper."""
        n, r, t, d_o, d_i = self.n, self.r, self.t, self.d_o, self.d_i
        by_factors = n * n * t * t * (d_i + r * r * (d_o + 1))
        by_rows = n * r * t * d_i * d_o + n * n * r * r * d_i * d_o
        return self.gram_by_units() if by_rows < by_factors else self.gram_by_positions()

    def unit_inputs(self) -> Tensor:
        """Inputs as the units see them, ``(n, t, s)``: none without a weight, and with the 1 of the bias at the end."""
        a = self.a if self.layer.weight else self.a[..., :0]
        return torch.cat([a, a.new_ones(self.n, self.t, 1)], dim=2) if self.layer.bias else a

    def _unit_rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Explicit rows of some units at a time, ``(rows, units, d_i + 1)``: their weights, then the bias, as far as they were selected."""
        a = self.unit_inputs()
        step = max(1, CHUNK_BYTES // max(1, self.rows * a.shape[2] * a.itemsize))
        for start in range(0, self.d_o, step):
            units = slice(start, min(start + step, self.d_o))
            signals = self.g[..., units].transpose(2, 3).reshape(self.n, -1, self.t)
            yield units, torch.bmm(signals, a).view(self.rows, units.stop - units.start, a.shape[2])

    def gram_by_units(self) -> Tensor:
        """U_l U_lᵀ, ``(rows, rows)``, from the rows of some units at a time."""
        out = torch.zeros(self.rows, self.rows, dtype=self.dtype, device=self.device)
        for _, rows in self._unit_rows():
            out += self_gram(rows.flatten(1))
        return out

    def gram_by_positions(self) -> Tensor:
        """U_l U_lᵀ, ``(rows, rows)``, as Σ_tp (a_nt·a_qp)(g_nrt·g_qsp) in tiles of examples."""
        n, r, t, d_o, d_i = self.n, self.r, self.t, self.d_o, self.d_i
        out = self.g.new_empty(n, r, n, r)
        step = max(1, CHUNK_BYTES // max(1, n * r * r * t * t * self.g.itemsize))
        g_all = self.g.reshape(n * r * t, d_o)
        a_all = self.a.reshape(n * t, d_i)
        for i in range(0, n, step):
            m = min(step, n - i)
            inner = self.a.new_zeros(m * t, n * t)
            if self.layer.weight:
                inner = self.a[i : i + m].reshape(m * t, d_i) @ a_all.T
            if self.layer.bias:
                inner = inner + 1
            outer = (self.g[i : i + m].reshape(m * r * t, d_o) @ g_all.T).view(m, r, t, n, r, t)
            out[i : i + m] = torch.einsum("mrtnsp,mtnp->mrns", outer, inner.view(m, t, n, t))
        return mirror(out.view(self.rows, self.rows))  # tiles round differently on the two sides

    def _diagonal(self) -> Tensor:
        if self.t > 1:
            return self._unit_diagonal()
        square = self.g[:, :, 0].square().sum(1)  # (n, d_o)
        pieces = []
        if self.layer.weight:
            pieces.append((square.T @ self.a[:, 0].square()).reshape(-1))
        if self.layer.bias:
            pieces.append(square.sum(0))
        return torch.cat(pieces)

    def _unit_diagonal(self) -> Tensor:
        squares = torch.cat([rows.square().sum(0) for _, rows in self._unit_rows()])  # (d_o, d_i + 1)
        weight, bias = squares.split([self.n_weight // self.d_o, squares.shape[1] - self.n_weight // self.d_o], dim=1)
        return torch.cat([weight.reshape(-1), bias.reshape(-1)])

    def trace(self) -> Tensor:
        if self.t > 1:
            return super().trace()
        norms = self.g.new_zeros(self.n, dtype=torch.float64)
        if self.layer.weight:
            norms += self.a[:, 0].square().sum(1)
        if self.layer.bias:
            norms += 1
        return norms @ self.g.square().sum((1, 2, 3)).double()

    def _split(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Output unit of each parameter, and its input column; the bias is column d_i of the homogeneous input."""
        is_bias = index >= self.n_weight
        unit = torch.where(is_bias, index - self.n_weight, index // max(self.d_i, 1))
        column = torch.where(is_bias, self.d_i, index % max(self.d_i, 1))
        return unit, column

    def _homogeneous(self, column: Tensor) -> Tensor:
        """Input columns ``(n, t, m)``, with the constant 1 of the bias as column d_i."""
        picked = self.a[..., column.clamp(max=self.d_i - 1)]
        return torch.where(column == self.d_i, torch.ones((), dtype=picked.dtype, device=picked.device), picked)

    def columns(self, index: Tensor) -> Tensor:
        unit, column = self._split(index)
        a = self._homogeneous(column)
        if self.t == 1:
            return (self.g[:, :, 0, unit] * a).reshape(self.rows, -1)
        return torch.einsum("nrtm,ntm->nrm", self.g[..., unit], a).reshape(self.rows, -1)

    def rows_at(self, index: Tensor) -> Tensor:
        n, r = index // self.r, index % self.r
        g, a = self.g[n, r], self.a[n]  # (m, t, d_o), (m, t, d_i)
        pieces = []
        if self.layer.weight:
            pieces.append(torch.bmm(g.mT, a).flatten(1))
        if self.layer.bias:
            pieces.append(g.sum(1))
        return torch.cat(pieces, dim=1)

    def contract(self, coefficients: Tensor) -> DenseScores:
        return DenseScores(self.layer, self.a, torch.einsum("nr,nrto->nto", coefficients, self.g)[:, None])

    def _within_units(self, index: Tensor) -> bool:
        if self.t > 1 or index.shape[1] < 2:
            return self.t == 1
        first, _ = self._split(index[:1])
        if (first != first[:, :1]).any():  # as it mostly is, where it is not so
            return False
        unit, _ = self._split(index)
        return bool((unit == unit[:, :1]).all())

    def block_row_count(self, index: Tensor) -> int:
        return self.n if self._within_units(index) else self.rows

    def block_rows(self, index: Tensor) -> Tensor:
        # Inside one unit the r columns share the input: U_bᵀ U_b = Σ_n (Σ_r g_nro²) a_n a_nᵀ needs n rows only.
        if not self._within_units(index):
            return super().block_rows(index)
        unit, column = self._split(index)
        norm = torch.linalg.vector_norm(self.g[:, :, 0], dim=1)  # (n, d_o)
        a = self._homogeneous(column.reshape(-1))[:, 0].reshape(self.n, *index.shape)
        return (a * norm[:, unit[:, 0], None]).transpose(0, 1)

    def _moments(self, index: Tensor) -> Tensor:
        if not self._within_units(index):
            return super()._moments(index)
        num_blocks, size = index.shape
        out = torch.empty(num_blocks, size, size, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK_BYTES // max(1, self.n * size * self.dtype.itemsize))
        for start in range(0, num_blocks, step):
            x = self.block_rows(index[start : start + step])
            out[start : start + step] = torch.bmm(x.mT, x)
        return out
