"""Stiff and sloppy directions of parameter space: what the data determine, what they leave open, and in which layers each lives."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, MemoryBudgetError, NumericalWarning, user_level
from fisherlens.fisher import Fisher, check_damping, require_fisher
from fisherlens.linalg.dense import eigenpairs, noise_floor
from fisherlens.linalg.precision import own_precision
from fisherlens.results import make_dataset
from fisherlens.spectrum import as_symmetric, top_eigenvalues
from fisherlens.spectrum.complete import label_coords
from fisherlens.spectrum.intervals import check_count
from fisherlens.spectrum.smaller import DENSE_LIMIT, embed_rows, is_dense_side, lift_rows, smaller_matrix

if TYPE_CHECKING:
    import xarray as xr

WHICH = ("both", "stiff", "sloppy")
METHODS = ("auto", "exact", "lanczos")
# Eigenvalues closer than this many noise floors are a cluster: rounding turns their vectors into each other by a hundredth and more (our choice).
_CLUSTER = 10


@dataclass(frozen=True)
class _Found:
    """Some eigenpairs, descending, and what the complete spectrum tells where it is known.

    ``gap`` is the distance of each eigenvalue to the nearest other one that is known, ``floor`` the noise floor, ``count`` the
    eigenvalues above it, ``above_damping`` those above the damping too, and ``layers`` the trace of the projector on all of them by layer.
    """

    values: Tensor
    vectors: Tensor
    ranks: np.ndarray
    sides: list[str]
    gap: np.ndarray
    tolerance: np.ndarray
    floor: float
    words: str
    spent: int
    converged: np.ndarray
    count: int | None = None
    above_damping: int | None = None
    layers: np.ndarray | None = None
    leverage: Tensor | None = None


@own_precision
def directions(
    F: Fisher,
    k: int = 10,
    *,
    damping: float = 1e-3,
    which: str = "both",
    vectors: bool = False,
    method: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Find the stiff and the sloppy directions of F, with the share of each layer, and what cannot be identified at all.

    .. math:: F v_i = \lambda_i v_i, \qquad \text{share of layer } l = \sum_{j \in l} v_{ij}^2

    A step of length t along v_i changes the predictions by KL = t² λ_i / 2 in nat per example. Stiff directions (large λ) are what the data determine;
    along sloppy ones (small λ > 0) parameters move far before a prediction changes; along the others, the null space of F, none does.

    Parameters
    ----------
    F
        The Fisher operator.
    k
        Directions on each side, at least 1 and at most P. Each direction is listed once, so that there are fewer where F has no 2 k eigenvalues
        above the noise.
    damping
        λ > 0 in nat: directions with λ_i > λ are determined by the data rather than by the damping.
    which
        ``"both"`` ends, ``"stiff"`` or ``"sloppy"``. Sloppy are the smallest eigenvalues above the noise floor.
    vectors
        Also return the directions themselves, ``eigenvector (rank, param)`` and, where the complete spectrum is known, ``leverage (param)``.
    method
        ``"exact"``: all eigenvalues, from the smaller of the dense and the Gram matrix. ``"lanczos"``: the stiff end by products, the sloppy end as
        far as products can reach it. ``"auto"``: exact up to an order of 5,000 and within the memory budget of F.
    seed, progress
        Of Lanczos: its start vectors, and whether to show a bar.

    Returns
    -------
    Dataset over ``rank``, the place in the complete spectrum from 0, the stiffest (of a sloppy end by Lanczos counted back from the rank bound), with
    the coordinate ``side``: ``eigenvalue`` in nat; ``residual_norm`` ‖F v - λ v‖; ``share`` of tr F; ``layer_share (rank, layer)``, rows sum to 1;
    ``participation`` 1/Σ v⁴, the effective number of parameters that take part; ``top_parameter``, the label of the largest entry, and
    ``top_parameter_share``, its square; ``std_bound`` 1/√(N(λ_i + λ)), the Cramér–Rao width along the direction with a Gaussian prior of precision Nλ;
    ``gradient_share``, the squared cosine to the mean gradient (absent without targets; NaN where the gradient is 0); ``identifiable``,
    λ_i above the noise floor and above λ; ``degenerate``, closer to a neighbour than the numbers resolve, and ``cluster``, the number of the group of
    such neighbours: *single vectors of a cluster, and so their shares, are arbitrary; only sums over a whole cluster mean something*; ``converged``.
    Scalars ``num_above_noise`` (the numerical rank), ``num_identifiable``, ``null_dimension`` = P - rank, ``noise_floor``; over ``layer``
    ``identifiable_dimension``, the trace of the projector on the eigenvectors above the noise (how many of the identifiable directions live in the layer;
    they sum to the rank), ``null_dimension_of_layer``, the rest of its parameters, and ``layer_size``. ``leverage`` is the diagonal of that projector:
    1 for a parameter that is identified by itself, 0 for one that nothing depends on, between for those that are identified only together. What only
    the complete spectrum tells is NaN without it.

    Raises
    ------
    InputError: k outside 1..P, an unknown option, a damping that is not finite and positive. MemoryBudgetError: ``method="exact"`` over the budget.

    Warns
    -----
    NumericalWarning: the sloppy end was asked for with ``"both"``, but the complete spectrum does not fit; only the stiff end is returned.
    ConvergenceWarning: Lanczos ended before all pairs converged.

    Notes
    -----
    Cost: exact, one Gram matrix of order N R and 9 (N R)³ operations, and two half-products per direction; the projector by layer adds one
    product of matrices of that order for each layer, and ``leverage`` 2 (N R)² P operations. No P × P matrix unless P is the smaller side. Signs are chosen
    so that the largest entry is positive. Stiff and sloppy: Transtrum et al., *J. Chem. Phys.* 143, 010901 (2015).

    Examples
    --------
    >>> import fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> found = fl.directions(F, 2)
    >>> int(found.null_dimension), [str(side) for side in found.side.values]
    (5, ['stiff', 'stiff', 'sloppy'])
    """
    require_fisher(F)
    damping = check_damping(damping)
    check_count("k", k, 1, "the directions on each side")
    if k > F.n_params:
        raise InputError(
            f"k must be at most the number of parameters, {F.n_params}; got {k}. F has no more directions."
        )
    for what, name, known in (("option which=", which, WHICH), ("method", method, METHODS)):
        if name not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what=what, name=name, hint=errors.nearest(str(name), known)))
    check_count("seed", seed, 0, "of the start vectors")
    found = None
    if method == "exact" or (method == "auto" and min(F.n_params, F.n_rows) <= DENSE_LIMIT):
        try:
            found = _exact(F, k, which, damping, vectors)
        except MemoryBudgetError:
            if method == "exact":
                raise
    if found is None:
        found = _lanczos(F, k, which, seed, progress)
    return _dataset(F, found, damping, vectors, {"k": k, "which": which, "method": method, "vectors": vectors})


