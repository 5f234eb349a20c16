"""Couplings through the blocks' Gram matrices, in tiles of rows: no Gram matrix of a block is ever held whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fisherlens.coupling.kernels import families, spread_gram
from fisherlens.linalg.dense import self_gram
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.scores import ScoreMatrix
from fisherlens.scores.base import CHUNK_BYTES, LayerScores
from fisherlens.scores.dense import DenseScores

# Entries of each block whose products are summed in the dtype of the scores before they are added in float64.
_SLICE = 2**17
Fill = Callable[[Tensor, slice, slice, int], None]


class BlockGrams:
    """The Gram matrices K_b = U_b U_bᵀ of the blocks of a partition, any part of them on request.

    Whole layers come from the Gram matrix of the layer, which is kept; blocks of units or inputs of a dense layer from their
    factors; all others from their columns, in chunks.

    Parameters
    ----------
    scores, parts
        The score matrix, and blocks of its columns.
    room
        Bytes that explicit columns may take.
    """

    def __init__(self, scores: ScoreMatrix, parts: Partition, room: int = CHUNK_BYTES):
        self.scores, self.num_blocks, self.room = scores, parts.num_blocks, max(room, CHUNK_BYTES)
        self._groups = [(group, self._filler(group)) for group in parts.groups]

    def tile(self, blocks: slice, rows: slice, stop: int) -> Tensor:
        """Rows ``rows`` and columns 0..stop of K_b for a run of blocks, ``(b, m, stop)``."""
        scores = self.scores
        shape = (blocks.stop - blocks.start, rows.stop - rows.start, stop)
        out = torch.empty(shape, dtype=scores.dtype, device=scores.device)
        for group, fill in self._groups:
            first, last = torch.searchsorted(
                group.block_ids, group.block_ids.new_tensor([blocks.start, blocks.stop])
            ).tolist()
            for at in range(first, last, step := self._together(group, rows, stop)):
                some = slice(at, min(at + step, last))
                target = out.new_empty(some.stop - at, *shape[1:])
                fill(target, some, rows, stop)
                out[group.block_ids[some].to(scores.device) - blocks.start] = target
        return out

    def whole(self, blocks: slice) -> Tensor:
        """K_b over all rows, ``(b, rows, rows)``."""
        return self.tile(blocks, slice(0, self.scores.rows), self.scores.rows)

    def _together(self, group: BlockGroup, rows: slice, stop: int) -> int:
        each = max(self.scores.rows * group.size, (rows.stop - rows.start) * stop) * self.scores.dtype.itemsize
        return max(1, self.room // max(1, each))

    def _filler(self, group: BlockGroup) -> Fill:
        scores = self.scores
        if group.layer is not None:
            layer = scores[group.layer]
            if group.size == layer.size:
                return lambda out, some, rows, stop: out.copy_(scores.layer_gram(layer.layer.name)[rows, :stop])
            found = families(scores, [group])
            if found is not None and len(found) == 1:
                # blocks of a family keep the order of the group
                return lambda out, some, rows, stop: out.copy_(spread_gram(found[0], some, rows, stop))
            local = group.index.to(scores.device) - scores.offsets[scores.layers.index(layer)]
            if isinstance(layer, DenseScores) and layer.t == 1 and len(group) == 1:
                factors = _rectangle(layer, local[0])
                if factors is not None:
                    return lambda out, some, rows, stop: out[0].copy_(_factored(*factors, rows, stop))
            return lambda out, some, rows, stop: self._from_columns(layer, local[some], out, rows, stop)
        index = group.index.to(scores.device)
        return lambda out, some, rows, stop: self._from_columns(scores, index[some], out, rows, stop)

    def _from_columns(
        self, scores: LayerScores | ScoreMatrix, index: Tensor, out: Tensor, rows: slice, stop: int
    ) -> None:
        width = max(1, self.room // max(1, scores.rows * len(index) * scores.dtype.itemsize))
        for k, part in enumerate(index.split(width, dim=1)):
            columns = scores.columns(part.reshape(-1)).view(scores.rows, *part.shape).transpose(0, 1)
            left, right = columns[:, rows], columns[:, :stop].mT
            torch.bmm(left, right, out=out) if k == 0 else out.baddbmm_(left, right)


def _rectangle(layer: DenseScores, index: Tensor) -> tuple[Tensor, Tensor] | None:
    """Inputs and output scores of a block that is all pairs of some units and some inputs, a weight matrix, say."""
    unit, column = layer._split(index)
    units, columns = unit.unique(), column.unique()
    if len(units) * len(columns) != len(index):
        return None
    return layer._homogeneous(columns)[:, 0], layer.g[:, :, 0, units]


def _factored(inputs: Tensor, outputs: Tensor, rows: slice, stop: int) -> Tensor:
    n, r, _ = outputs.shape
    first, last = rows.start // r, math.ceil(rows.stop / r)
    inner = (inputs[first:last] @ inputs.T).repeat_interleave(r, 0).repeat_interleave(r, 1)
    flat = outputs.reshape(n * r, -1)
    return (flat[rows] @ flat[:stop].T).mul_(inner[rows.start - first * r : rows.stop - first * r, :stop])


def inner_products(rows: Tensor) -> Tensor:
    """⟨x_i, x_j⟩ of all rows of ``(B, m)``, float64."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(_SLICE, dim=1):
        out += self_gram(part)
    return out


def tile_rows(num: int, rows: int, item: int, room: int) -> int:
    """Rows per tile such that the tile of all blocks takes ``room`` bytes; 0 where not even one row fits."""
    return min(rows, room // max(1, num * rows * item))


def tile_norms(scores: ScoreMatrix, parts: Partition, room: int) -> tuple[Tensor, Tensor]:
    """‖U_iᵀU_j‖² = ⟨K_i, K_j⟩ of all pairs, ``(B, B)``, and tr K_i, ``(B,)``, float64; only the lower triangle of K is computed."""
    num, rows = parts.num_blocks, scores.rows
    grams = BlockGrams(scores, parts, room // 4)
    squares = torch.zeros(num, num, dtype=torch.float64, device=scores.device)
    traces = torch.zeros(num, dtype=torch.float64, device=scores.device)
    step = max(1, tile_rows(num, rows, scores.dtype.itemsize, room // 2))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tile = grams.tile(slice(0, num), slice(start, stop), stop)
        traces += tile[:, :, start:].diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        tile[:, :, :start] *= math.sqrt(2)  # these entries stand for their mirror images too
        squares += inner_products(tile.view(num, -1))
    return squares, traces


def layer_norms(scores: ScoreMatrix) -> tuple[Tensor, Tensor]:
    """The same with one block per layer, from the layers' Gram matrices, which are computed once and kept."""
    grams = [scores.layer_gram(layer.layer.name).reshape(-1) for layer in scores.layers]
    traces = torch.stack([gram[:: scores.rows + 1].sum(dtype=torch.float64) for gram in grams])
    squares = torch.zeros(len(grams), len(grams), dtype=torch.float64, device=scores.device)
    step = max(2**12, 2**18 // len(grams))  # a slice of all of them stays in the caches
    for start in range(0, len(grams[0]), step):
        part = torch.stack([gram[start : start + step] for gram in grams])
        squares += part @ part.T
    return squares, traces
