"""Whether blocks depend on each other at all, not only linearly: distance correlation and HSIC of their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.coupling.pairs import DIMS, block_coords, check_counts, p_values, require_room
from fisherlens.coupling.permutations import PairwiseTest, kept_examples, permutation_test, sample_grams
from fisherlens.coupling.tiles import inner_products
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset

if TYPE_CHECKING:
    import xarray as xr

MEASURES = ("dcor", "hsic")
NORMALISE = (None, "outputs")
_NAMES = {"dcor": "distance correlation, squared and bias-corrected", "hsic": "normalised HSIC, bias-corrected"}


@own_precision
def dependence(
    F: Fisher,
    partition: Any = "layer",
    *,
    measure: str = "dcor",
    num_null: int = 200,
    seed: int = 0,
    normalise: str | None = None,
    max_blocks: int = 1024,
    progress_bar: bool | None = None,
) -> xr.Dataset:
    r"""Measure any dependence between the score vectors of every pair of blocks, not only correlation.

    .. math:: R_{ij} = \frac{\langle \tilde A_i, \tilde A_j \rangle}{\sqrt{\langle \tilde A_i, \tilde A_i \rangle \langle \tilde A_j, \tilde A_j \rangle}} \le 1,
       \qquad d^2_{nq} = K_{nn} + K_{qq} - 2 K_{nq}

    with Ã the U-centred matrix of distances d ("dcor") or of Gaussian kernels exp(-d²/2σ²) ("hsic") between the examples' score vectors in the
    block, K their Gram matrix. :func:`coupling` finds what is correlated; blocks can be uncorrelated and yet depend on each other, which "independent"
    excludes and a block-diagonal Fisher does not need.

    Parameters
    ----------
    F
        The Fisher operator, of N ≥ 4 examples; ``F.restrict(layer)`` for the segments inside one layer.
    partition
        A scheme, a :class:`Partition`, or a dict label → indices.
    measure
        ``"dcor"``: distance correlation, which needs no bandwidth. ``"hsic"``: Gaussian kernels, whose bandwidth σ is the median distance between
        two examples, for each block its own.
    num_null
        Permutations for the p-values; 0 skips them. Default 200 resolves p = 0.005 (our choice).
    seed
        Seeds own generators for the sampled labels and the permutations; the sample is that of :func:`coupling` with the same seed.
    normalise
        ``"outputs"`` divides each example's scores by the length of its score at the network's outputs, so that a length which all blocks share does not
        count. None leaves them as they are.
    max_blocks
        Refuse more blocks than this.
    progress_bar
        Show progress; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``block_i, block_j``: ``dependence``, 1 on the diagonal, with mean 0 between independent blocks (so it may be negative), 0 where the score
    of a block never changes; ``linear_coupling``, the :func:`coupling` of the same sample, not bias-corrected, whose square compares with
    ``dependence``; ``p_value``, ``p_adjusted`` and ``q_value`` of the dependence, as in :func:`coupling`.

    Raises
    ------
    InputError
        Fewer than 4 examples with weight, an unknown measure, or ``normalise="outputs"`` with the mc kind.
    MemoryBudgetError
        Scores that are not kept, or matrices over examples that do not fit.
    NonFiniteError
        Products of scores overflowed.

    Notes
    -----
    One score vector per example: labels drawn from the model for the exact kind, the first draw of mc, the observed labels for empirical.
    The p-values are exact for any dependence, as permuted pairs are independent with the same marginals, if the examples are exchangeable.

    Caution: with few outputs all blocks share the factor p - e_y of the output score. Two blocks that are independent but for one random length by which the
    scores of both are multiplied are uncorrelated, and yet their dependence is large. So a dependence that is found does not say that the blocks'
    parameters act together. ``normalise="outputs"`` takes that length out, but not the shared direction, a sign where there is one output.

    Cost: B Gram matrices over N examples, then (num_null + 1) B² N²/4 multiplications; N² per block are held, or computed again, under the budget of F.
    Sources: Székely and Rizzo (2014), Ann. Stat. 42, 2382 (U-centring, bias-corrected distance correlation); Song, Smola, Gretton, Bedo and Borgwardt (2012), JMLR
    13, 1393 (unbiased HSIC, which the U-centred product equals); the median bandwidth is customary.

    Examples
    --------
    >>> import fisherlens as fl
    >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (x, torch.zeros(20, dtype=torch.long)), likelihood="categorical")
    >>> sorted(fl.dependence(F, "parameter", num_null=20).data_vars)
    ['dependence', 'linear_coupling', 'p_adjusted', 'p_value', 'q_value']
    """
    require_fisher(F)
    check_counts(num_null, seed)
    if measure not in MEASURES:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="measure", name=measure, hint=errors.nearest(str(measure), MEASURES))
        )
    if normalise not in NORMALISE:
        raise InputError(
            f"normalise must be None or 'outputs', to divide by the length of the score at the outputs; got {normalise!r}."
        )
    parts = make_partition(F, partition)
    require_room(F, parts.num_blocks, max_blocks, "dependence", 3 + 5 * bool(num_null), parts)
    rows = F.single_sample(seed)
    n, num = kept_examples(rows), parts.num_blocks
    if n < 4:
        raise InputError(
            f"Dependence needs at least 4 examples, as its correction for bias divides by N - 3; F has {n} with weight. Build F on more examples."
        )
    if 12 * n**2 * rows.dtype.itemsize > F.memory:
        raise MemoryBudgetError(
            f"Matrices over pairs of {n} examples need {readable_bytes(12 * n**2 * rows.dtype.itemsize)}, over the budget of {readable_bytes(F.memory)}. Use fewer "
            "examples, or raise memory= of the Fisher."
        )
    grams = (
        _scaled(sample_grams(rows, parts, F.memory), F, rows.kept, seed)
        if normalise
        else sample_grams(rows, parts, F.memory)
    )

    def centred(blocks: slice) -> Tensor:
        return u_centred(distances(grams(blocks)) if measure == "dcor" else gaussian(distances(grams(blocks))))

    linear = _cosines(grams, num, n, F.memory).clamp(min=0).sqrt()
    if num_null and num > 1:
        tested = permutation_test(centred, rows, num, num_null, seed, F.memory, progress_bar)
        found = tested.observed
        np.fill_diagonal(found, _changes(centred, num, n, F.memory))
    else:
        nothing = np.full((num, num), np.nan)
        tested = PairwiseTest(nothing, nothing, nothing, nothing)
        found = _cosines(centred, num, n, F.memory).cpu().numpy()
    variables: dict[str, Any] = {
        "dependence": (DIMS, found, {"long_name": _NAMES[measure], "units": "1"}),
        "linear_coupling": (DIMS, linear, {"long_name": "coupling of two blocks in the same sample", "units": "1"}),
    }
    if num_null:
        variables |= p_values(tested.p_value, tested.p_adjusted, tested.q_value, "dependence")
    settings = {"partition": parts.scheme, **parts.options, "num_null": num_null, "seed": seed, "normalise": normalise}
    return make_dataset(
        variables,
        block_coords(F, parts),
        operator=F,
        method=f"{_NAMES[measure]}, one score per example" + (", example permutation" if num_null else ""),
        settings=settings,
        partition=parts.scheme,
        measure=measure,
    )


def distances(grams: Tensor) -> Tensor:
    """Distances between the vectors of Gram matrices ``(b, n, n)``, exactly 0 on the diagonal."""
    own = grams.diagonal(dim1=1, dim2=2)
    squares = (own[:, :, None] + own[:, None] - 2 * grams).clamp_(min=0)
    # what is left of two equal vectors is rounding
    squares[squares <= 8 * torch.finfo(grams.dtype).eps * (own[:, :, None] + own[:, None])] = 0
    return squares.sqrt_()


def gaussian(distance: Tensor) -> Tensor:
    """exp(-d²/2σ²) off the diagonal and 0 on it; σ the median distance of two examples, of those that differ where most are equal."""
    n = distance.shape[1]
    low, high = torch.triu_indices(n, n, 1, device=distance.device)
    out = torch.zeros_like(distance)
    for block, target in zip(distance, out, strict=True):
        every = block[low, high]
        width = every.median()
        if width == 0 and (every > 0).any():
            width = every[every > 0].median()
        if width > 0:  # else the score never changes
            target.copy_(torch.exp(-0.5 * (block / width).square()))
            target.fill_diagonal_(0)
    return out


def u_centred(matrices: Tensor) -> Tensor:
    """a_ij - row_i/(n-2) - column_j/(n-2) + total/((n-1)(n-2)) off the diagonal and 0 on it, for symmetric ``(b, n, n)`` with zero diagonal."""
    n = matrices.shape[1]
    row = matrices.sum(2) / (n - 2)
    total = row.sum(1) / (n - 1)
    out = matrices - row[:, :, None] - row[:, None] + total[:, None, None]
    out.diagonal(dim1=1, dim2=2).zero_()
    # a matrix that is constant off the diagonal centres to rounding only
    size = matrices.abs().amax((1, 2), keepdim=True)
    still = out.abs().amax((1, 2), keepdim=True) <= 64 * torch.finfo(out.dtype).eps * size
    return out.masked_fill(still, 0)


def _strips(num: int, n: int, item: int, memory: int) -> list[slice]:
    step = max(1, min(num, min(memory // 8, 2**28) // (n * n * item)))
    return [slice(i, min(i + step, num)) for i in range(0, num, step)]


def _cosines(matrices: Callable[[slice], Tensor], num: int, n: int, memory: int) -> Tensor:
    """⟨A_i, A_j⟩/(‖A_i‖‖A_j‖) of all pairs, ``(B, B)`` float64; 0 where one is zero."""
    item = matrices(slice(0, 1)).dtype.itemsize
    strips = _strips(num, n, item, memory)
    rows = []
    for k, here in enumerate(strips):
        left = matrices(here).flatten(1)
        row = [left.new_zeros(len(left), here.start, dtype=torch.float64)]
        for there in strips[k:]:
            row.append(inner_products(left) if there is here else (left @ matrices(there).flatten(1).T).double())
        rows.append(torch.cat(row, dim=1))
    products = torch.cat(rows)
    products = products.triu() + products.triu(1).T
    norm = products.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    return torch.where(scale > 0, products / scale.where(scale > 0, 1), 0)


def _changes(matrices: Callable[[slice], Tensor], num: int, n: int, memory: int) -> np.ndarray:
    """1 for each matrix that is not zero, ``(B,)``."""
    item = matrices(slice(0, 1)).dtype.itemsize
    found = [matrices(at).flatten(1).any(1) for at in _strips(num, n, item, memory)]
    return torch.cat(found).double().cpu().numpy()


def _scaled(grams: Callable[[slice], Tensor], F: Fisher, kept: Tensor | None, seed: int) -> Callable[[slice], Tensor]:
    """The Gram matrices after each example's row was divided by the length of its output score."""
    length = _output_lengths(F, seed)
    length = length if kept is None else length[kept]
    inverse = torch.where(length > 0, 1 / length.where(length > 0, 1), 0).to(F.dtype)
    return lambda blocks: grams(blocks) * inverse[:, None] * inverse


def _output_lengths(F: Fisher, seed: int) -> Tensor:
    """‖√w s_n‖ at the outputs for the labels of ``F.single_sample(seed)``, ``(N,)`` float64."""
    if F.kind == "mc":
        raise InputError(
            "normalise='outputs' needs the labels' scores at the outputs, which the mc kind does not keep. Use kind='exact', which draws labels for this test, or "
            "'empirical'."
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for bound in F._bound:
        if F.kind == "exact":  # the same numbers as those of the sample
            uniforms = torch.rand(
                len(bound.weight), bound.num_uniforms, generator=generator, dtype=torch.float64, device="cpu"
            )
            score = bound.sampled_score(uniforms)
        else:
            score = bound.observed_score()
        found.append(torch.linalg.vector_norm(score.flatten(1).double(), dim=1))
    return torch.cat(found)