# --- eigenpairs ------------------------------------------------------------------------------------------------------


def _exact(F: Fisher, k: int, which: str, damping: float, leverage: bool) -> _Found:
    """All eigenvalues of the smaller side, and the vectors that are wanted."""
    view = as_symmetric(F)
    found = smaller_matrix(view)
    values, basis = eigenpairs(found.matrix, f"The {found.words} of F")
    floor = noise_floor(values, len(values), F.dtype)
    count = min(int((values > floor).sum()), F.rank_bound)
    places = _places(count, k, which)
    index = torch.from_numpy(places).to(basis.device)
    chosen = basis[:, index]
    vectors = chosen if found.dense else _unit(lift_rows(view, chosen.to(F.dtype)).double())
    spread = np.abs(np.diff(values.cpu().numpy()))
    gap = np.minimum(np.append(spread, np.inf), np.insert(spread, 0, np.inf))[places]
    known, basis = values[:count], basis[:, :count]
    return _Found(
        values[index],
        vectors,
        places,
        ["stiff" if place < k and which != "sloppy" else "sloppy" for place in places],
        gap,
        np.full(len(places), _CLUSTER * floor),
        floor,
        f"exact: eigenvectors of the {found.words} in float64",
        found.spent,
        np.ones(len(places), dtype=bool),
        count,
        int((known > max(damping, floor)).sum()),
        _layer_dimensions(F, found.dense, known, basis),
        _leverage(F, found.dense, known, basis) if leverage else None,
    )


