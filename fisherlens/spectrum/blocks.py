"""All eigenvalues of every block of a block-diagonal matrix, equal sizes in one batch, each through the smaller of its two sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.approximations.block_diagonal import BlockDiagonal
from fisherlens.approximations.blocks import MomentBlocks, RowBlocks
from fisherlens.approximations.shared import SharedBlockDiagonal, as_single_blocks
from fisherlens.errors import MemoryBudgetError, readable_bytes
from fisherlens.linalg.dense import eigenpairs, eigenvalues

# Bytes of float64 matrices that are decomposed in one call.
_BATCH = 64 * 2**20
_MEMORY = 2 * 2**30


class BlockTable:
    """Eigenvalues of blocks as padded arrays, filled piece by piece.

    Attributes
    ----------
    columns
        Name → array over blocks and ranks (``eigenvalue``, ``residual_norm``, ``above_noise``, on request ``eigenvector``) or blocks alone
        (``noise_floor``, ``trace``, ``rank_bound``, ``num_above_noise``).
    """

    def __init__(self, num_blocks: int, length: int, n: int, *, vectors: bool, memory: float = _MEMORY):
        needed = num_blocks * length * (24 + 8 * n * vectors)
        if needed > memory and num_blocks > 1:
            raise MemoryBudgetError(
                f"The spectra of {num_blocks} blocks with up to {length} eigenvalues each{' and their eigenvectors' if vectors else ''} take "
                f"{readable_bytes(needed)}, over the budget of {readable_bytes(memory)}. Use vectors=False, look at one layer with F.restrict(name), or "
                "choose a partition with fewer blocks."
            )
        shape = (num_blocks, length)
        self.columns: dict[str, Any] = {
            "eigenvalue": np.full(shape, np.nan),
            "residual_norm": np.full(shape, np.nan),
            "above_noise": np.zeros(shape, dtype=bool),
            "noise_floor": np.zeros(num_blocks),
            "trace": np.zeros(num_blocks),
            "rank_bound": np.zeros(num_blocks, dtype=np.int64),
            "num_above_noise": np.zeros(num_blocks, dtype=np.int64),
        }
        if vectors:
            self.columns["eigenvector"] = np.full((*shape, n), np.nan)

    def fill(
        self, ids: np.ndarray, values: np.ndarray, eps: float, rank_bound: int, psd: bool, trace: np.ndarray
    ) -> np.ndarray:
        """Enter the eigenvalues ``(B, m)`` of some blocks and what follows from them; returns which are above the noise."""
        order, size = values.shape[1], np.abs(values)
        floor = order * eps * size.max(1, initial=0.0)
        above = (values if psd else size) > floor[:, None]
        at = (ids, slice(0, order))
        self.columns["eigenvalue"][at], self.columns["above_noise"][at] = values, above
        self.columns["residual_norm"][at] = floor[:, None]
        for name, column in (("noise_floor", floor), ("trace", trace), ("num_above_noise", above.sum(1))):
            self.columns[name][ids] = column
        self.columns["rank_bound"][ids] = rank_bound
        return above

    def fill_vectors(self, ids: np.ndarray, places: np.ndarray, x: Tensor, residual: Tensor, above: np.ndarray) -> None:
        """Enter eigenvectors ``(B, s, m)`` at flat places ``(B, s)``; those of noise stay NaN, with the floor as residual."""
        rows = x.mT.cpu().numpy()
        for block, where, vectors, norms, good in zip(ids, places, rows, residual.cpu().numpy(), above, strict=True):
            ranks = np.flatnonzero(good)
            self.columns["eigenvector"][block, ranks[:, None], where] = vectors[ranks]
            self.columns["residual_norm"][block, ranks] = norms[ranks]


def block_spectra(blocks: BlockDiagonal, *, vectors: bool) -> dict[str, np.ndarray]:
    """The columns of a :class:`BlockTable` for every block, in the partition's order."""
    eps, F = torch.finfo(blocks.dtype).eps, blocks._fisher
    pieces = [
        (group.block_ids.numpy(), at, as_single_blocks(part))
        for group, (at, part) in zip(blocks._groups, blocks._parts, strict=True)
    ]
    # a mean of blocks may have a higher rank than any of them
    most = blocks.n_params if isinstance(blocks, SharedBlockDiagonal) else F.rank_bound
    length = max((_order(part) for _, _, part in pieces), default=0)
    table = BlockTable(blocks.partition.num_blocks, length, blocks.n_params, vectors=vectors, memory=F.memory)
    for ids, at, part in pieces:
        for chunk, matrices in _matrices(part):
            what = f"A block of order {matrices.shape[-1]}"
            trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).cpu().numpy()
            bound = min(most, matrices.shape[-1])
            if matrices.shape[-1] == 1 and not vectors:
                values = eigenvalues(matrices, what) if not torch.isfinite(matrices).all() else matrices[:, 0].double()
                table.fill(ids[chunk], values.cpu().numpy(), eps, bound, True, trace)
                continue
            if not vectors:
                table.fill(ids[chunk], eigenvalues(matrices, what).cpu().numpy(), eps, bound, True, trace)
                continue
            values, basis = eigenpairs(matrices, what)
            above = table.fill(ids[chunk], values.cpu().numpy(), eps, bound, True, trace)
            x, places = _vectors(part, chunk, values, basis)
            residual = torch.linalg.vector_norm(_product(part, chunk, x) - x * values[:, None], dim=1)
            table.fill_vectors(ids[chunk], (places + at.start).cpu().numpy(), x, residual, above)
    return table.columns


