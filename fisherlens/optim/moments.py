"""Second moments of the scores of one forward pass, block by block, under a memory budget."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fisherlens.layout import LayerInfo, Layout
from fisherlens.linalg.memory import Workspace
from fisherlens.optim.tap import Call
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.scores.base import CHUNK_BYTES, LayerScores, column_moments
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ExplicitScores, ZeroScores
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.recorder import parameter_rows

# Explicit rows of a convolution at a time. Small enough for the cache and for recycled memory: of 64, 32, 16 and 8 MiB the
# fastest on two CPU cores, for 3x3 convolutions on 32x32 maps.
ROWS_BYTES = 16 * 2**20


def restrict(partition: Partition, layers: Sequence[LayerInfo]) -> Partition:
    """Keep of every block what lies in some layers, still in flat indices of the whole layout; empty blocks go."""
    covered = np.zeros(partition.layout.n_params, dtype=bool)
    for layer in layers:
        covered[layer.start : layer.stop] = True
    kept = covered[partition.flat.numpy()]
    if kept.all():
        return partition
    sizes = np.bincount(
        np.repeat(np.arange(partition.num_blocks), partition.sizes)[kept], minlength=partition.num_blocks
    )
    flat = torch.from_numpy(partition.flat.numpy()[kept])
    return Partition(partition.scheme, partition.layout, sizes[sizes > 0], flat, partition.options)


def digest(partition: Partition) -> str:
    """Tell blocks of the same sizes apart."""
    sizes = np.asarray(partition.sizes, dtype=np.int64)
    return hashlib.sha256(sizes.tobytes() + partition.flat.numpy().tobytes()).hexdigest()


def layer_scores(
    layer: LayerInfo, calls: Sequence[Call], examples: slice, dtype: torch.dtype, workspace: Workspace | None = None
) -> LayerScores:
    """Scores of some examples of one pass, one row each: factors of a dense layer, explicit rows of a convolution."""
    inputs = [call.use.inputs[examples].to(dtype) for call in calls]
    scores = [call.score[examples].to(dtype) for call in calls]
    n = len(inputs[0])
    if layer.kind == "dense":
        a = [x.reshape(n, -1, x.shape[-1]) for x in inputs]
        g = [s.reshape(n, 1, -1, s.shape[-1]) for s in scores]
        if len(calls) == 1:
            return DenseScores(layer, a[0], g[0])
        return DenseScores(layer, torch.cat(a, dim=1), torch.cat(g, dim=2))
    total: list[Tensor] = []
    for call, x, score in zip(calls, inputs, scores, strict=True):
        out = _row_buffers(layer, n, dtype, x.device, workspace)
        rows = parameter_rows(layer, replace(call.use, inputs=x), score[:, None].contiguous(), out, workspace)
        total = [a + b for a, b in zip(total, rows, strict=True)] if total else rows
    return ExplicitScores(layer, [piece.reshape(n, -1) for piece in total], 1)


def _row_buffers(
    layer: LayerInfo, n: int, dtype: torch.dtype, device: torch.device, workspace: Workspace | None
) -> tuple[Tensor | None, ...]:
    """Where a convolution's rows of its weight may go: memory that was used before."""
    if workspace is None or layer.weight is None:
        return (None, None)
    return workspace.empty((n, 1, layer.weight.numel), dtype, device), None


def bytes_per_example(layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype) -> int:
    """Memory of one example's explicit rows and of the patches they are made of; nothing for dense factors."""
    if layer.kind == "dense":
        return 0
    patches = 0
    for call in calls:
        shape = call.use.output_shape
        kernel = math.prod(call.use.module.kernel_size)
        patches = max(patches, call.use.inputs.shape[1] * kernel * math.prod(shape[2:]))
    return (layer.size * (1 + (len(calls) > 1)) + patches) * dtype.itemsize


@dataclass(eq=False)
class _Piece:
    """Blocks of one group: its place among all groups, its rows there, and their entries, counted over the layers needed.

    ``run`` is where the entries start if they follow each other without a gap, else None.
    """

    place: int
    rows: Tensor | None  # None for all of them
    index: Tensor  # (B, s)
    run: int | None


@dataclass(eq=False)
class _Work:
    """Blocks that need the same layers: one layer, or all of them where blocks cross layers."""

    layers: list[LayerInfo]
    pieces: list[_Piece]


