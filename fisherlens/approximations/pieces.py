"""Sums over the data that structured stand-ins need, taken from captured scores or piece by piece where these are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherlens.fisher import Fisher
from fisherlens.partitions import BlockGroup
from fisherlens.scores.base import CHUNK_BYTES, LayerScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.matrix import ScoreMatrix
from fisherlens.scores.streamed import StreamedLayer


def score_parts(scores: ScoreMatrix) -> Iterator[ScoreMatrix]:
    """The kept scores at once; of streamed ones those of each piece of the data, in one pass for all layers."""
    first = scores.layers[0]
    if not isinstance(first, StreamedLayer):
        yield scores
        return
    names = [layer.layer.name for layer in scores.layers]
    for _, part in first._stream.parts():
        yield part.restrict(names)


def homogeneous_index(scores: DenseScores) -> Tensor:
    """Places of [W | b] in a layer's vector, ``(d_o, d_i + 1)``: rows are units, columns inputs; without what was not selected."""
    pieces = []
    if scores.layer.weight:
        pieces.append(torch.arange(scores.n_weight, device=scores.device).view(scores.d_o, scores.d_i))
    if scores.layer.bias:
        pieces.append(scores.n_weight + torch.arange(scores.d_o, device=scores.device)[:, None])
    return torch.cat(pieces, dim=1)


def homogeneous_inputs(scores: DenseScores) -> Tensor:
    """Inputs with the constant 1 of the bias, ``(n, t, d_i + 1)``; without what was not selected."""
    pieces = [scores.a] if scores.layer.weight else []
    if scores.layer.bias:
        pieces.append(scores.a.new_ones(*scores.a.shape[:2], 1))
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]


def structure_of(scores: LayerScores, index: Tensor) -> str | None:
    """``"units"`` or ``"inputs"`` where the blocks are all rows or all columns of [W | b] of a layer kept as factors, else None."""
    if not isinstance(scores, DenseScores):
        return None
    units, inputs = scores.d_o, (scores.d_i if scores.layer.weight else 0) + (1 if scores.layer.bias else 0)
    if index.shape not in ((units, inputs), (inputs, units)):
        return None
    own = homogeneous_index(scores)
    for name, expected in (("units", own), ("inputs", own.T)):
        if index.shape == expected.shape and bool((index == expected).all()):
            return name
    return None


def sum_of_blocks(scores: LayerScores, index: Tensor) -> Tensor:
    """Σ_b U_bᵀ U_b over the blocks ``(B, s)`` of one layer, ``(s, s)``, without the blocks where a contraction gives the sum."""
    structure = structure_of(scores, index)
    if structure is None:
        return scores._summed(lambda part: _summed_columns(part, index))
    total = scores._summed(_summed_units if structure == "units" else _summed_inputs)
    return (total + total.T) / 2


def _summed_units(part: LayerScores) -> Tensor:
    """Σ_o Σ_nr (Σ_t g_to a_t)(Σ_t g_to a_t)ᵀ = Σ_n A_nᵀ (Σ_r G_nr G_nrᵀ) A_n, with positions in the rows of A_n and G_nr."""
    a = homogeneous_inputs(part)
    g = part.g.transpose(1, 2).flatten(2)  # (n, t, r d_o)
    weighted = torch.bmm(torch.bmm(g, g.mT), a)
    return a.flatten(0, 1).T @ weighted.flatten(0, 1)


def _summed_inputs(part: LayerScores) -> Tensor:
    """Σ_i Σ_nr (Σ_t a_ti g_t)(Σ_t a_ti g_t)ᵀ = Σ_nr G_nrᵀ (A_n A_nᵀ) G_nr."""
    a = homogeneous_inputs(part)
    weighted = torch.matmul(torch.bmm(a, a.mT)[:, None], part.g)
    return part.g.flatten(0, 2).T @ weighted.flatten(0, 2)


def _summed_columns(part: LayerScores, index: Tensor) -> Tensor:
    size = index.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64, device=part.device)
    step = max(1, CHUNK_BYTES // max(1, part.rows * size * part.dtype.itemsize))
    for chunk in index.split(step):
        rows = part.columns(chunk.reshape(-1)).reshape(-1, size)  # every block's rows, one after another
        total += rows.T @ rows
    return total.to(part.dtype)


def squared_block_norms(F: Fisher, group: BlockGroup) -> Tensor:
    """‖F_bb‖² of the blocks of one layer, ``(B,)`` float64, with no more than a chunk of blocks in memory.

    Units and inputs of a dense layer of one position need N × N kernels only (methods: ‖F_oo‖² = sᵀ[(A Aᵀ)∘(A Aᵀ)]s / N²); other blocks
    are formed on their smaller side, in chunks.
    """
    layer, scores = F.layout.layer(group.layer), F.scores[group.layer]
    index = (group.index - layer.start).to(F.device)
    if group.size == 1:
        return (scores.diagonal()[index[:, 0]].double() / F.total_weight).square()
    structure = structure_of(scores, index)
    if structure is not None and scores.t == 1:
        return (_unit_norms if structure == "units" else _input_norms)(scores) / F.total_weight**2
    rows = scores.block_row_count(index)
    by_rows = group.size > rows
    # where each chunk is a pass over the data, chunks are as large as the budget allows
    room = max(CHUNK_BYTES, F.memory // 4) if isinstance(scores, StreamedLayer) else CHUNK_BYTES
    each = (rows * (group.size + rows) if by_rows else group.size**2) * F.dtype.itemsize
    found = []
    for chunk in index.split(max(1, room // each)):
        if by_rows:
            x = scores.block_rows(chunk)
            small = torch.bmm(x, x.mT)
        else:
            small = scores.moments(chunk)
        found.append(small.flatten(1).double().square().sum(1))
    return torch.cat(found) / F.total_weight**2


def _unit_norms(scores: DenseScores) -> Tensor:
    """Σ_nq s_no s_qo (a_n·a_q)² for every unit o, s_no = Σ_r g_nro²."""
    a, s = homogeneous_inputs(scores)[:, 0], scores.g[:, :, 0].square().sum(1)
    return _quadratic_forms(s, lambda at: (a[at] @ a.T).square(), scores.n)


def _input_norms(scores: DenseScores) -> Tensor:
    """Σ_nq a_ni² a_qi² Σ_rs (g_nr·g_qs)² for every input i."""
    g = scores.g[:, :, 0]

    def kernel(at: slice) -> Tensor:
        inner = g[at].flatten(0, 1) @ g.flatten(0, 1).T
        return inner.view(-1, scores.r, scores.n, scores.r).square().sum((1, 3))

    return _quadratic_forms(homogeneous_inputs(scores)[:, 0].square(), kernel, scores.n * scores.r**2)


def _quadratic_forms(x: Tensor, kernel: Callable[[slice], Tensor], width: int) -> Tensor:
    """x_jᵀ K x_j for every column j, from strips of K, whose rows hold ``width`` numbers on their way."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    step = max(1, CHUNK_BYTES // (width * x.itemsize))
    for start in range(0, len(x), step):
        at = slice(start, start + step)
        total += (x[at] * (kernel(at) @ x)).sum(0, dtype=torch.float64)
    return total
