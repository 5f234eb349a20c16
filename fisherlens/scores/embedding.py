"""Scores of an embedding table: index look-ups, never one-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.scores.base import CHUNK_BYTES, LayerScores, largest_entry


def embedding_rows(module: nn.Embedding, index: Tensor, g: Tensor) -> list[Tensor]:
    """Explicit rows ``(n, r, V d)`` of one use: row v of the table collects the scores at the positions that read it."""
    n, r, d = g.shape[0], g.shape[1], g.shape[-1]
    g = mask_padding(module, index, g)
    rows = g.new_zeros(n, module.num_embeddings, r, d)
    flat = index.reshape(n, -1)
    example = torch.arange(n, device=index.device)[:, None].expand_as(flat)
    rows.index_put_((example, flat), g.reshape(n, r, -1, d).transpose(1, 2), accumulate=True)
    return [rows.transpose(1, 2).reshape(n, r, -1)]


def mask_padding(module: nn.Embedding, index: Tensor, g: Tensor) -> Tensor:
    """Scores with those of the padding index set to zero: its row receives no gradient."""
    if module.padding_idx is None:
        return g
    padding = (index == module.padding_idx).reshape(index.shape[0], 1, *index.shape[1:], 1)
    return g.masked_fill(padding, 0)


class EmbeddingScores(LayerScores):
    """Row (n, r) of a table is Σ_t g_nrt at the table row that position t reads; only indices and g are kept.

    Parameters
    ----------
    layer
        The layer.
    index
        Table rows read, ``(n, t)``.
    outputs
        Output scores g, ``(n, r, t, d)``, zero at padding.
    """

    path = "factors"
    spreads = False  # rows that no example reads do not take part

    def __init__(self, layer: LayerInfo, index: Tensor, outputs: Tensor):
        self.layer, self.index, self.g = layer, index, outputs
        self.n, self.r, self.t, self.d = outputs.shape
        self.num_rows = layer.size // self.d
        self.width = self.t * self.d
        self.dtype, self.device = outputs.dtype, outputs.device

    def largest(self) -> float:
        return self.t * largest_entry(self.g)

    def part(self, at: slice) -> EmbeddingScores:
        return EmbeddingScores(self.layer, self.index[at], self.g[at])

    @property
    def nbytes(self) -> int:
        return self.index.numel() * 8 + self.g.numel() * self.g.itemsize

    def matmat(self, v: Tensor) -> Tensor:
        read = v.reshape(self.num_rows, self.d, -1)[self.index]  # (n, t, d, K)
        return torch.bmm(self.g.flatten(2), read.flatten(1, 2)).reshape(self.rows, -1)

    def _rmatmat(self, z: Tensor, out: Tensor) -> None:
        k = z.shape[1]
        h = torch.bmm(z.reshape(self.n, self.r, k).mT, self.g.flatten(2)).view(self.n, k, self.t, self.d)
        table = out.new_zeros(self.num_rows, k, self.d)
        table.index_add_(0, self.index.reshape(-1), h.transpose(1, 2).reshape(-1, k, self.d))
        out.copy_(table.transpose(0, 1).reshape(k, -1))

    def add_gram(self, out: Tensor) -> None:
        n, r, t = self.n, self.r, self.t
        found = self.g.new_empty(n, r, n, r)
        step = max(1, CHUNK_BYTES // max(1, n * r * r * t * t * self.g.itemsize))
        everything = self.g.reshape(n * r * t, self.d)
        for i in range(0, n, step):
            m = min(step, n - i)
            same = (self.index[i : i + m].reshape(m, t, 1, 1) == self.index).to(self.dtype)
            outer = (self.g[i : i + m].reshape(m * r * t, self.d) @ everything.T).view(m, r, t, n, r, t)
            found[i : i + m] = torch.einsum("mrtnsp,mtnp->mrns", outer, same)
        out += found.view(self.rows, self.rows)

    def columns(self, index: Tensor) -> Tensor:
        read = (self.index[..., None] == index // self.d).to(self.dtype)  # (n, t, m)
        return torch.einsum("nrtm,ntm->nrm", self.g[..., index % self.d], read).reshape(self.rows, -1)

    def rows_at(self, index: Tensor) -> Tensor:
        n, r = index // self.r, index % self.r
        out = self.g.new_zeros(len(index), self.num_rows, self.d)
        example = torch.arange(len(index), device=index.device)[:, None].expand(-1, self.t)
        out.index_put_((example, self.index[n]), self.g[n, r], accumulate=True)
        return out.flatten(1)

    def contract(self, coefficients: Tensor) -> EmbeddingScores:
        g = torch.einsum("nr,nrtd->ntd", coefficients, self.g)[:, None]
        return EmbeddingScores(self.layer, self.index, g)
