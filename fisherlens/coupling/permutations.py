"""Permutation tests for all pairs of blocks at once, with the errors of many tests under control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens._progress import progress
from fisherlens.coupling.norms import are_layers, require_finite_products
from fisherlens.coupling.tiles import BlockGrams
from fisherlens.errors import MemoryBudgetError, readable_bytes
from fisherlens.partitions import Partition
from fisherlens.scores import ScoreMatrix

# Transient memory of the test, large enough that matrix products dominate (our choice).
_ROOM = 2**29


@dataclass(frozen=True)
class PairwiseTest:
    """Per pair of blocks, ``(B, B)``, NaN on the diagonal: ``observed`` statistic, ``p_value``, ``p_adjusted``, ``q_value``."""

    observed: np.ndarray
    p_value: np.ndarray
    p_adjusted: np.ndarray
    q_value: np.ndarray


def sample_grams(sample: ScoreMatrix, parts: Partition, memory: int) -> Callable[[slice], Tensor]:
    """K of a run of blocks over the examples that carry weight, ``(b, n, n)``, for a sample with one row per example."""
    keep = None if sample.kept is None else sample.kept.nonzero()[:, 0]
    layers = are_layers(sample, parts)
    grams = None if layers else BlockGrams(sample, parts, memory // 8)

    def of(blocks: slice) -> Tensor:
        if grams is None:
            found = torch.stack([sample.layer_gram(x.layer.name) for x in sample.layers[blocks]])
        else:
            found = grams.whole(blocks)
        require_finite_products(found)
        return found if keep is None else found[:, keep][:, :, keep]

    return of


def kept_examples(sample: ScoreMatrix) -> int:
    """Examples that carry weight."""
    return sample.n if sample.kept is None else int(sample.kept.sum())


def permutation_test(
    matrices: Callable[[slice], Tensor],
    sample: ScoreMatrix,
    num: int,
    num_null: int,
    seed: int,
    memory: int,
    bar: bool | None,
) -> PairwiseTest:
    """Test every pair of B symmetric matrices over n examples: statistic ⟨A_i, A_j⟩/(‖A_i‖‖A_j‖), null ⟨A_i, Π A_j Πᵀ⟩.

    All pairs share each permutation Π. ``p_value`` = (1 + #{null ≥ observed})/(1 + num_null); ``p_adjusted`` compares with the largest
    standardised null value over all pairs (Westfall and Young 1993, maxT); ``q_value`` is Benjamini and Hochberg's. Pairs whose
    statistic cannot vary get 1. Matrices are symmetric and so are pairs: a quarter of the products are computed.
    Work: num_null B² n²/2 multiplications.

    Parameters
    ----------
    matrices
        Gives the matrices of a run of blocks, ``(b, n, n)``.
    sample
        The scores that they are made of: says how many examples there are, and of which dtype.
    num
        Blocks B.
    """
    n = kept_examples(sample)
    nothing = np.full((num, num), np.nan)
    packed = _Packed(matrices, num, n, sample, memory)
    step = packed.strip(num_null)
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.arange(n, device="cpu"),
        *(torch.randperm(n, generator=generator, device="cpu") for _ in range(num_null)),
    ]
    places = packed.places()
    observed, z_observed, raw = nothing.copy(), nothing.copy(), nothing.copy()
    largest = np.full(num_null, -np.inf)
    starts = range(0, num, step)
    with progress(len(starts) * (len(starts) + 1) // 2 * (num_null + 1), desc="permutations", enabled=bar) as moved:
        for j in starts:
            right = packed.get(slice(j, min(j + step, num)))
            for i in range(0, j + 1, step):
                left = right if i == j else packed.get(slice(i, min(i + step, num)))
                draws = np.empty((num_null + 1, len(left), len(right)))
                for k, order in enumerate(orders):
                    order = order.to(right.device)
                    shuffled = right if k == 0 else right[:, places[order[packed.low], order[packed.high]]]
                    draws[k] = (left @ shuffled.T).double().cpu().numpy()
                    moved.update(1)
                here = (slice(i, i + len(left)), slice(j, j + len(right)))
                pairs = np.triu(np.ones(draws.shape[1:], dtype=bool), 1) if i == j else np.ones(draws.shape[1:], bool)
                observed[here][pairs] = draws[0][pairs]
                rounding = _standardise(draws, right.dtype)
                slack = draws[0] - rounding
                z_observed[here][pairs] = slack[pairs]
                raw[here][pairs] = ((1 + (draws[1:] >= slack).sum(0)) / (1 + num_null))[pairs]
                if pairs.any():
                    largest = np.maximum(largest, draws[1:, pairs].max(1))
    largest.sort()
    adjusted = (1 + num_null - np.searchsorted(largest, z_observed)) / (1 + num_null)
    adjusted[np.isnan(z_observed)] = np.nan
    still = np.isneginf(z_observed)
    raw[still], adjusted[still] = 1.0, 1.0
    upper = np.triu_indices(num, 1)
    q_value = nothing.copy()
    q_value[upper] = benjamini_hochberg(raw[upper])
    for values in (observed, raw, adjusted, q_value):
        values.T[upper] = values[upper]
    return PairwiseTest(observed, raw, adjusted, q_value)


class _Packed:
    """Upper triangles of matrices of unit norm, ``(b, n(n+1)/2)``: entries off the diagonal count twice, so they carry √2."""

    def __init__(self, matrices: Callable[[slice], Tensor], num: int, n: int, sample: ScoreMatrix, memory: int):
        self._matrices, self.num, self.n, self.item = matrices, num, n, sample.dtype.itemsize
        self.room = min(memory // 2, _ROOM)
        needed = 10 * self._bytes() + 16 * n**2  # some matrices on their way, and the places of their entries
        if needed > max(memory, 2**24):
            raise MemoryBudgetError(
                f"The permutation test of {num} blocks on {n} examples needs at least {readable_bytes(needed)}, over the budget of {readable_bytes(memory)}. Use "
                "num_null=0, fewer examples, or raise memory= of the Fisher."
            )
        self.low, self.high = torch.triu_indices(n, n, device=sample.device)
        self.weight = torch.where(self.low == self.high, 1.0, 2**0.5).to(sample.dtype)
        self._kept: dict[int, Tensor] | None = {} if num * self._bytes() <= self.room else None

    def _bytes(self) -> int:
        return self.n * (self.n + 1) // 2 * self.item

    def places(self) -> Tensor:
        """Place of entry (a, b) in the upper triangle, ``(n, n)``."""
        out = torch.empty(self.n, self.n, dtype=torch.long, device=self.low.device)
        number = torch.arange(len(self.low), device=self.low.device)
        out[self.low, self.high] = number
        out[self.high, self.low] = number
        return out

    def strip(self, num_null: int) -> int:
        """Blocks per strip: three strips of matrices, and the draws of all pairs of two strips with workspace, fit the room."""
        by_draws = int((self.room / (2 * 8 * 3 * (num_null + 1))) ** 0.5)
        by_matrices = self.room // (2 * 5 * self._bytes())
        quarters = max(128, -(-self.num // 4))  # of two strips or more, the pairs below the diagonal are left out
        return max(1, min(self.num, quarters, by_draws, by_matrices))

    def get(self, blocks: slice) -> Tensor:
        if self._kept is not None and blocks.start in self._kept:
            return self._kept[blocks.start]
        packed = self._matrices(blocks)[:, self.low, self.high] * self.weight
        norm = torch.linalg.vector_norm(packed, dim=1, keepdim=True)
        require_finite_products(norm)
        packed /= norm.where(norm > 0, 1)
        if self._kept is not None:
            self._kept[blocks.start] = packed
        return packed


def _standardise(draws: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Make z of every draw by mean and spread of its pair, in place, -inf where it does not vary beyond rounding; returns what rounding adds to z."""
    eps = torch.finfo(dtype).eps
    size = np.abs(draws).max(0)
    draws -= draws.mean(0)
    spread = np.sqrt(np.square(draws).sum(0) / max(len(draws) - 1, 1))
    still = spread <= max(1e-7, 16 * eps) * size
    spread[still] = 1.0
    draws /= spread
    draws[:, still] = -np.inf
    return 1e-9 + 8 * eps / spread


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of m tests: the smallest false discovery rate at which each is found, min over k ≥ rank of p_(k) m/k.

    Source: Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57, 289; valid for independent or positively dependent tests.
    """
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return out
