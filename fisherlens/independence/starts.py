r"""Where Lanczos begins in a layer: near the ends of M, from a small part of the problem.

The largest μ belongs to a vector of the row space, x = (F̂ + λ)⁻¹ Uᵀ y, and y is nearly the same for all stand-ins: that of the diagonal is found on some
of its columns. The smallest belongs to a vector inside the few blocks where F̂ is largest: a small problem in their leading eigenvectors tells which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.approximations.blocks import Blocks, MomentBlocks, RowBlocks
from fisherlens.approximations.structured import UnitBlocks
from fisherlens.independence.leads import unit
from fisherlens.independence.options import SMALL
from fisherlens.independence.standin import Parts, StandIn
from fisherlens.independence.target import Target
from fisherlens.linalg.probes import Probes
from fisherlens.scores.base import LayerScores

# Share of a random vector in a start that is held to be good; it makes the start complete (our choice).
RANDOM_PREPARED = 0.03
# Columns of U in the small problem for the largest μ, and steps of Lanczos there (our choices, from runs on LeNet: within about 1 % then).
_COLUMNS, _SHARE, _STEPS = 2048, 200, 8
# Entries of the blocks that are looked at for the smallest μ, their fewest and most, eigenvectors of each, and those that are kept in all.
_ENTRIES, _FEWEST, _MOST, _EACH, _EACH_UNIT, _KEPT = 2048, 4, 128, 8, 3, 128
# Steps of subspace iteration for these.
_POWERS = 6


def is_layer(target: Target) -> bool:
    """Whether leads come from this target rather than go to it."""
    return len(target.F.layout.layers) == 1


def common_start(target: Target, damping: float) -> Tensor | None:
    """Uᵀy, ``(P,)``, of the y that is near the largest μ of all stand-ins, with a random part; None where there are no columns to look at, or the layer is small."""
    F = target.F
    if not is_layer(target) or F.n_params <= SMALL or F.plan.streamed or F.plan.linearised:
        return None
    if target.common is None or target.common[0] != damping:
        spread = unit(F.scores.rmatmat(common_direction(target, damping)[:, None])[:, 0])
        random = unit(Probes(F.n_params, F.dtype, F.device, target.options.seed).gaussian(1)[:, 0])
        target.common = (damping, torch.add(spread, random, alpha=RANDOM_PREPARED))
    return target.common[1]


def common_direction(target: Target, damping: float) -> Tensor:
    """The y, ``(rows,)``, of the largest μ of the diagonal, from some columns of U."""
    F = target.F
    rows = Probes(F.scores.rows, F.dtype, F.device, target.options.seed + 1)
    generator = torch.Generator().manual_seed(target.options.seed)
    count = min(F.n_params, max(_COLUMNS, F.n_params // _SHARE))
    index = torch.randint(F.n_params, (count,), generator=generator, device="cpu").to(F.device)
    u = F.scores.layers[0].columns(index) / (target.diagonal[index] + damping).sqrt().to(F.dtype)
    basis, images = [unit(rows.gaussian(1)[:, 0])], []
    for _ in range(_STEPS):
        w = u @ (u.T @ basis[-1])
        images.append(w)
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        norm = torch.linalg.vector_norm(w)
        if not norm > 1e-6 * torch.linalg.vector_norm(images[-1]):
            break
        basis.append(w / norm)
    known = torch.stack(basis[: len(images)]).double()
    form = known @ torch.stack(images).double().T
    top = torch.linalg.eigh((form + form.T) / 2)[1][:, -1]
    return (top @ known).to(F.dtype)


@dataclass(frozen=True)
class Leading:
    """Vectors inside blocks, where these are large.

    Attributes
    ----------
    places
        Entries of the blocks in the layer, ``(c, s)``.
    vectors
        Orthonormal in each block, ``(c, s, j)``.
    values
        Quotients with the block, ``(c, j)``.
    images
        U times each of them, ``(rows, c j)``.
    """

    places: Tensor
    vectors: Tensor
    values: Tensor
    images: Tensor


def low_start(target: Target, stand_in: StandIn, damping: float) -> Tensor | None:
    r"""An r, ``(P,)``, such that (F + λ)⁻¹ r nearly has the smallest μ; None where blocks do not tell.

    Of r = T c, with the leading eigenvectors T of the largest blocks and their eigenvalues q, it is the one with the largest

    .. math:: \frac{r^\top (F + \lambda)^{-1} r}{r^\top (\hat F + \lambda)^{-1} r}, \qquad
       \lambda\, T^\top (F + \lambda)^{-1} T = 1 - T^\top U^\top (U U^\top + W \lambda)^{-1} U T
    """
    F = target.F
    if F.solver.dense_side or not target.exact:
        return None
    found = _found(target, stand_in)
    if not found:
        return None
    q = torch.cat([one.values.flatten() for _, one in found])
    kept = q.topk(min(len(q), _KEPT)).indices
    images = torch.cat([one.images for _, one in found], dim=1)[:, kept]
    half = torch.linalg.solve_triangular(F.solver.factor(damping), images.double(), upper=False)
    weights = (q[kept].double() + damping).sqrt()
    small = torch.eye(len(kept), dtype=half.dtype, device=half.device) - half.T @ half / F.total_weight
    c = torch.zeros(len(q), dtype=half.dtype, device=half.device)
    c[kept] = weights * torch.linalg.eigh(weights[:, None] * small * weights)[1][:, -1]
    out, first = torch.zeros(F.n_params, dtype=F.dtype, device=F.device), 0
    for start, one in found:
        own = c[first : first + one.values.numel()].view(one.values.shape).to(F.dtype)
        out[one.places + start] += torch.bmm(one.vectors, own[:, :, None])[:, :, 0]
        first += one.values.numel()
    return unit(out)


def _found(target: Target, stand_in: StandIn) -> list[tuple[int, Leading]]:
    """Leading vectors of a stand-in's blocks, with the places where their layers begin; those of layers are kept for the whole network."""
    F, kept, matrix = target.F, target.leads.leading, stand_in.matrix
    parts = matrix._parts if isinstance(matrix, Parts) else [(slice(0, F.n_params), matrix)]
    if len(parts) != len(F.scores.layers) or any(type(part) is not BlockDiagonal for _, part in parts):
        return []
    found: list[tuple[int, Leading]] = []
    for (piece, part), scores in zip(parts, F.scores.layers, strict=True):
        key = stand_in.name, scores.layer.name
        if key not in kept:
            own = [_leading(scores, target.diagonal[piece][at], at, x, target.options.seed) for at, x in part._parts]
            kept[key] = [one for one in own if one is not None]
        found += [(piece.start, one) for one in kept[key]]
    return found