class BlockMoments:
    """Computes Σ_n u_nb u_nbᵀ for every block b of a partition, u_n the score of example n.

    Dense layers are contracted from inputs and output scores; rows of convolutions are made for as many examples at a
    time as fit the budget.

    Parameters
    ----------
    groups
        Blocks in batches of one size, in flat indices.
    layers
        The layers that the blocks lie in, in layout order.
    layout
        Layout of the flat indices.
    device
        Of the parameters.
    budget
        Bytes for explicit rows at a time.
    """

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        layers: Sequence[LayerInfo],
        layout: Layout,
        device: torch.device,
        budget: int = ROWS_BYTES,
    ):
        self.budget = budget
        self._workspace = Workspace(limit=2 * budget)
        self._shapes = [(*group.index.shape, group.size) for group in groups]
        self._work: list[_Work] = []
        for name in dict.fromkeys(group.layer for group in groups):
            needed = list(layers) if name is None else [layout.layer(name)]
            position = torch.zeros(layout.n_params, dtype=torch.int64, device="cpu")
            position[torch.cat([torch.arange(layer.start, layer.stop, device="cpu") for layer in needed])] = 1
            position = position.cumsum(0) - 1
            pieces = []
            for place, group in enumerate(groups):
                if group.layer == name:
                    index = position[group.index]
                    for rows in _alike(needed, index):
                        part = index if rows is None else index[rows]
                        rows = None if rows is None else rows.to(device)
                        pieces.append(_Piece(place, rows, part.to(device), run_start(part)))
            self._work.append(_Work(needed, pieces))

    def __call__(self, calls: Mapping[str, Sequence[Call]], n: int, like: Tensor) -> list[Tensor | None]:
        """Give one ``(B, s, s)`` per group, None where none of its layers was called; ``n`` examples."""
        out: list[Tensor | None] = [None] * len(self._shapes)
        for work in self._work:
            present = [layer for layer in work.layers if layer.name in calls]
            if not present:
                continue
            per_example = sum(bytes_per_example(layer, calls[layer.name], like.dtype) for layer in present)
            step = max(1, min(n, self.budget // max(1, per_example)))
            for start in range(0, n, step):
                at = slice(start, min(start + step, n))
                scores = [
                    layer_scores(layer, calls[layer.name], at, like.dtype, self._workspace)
                    if layer.name in calls
                    else ZeroScores(layer, at.stop - at.start, 1, like.dtype, like.device)
                    for layer in work.layers
                ]
                totals = [out[piece.place] if piece.rows is None else None for piece in work.pieces]
                for piece, found in zip(work.pieces, _moments(scores, work.pieces, totals), strict=True):
                    if found is out[piece.place]:
                        continue  # added in place
                    if out[piece.place] is None and piece.rows is None:
                        out[piece.place] = found
                        continue
                    if out[piece.place] is None:
                        out[piece.place] = like.new_zeros(self._shapes[piece.place])
                    if piece.rows is None:
                        out[piece.place] += found
                    else:
                        out[piece.place].index_add_(0, piece.rows, found)
        return out


def _alike(layers: Sequence[LayerInfo], index: Tensor) -> list[Tensor | None]:
    """Rows of a dense layer's group that lie within one unit, and the others; any other group stays whole."""
    layer = layers[0]
    if len(layers) > 1 or layer.kind != "dense" or layer.weight is None or index.shape[1] == 1:
        return [None]
    weight = layer.weight
    unit = torch.where(index < weight.numel, index // weight.shape[1], index - weight.numel)
    within = (unit == unit[:, :1]).all(1)
    if within.all() or not within.any():
        return [None]
    return [within.nonzero()[:, 0], (~within).nonzero()[:, 0]]


def run_start(index: Tensor) -> int | None:
    """First index, if the rows of ``index`` follow each other without a gap; else None."""
    flat = index.reshape(-1)
    start = int(flat[0])
    return start if torch.equal(flat, torch.arange(start, start + len(flat), device=flat.device)) else None


def _moments(scores: list[LayerScores], pieces: list[_Piece], totals: list[Tensor | None]) -> list[Tensor]:
    """Moments of these scores; where ``totals`` allow it, added there and that total itself."""
    if len(scores) > 1:  # blocks across layers need the columns of all of them, which is all that moments asks for
        matrix = ScoreMatrix(scores)
        return [column_moments(matrix, piece.index) for piece in pieces]
    (layer,) = scores
    diagonal = layer.diagonal() if any(piece.index.shape[1] == 1 for piece in pieces) else None
    return [
        _entries(diagonal, piece) if piece.index.shape[1] == 1 else _layer_moments(layer, piece, total)
        for piece, total in zip(pieces, totals, strict=True)
    ]


def _entries(diagonal: Tensor, piece: _Piece) -> Tensor:
    flat = piece.index[:, 0]
    return (diagonal[flat] if piece.run is None else diagonal[piece.run : piece.run + len(flat)])[:, None, None]


def _layer_moments(scores: LayerScores, piece: _Piece, total: Tensor | None) -> Tensor:
    """Moments of blocks in one layer; neighbouring kernels, segments and biases, the usual case, without any gather."""
    size, start, count = piece.index.shape[1], piece.run, piece.index.numel()
    rows = found = None
    if start is not None and isinstance(scores, ExplicitScores):
        for part, at in zip(scores.pieces, scores.slices, strict=True):
            if at.start <= start and start + count <= at.stop:
                rows = part[:, start - at.start : start - at.start + count]
    elif start is not None and isinstance(scores, DenseScores):
        if start >= scores.n_weight:
            rows = scores.g[:, 0].sum(1)[:, start - scores.n_weight : start - scores.n_weight + count]
        elif scores.t == 1:
            found = _segment_moments(scores, start, count, size)
    if rows is not None:
        blocks = rows.unflatten(1, (-1, size)).transpose(0, 1)  # (B, n, s)
        return torch.bmm(blocks.mT, blocks) if total is None else total.baddbmm_(blocks.mT, blocks)
    return scores.moments(piece.index) if found is None else found


def _segment_moments(scores: DenseScores, start: int, count: int, size: int) -> Tensor | None:
    """Σ_n g_no² a_nc a_ncᵀ for the segments c of whole rows o of a dense weight; None where the blocks are not such.

    All units share the outer products of inputs, so that one matrix product per segment serves them.
    """
    width = scores.d_i
    if start % width or count % width or width % size or start + count > scores.n_weight:
        return None
    squares = scores.g[:, 0, 0, start // width : (start + count) // width].square()  # (n, units)
    out = scores.a.new_empty(squares.shape[1], width // size, size, size)
    step = max(1, CHUNK_BYTES // (scores.n * size * size * out.itemsize))
    inputs = scores.a[:, 0].unflatten(1, (-1, size))  # (n, segments, s)
    for first in range(0, out.shape[1], step):
        part = inputs[:, first : first + step]
        outer = (part[:, :, :, None] * part[:, :, None, :]).flatten(1)  # (n, segments s s)
        out[:, first : first + step] = (squares.T @ outer).view(len(out), -1, size, size)
    return out.flatten(0, 1)
