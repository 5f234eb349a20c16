"""Damped solves of many small blocks, each of which gets more damping where it needs it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherlens.scores.base import CHUNK_BYTES

RETRIES = 6  # with 10, 100, ..., 10^6 times the damping; the number is our choice
SOLVED_BYTES = (
    4 * 2**20
)  # of blocks at a time on a CPU: they stay in its cache, in memory that was used before (our choice)


class BlockSolution(NamedTuple):
    """Solutions ``(B, s)``, how many factorisations were repeated, the blocks that could not be factorised, and their λ ``(B,)``."""

    vectors: Tensor
    retries: int
    failed: Tensor
    damping: Tensor


def solve_blocks(matrices: Tensor, damping: float, vectors: Tensor) -> BlockSolution:
    """Solve (H_b + λI) u_b = m_b for every block, by batched Cholesky factors in float64.

    A block that is not positive definite, or whose solution is not finite, is tried again with 10 λ, then 100 λ, up to
    10^6 λ; the others keep their λ. A block that fails even so takes m_b / (10^6 λ), the limit of large damping.

    Parameters
    ----------
    matrices
        H, ``(B, s, s)``, symmetric; the lower triangles are read.
    damping
        λ > 0.
    vectors
        m, ``(B, s)``.
    """
    if matrices.shape[-1] == 1:
        none = torch.zeros(0, dtype=torch.int64, device=vectors.device)
        return BlockSolution(vectors / (matrices[:, 0] + damping), 0, none, vectors.new_full((len(vectors),), damping))
    at_once = min(SOLVED_BYTES, CHUNK_BYTES) if matrices.device.type == "cpu" else CHUNK_BYTES
    step = max(1, at_once // (16 * matrices[0].numel()))
    parts = [_attempt(m, damping, v) for m, v in zip(matrices.split(step), vectors.split(step), strict=True)]
    out, solved = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    todo = (~solved).nonzero()[:, 0]
    used = vectors.new_full((len(vectors),), damping)
    retries = 0
    for power in range(1, RETRIES + 1):
        if not len(todo):
            break
        retries += len(todo)
        used[todo] = damping * 10**power
        out[todo], solved = _attempt(matrices[todo], damping * 10**power, vectors[todo])
        todo = todo[~solved]
    out[todo] = vectors[todo] / (damping * 10**RETRIES)
    return BlockSolution(out, retries, todo, used)


def _attempt(matrices: Tensor, damping: float, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions, and which of them stand."""
    dtype = torch.float64 if matrices.device.type != "mps" else matrices.dtype
    wide = matrices.to(dtype, copy=True)
    wide.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, info = torch.linalg.cholesky_ex(wide)
    solution = torch.cholesky_solve(vectors[:, :, None].to(dtype), factor)[:, :, 0].to(vectors.dtype)
    return solution, (info == 0) & torch.isfinite(solution).all(1)


class KernelFactor(NamedTuple):
    """Cholesky factor of a damped kernel in float64, the damping that it took, and how many attempts had failed."""

    factor: Tensor | None
    damping: float
    retries: int


def factorise(gram: Tensor, scale: float, damping: float) -> KernelFactor:
    """Factorise scale · K + λI in float64, with 10 λ, 100 λ, …, 10^6 λ where it is not positive definite.

    Where that fails too, the factor is None and the damping 10^6 λ: gradient over damping is what is left.
    """
    dtype = torch.float64 if gram.device.type != "mps" else gram.dtype
    for power in range(RETRIES + 1):
        wide = gram.to(dtype) * scale
        wide.diagonal().add_(damping * 10**power)
        factor, info = torch.linalg.cholesky_ex(wide)
        if info == 0 and torch.isfinite(factor.diagonal()).all():
            return KernelFactor(factor, damping * 10**power, power)
    return KernelFactor(None, damping * 10**RETRIES, RETRIES)
