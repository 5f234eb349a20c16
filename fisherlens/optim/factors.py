"""The two sides of a layer's gradient: what it reads and the scores at its output, position by position, and inverses made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.linalg.dense import eigenpairs, self_gram
from fisherlens.linalg.memory import Workspace
from fisherlens.optim import texts
from fisherlens.optim.moments import ROWS_BYTES
from fisherlens.optim.patch_moments import patch_moments, patch_sums, shifts_are_cheaper
from fisherlens.optim.solve import RETRIES
from fisherlens.optim.tap import Call
from fisherlens.scores.base import CHUNK_BYTES
from fisherlens.scores.conv import ConvGeometry


def matrix_shape(layer: LayerInfo) -> tuple[int, int, int]:
    """(B, d_o, d_i): groups of a convolution, outputs of each, inputs of each with the constant 1 of a bias."""
    tensor = layer.weight or layer.bias
    inputs = math.prod(layer.weight.shape[1:]) if layer.weight else 0
    return layer.groups, tensor.shape[0] // layer.groups, inputs + (layer.bias is not None)


def matrix_of(layer: LayerInfo, flat: Tensor) -> Tensor:
    """Weight and bias out of a flat vector as matrices [W, b], ``(B, d_o, d_i)``."""
    parts = [flat[p.start : p.stop].view(layer.groups, p.shape[0] // layer.groups, -1) for p in _tensors(layer)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def write_matrix(layer: LayerInfo, matrix: Tensor, out: Tensor) -> None:
    """Put matrices [W, b] where they belong in a flat vector."""
    start = 0
    for p in _tensors(layer):
        width = math.prod(p.shape[1:])
        out[p.start : p.stop] = matrix[:, :, start : start + width].reshape(-1)
        start += width


def _tensors(layer: LayerInfo) -> list[Any]:
    return [p for p in (layer.weight, layer.bias) if p is not None]


def positions(
    layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype, workspace: Workspace, budget: int = ROWS_BYTES
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs a ``(B, d_i, n, T)`` and scores g ``(B, d_o, n, T)`` of some examples at a time.

    The gradient of example n is Σ_t g_nt a_ntᵀ. A convolution's T positions are its output pixels and a its patches, some examples
    at a time under ``budget`` bytes; several calls of one module stand side by side along T; a bias adds a constant 1 to a.
    """
    if layer.weight is not None and any(call.use.modified for call in calls):
        raise InputError(texts.WRITTEN_OVER.format(layer=layer.name))
    if layer.kind == "dense":
        yield _dense_positions(layer, calls, dtype)
        return
    groups, d_o, d_i = matrix_shape(layer)
    n = len(calls[0].use.inputs)
    counts = [math.prod(call.score.shape[2:]) for call in calls]
    step = max(1, budget // (groups * d_i * sum(counts) * dtype.itemsize))
    for first in range(0, n, step):
        some = slice(first, min(first + step, n))
        size = some.stop - some.start
        a = workspace.empty((groups, d_i, size, sum(counts)), dtype, calls[0].score.device)
        g = workspace.empty((groups, d_o, size, sum(counts)), dtype, calls[0].score.device)
        start = 0
        for call, count in zip(calls, counts, strict=True):
            here = slice(start, start + count)
            if layer.weight:
                _write_patches(call, some, a[:, : d_i - (layer.bias is not None), :, here])
            g[..., here] = call.score[some].reshape(size, groups, d_o, count).permute(1, 2, 0, 3)
            start += count
        if layer.bias:
            a[:, -1] = 1
        yield a, g


def _dense_positions(layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n = len(calls[0].use.inputs)
    scores = [call.score.reshape(n, -1, call.score.shape[-1]) for call in calls]
    g = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)).to(dtype)  # (n, T, d_o)
    columns = []
    if layer.weight:
        inputs = [call.use.inputs.reshape(n, -1, call.use.inputs.shape[-1]) for call in calls]
        columns.append((inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)).to(dtype))
    if layer.bias:
        columns.append(g.new_ones(*g.shape[:2], 1))
    a = columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)
    return a.permute(2, 0, 1)[None], g.permute(2, 0, 1)[None]


def _write_patches(call: Call, some: slice, out: Tensor) -> None:
    """Write the patches that a convolution reads into ``(B, d, n, T)``, entries in the order of its weight."""
    x = call.use.inputs[some]
    geometry = ConvGeometry.of(call.use.module)
    padded = geometry.padded(x)
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    batch, channel, *axes = padded.stride()
    kernel = [stride * dilation for stride, dilation in zip(axes, geometry.dilation, strict=True)]
    moves = [stride * step for stride, step in zip(axes, geometry.stride, strict=True)]
    at = geometry.positions(padded)
    view = padded.as_strided(
        (groups, channels, *geometry.kernel, len(x), *at), (channel * channels, channel, *kernel, batch, *moves)
    )
    out.unflatten(3, at).unflatten(1, (channels, *geometry.kernel)).copy_(view)


