"""How strongly the blocks of a partition are coupled, and how much of that a finite sample would give by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.coupling.norms import block_norms, layer_block_norms, subset
from fisherlens.coupling.permutations import permutation_test, sample_grams
from fisherlens.coupling.sketches import sketched_norms
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import Partition
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

DIMS = ("block_i", "block_j")


@own_precision
def coupling(
    F: Fisher,
    partition: Any = "layer",
    *,
    num_null: int = 200,
    seed: int = 0,
    max_blocks: int = 4096,
    sample: int | None = None,
    num_sketches: int | None = None,
    sketch_size: int = 64,
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
        Seeds own generators for the sampled labels, the permutations, the choice of blocks and the sketches.
    max_blocks
        Refuse more blocks than this: the result has max_blocks² entries per variable, 128 MiB each at the default.
    sample
        Of more blocks, take this many at random, each equally likely, in their order: their couplings are exact, and a mean over
        their pairs is an unbiased estimate of that over all pairs. ``place_i`` says which they are. None takes all.
    num_sketches
        Estimate instead of computing: the number of independent sketches, at least 3 for standard errors. None computes.
    sketch_size
        Random sign vectors q per sketch, at least 2. The standard error of ρ² falls as 1/√num_sketches, and as 1/q as long as no few directions dominate the
        blocks (then 1/√q). Default 64 (our choice): with 8 sketches it was 0.02 for the kernels of a small convolution.
    progress_bar
        Show progress; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``block_i, block_j``: ``coupling``; ``noise_floor`` = √(tr F_ii tr F_jj /(N R ‖F_ii‖ ‖F_jj‖)), what a finite sample gives to
    two uncorrelated blocks (root mean square under random mixing of each example's columns); ``p_value``, ``p_adjusted`` and ``q_value``; and
    ``block_norm (block_i)`` = ‖F_bb‖ in nat. With sketches also ``coupling_sem``, ``coupling_squared``, ``coupling_squared_sem`` and
    ``block_norm_sem``. Coordinates: ``layer_i``, ``layer_j``, ``size_i`` and, of a random choice, ``place_i``.

    Raises
    ------
    InputError
        More than ``max_blocks`` blocks, or an option out of its range.
    MemoryBudgetError
        The result, or every way to compute it, is over the budget of F.
    NonFiniteError
        Products of scores overflowed.

    Notes
    -----
    p-values: examples of block j are permuted against those of block i, on one R = 1 sample (labels drawn from the model for the
    exact kind; its own rows for empirical). All pairs share each permutation; ``p_value`` = (1 + #{null ≥ observed})/(1 + num_null), and
    ``p_adjusted`` compares with the largest standardised null value over all pairs (Westfall and Young's maxT), which controls the
    family-wise error. ``q_value`` is Benjamini and Hochberg's over all pairs, which controls the share of false ones among those found; it
    cannot be below B(B-1)/2/(1 + num_null) over the number of pairs found. They test the R = 1 sample's coupling, which is noisier than the exact one. The null hypothesis is
    independence, not a coupling of 0: blocks that are uncorrelated but share, say, a random length of their scores are found more often than by chance (40 % instead of 5 %
    in a test of ours); :func:`dependence` is made for these.

    Cost in multiplications, r rows of U, p parameters in B blocks: whole layers B² r²/2 once their Gram matrices exist; units, or inputs, of
    dense layers at one position B² N²/2, whatever their size, by ‖F_oo'‖² = sᵀ[(AAᵀ)∘(AAᵀ)]s/N², s_n = Σ_r g_nro g_nro'; anything else the less of
    B² r²/4 + p r²/2 (Gram matrices in tiles of rows) and r p²/2 (columns). Nothing is held beyond the budget of F; ``attrs["method"]`` says which way was taken. A test costs
    num_null B² N²/4. A sketch costs q half-products with F and B² q²/4.

    Bias of sketches: the squared norms are unbiased, so ρ² has the bias of a ratio of means, of the order of its squared standard error, and may leave [0, 1]; it is in
    ``coupling_squared``. ``coupling`` is its root after clipping, which is biased upward near 0: average ``coupling_squared``, not ``coupling``.
    ``coupling_sem`` = √(ρ² + sem) - ρ, with sem that of ρ².

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.coupling(F, "parameter", num_null=0)["coupling"].shape
    (2, 2)
    """
    require_fisher(F)
    check_counts(num_null, seed)
    _check_options(max_blocks, sample, num_sketches, sketch_size)
    by_layer = isinstance(partition, str) and partition == "layer"
    parts = None if by_layer and num_sketches is None and sample is None else make_partition(F, partition)
    coords, total, places = None, len(F.layout.layers), None
    if parts is not None:
        total = parts.num_blocks
        if sample is not None and sample < total:
            chosen = np.random.default_rng(seed).permutation(total)[:sample]
            places = np.sort(chosen)
            parts = subset(parts, torch.from_numpy(places))
    num = total if places is None else len(places)
    require_room(F, num, max_blocks, "coupling", 5 + 5 * bool(num_null) + 4 * bool(num_sketches), parts)
    if num_sketches is None:
        found = layer_block_norms(F.scores, F.memory) if parts is None else None
        if found is None:
            parts = make_partition(F, partition) if parts is None else parts
            found = block_norms(F.scores, parts, F.memory)
        norms, traces, way = (
            found.squares.diagonal().clamp(min=0).sqrt(),
            found.traces,
            f"exact block norms ({found.way})",
        )
        ratio = _over(found.squares, norms)
        extra: dict[str, Any] = {}
    else:
        sketched = sketched_norms(F.scores, parts, num_sketches, sketch_size, seed, F.memory, progress_bar)
        norms, way = sketched.norms, "sketched block norms"
        traces = torch.stack(
            [part.sum() for part in F.scores.diagonal().double()[parts.flat.to(F.device)].split(parts.sizes.tolist())]
        )
        ratio = sketched.ratio
        extra = _errors(sketched.ratio, sketched.ratio_sem, sketched.norms_sem / F.total_weight)
    floor = _over(traces[:, None] * traces / max(F.n_rows, 1), norms)
    variables: dict[str, Any] = {
        "coupling": (DIMS, ratio.clamp(0, 1).sqrt(), {"long_name": "coupling of two blocks", "units": "1"}),
        "noise_floor": (
            DIMS,
            floor.sqrt(),
            {"long_name": "coupling of uncorrelated blocks in a sample of this size", "units": "1"},
        ),
        "block_norm": ("block_i", norms / F.total_weight, {"long_name": "Frobenius norm of the block", "units": "nat"}),
        **extra,
    }
    if num_null:
        parts = make_partition(F, partition) if parts is None else parts
        variables |= _tested(F, parts, num_null, seed, progress_bar)
        way = f"{way}, example permutation"
    coords = block_coords(F, parts)
    if places is not None:
        coords["place_i"] = ("block_i", places)
    scheme, options = ("layer", {}) if parts is None else (parts.scheme, dict(parts.options))
    settings = {
        "partition": scheme,
        **options,
        "num_null": num_null,
        "seed": seed,
        "num_blocks": total,
        "sample": sample,
    }
    if num_sketches is not None:
        settings |= {"num_sketches": num_sketches, "sketch_size": sketch_size}
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=way,
        num_matvecs=None if num_sketches is None else num_sketches * sketch_size,
        settings=settings,
        partition=scheme,
    )


