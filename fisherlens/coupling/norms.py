"""Squared norms of all blocks of F, by the cheapest exact way that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.coupling.kernels import families, kernel_bytes, kernel_cost, kernel_norms
from fisherlens.coupling.strips import matrix_norms, strip_norms
from fisherlens.coupling.tiles import layer_norms, tile_norms, tile_rows
from fisherlens.errors import MemoryBudgetError, NonFiniteError, readable_bytes
from fisherlens.partitions import Partition
from fisherlens.scores import ScoreMatrix

# Chunks are allowed this much however small the budget is (our choice).
_LEAST = 2**27


@dataclass(frozen=True)
class Norms:
    """‖U_iᵀU_j‖² of all pairs of blocks, ``(B, B)``; tr U_iᵀU_i, ``(B,)``; both float64; and how they were computed."""

    squares: Tensor
    traces: Tensor
    way: str


@dataclass(frozen=True)
class _Way:
    name: str
    cost: float  # multiplications
    nbytes: float
    run: Callable[[], tuple[Tensor, Tensor]]


def are_layers(scores: ScoreMatrix, parts: Partition) -> bool:
    """Whether the blocks are the layers, in their order."""
    return parts.layers == tuple(layer.layer.name for layer in scores.layers) and [int(s) for s in parts.sizes] == [
        layer.size for layer in scores.layers
    ]


def layer_block_norms(scores: ScoreMatrix, memory: int) -> Norms | None:
    """With one block per layer from the layers' Gram matrices; None where these do not fit."""
    if len(scores.layers) * scores.rows**2 * scores.dtype.itemsize > max(memory, _LEAST):
        return None
    return _finite(*layer_norms(scores), "Gram matrices of the layers")


def block_norms(scores: ScoreMatrix, parts: Partition, memory: int) -> Norms:
    """By the way with the fewest operations among those that fit."""
    if are_layers(scores, parts) and (found := layer_block_norms(scores, memory)) is not None:
        return found
    ways = possible_ways(scores, parts, memory)
    room = max(memory, _LEAST)
    fitting = [way for way in ways if way.nbytes <= room]
    if not fitting:
        needed = readable_bytes(min(way.nbytes for way in ways))
        raise MemoryBudgetError(
            f"The couplings of {parts.num_blocks} blocks need at least {needed}, over the budget of {readable_bytes(memory)}. Use fewer examples, kind='mc' with "
            "one column each, estimates with num_sketches=8, one layer with F.restrict(name), or raise memory= of the Fisher."
        )
    best = min(fitting, key=lambda way: way.cost)
    return _finite(*best.run(), best.name)


def require_finite_products(values: Tensor) -> None:
    """Refuse products of scores that overflowed."""
    if not torch.isfinite(values).all():
        raise NonFiniteError(
            "The couplings hold NaN or infinity: products of the scores, which are of the fourth order in them, overflowed. Look for very large parameters or inputs, or "
            "use a float64 model."
        )


def _finite(squares: Tensor, traces: Tensor, way: str) -> Norms:
    require_finite_products(squares)
    return Norms(squares, traces, way)


def possible_ways(scores: ScoreMatrix, parts: Partition, memory: int) -> list[_Way]:
    """What each way costs and holds."""
    rows, num, size, item = scores.rows, parts.num_blocks, int(np.sum(parts.sizes)), scores.dtype.itemsize
    room = max(memory, _LEAST)
    step = max(1, tile_rows(num, rows, item, room // 8))
    # the columns of every block are taken again for each tile, for half of its rows on average
    tiles = rows**2 * (num**2 / 4 + size / 2) + rows * size * (rows / step)
    ways = [
        _Way("tiles of Gram matrices", tiles, 4.0 * num * rows * item, lambda: tile_norms(scores, parts, room // 4)),
        _Way("the matrix", rows * size**2 / 2, size**2 * (item + 16.0), lambda: matrix_norms(scores, parts)),
        _Way("columns", rows * size**2 / 2 * 1.01, 3.0 * rows * item, lambda: strip_norms(scores, parts, room // 2)),
    ]
    found = families(scores, parts.groups)
    if found:
        cost, nbytes = kernel_cost(found, scores.n, scores.r), kernel_bytes(found, scores.n, item)
        ways.append(_Way("kernels over examples", cost, nbytes, lambda: kernel_norms(scores, parts, found)))
    return ways


def subset(parts: Partition, blocks: Tensor) -> Partition:
    """Some blocks of a partition, in the order given; they cover no more than themselves."""
    ids = blocks.numpy()
    sizes = parts.sizes[ids]
    starts = (np.cumsum(parts.sizes) - parts.sizes)[ids]
    place = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
    flat = parts.flat[torch.from_numpy(place)]
    return Partition(parts.scheme, parts.layout, sizes, flat, parts.options, lambda: [parts.labels[b] for b in ids])
