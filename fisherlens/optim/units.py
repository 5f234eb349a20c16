"""What one output unit sees: its rows, its gradient, and its place in the flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import self_gram
from fisherlens.optim import texts
from fisherlens.optim.moments import ROWS_BYTES, bytes_per_example, layer_scores
from fisherlens.optim.solve import solve_blocks
from fisherlens.optim.tap import Pass
from fisherlens.scores.base import CHUNK_BYTES, LayerScores
from fisherlens.scores.dense import DenseScores


def unit_count(layer: LayerInfo) -> int:
    """Output units or channels d_o."""
    return (layer.weight or layer.bias).shape[0]


def unit_size(layer: LayerInfo) -> int:
    """Parameters s of one unit: its weights, then its bias."""
    return layer.size // unit_count(layer)


def by_unit(layer: LayerInfo, flat: Tensor) -> Tensor:
    """The entries of a flat vector, ``(d_o, s)``; the bias is the last column."""
    units = unit_count(layer)
    return torch.cat([flat[p.start : p.stop].view(units, -1) for p in layer.parameters], dim=1)


def write_units(layer: LayerInfo, values: Tensor, out: Tensor) -> None:
    """Put ``(d_o, s)`` into their places in a flat vector."""
    start = 0
    for p in layer.parameters:
        width = p.numel // len(values)
        out[p.start : p.stop] = values[:, start : start + width].reshape(-1)
        start += width


def chunks(layer: LayerInfo, passes: Sequence[tuple[Pass, int]], like: Tensor) -> Iterator[LayerScores]:
    """Scores of a layer, of as many examples at a time as fit: factors of a dense layer, rows of a convolution."""
    for one, n in passes:
        calls = one.calls.get(layer.name, ())
        if not calls:
            continue
        if layer.weight is not None and any(call.use.modified for call in calls):
            raise InputError(texts.WRITTEN_OVER.format(layer=layer.name))
        step = max(1, min(n, ROWS_BYTES // max(1, bytes_per_example(layer, calls, like.dtype))))
        for start in range(0, n, step):
            yield layer_scores(layer, calls, slice(start, min(start + step, n)), like.dtype)


def has_plain_units(scores: LayerScores) -> bool:
    """Whether row n of unit o is g_no a_n: a dense layer of one position."""
    return type(scores) is DenseScores and scores.t == 1


def unit_rows(scores: LayerScores) -> Iterator[tuple[slice, Tensor]]:
    """Rows of some units at a time, X of shape ``(k, n, s)``, in bounded memory."""
    layer = scores.layer
    units, size = unit_count(layer), unit_size(layer)
    step = max(1, CHUNK_BYTES // max(1, scores.n * size * scores.dtype.itemsize))
    a = scores.unit_inputs() if type(scores) is DenseScores else None
    for start in range(0, units, step):
        at = slice(start, min(start + step, units))
        if a is not None and scores.t == 1:
            yield at, scores.g[:, 0, 0, at].T[:, :, None] * a[:, 0]
        elif a is not None:
            yield at, torch.matmul(scores.g[:, 0, :, at].mT, a).transpose(0, 1)
        else:
            pieces = [piece.view(scores.n, units, -1)[:, at] for piece in scores.pieces]
            yield at, torch.cat(pieces, dim=2).transpose(0, 1)


def solve_by_kernels(scores: LayerScores, scale: float, g: Tensor, damping: float) -> tuple[Tensor, int, int]:
    """(g_o - scale · X_oᵀ (scale · X_o X_oᵀ + λI)⁻¹ X_o g_o) / λ for all units, ``(d_o, s)``; retries; units without a factor.

    A unit whose kernel needed more damping has that λ throughout; one without a factor moves along g_o / (10^6 λ).
    """
    out, retries, failed = torch.empty_like(g), 0, 0

    def weights(kernels: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal retries, failed
        found = solve_blocks(kernels, damping, z)
        retries, failed = retries + found.retries, failed + len(found.failed)
        found.vectors[found.failed] = 0
        return found.vectors, found.damping[:, None]

    if not has_plain_units(scores):
        for at, rows in unit_rows(scores):
            y, used = weights(scale * rows @ rows.mT, torch.bmm(rows, g[at, :, None])[:, :, 0])
            out[at] = (g[at] - scale * torch.bmm(rows.mT, y[:, :, None])[:, :, 0]) / used
        return out, retries, failed
    a, scored = scores.unit_inputs()[:, 0], scores.g[:, 0, 0]  # (n, s), (n, d_o)
    inner, z = scale * self_gram(a), (scored * (a @ g.T)).T  # (n, n), (d_o, n)
    step = max(1, CHUNK_BYTES // (8 * scores.n**2))
    for start in range(0, len(g), step):
        at = slice(start, start + step)
        unit = scored[:, at].T  # (k, n)
        y, used = weights(inner * unit[:, :, None] * unit[:, None], z[at])
        out[at] = (g[at] - scale * (unit * y) @ a) / used
    return out, retries, failed