def _over(squares: Tensor, norms: Tensor) -> Tensor:
    """Entries over the norms of their two blocks; 0 where one of these is zero."""
    scale = norms[:, None] * norms
    return torch.where(scale > 0, squares / scale.where(scale > 0, 1), 0)


def _errors(ratio: Tensor, sem: Tensor, norm_sem: Tensor) -> dict[str, Any]:
    root = ratio.clamp(0, 1).sqrt()
    words = {
        "coupling_sem": (DIMS, (root.square() + sem).sqrt() - root, "standard error of the coupling", "1"),
        "coupling_squared": (DIMS, ratio, "squared coupling, estimated", "1"),
        "coupling_squared_sem": (DIMS, sem, "standard error of the squared coupling", "1"),
        "block_norm_sem": ("block_i", norm_sem, "standard error of the block's norm", "nat"),
    }
    return {
        name: (dims, values, {"long_name": text, "units": units}) for name, (dims, values, text, units) in words.items()
    }


def _tested(F: Fisher, parts: Partition, num_null: int, seed: int, bar: bool | None) -> dict[str, Any]:
    if parts.num_blocks == 1:
        nothing = np.full((1, 1), np.nan)
        return p_values(nothing, nothing, nothing, "coupling")
    rows = F.single_sample(seed)
    tested = permutation_test(
        sample_grams(rows, parts, F.memory), rows, parts.num_blocks, num_null, seed, F.memory, bar
    )
    return p_values(tested.p_value, tested.p_adjusted, tested.q_value, "coupling")