def _places(count: int, k: int, which: str) -> np.ndarray:
    """Ranks of the wanted ends of ``count`` eigenvalues, each once."""
    stiff = range(min(k, count)) if which != "sloppy" else range(0)
    sloppy = range(max(len(stiff), count - k), count) if which != "stiff" else range(0)
    return np.array([*stiff, *sloppy], dtype=np.int64)


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=0).clamp(min=torch.finfo(v.dtype).tiny)


def _layer_dimensions(F: Fisher, dense: bool, values: Tensor, basis: Tensor) -> np.ndarray:
    """Trace of the projector on all eigenvectors by layer: Σ_i ‖v_i,l‖², on the row side Σ_i q_iᵀ K_l q_i / k_i."""
    if dense:
        return np.array([basis[layer.start : layer.stop].square().sum().item() for layer in F.layout.layers])
    wide = embed_rows(as_symmetric(F), basis)
    parts = []
    for name in F.layout.layer_names:
        gram = F.scores.layer_gram(name).double()
        parts.append((wide * (gram @ wide)).sum(0))
    each = torch.stack(parts)
    return (each / each.sum(0)).sum(1).cpu().numpy()  # the sum over layers is W k_i, but for rounding


def _leverage(F: Fisher, dense: bool, values: Tensor, basis: Tensor) -> Tensor:
    """Diagonal of the projector on all eigenvectors, float64 ``(P,)``."""
    if dense:
        return basis.square().sum(1)
    half = (embed_rows(as_symmetric(F), basis) / (values * F.total_weight).sqrt()).T
    pieces = [
        (half @ layer.columns(chunk).double()).square().sum(0)
        for layer in F.scores.layers
        for chunk in layer.column_chunks()
    ]
    return torch.cat(pieces).clamp(max=1)


def _lanczos(F: Fisher, k: int, which: str, seed: int, progress: bool | None) -> _Found:
    """The ends that products reach; one pair more than wanted, to see whether the last has a close neighbour."""
    if which == "both":
        warnings.warn(
            f"Only the stiff end is returned: the sloppy one needs the complete spectrum of an order of {min(F.n_params, F.n_rows)}, which does not fit. "
            "Use fewer examples or kind='mc'; or which='sloppy', which tries by products.",
            NumericalWarning,
            stacklevel=user_level(),
        )
    sloppy = which == "sloppy"
    options: dict[str, Any] = {"which": "smallest" if sloppy else "largest", "vectors": True, "seed": seed}
    more = min(k + 1, F.n_params)
    ds = top_eigenvalues(F, more, method="auto" if sloppy else "lanczos", progress=progress, **options)
    good = ds["above_noise"].values & np.isfinite(ds["eigenvalue"].values)
    values, floor = ds["eigenvalue"].values[good], float(ds["noise_floor"])
    spread = np.abs(np.diff(values))
    gap = np.minimum(np.append(spread, np.inf), np.insert(spread, 0, np.inf))
    wanted = slice(-k, None) if sloppy else slice(0, k)
    count = len(values[wanted])
    ranks = np.arange(F.rank_bound - count, F.rank_bound) if sloppy else np.arange(count)
    kept = np.flatnonzero(good)[wanted]
    return _Found(
        torch.from_numpy(values[wanted].copy()).to(F.device),
        torch.from_numpy(ds["eigenvector"].values[kept].T.copy()).to(F.device),
        ranks,
        ["sloppy" if sloppy else "stiff"] * count,
        gap[wanted],
        _CLUSTER * np.maximum(floor, ds["residual_norm"].values[kept]),
        floor,
        ds.attrs["method"],
        int(ds.attrs["num_matvecs"]),
        ds["converged"].values[kept],
    )


# --- what they tell --------------------------------------------------------------------------------------------------