def normal(x: Tensor) -> Tensor:
    """The same with 0 for numbers so small that products with them leave the range of full mantissas, which takes a CPU a hundred times as long.

    In single precision those below 1e-24, unless all are below 1e-10.
    """
    info = torch.finfo(x.dtype)
    cut = info.tiny / info.eps**2
    if x.device.type != "cpu" or not x.numel() or x.abs().max() <= cut / info.eps**2:
        return x
    return functional.hardshrink(x, cut)


def rounded(vectors: Tensor) -> Tensor:
    """Unit vectors with 0 for entries below the square of the rounding of one, which are noise; see :func:`normal` for the reason."""
    return functional.hardshrink(vectors, torch.finfo(vectors.dtype).eps ** 2)


def factor_basis(factor: Tensor, side: str, layer: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Kronecker factor, descending, and eigenvectors as :func:`rounded` leaves them, in the dtype of the factor."""
    values, vectors = eigenpairs(factor, f"Factor {side} of layer {layer!r}")
    return values.to(factor.dtype), rounded(vectors.to(factor.dtype))


# What of λ an eigenvalue of a block may be left out for, times the rounding of one (our choice: within what single precision is held to).
_NEGLIGIBLE = 100


def damped_direction(left: Tensor, right: Tensor, g: Tensor, a: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(G ⊗ A + λI)⁻¹ vec(gradient) for B blocks, ``(B, d_o, d_i)``, from the eigenvectors of G and A and their eigenvalues, descending.

    Where an eigenvalue of A is so small that its block is nothing beside λI, gradient over λ is left; its eigenvector is not needed.
    """
    g, a = g.clamp(min=0)[:, :, None], a.clamp(min=0)[:, None, :]  # below zero is rounding
    along = normal(left.mT @ gradient)
    rank = int((a * g.amax() > _NEGLIGIBLE * torch.finfo(a.dtype).eps * damping).sum(2).max())
    if rank > 0.7 * a.shape[2]:
        return normal(left @ normal((along @ right) / (g * a + damping))) @ right.mT
    right, values = right[:, :, :rank], g * a[:, :, :rank]
    inside = normal((along @ right) * (values / (values + damping)))
    return (left @ normal(along - inside @ right.mT)) / damping


class FactorSums(NamedTuple):
    """Σ_nt a aᵀ ``(B, d_i, d_i)``, Σ_nt g gᵀ / T ``(B, d_o, d_o)``, and the number of examples."""

    A: Tensor
    G: Tensor
    examples: int

    def __add__(self, other: FactorSums) -> FactorSums:  # type: ignore[override]
        return FactorSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def factor_sums(
    layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype, workspace: Workspace, form: str
) -> FactorSums:
    """Sums that the Kronecker factors of one pass are made of.

    ``form`` is ``"expand"``, every position an example of its own, or ``"reduce"``, the mean of a and the sum of g over positions.
    """
    if layer.kind == "conv" and form == "expand" and layer.weight is not None and all(map(_by_shifts, calls)):
        return _shifted_sums(layer, calls, dtype)
    total: FactorSums | None = None
    for a, g in positions(layer, calls, dtype, workspace):
        if form == "reduce":
            a, g = a.mean(3, keepdim=True), g.sum(3, keepdim=True)
        n, t = a.shape[2:]
        part = FactorSums(*(_grams(x.flatten(2)) for x in (a, g)), n)
        part.G.div_(t)
        total = part if total is None else total + part
    return total


def _grams(rows: Tensor) -> Tensor:
    """X Xᵀ for ``(B, d, m)``."""
    return self_gram(rows[0])[None] if len(rows) == 1 else torch.bmm(rows, rows.mT)


def _by_shifts(call: Call) -> bool:
    geometry, x = ConvGeometry.of(call.use.module), call.use.inputs
    return shifts_are_cheaper(geometry, x.shape[1] // geometry.groups, tuple(call.score.shape[2:]))


def _shifted_sums(layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype) -> FactorSums:
    """The same sums for convolutions whose patches need not be made."""
    if any(call.use.modified for call in calls):
        raise InputError(texts.WRITTEN_OVER.format(layer=layer.name))
    groups, d_o, d_i = matrix_shape(layer)
    n, d = len(calls[0].use.inputs), layer.weight.numel // (groups * d_o)
    A, G = (
        calls[0].score.new_zeros(groups, d_i, d_i, dtype=dtype),
        calls[0].score.new_zeros(groups, d_o, d_o, dtype=dtype),
    )
    count = 0
    for call in calls:
        geometry = ConvGeometry.of(call.use.module)
        x, t = geometry.padded(call.use.inputs.to(dtype)), math.prod(call.score.shape[2:])
        A[:, :d, :d] += patch_moments(geometry, x)
        if layer.bias is not None:
            sums = patch_sums(geometry, x)
            A[:, :d, d] += sums
            A[:, d, :d] += sums
            A[:, d, d] += n * t
        g = call.score.to(dtype).reshape(n, groups, d_o, t).permute(1, 2, 0, 3)
        G += _grams(g.flatten(2))
        count += t
    return FactorSums(A, G / count, n)


def summed_scores(layer: LayerInfo, calls: Sequence[Call], dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """Σ_n Σ_t g_nt a_ntᵀ, ``(B, d_o, d_i)``: the gradient that belongs to the scores."""
    return sum(torch.bmm(g.flatten(2), a.flatten(2).mT) for a, g in positions(layer, calls, dtype, workspace))


def rotated_squares(
    layer: LayerInfo, calls: Sequence[Call], left: Tensor, right: Tensor, workspace: Workspace
) -> Tensor:
    """Σ_n (Q_Gᵀ U_n Q_A)², entry by entry, ``(B, d_o, d_i)``; the U_n of layers with positions under a memory budget."""
    total = left.new_zeros(len(left), left.shape[1], right.shape[1])
    for a, g in positions(layer, calls, left.dtype, workspace):
        n, t = a.shape[2:]
        a, g = right.mT @ a.flatten(2), left.mT @ g.flatten(2)
        if t == 1:
            total += g.square() @ a.square().mT
            continue
        a, g = (x.unflatten(2, (n, t)).transpose(1, 2) for x in (a, g))  # (B, n, d, T)
        step = max(1, ROWS_BYTES // (total.numel() * total.itemsize))
        for first in range(0, n, step):
            some = slice(first, first + step)
            total += (g[:, some] @ a[:, some].mT).square().sum(1)
    return total


class Inverses(NamedTuple):
    """Inverses ``(B, s, s)``, how many factorisations were repeated, and how many blocks could not be factorised."""

    matrices: Tensor
    retries: int
    failed: int


def damped_inverses(matrices: Tensor, damping: Tensor) -> Inverses:
    """(M_b + λ_b I)⁻¹ for every block, from Cholesky factors in float64.

    A block that is not positive definite is tried again with 10 λ, 100 λ, up to 10^6 λ, and then becomes I / (10^6 λ), the limit of
    large damping.

    Parameters
    ----------
    matrices
        M, ``(B, s, s)``, symmetric; the lower triangles are read.
    damping
        λ > 0, ``(B,)`` in float64.
    """
    damping = damping.to(matrices.device)
    if matrices.shape[-1] == 1:
        return Inverses(1 / (matrices + damping.to(matrices.dtype)[:, None, None]), 0, 0)
    step = max(1, CHUNK_BYTES // (16 * matrices[0].numel()))
    out, bad = torch.empty_like(matrices), []
    for first in range(0, len(matrices), step):
        some = slice(first, first + step)
        out[some], solved = _attempt(matrices[some], damping[some])
        bad.append((~solved).nonzero()[:, 0] + first)
    todo = torch.cat(bad)
    retries = 0
    for power in range(1, RETRIES + 1):
        if not len(todo):
            break
        retries += len(todo)
        out[todo], solved = _attempt(matrices[todo], damping[todo] * 10**power)
        todo = todo[~solved]
    if len(todo):
        identity = torch.eye(matrices.shape[-1], dtype=out.dtype, device=out.device)
        out[todo] = identity / (damping[todo] * 10**RETRIES).to(out.dtype)[:, None, None]
    return Inverses(out, retries, len(todo))


def _attempt(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses, and which of them stand."""
    dtype = torch.float64 if matrices.device.type != "mps" else matrices.dtype
    wide = matrices.to(dtype, copy=True)
    wide.diagonal(dim1=-2, dim2=-1).add_(damping.to(dtype)[:, None])
    factor, info = torch.linalg.cholesky_ex(wide)
    factor[info != 0] = torch.eye(matrices.shape[-1], dtype=dtype, device=matrices.device)  # replaced by the caller
    inverse = torch.cholesky_inverse(factor).to(matrices.dtype)
    return inverse, (info == 0) & torch.isfinite(inverse).flatten(1).all(1)
