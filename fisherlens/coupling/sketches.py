"""Estimates of the couplings from a few random projections of the rows of U, with standard errors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens._progress import progress
from fisherlens.coupling.norms import require_finite_products
from fisherlens.errors import MemoryBudgetError, NumericalWarning, readable_bytes, user_level
from fisherlens.linalg.dense import self_gram
from fisherlens.partitions import BlockGroup, Partition
from fisherlens.scores import ScoreMatrix
from fisherlens.scores.base import CHUNK_BYTES


@dataclass(frozen=True)
class Sketched:
    """Estimates for all pairs of blocks, float64.

    Attributes
    ----------
    ratio, ratio_sem
        ρ², ``(B, B)``: ratios of means over sketches, not clipped, and their standard errors.
    norms, norms_sem
        ‖U_bᵀU_b‖, ``(B,)``.
    """

    ratio: Tensor
    ratio_sem: Tensor
    norms: Tensor
    norms_sem: Tensor


def sketched_norms(
    scores: ScoreMatrix, parts: Partition, num_sketches: int, size: int, seed: int, memory: int, bar: bool | None
) -> Sketched:
    r"""Estimate ‖U_iᵀU_j‖² of all pairs of blocks with random signs z_1 … z_q over the rows.

    .. math:: X_{ij} = \frac{1}{q(q-1)} \sum_{a \ne b} (z_a^\top K_i z_b)(z_a^\top K_j z_b), \qquad E[X_{ij}] = \langle K_i, K_j \rangle

    Unbiased because z_a and z_b are independent and E z zᵀ = I. All blocks and pairs share the signs; the sketches are independent.
    """
    generator = torch.Generator().manual_seed(seed)
    num, device = parts.num_blocks, scores.device
    sums = [torch.zeros(num, num, dtype=torch.float64, device=device) for _ in range(3)]
    own = torch.empty(num_sketches, num, dtype=torch.float64, device=device)
    for k in progress(range(num_sketches), desc="sketches", enabled=bar):
        signs = torch.randint(0, 2, (scores.rows, size), generator=generator, device="cpu")
        x = _sketch(scores, parts, (2 * signs - 1).to(device, scores.dtype), memory)
        require_finite_products(x)
        own[k] = x.diagonal()
        sums[0] += x
        sums[1] += x.square()
        sums[2] += x * own[k][:, None]
    return _ratios(*sums, own)


def _ratios(total: Tensor, squares: Tensor, cross: Tensor, own: Tensor) -> Sketched:
    """ρ² = x̄_ij / √(x̄_ii x̄_jj), with the standard error of its linearisation in the three means."""
    count = len(own)
    mean, d = total / count, own.mean(0)
    scale = (d[:, None] * d).sqrt()
    there = scale > 0
    scale = scale.where(there, 1)
    ratio = (mean / scale).where(there, 0)
    if count < 3:
        warnings.warn(
            f"{count} sketches are too few for standard errors of the couplings, which are NaN. Use num_sketches >= 3.",
            NumericalWarning,
            stacklevel=user_level(),
        )
        unknown = torch.full_like(ratio, torch.nan)
        return Sketched(ratio, unknown, d.sqrt(), unknown[0])
    # deviations of a sketch: e = δ_ij/scale - ρ²/2 (δ_ii/x̄_ii + δ_jj/x̄_jj); their sum of squares from the sums
    relative = (own - d) / d.where(d > 0, 1)
    both = relative.T @ relative
    with_own = (cross - total * d[:, None]) / (scale * d.where(d > 0, 1)[:, None])
    spread = (squares - total * mean) / scale.square()
    spread = (
        spread
        - ratio * (with_own + with_own.T)
        + ratio.square() / 4 * (both.diagonal()[:, None] + both.diagonal() + 2 * both)
    )
    sem = (spread.clamp(min=0) / (count * (count - 1))).sqrt().where(there, 0)
    sem.fill_diagonal_(0)  # a block's coupling to itself is 1
    norms_sem = own.std(0) / count**0.5 / (2 * d.sqrt()).where(d > 0, 1)
    return Sketched(ratio, sem, d.sqrt(), norms_sem)


def _sketch(scores: ScoreMatrix, parts: Partition, signs: Tensor, memory: int) -> Tensor:
    """X of one sketch, ``(B, B)`` float64."""
    size = signs.shape[1]
    pair = torch.triu_indices(size, size, 1, device=scores.device)
    out = torch.empty(parts.num_blocks, pair.shape[1], dtype=scores.dtype, device=scores.device)
    crossing = any(group.layer is None for group in parts.groups)
    if crossing or not _kept(scores):  # a pass over the data gives all layers at once
        _require_room(scores.size * size * scores.dtype.itemsize, memory)
        image = scores.rmatmat(signs).T
        for group in parts.groups:
            _compress(image, group, 0, pair, out)
    else:
        for layer, start in zip(scores.layers, scores.offsets, strict=True):
            groups = [group for group in parts.groups if group.layer == layer.layer.name]
            if groups:
                _require_room(layer.size * size * scores.dtype.itemsize, memory)
                image = torch.empty(size, layer.size, dtype=scores.dtype, device=scores.device)
                layer.rmatmat(signs, image)
                for group in groups:
                    _compress(image, group, start, pair, out)
    return self_gram(out).double() * (2 / (size * (size - 1)))


def _kept(scores: ScoreMatrix) -> bool:
    return all(layer.path != "streamed" for layer in scores.layers)


def _require_room(needed: int, memory: int) -> None:
    if needed > memory:
        raise MemoryBudgetError(
            f"A sketch of this size holds {readable_bytes(needed)}, over the budget of {readable_bytes(memory)}. Use a smaller sketch_size with more num_sketches, "
            "one layer with F.restrict(name), or raise memory= of the Fisher."
        )


def _compress(image: Tensor, group: BlockGroup, start: int, pair: Tensor, out: Tensor) -> None:
    """Write the entries above the diagonal of Zᵀ K_b Z for every block of a group."""
    index = group.index.to(image.device) - start
    size = len(image)
    step = max(1, CHUNK_BYTES // max(1, size * max(size, group.size) * image.dtype.itemsize))
    for at in range(0, len(index), step):
        some = index[at : at + step]
        rows = image[:, some.reshape(-1)].view(size, *some.shape).transpose(0, 1)
        gram = torch.bmm(rows, rows.mT)
        out[group.block_ids[at : at + step].to(image.device)] = gram[:, pair[0], pair[1]]