def p_values(p_value: np.ndarray, p_adjusted: np.ndarray, q_value: np.ndarray, what: str) -> dict[str, Any]:
    """The variables of a permutation test."""
    return {
        "p_value": (DIMS, p_value, {"long_name": f"permutation p-value of the {what}", "units": "1"}),
        "p_adjusted": (DIMS, p_adjusted, {"long_name": "p-value adjusted for all pairs", "units": "1"}),
        "q_value": (DIMS, q_value, {"long_name": "smallest false discovery rate that finds the pair", "units": "1"}),
    }


def block_coords(F: Fisher, parts: Partition | None) -> dict[str, Any]:
    """Labels, layers and sizes of blocks; None for the layers themselves."""
    if parts is None:
        labels = layers = list(F.layout.layer_names)
        sizes = np.array([layer.size for layer in F.layout.layers])
    else:
        labels, layers, sizes = list(parts.labels), [name or "(several)" for name in parts.layers], parts.sizes
    layers = np.array(layers)
    return {
        **{dim: labels for dim in DIMS},
        **{f"layer_{dim[-1]}": (dim, layers) for dim in DIMS},
        "size_i": ("block_i", sizes),
    }


def check_counts(num_null: object, seed: object) -> None:
    """Refuse a number of permutations or a seed that cannot be one."""
    if not isinstance(num_null, int) or isinstance(num_null, bool) or num_null < 0:
        raise InputError(f"num_null must be an integer >= 0, the number of permutations; got {num_null!r}.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be an integer >= 0; got {seed!r}.")


def _check_options(max_blocks: object, sample: object, num_sketches: object, sketch_size: object) -> None:
    least = {
        "max_blocks": (max_blocks, 1, "the most blocks that a result may have"),
        "sample": (sample, 2, "how many blocks to take at random, or None for all of them"),
        "num_sketches": (num_sketches, 1, "the number of independent sketches, or None for exact couplings"),
        "sketch_size": (sketch_size, 2, "the random vectors of one sketch, as its estimates come from pairs of them"),
    }
    for name, (value, smallest, meaning) in least.items():
        if value is None and name in ("sample", "num_sketches"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise InputError(f"{name} must be an integer >= {smallest}, {meaning}; got {value!r}.")


def require_room(F: Fisher, num: int, max_blocks: int, what: str, matrices: int, parts: Partition | None) -> None:
    """Refuse more blocks than allowed, and results that would not fit the budget of F."""
    scheme = "layer" if parts is None else parts.scheme
    if num > max_blocks:
        remedy = "sample=1000 for a random choice of blocks, " if what == "coupling" else ""
        raise InputError(
            f"Partition {scheme!r} has {num} blocks, so {num**2} pairs; the limit is {max_blocks} blocks. Take {remedy}one layer with "
            "F.restrict(name), a coarser partition, or raise max_blocks."
        )
    needed = 8 * matrices * num**2
    if needed > max(F.memory, 2**24):
        raise MemoryBudgetError(
            f"The result for {num} blocks, {matrices} matrices of {num} by {num} numbers on the way, takes {readable_bytes(needed)}, over the budget of "
            f"{readable_bytes(F.memory)}. Take fewer blocks, one layer with F.restrict(name), or raise memory= of the Fisher."
        )
