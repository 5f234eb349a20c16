"""Blocks that several partitions of one layer have in common are built once; finer blocks are cut out of coarser ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.approximations.blocks import Blocks, MomentBlocks
from fisherlens.linalg import memory
from fisherlens.scores.base import LayerScores
from fisherlens.scores.explicit import ExplicitScores

# Blocks from this size on are formed strip by strip, the upper triangle mirrored (our choice: below it products are too small).
_LARGE = 256
_CHUNK_BYTES = 16 * 2**20


class Shelf:
    """What was built for a layer so far, by the places of the blocks in its vector.

    Parameters
    ----------
    diagonal
        F_ii of the layer, ``(p,)``, in the dtype of its scores.
    """

    def __init__(self, diagonal: Tensor):
        self.diagonal = diagonal
        self._built: list[Blocks] = []

    def find(self, index: Tensor) -> Blocks | None:
        """The blocks at these places, if they are here or inside others that are."""
        if index.shape[1] == 1:
            return MomentBlocks(index, self.diagonal[index[:, 0], None, None])
        for blocks in self._built:
            if blocks.index.shape == index.shape and torch.equal(blocks.index, index):
                return blocks
        for blocks in self._built:
            if type(blocks) is MomentBlocks and blocks.index.shape[1] > index.shape[1]:
                matrices = blocks.cut(index)
                if matrices is not None:
                    return self.keep(MomentBlocks(index, matrices))
        return None

    def keep(self, blocks: Blocks) -> Blocks:
        """Put blocks here."""
        if getattr(blocks, "index", None) is not None:
            self._built.append(blocks)
        return blocks


def large_moments(scores: LayerScores, index: Tensor) -> Tensor | None:
    """U_bᵀ U_b of large blocks ``(B, s)`` that are rows of an explicit weight, each with its bias at the end; None for other blocks.

    The weight's columns are used where they lie, and five eighths of each block are computed.
    """
    if index.shape[1] < _LARGE or not isinstance(scores, ExplicitScores) or len(scores.pieces) != 2:
        return None
    (count, size), (weight, bias) = index.shape, scores.pieces
    own = torch.arange(scores.size, device=index.device)
    own = torch.cat([own[: count * (size - 1)].view(count, -1), own[count * (size - 1) :].view(-1, 1)[:count]], dim=1)
    if scores.size != count * size or weight.shape[1] != count * (size - 1) or not torch.equal(own, index):
        return None
    columns = weight.view(len(weight), count, size - 1).transpose(0, 1)  # (B, rows, s - 1)
    out = memory.zeros((count, size, size), weight.dtype, weight.device)
    strip, step = -(-(size - 1) // 4), max(1, _CHUNK_BYTES // (size**2 * weight.itemsize))
    for start in range(0, count, step):
        at = slice(start, start + step)
        x, b, block = columns[at], bias.T[at, :, None], out[at]
        for first in range(0, size - 1, strip):
            stop = min(first + strip, size - 1)
            block[:, first:stop, :stop] = torch.bmm(x[:, :, first:stop].mT, x[:, :, :stop])
            block[:, :first, first:stop] = block[:, first:stop, :first].mT
        block[:, -1, :-1] = torch.bmm(b.mT, x)[:, 0]
        block[:, :-1, -1] = block[:, -1, :-1]
        block[:, -1, -1] = b.square().sum((1, 2))
    return out