def _leading(scores: LayerScores, diagonal: Tensor, at: slice, blocks: Blocks, seed: int) -> Leading | None:
    """Leading vectors of the blocks with the largest traces."""
    if not isinstance(blocks, MomentBlocks | RowBlocks):
        return None
    count, size = blocks.index.shape
    units = isinstance(blocks, UnitBlocks)
    traces = diagonal[blocks.index].sum(1)
    some = traces.topk(min(count, _MOST if units else max(_FEWEST, min(_MOST, _ENTRIES // size)))).indices
    places, dtype = blocks.index[some] + (at.start or 0), scores.dtype
    if units:
        values, turn = _eigenvectors(blocks.gram[some].to(dtype), seed, _EACH_UNIT)
        vectors, images = blocks.vectors_of(some, turn)
        return Leading(places, vectors, values, images)
    if size == 1:
        values, vectors = traces[some, None].to(dtype), torch.ones(len(some), 1, 1, dtype=dtype, device=places.device)
    elif isinstance(blocks, MomentBlocks):
        values, vectors = _eigenvectors(blocks.chunk(some), seed, _EACH)
    else:
        rows = blocks.rows[some]
        values, turn = _eigenvectors(torch.bmm(rows, rows.mT), seed, _EACH)
        vectors = torch.nn.functional.normalize(torch.bmm(rows.mT, turn), dim=1)
    columns = scores.columns(places.flatten()).view(-1, *places.shape)
    images = torch.bmm(columns.transpose(0, 1), vectors).transpose(0, 1).flatten(1)
    return Leading(places, vectors, values, images)


def _eigenvectors(matrices: Tensor, seed: int, each: int) -> tuple[Tensor, Tensor]:
    """Leading pairs of ``(c, s, s)``, roughly, by subspace iteration: ``(c, j)`` and ``(c, s, j)``."""
    dtype, matrices = matrices.dtype, matrices if matrices.itemsize >= 4 else matrices.float()  # halves have no QR
    count, size = matrices.shape[:2]
    start = Probes(size, matrices.dtype, matrices.device, seed).gaussian(min(each, size))
    vectors = start.expand(count, *start.shape)
    for step in range(_POWERS):
        vectors = torch.bmm(matrices, vectors)
        if step % 2:
            vectors = torch.linalg.qr(vectors)[0]
    values, turn = torch.linalg.eigh(torch.bmm(vectors.mT, torch.bmm(matrices, vectors)))
    return values.to(dtype), torch.bmm(vectors, turn).to(dtype)
