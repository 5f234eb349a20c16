"""How strongly the blocks of a partition are coupled, and how much of that a finite sample would give by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens._progress import progress
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset
from fisherlens.scores import ScoreMatrix

if TYPE_CHECKING:
    import xarray as xr


def coupling(
    F: Fisher,
    partition: Any = "layer",
    *,
    num_null: int = 200,
    seed: int = 0,
    max_blocks: int = 2048,
    progress_bar: bool | None = None,
) -> xr.Dataset:
    r"""Compute the coupling of every pair of blocks, with its chance level and permutation p-values.

    .. math:: \rho_{ij} = \frac{\|F_{ij}\|_F}{\sqrt{\|F_{ii}\|_F \|F_{jj}\|_F}} \in [0, 1]

    Exact, from the scores: ‖F_ij‖² = ⟨K_i, K_j⟩/W² with the Gram matrices K_b = U_b U_bᵀ. ρ² is the linear centred-kernel
    alignment (uncentred) of the two blocks' tangent kernels. A coupling of 0 is all that block-diagonality needs.

    Parameters
    ----------
    F
        The Fisher operator; ``F.restrict(layer)`` for the segments inside one layer.
    partition
        A scheme, a :class:`Partition`, or a dict label → indices.
    num_null
        Permutations for the p-values; 0 skips them. Default 200 resolves p = 0.005 (our choice).
    seed
        Seeds own generators for the sampled labels and the permutations.
    max_blocks
        Refuse more blocks than this: the result has max_blocks² entries.
    progress_bar
        Show progress; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``block_i, block_j``: ``coupling``; ``noise_floor`` = √(tr F_ii tr F_jj /(N R ‖F_ii‖ ‖F_jj‖)), what a finite sample gives to
    two uncorrelated blocks (root mean square under random mixing of each example's columns); ``p_value`` and ``p_adjusted``; and
    ``block_norm (block_i)`` = ‖F_bb‖ in nat.

    Notes
    -----
    p-values: examples of block j are permuted against those of block i, on one R = 1 sample (labels drawn from the model for the
    exact kind; its own rows for empirical). All pairs share each permutation; ``p_value`` = (1 + #{null ≥ observed})/(1 + num_null), and
    ``p_adjusted`` compares with the largest standardised null value over all pairs (Westfall and Young's maxT), which controls the
    family-wise error. They test the R = 1 sample's coupling, which is noisier than the exact one shown.

    Cost: block Grams, or the matrix of the blocks in chunks, whichever takes fewer operations.

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.coupling(F, "parameter", num_null=0)["coupling"].shape
    (2, 2)
    """
    require_fisher(F)
    parts = make_partition(F, partition)
    if not isinstance(num_null, int) or isinstance(num_null, bool) or num_null < 0:
        raise InputError(f"num_null must be an integer >= 0, the number of permutations; got {num_null!r}.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be an integer >= 0; got {seed!r}.")
    if parts.num_blocks > max_blocks:
        raise InputError(
            f"Partition {parts.scheme!r} has {parts.num_blocks} blocks, so {parts.num_blocks**2} pairs; the limit is {max_blocks} blocks. Look at one layer with "
            "F.restrict(name), choose a coarser partition, or raise max_blocks."
        )
    squares = _squared_norms(F, parts) / F.total_weight**2
    norms = squares.diagonal().sqrt()
    traces = _block_sums(F.diagonal().double(), parts)
    rows = max(F.n_rows, 1)
    scale = norms[:, None] * norms
    ratio = torch.where(scale > 0, squares / scale.where(scale > 0, 1), 0)
    floor = torch.where(scale > 0, traces[:, None] * traces / (rows * scale.where(scale > 0, 1)), 0)
    dims = ("block_i", "block_j")
    variables: dict[str, Any] = {
        "coupling": (dims, ratio.sqrt().clamp(max=1.0), {"long_name": "coupling of two blocks", "units": "1"}),
        "noise_floor": (
            dims,
            floor.sqrt(),
            {"long_name": "coupling of uncorrelated blocks in a sample of this size", "units": "1"},
        ),
        "block_norm": ("block_i", norms, {"long_name": "Frobenius norm of the block", "units": "nat"}),
    }
    if num_null:
        p_value, p_adjusted = _permutation_test(F.single_sample(seed), parts, num_null, seed, progress_bar)
        variables["p_value"] = (dims, p_value, {"long_name": "permutation p-value of the coupling", "units": "1"})
        variables["p_adjusted"] = (dims, p_adjusted, {"long_name": "p-value adjusted for all pairs", "units": "1"})
    layers = np.array([name or "(several)" for name in parts.layers])
    coords = {
        "block_i": list(parts.labels),
        "block_j": list(parts.labels),
        "layer_i": ("block_i", layers),
        "layer_j": ("block_j", layers),
        "size_i": ("block_i", parts.sizes),
    }
    settings = {"partition": parts.scheme, **parts.options, "num_null": num_null, "seed": seed}
    return make_dataset(
        variables,
        coords,
        operator=F,
        method="exact block norms, example permutation",
        settings=settings,
        partition=parts.scheme,
    )


def _block_sums(values: Tensor, parts: Partition) -> Tensor:
    """Sum of flat values over each block, float64."""
    block = parts.block_of.to(values.device)
    inside = block >= 0
    return torch.zeros(parts.num_blocks, dtype=torch.float64, device=values.device).index_add_(
        0, block[inside], values[inside].double()
    )


def _is_layers(scores: ScoreMatrix, parts: Partition) -> bool:
    return (
        parts.num_blocks == len(scores.layers)
        and [int(s) for s in parts.sizes] == [layer.size for layer in scores.layers]
        and all(parts.layers)
    )


def _squared_norms(F: Fisher, parts: Partition) -> Tensor:
    """⟨K_i, K_j⟩ for all pairs of blocks, ``(B, B)`` float64, by the cheapest way that fits the budget."""
    scores, num = F.scores, parts.num_blocks
    rows, size, item = scores.rows, scores.size, scores.dtype.itemsize
    layers = _is_layers(scores, parts)
    ways = [  # operations, bytes, function
        (rows**2 * (size + (0 if layers else num**2)), num * rows**2 * item, _layer_norms if layers else _gram_norms),
        (rows * size**2, size**2 * (item + 8), _matrix_norms),
        (1.01 * rows * size**2, rows * size * item + 2**27, _column_norms),
    ]
    fitting = [way for way in ways if way[1] <= max(F.memory, 2**27)]
    if not fitting:
        needed = readable_bytes(min(way[1] for way in ways))
        raise MemoryBudgetError(
            f"The couplings of {num} blocks need at least {needed}, over the budget of {readable_bytes(F.memory)}. Use fewer examples, kind='mc' with one "
            "column each, one layer with F.restrict(name), or raise memory= of the Fisher."
        )
    return min(fitting, key=lambda way: way[0])[2](scores, parts)


def _layer_norms(scores: ScoreMatrix, parts: Partition) -> Tensor:
    """From the Gram matrices of the layers, which are computed once and kept."""
    return _inner_products([scores.layer_gram(layer.layer.name) for layer in scores.layers])


def _gram_norms(scores: ScoreMatrix, parts: Partition) -> Tensor:
    """From the Gram matrix of every block."""
    return _inner_products(list(_block_grams(scores, parts)))


def _matrix_norms(scores: ScoreMatrix, parts: Partition) -> Tensor:
    """From UᵀU: squares of its entries, summed by block on both sides."""
    order = parts.flat.to(scores.device)
    block = parts.block_of.to(scores.device)[order]
    square = scores.dense(order).double().square_()
    half = torch.zeros(parts.num_blocks, len(order), dtype=torch.float64, device=scores.device)
    half.index_add_(0, block, square)
    out = torch.zeros(parts.num_blocks, parts.num_blocks, dtype=torch.float64, device=scores.device)
    out.index_add_(1, block, half)
    return (out + out.T) / 2


def _inner_products(grams: list[Tensor]) -> Tensor:
    out = torch.empty(len(grams), len(grams), dtype=torch.float64, device=grams[0].device)
    flat = [gram.reshape(-1) for gram in grams]
    for i, a in enumerate(flat):
        for j in range(i, len(flat)):
            out[i, j] = out[j, i] = torch.dot(a, flat[j])
    return out


def _block_grams(scores: ScoreMatrix, parts: Partition) -> Tensor:
    """K_b of every block, ``(B, rows, rows)``."""
    out = torch.empty(parts.num_blocks, scores.rows, scores.rows, dtype=scores.dtype, device=scores.device)
    for block, index in enumerate(parts.blocks):
        columns = scores.columns(index.to(scores.device))
        torch.mm(columns, columns.T, out=out[block])
    return out


def _column_norms(scores: ScoreMatrix, parts: Partition) -> Tensor:
    """The same from UᵀU in strips: squares of its entries, summed by block on both sides."""
    order = parts.flat.to(scores.device)
    block = parts.block_of.to(scores.device)[order]
    columns = scores.columns(order)
    out = torch.zeros(parts.num_blocks, parts.num_blocks, dtype=torch.float64, device=scores.device)
    step = max(1, 2**25 // max(1, len(order)))
    for start in range(0, len(order), step):
        square = (columns[:, start : start + step].T @ columns).square_().double()
        strip = torch.zeros(square.shape[0], parts.num_blocks, dtype=torch.float64, device=scores.device).index_add_(
            1, block, square
        )
        out.index_add_(0, block[start : start + step], strip)
    return (out + out.T) / 2


def _permutation_test(
    sample: ScoreMatrix, parts: Partition, num_null: int, seed: int, bar: bool | None
) -> tuple[np.ndarray, np.ndarray]:
    """Raw and maxT-adjusted p-values of every pair from shared permutations of the examples."""
    if parts.num_blocks == 1:
        return np.full((1, 1), np.nan), np.full((1, 1), np.nan)
    needed = 2 * parts.num_blocks * sample.n**2 * sample.dtype.itemsize
    if needed > 2**32:
        raise MemoryBudgetError(
            f"The permutation test of {parts.num_blocks} blocks on {sample.n} examples needs {readable_bytes(needed)}. Use num_null=0, fewer examples, "
            "a coarser partition, or one layer with F.restrict(name)."
        )
    keep = torch.arange(sample.n, device=sample.device) if sample.kept is None else sample.kept.nonzero()[:, 0]
    grams = (
        [sample.layer_gram(x.layer.name) for x in sample.layers]
        if _is_layers(sample, parts)
        else _block_grams(sample, parts)
    )
    grams = torch.stack([gram[keep][:, keep] for gram in grams])
    num, n = len(grams), len(keep)
    norms = torch.linalg.vector_norm(grams.flatten(1), dim=1)
    unit = grams / norms.where(norms > 0, 1)[:, None, None]
    flat = unit.reshape(num, n * n)
    upper = torch.triu_indices(num, num, 1, device=sample.device)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(num_null + 1, upper.shape[1], dtype=torch.float64, device=sample.device)
    draws[0] = (flat @ flat.T)[upper[0], upper[1]]
    for k in progress(range(1, num_null + 1), desc="permutations", enabled=bar):
        order = torch.randperm(n, generator=generator).to(sample.device)
        shuffled = unit[:, order][:, :, order].reshape(num, n * n)
        draws[k] = (flat @ shuffled.T)[upper[0], upper[1]]
    deviation = draws - draws.mean(0)
    spread = draws.std(0)
    # pairs that cannot vary (a zero block, one example) are never significant
    z = torch.where(spread > 1e-7 * draws.abs().amax(0), deviation / spread.where(spread > 0, 1), -float("inf"))
    flat_pairs = torch.isinf(z[0])
    slack = 1e-9
    raw = (1 + (z[1:] >= z[0] - slack).sum(0)).double() / (1 + num_null)
    largest = z[1:].amax(1).sort().values if upper.shape[1] else draws.new_zeros(num_null)
    adjusted = (1 + num_null - torch.searchsorted(largest, z[0] - slack)).double() / (1 + num_null)
    out = []
    for values in (raw, adjusted):
        matrix = torch.full((num, num), float("nan"), dtype=torch.float64, device=sample.device)
        values = values.masked_fill(flat_pairs, 1.0)
        matrix[upper[0], upper[1]] = values
        matrix[upper[1], upper[0]] = values
        out.append(matrix.cpu().numpy())
    return out[0], out[1]