def _dataset(F: Fisher, found: _Found, damping: float, vectors: bool, settings: dict[str, Any]) -> xr.Dataset:
    values, v = found.values.double(), found.vectors.double()
    square, count = v.square(), len(found.values)
    shares = torch.stack([square[layer.start : layer.stop].sum(0) for layer in F.layout.layers], dim=1)
    shares = shares / shares.sum(1, keepdim=True)
    largest = v.abs().argmax(0) if count else torch.zeros(0, dtype=torch.long, device=v.device)
    places = torch.arange(count, device=v.device)
    v = v * v[largest, places].sign()
    image = (F @ v.to(F.dtype)).double() if count else v
    residual = torch.linalg.vector_norm(image - v * values, dim=0)
    trace = F.trace()
    close = found.gap <= found.tolerance
    joined = np.diff(found.ranks, prepend=-2) == 1
    joined[1:] &= np.abs(np.diff(values.cpu().numpy())) <= found.tolerance[1:]
    joined[:1] = False
    by_rank: dict[str, tuple[Any, str, str]] = {
        "eigenvalue": (values, "eigenvalue of F", "nat"),
        "residual_norm": (residual, "residual norm of the eigenpair", "nat"),
        "share": (values / trace if trace > 0 else values, "share of the trace of F", "1"),
        "participation": (1 / square.square().sum(0), "parameters that take part, 1/Σ v⁴", "1"),
        "top_parameter": (np.array(_labels(F, largest.tolist()), dtype=str), "parameter with the largest entry", "1"),
        "top_parameter_share": (square[largest, places], "its share of the direction", "1"),
        "std_bound": ((F.n_data * (values + damping)).rsqrt(), "Cramér–Rao width along the direction", "1"),
        "identifiable": (values > max(damping, found.floor), "above the noise floor and the damping", "1"),
        "degenerate": (close, "too close to a neighbour to be told apart", "1"),
        "cluster": (np.cumsum(~joined) - 1, "number of the group of close neighbours", "1"),
        "converged": (found.converged, "residual within the tolerance", "1"),
    }
    if F._gradient is not None:
        g = F.gradient().double()
        along = (v.T @ g).square() / (g @ g) if bool((g != 0).any()) else torch.full_like(values, torch.nan)
        by_rank["gradient_share"] = (along, "squared cosine to the gradient", "1")
    variables: dict[str, Any] = {
        name: ("rank", value, {"long_name": words, "units": units}) for name, (value, words, units) in by_rank.items()
    }
    variables["layer_share"] = (("rank", "layer"), shares, {"long_name": "share of the layer", "units": "1"})
    variables |= _facts(F, found)
    coords: dict[str, Any] = {
        "rank": found.ranks,
        "side": ("rank", np.array(found.sides, dtype=str)),
        "layer": list(F.layout.layer_names),
    }
    if vectors:
        variables["eigenvector"] = (("rank", "param"), v.T, {"long_name": "direction of unit length", "units": "1"})
        coords |= label_coords(F, F.n_params)
        if found.leverage is not None:
            words = {"long_name": "leverage, the identifiable part of a parameter", "units": "1"}
            variables["leverage"] = ("param", found.leverage, words)
    side = "dense" if is_dense_side(as_symmetric(F)) else "score rows"
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=found.words,
        num_matvecs=found.spent + count,
        damping=damping,
        settings=settings | {"smaller_side": side},
    )


def _facts(F: Fisher, found: _Found) -> dict[str, Any]:
    """What the complete spectrum tells of the whole and of each layer; NaN where it is not known."""
    sizes = np.array([layer.size for layer in F.layout.layers])
    rank = np.nan if found.count is None else float(found.count)
    sure = np.nan if found.above_damping is None else float(found.above_damping)
    known = np.full(len(sizes), np.nan) if found.layers is None else found.layers

    def entry(dims: Any, value: Any, words: str, units: str = "1") -> tuple[Any, Any, dict[str, str]]:
        return dims, value, {"long_name": words, "units": units}

    return {
        "num_above_noise": entry((), rank, "eigenvalues above the noise floor"),
        "num_identifiable": entry((), sure, "eigenvalues above the noise floor and the damping"),
        "null_dimension": entry((), F.n_params - rank, "directions that no prediction depends on"),
        "noise_floor": entry((), found.floor, "noise floor n ε λ_max", "nat"),
        "identifiable_dimension": entry("layer", known, "identifiable directions that live in the layer"),
        "null_dimension_of_layer": entry(
            "layer", np.maximum(sizes - known, 0), "directions of the layer that are open"
        ),
        "layer_size": entry("layer", sizes, "parameters"),
    }


def _labels(F: Fisher, index: Sequence[int]) -> list[str]:
    """Labels of some entries of the flat vector, such as ``0.weight[3,2]``."""
    out = []
    for i in index:
        info = next(p for p in F.layout.parameters if p.start <= i < p.stop)
        place = np.unravel_index(i - info.start, info.shape) if info.shape else ()
        out.append(f"{info.name}[{','.join(map(str, place))}]" if place else info.name)
    return out
