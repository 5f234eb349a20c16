"""Eigenpairs at one end of the spectrum of one operator: which way to take, and what the recomputed residuals prove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.fisher import Fisher
from fisherlens.linalg.dense import eigenpairs, eigenvalues
from fisherlens.linalg.lanczos import LanczosResult, Selection, block_lanczos
from fisherlens.linalg.ritz import Interval, RitzPairs, bounds, rayleigh_ritz, rounding
from fisherlens.spectrum.operators import Operator, Product, Symmetric, as_symmetric
from fisherlens.spectrum.pencil import Pencil, allowance
from fisherlens.spectrum.side import side_for
from fisherlens.spectrum.smaller import DENSE_LIMIT, lift_rows, multiply_rows, smaller_matrix

# Score rows up to which the Gram matrix and all its eigenvalues cost less than thinking about it (our choice).
_SMALL = 500
# Order up to which all eigenpairs of a matrix at hand are computed, rather than some by Lanczos (our choice).
_ALL = 1000


@dataclass(frozen=True)
class Wish:
    """What was asked for; see :func:`fisherlens.top_eigenvalues`."""

    k: int
    which: str
    tol: float
    vectors: bool
    seed: int
    method: str
    budget: int
    pencil: Pencil | None = None


@dataclass(frozen=True)
class _Space:
    """Where the work is done: parameters, or the kept score rows of a Fisher, whose vectors ``lift`` takes to parameters."""

    order: int
    product: Product
    lift: Product | None = None
    matrix: Tensor | None = None
    words: str = ""
    spent: int = 0


@dataclass(frozen=True)
class _Found:
    """Vectors in rows with their recomputed products, and the intervals that hold all other eigenvalues."""

    vectors: Tensor
    images: Tensor
    scale: float
    spent: int
    words: str
    rest: Callable[[np.ndarray, float], list[Interval]]
    skew: float = 0.0
    settled: bool = True
    interrupted: bool = False
    iterated: bool = True
    known_above: int | None = None  # eigenvalues above the floor, where all are known


def solve_end(F: Any, wish: Wish, on_products: Callable[[int], None]) -> dict[str, Any]:
    """Variables of the result for one operator, as arrays, with ``method``, ``num_matvecs``, ``settled`` and ``interrupted``."""
    view = as_symmetric(F)
    bound = min(view.rank_bound, view.n) if view.psd else view.n
    active = min(wish.k, bound)
    positive = wish.which == "smallest" and view.psd
    empty = torch.zeros(0, view.n, dtype=view.dtype, device="cpu")
    if not active:
        found = _Found(empty, empty, 0.0, 0, "exact: the rank is 0", lambda values, slack: [])
        pairs = RitzPairs(empty.double()[:, 0], empty, empty, empty.double()[:, :0])
        return _judge(view, pairs, found, wish, view.n, active, positive)
    block = _block(view, active, positive)
    space = _space(view, wish, active, positive, block)
    floor = min(space.order, DENSE_LIMIT) * torch.finfo(view.dtype).eps
    selection = Selection("positive" if positive else wish.which, floor)
    if space.matrix is not None and (space.order <= _ALL or positive or wish.method == "exact"):
        found = _exact(space, view, active, selection)
    else:
        found = _lanczos(space, view, wish, active, selection, block, on_products)
    pairs = rayleigh_ritz(found.vectors, found.images, wish.pencil)
    if wish.vectors and space.lift is not None:
        pairs = _lifted(pairs, space.lift, floor * found.scale, view.n)
        found = replace(found, spent=found.spent + len(pairs.values))
    return _judge(view, pairs, found, wish, space.order, active, positive)


# --- where to work ---------------------------------------------------------------------------------------------------


def _space(view: Symmetric, wish: Wish, active: int, positive: bool, block: int) -> _Space:
    """The smaller side, with its matrix where that is cheaper than products, or the only way."""
    F, plain = view.source, _Space(view.n, view.product, words="products with the operator")
    if wish.pencil is not None:
        if wish.method == "exact":
            raise InputError("method='exact' does not know B; leave it at 'auto', or decompose the two dense matrices.")
        return plain
    rows = _Space(
        0, lambda z: multiply_rows(view, z), lambda z: lift_rows(view, z), words="products with the score rows"
    )
    if isinstance(F, Fisher) and F.kind != "hessian":
        rows = replace(rows, order=F.n_rows)
    if wish.method == "exact" or (wish.method == "auto" and _whole_is_due(view, wish, active, positive)):
        try:
            found = smaller_matrix(view)
        except MemoryBudgetError:
            if wish.method == "exact":
                raise
        else:
            facts = {"matrix": found.matrix, "words": found.words, "spent": found.spent}
            return replace(plain if found.dense else rows, **facts)
    if not isinstance(F, Fisher) or F.kind == "hessian":
        return plain
    # Lanczos usually takes twice this number of products; half of it, as a Gram matrix by columns runs at half the speed of products
    side = side_for(F, 3 * active + 5, width=block) if wish.method == "auto" and not positive else None
    if side is not None and side.matrix is not None:
        gram = side.order != view.n or "Gram" in side.words
        return replace(rows if gram else plain, matrix=side.matrix, words="Gram matrix" if gram else "dense matrix")
    return rows if view.rows is not None else plain


def _whole_is_due(view: Symmetric, wish: Wish, active: int, positive: bool) -> bool:
    """Whether every eigenvalue is to be computed: it costs little, or the smallest above zero are wanted."""
    F = view.source
    if isinstance(F, Fisher) and F.kind != "hessian":
        small = not (F.plan.streamed or F.plan.linearised) and min(F.n_params, F.n_rows) <= _SMALL
        return small or positive
    if isinstance(F, Fisher):
        return F.n_params <= 6 * active + 30
    return positive and view.n <= min(DENSE_LIMIT, wish.budget - active)


def _block(view: Symmetric, active: int, positive: bool) -> int:
    """Vectors per product, from what a vector in a block costs on two CPU cores against one alone (our measurements).

    Products with explicit rows and with convolutions read large tensors once for the whole block: a fifth in a block of 16. Dense layers gain
    nothing, and narrow blocks need fewer products. A pass over streamed data serves any number of vectors.
    """
    F = view.source
    if isinstance(F, Fisher) and F.kind == "hessian":
        width = 2
    elif isinstance(F, Fisher) and (F.plan.streamed or F.plan.linearised):
        width = max(16, min(active, 32))
    elif isinstance(F, Fisher):
        total = sum(entry.product_flops for entry in F.plan)
        shared = sum(e.product_flops for e in F.plan if e.path == "explicit" or e.storage in ("convolution", "patches"))
        width = max(8, min(active, 16)) if shared >= 0.5 * total else 1
    elif isinstance(F, Operator):
        width = 4 if F.block else 1
    else:
        width = min(8, max(active, 2))
    return max(width, active) if positive else width


# --- two ways --------------------------------------------------------------------------------------------------------


def _exact(space: _Space, view: Symmetric, active: int, selection: Selection) -> _Found:
    """All eigenvalues of the matrix, and the eigenvectors that are wanted; the operator is then asked for their products."""
    what = f"The {space.words} of the operator"
    if space.order <= 2 * _ALL or space.matrix.device.type != "cpu":
        values, basis = eigenpairs(space.matrix, what)
        theta, basis = values.flip(0).cpu(), basis.flip(1)
        scale = theta.abs().max().item()
        wanted = selection.order(theta, scale)[:active]
        chosen = basis[:, wanted.to(basis.device)]
    else:
        theta = eigenvalues(space.matrix, what).flip(0).cpu()
        scale = theta.abs().max().item()
        wanted = selection.order(theta, scale)[:active]
        chosen = _some_eigenvectors(space.matrix, wanted)
    vectors = chosen.to(view.dtype)
    images = space.product(vectors)
    others = np.ones(len(theta), dtype=bool)
    others[wanted.numpy()] = False

    def rest(values: np.ndarray, slack: float) -> list[Interval]:
        runs = np.flatnonzero(np.diff(np.concatenate([[False], others, [False]]).astype(int))).reshape(-1, 2)
        return [(theta[a].item() - slack, theta[b - 1].item() + slack) for a, b in runs]

    spent = space.spent + active
    words = f"exact: eigenvalues of the {space.words} in float64"
    above = int((theta > selection.floor * scale).sum())
    return _Found(vectors.T, images.T, scale, spent, words, rest, iterated=False, known_above=above)


def _some_eigenvectors(matrix: Tensor, wanted: Tensor) -> Tensor:
    """Eigenvectors at some places of the ascending spectrum, by LAPACK for each run of places; all vectors would cost six times as much."""
    import scipy.linalg

    places = sorted(wanted.tolist())
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    array = ((matrix + matrix.T) / 2).double().numpy()
    found = [scipy.linalg.eigh(array, subset_by_index=run, driver="evr")[1] for run in runs]
    return torch.from_numpy(np.concatenate(found, axis=1))


def _lanczos(
    space: _Space,
    view: Symmetric,
    wish: Wish,
    active: int,
    selection: Selection,
    block: int,
    on_products: Callable[[int], None],
) -> _Found:
    options: dict[str, Any] = {"selection": selection, "tol": wish.tol, "relative": selection.which == "positive"}
    options |= {"metric": wish.pencil, "seed": wish.seed, "device": view.device}
    if space.matrix is not None:
        matrix = (space.matrix.double() + space.matrix.double().T) / 2
        found = block_lanczos(
            matrix.__matmul__, space.order, active, block=max(active, 8), max_products=10**6, **options
        )
        vectors = found.vectors.to(view.dtype)
        images, spent = space.product(vectors.T).T, space.spent + active
        words = f"Lanczos on the {space.words}, residuals from the operator"
        return _Found(vectors, images, found.scale, spent, words, _beyond(found, selection), 0.0, found.settled)
    counted = 0

    def tell(total: int) -> None:
        nonlocal counted
        on_products(total - counted)
        counted = total

    found = block_lanczos(
        space.product,
        space.order,
        active,
        dtype=view.dtype,
        block=block,
        max_products=max(2, wish.budget - (active if wish.vectors and space.lift is not None else 0)),
        on_products=tell,
        **options,
    )
    words = f"block Lanczos with thick restart, blocks of {block}, {space.words} (order {space.order})"
    if wish.pencil is not None:
        words += f", in the inner product of B = {wish.pencil.words}"
    flags = (found.skew, found.settled, found.interrupted)
    return _Found(found.vectors, found.images, found.scale, found.products, words, _beyond(found, selection), *flags)


def _beyond(found: LanczosResult, selection: Selection) -> Callable[[np.ndarray, float], list[Interval]]:
    """Where all other eigenvalues lie, if none was missed: beyond the last one wanted."""

    def rest(values: np.ndarray, slack: float) -> list[Interval]:
        if found.complete and len(values) == found.vectors.shape[1]:
            return []
        low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
        if selection.which == "largest":
            return [(-np.inf, low + slack)]
        if selection.which == "smallest":
            return [(high - slack, np.inf)]
        if selection.which == "magnitude":
            inner = np.abs(values).min(initial=np.inf) + slack
            return [(-inner, inner)]
        return [(-np.inf, selection.floor * found.scale), (high - slack, np.inf)]

    return rest


# --- what was found --------------------------------------------------------------------------------------------------


def _lifted(pairs: RitzPairs, lift: Product, floor: float, n: int) -> RitzPairs:
    """Pairs of the score rows as pairs of the parameters: x = Uᵀq/√(Wλ), and F x from the same products.

    What cannot be told from zero has no direction among the parameters; its vector is NaN and its residual that of the rows.
    """
    good = int((pairs.values > floor).sum())  # they come first
    vectors = torch.full((len(pairs.values), n), float("nan"), dtype=pairs.vectors.dtype, device=pairs.vectors.device)
    if not good:
        return replace(pairs, vectors=vectors, images=vectors)
    root = pairs.values[:good].sqrt().to(vectors)[:, None]
    lifted = rayleigh_ritz(lift(pairs.vectors[:good].T).T / root, lift(pairs.images[:good].T).T / root)
    images = vectors.clone()
    vectors[:good], images[:good] = lifted.vectors, lifted.images
    overlap = torch.zeros_like(pairs.overlap)
    overlap[:good, :good], overlap[good:, good:] = lifted.overlap, pairs.overlap[good:, good:]
    return RitzPairs(torch.cat([lifted.values, pairs.values[good:]]), vectors, images, overlap)


def _judge(
    view: Symmetric, pairs: RitzPairs, found: _Found, wish: Wish, order: int, active: int, positive: bool
) -> dict[str, Any]:
    """Residuals, bounds and flags; ranks beyond the rank bound are exact zeros, ranks that the budget did not reach NaN."""
    values, residual = pairs.values.numpy(), pairs.residual_norm.numpy()
    slack = rounding(order, view.dtype, found.scale, found.skew)
    if wish.pencil is not None and len(values):
        slack += allowance(wish.pencil, view, pairs.vectors, pairs.images, pairs.values)
    floor = min(order, DENSE_LIMIT) * torch.finfo(view.dtype).eps * found.scale
    end = "" if positive or wish.which == "magnitude" else wish.which
    goal = wish.tol * (np.abs(values) if positive else np.full(len(values), found.scale))
    # an iteration that stops at the tolerance may have left eigenvalues together that are closer than that
    resolution = goal.max(initial=0.0) * found.iterated
    rest = found.rest(values, max(resolution, residual.max(initial=0.0)) + slack)
    lower, upper = bounds(values, pairs.overlap.numpy(), slack, rest, end=end, resolution=resolution)
    above = values > floor if view.psd else np.abs(values) > floor
    length = min(wish.k, view.n)
    missing, zeros = active - len(values), length - active

    def padded(column: np.ndarray) -> np.ndarray:
        return np.concatenate([column, np.full(missing, np.nan), np.zeros(zeros)])

    facts: dict[str, Any] = {
        "eigenvalue": padded(values),
        "residual_norm": padded(residual),
        "lower": padded(lower),
        "upper": padded(upper),
        "above_noise": np.concatenate([above, np.zeros(missing + zeros, dtype=bool)]),
        "converged": np.concatenate(
            [residual <= goal + slack, np.zeros(missing, dtype=bool), np.ones(zeros, dtype=bool)]
        ),
        "noise_floor": floor,
        "rank_bound": min(view.rank_bound, view.n),
        "num_above_noise": int(above.sum()),
        "num_matvecs": found.spent,
        "method": found.words,
        "settled": found.settled,
        "interrupted": found.interrupted,
        # of the smallest above zero: how many real ones may lie below what the dtype resolves
        "hidden": max(0, min(view.rank_bound, order) - found.known_above)
        if positive and found.known_above is not None
        else 0,
    }
    F = view.source
    if isinstance(F, Fisher) and F.kind != "hessian" and wish.pencil is None:
        facts["trace"] = F.trace()
    if wish.vectors:
        full = np.full((length, view.n), np.nan)
        full[: len(values)][above] = pairs.vectors.cpu().double().numpy()[above]
        facts["eigenvector"] = full
    return facts
