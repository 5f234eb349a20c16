"""Couplings through UᵀU itself, in strips of columns, or whole where it is small."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.partitions import Partition
from fisherlens.scores import ScoreMatrix

# Columns whose products are taken at once: large enough for the matrix product, and squares of them are summed in their own dtype.
_WIDTH = 2048


def matrix_norms(scores: ScoreMatrix, parts: Partition) -> tuple[Tensor, Tensor]:
    """‖U_iᵀU_j‖² of all pairs and tr U_iᵀU_i from UᵀU over the blocks' columns, float64: squares of its entries, summed by block on both sides."""
    order, block = _columns(scores, parts)
    matrix = scores.dense(order).double()
    traces = torch.zeros(parts.num_blocks, dtype=torch.float64, device=scores.device)
    traces.index_add_(0, block, matrix.diagonal())
    half = torch.zeros(parts.num_blocks, len(order), dtype=torch.float64, device=scores.device)
    half.index_add_(0, block, matrix.square_())
    out = torch.zeros(parts.num_blocks, parts.num_blocks, dtype=torch.float64, device=scores.device)
    out.index_add_(0, block, half.T.contiguous())
    return (out + out.T) / 2, traces


def _columns(scores: ScoreMatrix, parts: Partition) -> tuple[Tensor, Tensor]:
    """The blocks' columns one after another, and the block of each."""
    order = parts.flat.to(scores.device)
    return order, torch.repeat_interleave(
        torch.arange(parts.num_blocks, device=scores.device), torch.from_numpy(parts.sizes.copy()).to(scores.device)
    )


def strip_norms(scores: ScoreMatrix, parts: Partition, room: int) -> tuple[Tensor, Tensor]:
    """The same from explicit columns, two strips of them at a time; all columns at once where they fit."""
    order, block = _columns(scores, parts)
    item = scores.dtype.itemsize
    out = torch.zeros(parts.num_blocks, parts.num_blocks, dtype=torch.float64, device=scores.device)
    traces = torch.zeros(parts.num_blocks, dtype=torch.float64, device=scores.device)
    width = max(1, min(len(order), room // max(1, 3 * scores.rows * item)))
    if 2 * width >= len(order):
        width = len(order)
    places = torch.arange(len(order), device=scores.device).split(width)
    for k, here in enumerate(places):
        left = scores.columns(order[here])
        traces.index_add_(0, block[here], left.square().sum(0, dtype=torch.float64))
        for there in places[k:]:
            right = left if there is here else scores.columns(order[there])
            _add(out, left, block[here], right, block[there], mirrored=there is not here)
    return (out + out.T) / 2, traces


def _add(out: Tensor, left: Tensor, left_block: Tensor, right: Tensor, right_block: Tensor, *, mirrored: bool) -> None:
    """Add the squares of leftᵀ right by block, and those of its mirror image."""
    for i in range(0, left.shape[1], _WIDTH):
        own = left_block[i : i + _WIDTH]
        first = own[0]
        for j in range(0 if mirrored else i, right.shape[1], _WIDTH):
            other = right_block[j : j + _WIDTH]
            start, stop = other[0], other[-1] + 1
            square = (right[:, j : j + _WIDTH].T @ left[:, i : i + _WIDTH]).square_()
            half = square.new_zeros(int(stop - start), len(own)).index_add_(0, other - start, square)
            local = half.new_zeros(int(own[-1] - first) + 1, len(half), dtype=torch.float64)
            local.index_add_(0, own - first, half.T.double())
            out[first : own[-1] + 1, start:stop] += local
            if mirrored or j != i:
                out[start:stop, first : own[-1] + 1] += local.T