def sub_spectra(
    matrix: Tensor, index: Sequence[Tensor], eps: float, *, psd: bool, vectors: bool, memory: float = _MEMORY
) -> dict[str, np.ndarray]:
    """The same for some index sets of a matrix that is there."""
    n = len(matrix)
    table = BlockTable(len(index), max(map(len, index), default=0), n, vectors=vectors, memory=memory)
    for block, places in enumerate(index):
        places = places.to(matrix.device)
        part = matrix[places][:, places]
        ids, trace = np.array([block]), part.trace().reshape(1).cpu().numpy()
        if not vectors:
            table.fill(ids, eigenvalues(part, "A block").cpu().numpy()[None], eps, len(places), psd, trace)
            continue
        values, basis = eigenpairs(part, "A block")
        above = table.fill(ids, values.cpu().numpy()[None], eps, len(places), psd, trace)
        residual = torch.linalg.vector_norm(part @ basis - basis * values, dim=0)
        table.fill_vectors(ids, places.cpu().numpy()[None], basis[None], residual[None], above)
    return table.columns


def _order(part: Any) -> int:
    """Order of the smaller side of a batch of blocks."""
    if isinstance(part, MomentBlocks):
        return part.matrices.shape[-1]
    if isinstance(part, RowBlocks):
        return part.gram.shape[-1]
    return part.scores.rows if part.scores.kept is None else int(part.scores.kept.sum())


def _matrices(part: Any) -> Iterator[tuple[slice, Tensor]]:
    """Matrices of the smaller side of a batch of blocks, float64, in pieces."""
    if not isinstance(part, MomentBlocks | RowBlocks):
        yield slice(0, 1), (part.scores.gram().double() / part.total_weight)[None]
        return
    every = part.matrices if isinstance(part, MomentBlocks) else part.gram
    step = max(1, _BATCH // (8 * every.shape[-1] ** 2))
    for start in range(0, len(every), step):
        yield slice(start, start + step), every[start : start + step].double()


def _vectors(part: Any, chunk: slice, values: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the blocks, ``(B, s, m)`` of length one, and the places of their entries, ``(B, s)``."""
    if isinstance(part, MomentBlocks):
        return basis, part.index[chunk]
    if isinstance(part, RowBlocks):
        x, places = torch.bmm(part.rows[chunk].double().mT, basis), part.index[chunk]
    else:
        scores = part.scores
        z = basis[0].to(scores.dtype)
        if scores.kept is not None:
            z = torch.zeros(scores.rows, z.shape[1], dtype=z.dtype, device=z.device)
            z[scores.kept] = basis[0].to(scores.dtype)
        x = scores.rmatmat(z).double()[None]
        places = torch.arange(scores.size, device=scores.device)[None]
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-300), places


def _product(part: Any, chunk: slice, x: Tensor) -> Tensor:
    """Block times vectors, ``(B, s, m)``, in float64."""
    if isinstance(part, MomentBlocks):
        return torch.bmm(part.matrices[chunk].double(), x)
    if isinstance(part, RowBlocks):
        rows = part.rows[chunk].double()
        return torch.bmm(rows.mT, torch.bmm(rows, x))
    image = part.scores.rmatmat(part.scores.matmat(x[0].to(part.scores.dtype)))
    return image.double()[None] / part.total_weight
