"""The score matrix U of several layers: products and Gram matrices, never U itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fisherlens.linalg.dense import mirror, self_gram
from fisherlens.linalg.memory import Workspace
from fisherlens.linalg.precision import OwnPrecision
from fisherlens.scores.base import PART, LayerScores

# Explicit columns up to this size are formed whole; beyond it their Gram matrix is summed over chunks of rows (our choice).
_AT_ONCE = 256 * 2**20
# Idle buffers for later products hold so much at least, and up to a quarter of the budget: a block of vectors costs more to map anew than to
# compute where it is large (our choice).
_IDLE_AT_LEAST, _IDLE_AT_MOST = 256 * 2**20, 2**30
# Gram matrices of the layers up to this size together are kept beside their sum: couplings ask for them (our choice).
_KEPT_GRAMS = 256 * 2**20


class ScoreMatrix(OwnPrecision):
    """U of shape ``(rows, P)``, P over the given layers in order; no answer is divided by the total weight.

    Parameters
    ----------
    layers
        Scores of the layers, in the order of the flat vector.
    kept
        Which rows carry weight, ``(rows,)`` bool; None for all. Rows without weight are zero and left out of :meth:`gram`.
    memory
        Budget in bytes of the Fisher they belong to: Gram matrices of layers are kept for later only well within it.
    """

    def __init__(self, layers: Sequence[LayerScores], kept: Tensor | None = None, memory: float = math.inf):
        self.layers = tuple(layers)
        self.kept, self.memory = kept, memory
        self.n, self.r = layers[0].n, layers[0].r
        self.rows = layers[0].rows
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self.size = sum(layer.size for layer in layers)
        self._grams: dict[str, Tensor] = {}
        self.workspace = Workspace(int(max(_IDLE_AT_LEAST, min(memory / 4, _IDLE_AT_MOST))))
        for layer in self.layers:
            layer.workspace = self.workspace

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer starts in this matrix's own columns."""
        starts, at = [], 0
        for layer in self.layers:
            starts.append(at)
            at += layer.size
        return tuple(starts)

    def restrict(self, names: Sequence[str]) -> ScoreMatrix:
        """The columns of some layers only, sharing memory and Gram matrices with this one."""
        part = ScoreMatrix([layer for layer in self.layers if layer.layer.name in set(names)], self.kept, self.memory)
        part._grams = self._grams
        return part

    def contract(self, coefficients: Tensor) -> ScoreMatrix:
        """One row per example, Σ_r c_nr u_nr, for coefficients ``(n, r)``."""
        kept = None if self.kept is None else self.kept.view(self.n, self.r).any(1)
        return ScoreMatrix([layer.contract(coefficients) for layer in self.layers], kept)

    def __getitem__(self, name: str) -> LayerScores:
        return next(layer for layer in self.layers if layer.layer.name == name)

    def matmat(self, v: Tensor) -> Tensor:
        """``(P, K)`` → ``(rows, K)``: the sum over layers is the coupling between them."""
        pieces = zip(self.layers, self.offsets, strict=True)
        layer, start = next(pieces)
        out = layer.matmat(v[start : start + layer.size])
        for layer, start in pieces:
            out += layer.matmat(v[start : start + layer.size])
        return out

    def rmatmat(self, z: Tensor) -> Tensor:
        """``(rows, K)`` → ``(P, K)``: Uᵀ Z, a transposed view of K contiguous vectors."""
        out = self.workspace.empty((z.shape[1], self.size), z.dtype, z.device)
        for layer, start in zip(self.layers, self.offsets, strict=True):
            layer.rmatmat(z, out[:, start : start + layer.size])
        return out.T

    def product(self, v: Tensor, scale: float = 1.0) -> Tensor:
        """UᵀU V times a scale, ``(P, K)``."""
        return self.rmatmat(self.matmat(v).mul_(scale))

    @cached_property
    def sizes(self) -> dict[str, float]:
        """A bound for each layer by name: no entry of its scores is larger."""
        return {layer.layer.name: layer.largest() for layer in self.layers}

    @cached_property
    def _largest(self) -> float:
        return max(self.sizes.values())

    def checked_product(self, v: Tensor, scale: float = 1.0) -> tuple[Tensor, bool]:
        """The product, and whether it is finite for certain: then so is V, and no sum of U's entries times those of U V can overflow.

        This looks at U V, which is short, where question and answer have an entry per parameter.
        """
        z = self.matmat(v).mul_(scale)
        bound = z.abs().sum(dtype=torch.float64).item() * self._largest
        certain = bound < torch.finfo(self.dtype).max / 2 and all(layer.spreads for layer in self.layers)
        return self.rmatmat(z), certain

    def layer_gram(self, name: str) -> Tensor:
        """U_l U_lᵀ over all rows, computed once and kept."""
        if name not in self._grams:
            self._grams[name] = self[name].gram()
        return self._grams[name]

    def full_gram(self) -> Tensor:
        """U Uᵀ over all rows, also those without weight; those of layers are kept for later only where they are small."""
        total = torch.zeros(self.rows, self.rows, dtype=self.dtype, device=self.device)
        own = self.rows**2 * self.dtype.itemsize
        keep = len(self.layers) * own <= min(_KEPT_GRAMS, self.memory - 2 * own)  # two: the sum, and its caller's copy
        for layer in self.layers:
            name = layer.layer.name
            if keep or name in self._grams:
                total += self.layer_gram(name)
            else:
                layer.add_gram(total)
        return mirror(total)

    def gram(self) -> Tensor:
        """U Uᵀ over the kept rows."""
        gram = self.full_gram()
        return gram if self.kept is None else gram[self.kept][:, self.kept]

    def diagonal(self) -> Tensor:
        """Column sums of U², ``(P,)``."""
        return torch.cat([layer.diagonal() for layer in self.layers])

    def trace(self) -> Tensor:
        """The sum of U², a float64 number."""
        return sum(layer.trace() for layer in self.layers)

    def rows_at(self, index: Tensor) -> Tensor:
        """Explicit rows, ``(len(index), P)``."""
        return torch.cat([layer.rows_at(index) for layer in self.layers], dim=1)

    def columns(self, index: Tensor) -> Tensor:
        """Explicit columns of the flat indices, ``(rows, len(index))``."""
        out = torch.empty(self.rows, len(index), dtype=self.dtype, device=self.device)
        for layer, start in zip(self.layers, self.offsets, strict=True):
            here = ((index >= start) & (index < start + layer.size)).nonzero()[:, 0]
            if len(here):
                out[:, here] = layer.columns(index[here] - start)
        return out

    def dense(self, index: Tensor | None = None) -> Tensor:
        """Uᵀ U, ``(P, P)``, or its block of some columns, ``(m, m)``; from all rows at once where those are small, else by chunks of rows."""
        width = self.size if index is None else len(index)
        if self.rows * width * self.dtype.itemsize <= _AT_ONCE and self.n <= PART:
            every = torch.arange(self.size, device=self.device)
            return self_gram(self.columns(every if index is None else index).T)
        out = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        step = max(1, min(_AT_ONCE // (self.size * self.dtype.itemsize), PART * self.r))
        for chunk in torch.arange(self.rows, device=self.device).split(step):
            rows = self.rows_at(chunk)
            out += self_gram((rows if index is None else rows[:, index]).T)
        return out.to(self.dtype)
