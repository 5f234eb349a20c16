"""Some eigenvalues at an end of the spectrum, each with its residual and bounds."""

from __future__ import annotations

import json
import numbers
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens import errors
from fisherlens._progress import progress as progress_bar
from fisherlens.errors import (
    ConvergenceWarning,
    InputError,
    MemoryBudgetError,
    NumericalWarning,
    readable_bytes,
    user_level,
)
from fisherlens.fisher import Fisher
from fisherlens.linalg.precision import own_precision
from fisherlens.results import make_dataset
from fisherlens.spectrum.complete import WHOLE, label_coords, spectrum
from fisherlens.spectrum.ends import Wish, solve_end
from fisherlens.spectrum.operators import as_symmetric
from fisherlens.spectrum.pencil import metric_of

if TYPE_CHECKING:
    import xarray as xr

WHICH = ("largest", "smallest", "magnitude")
METHODS = ("auto", "exact", "lanczos")
_WORDS = {
    "eigenvalue": ("eigenvalue", "nat"),
    "residual_norm": ("residual norm of the eigenpair", "nat"),
    "lower": ("lower bound of the eigenvalue", "nat"),
    "upper": ("upper bound of the eigenvalue", "nat"),
    "above_noise": ("eigenvalue above the noise floor", "1"),
    "converged": ("residual within the tolerance", "1"),
    "noise_floor": ("noise floor n ε λ_max", "nat"),
    "rank_bound": ("upper bound of the rank", "1"),
    "num_above_noise": ("eigenvalues above the noise floor among those shown", "1"),
    "trace": ("trace", "nat"),
}


@own_precision
def top_eigenvalues(
    F: Any,
    k: int = 10,
    *,
    which: str = "largest",
    B: Any = None,
    tol: float = 1e-6,
    vectors: bool = False,
    seed: int = 0,
    by: Any = None,
    damping: float | None = None,
    method: str = "auto",
    max_matvecs: int | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Compute some eigenvalues at an end of the spectrum, with the residual, bounds and convergence of each.

    .. math:: A x_i = \lambda_i x_i \quad\text{or}\quad A x_i = \lambda_i B x_i, \qquad r_i = A x_i - \lambda_i B x_i

    Parameters
    ----------
    F
        A Fisher or Hessian, an approximation, or an :class:`Operator`: anything symmetric.
    k
        How many, counted with multiplicity.
    which
        ``"largest"``; ``"smallest"``: of a semi-definite operator the smallest *above the noise floor*, as zero is always an eigenvalue of a
        Fisher with P > N R, and of an indefinite one (a Hessian, an ``Operator`` without ``psd=True``) the most negative; or ``"magnitude"``,
        the largest \|λ\|.
    B
        Positive definite, for the generalised problem: an approximation together with a damping, as ``(approximation, damping)`` or with
        ``damping=``, or any object with ``@`` and ``solve(v)`` such as ``F.damped(λ)``.
    tol
        A pair has converged when its residual norm is at most tol · max\|λ\| (for the smallest above zero: tol · λ of the pair) beside the
        rounding error of the products. Default 1e-6: errors of separated eigenvalues are then about its square.
    vectors
        Also return the eigenvectors, ``(rank, param)``, with xᵀx = 1, or xᵀBx = 1.
    seed
        Of an own generator for the start vectors; global random state is neither read nor changed.
    by
        None for the whole; ``"layer"`` for each diagonal block of a layer, with the whole as ``"all"``; or any other partition, whose blocks are
        decomposed completely as by :func:`spectrum`.
    damping
        Added to ``B``, in its units.
    method
        ``"auto"`` by cost, ``"exact"`` through the dense or Gram matrix, or ``"lanczos"``.
    max_matvecs
        Budget of products with F; None for max(1000, 50 k).
    progress
        Show a bar; None for "if standard error is a terminal".

    Returns
    -------
    Dataset over ``rank`` (and ``layer`` or ``block`` in front): ``eigenvalue``, descending; ``residual_norm``, ‖r_i‖ recomputed from the
    operator (on the side of the score rows, unless vectors are asked for; with B the norm is √(rᵀB⁻¹r)); ``lower`` and ``upper`` with
    lower ≤ λ_i ≤ upper; ``above_noise``; ``converged``; ``eigenvector`` on request; scalars ``noise_floor``, ``rank_bound``, ``num_above_noise``
    and, for a Fisher, ``trace``. ``rank`` has length min(k, order): what the rank bound leaves are exact zeros, and what the budget
    did not reach is NaN. The attribute ``num_matvecs`` counts all products, those of the check included.

    Raises
    ------
    InputError: an unknown option, an operator that is not symmetric, a B that is not positive definite or whose solve is not its inverse.
    NonFiniteError: a product with NaN or infinity. MemoryBudgetError: ``method="exact"`` over the budget.

    Warns
    -----
    ConvergenceWarning: the budget, or Ctrl-C, ended the run before all pairs converged; they are returned as they are.
    NumericalWarning: the smallest above zero of a float32 operator whose rank may be larger than what stands above the noise.

    Notes
    -----
    Exact where forming the Gram or dense matrix costs less than the products, else block Lanczos with thick restart on the smaller side;
    ``method`` in the attributes says which. Bounds are two-sided: the residual norm of a cluster of values, its square over the gap where the
    others certify one, and for the last cluster, which nothing separates from the rest, 10 times the residual norm or the tolerance if that is
    larger; each widened by the rounding of products, 4 √n ε max\|λ\|, or the asymmetry that was measured if that is larger. At the end of the spectrum one side is free
    of the residual (Cauchy). Of a pair that has not converged, the interval holds an eigenvalue, but not surely the i-th.
    The noise floor is n ε max\|λ\| with n the order of the side, at most 5000 as no larger matrix is decomposed (our choice).

    The smallest eigenvalues above zero need the complete spectrum of the smaller side, as no product tells how many zeros there are.
    Where that does not fit, Lanczos works from the low end and needs about √(λ_max/λ_min) products: expect ``converged=False``.
    In float32 nothing below the noise floor can be had; use ``model.double()``.

    Cost: about 30 to 100 products for the ten largest. See Parlett, *The Symmetric Eigenvalue Problem* (1998), for the bounds.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> d = torch.arange(1.0, 101.0, dtype=torch.float64)
    >>> A = fl.Operator(lambda v: d[:, None] * v, 100, block=True)
    >>> fl.top_eigenvalues(A, 3)["eigenvalue"].values.round(6).tolist()
    [100.0, 99.0, 98.0]
    """
    view = as_symmetric(F)
    k = _count(k, "k", 1)
    budget = max(1000, 50 * k) if max_matvecs is None else _count(max_matvecs, "max_matvecs", 2)
    seed = _count(seed, "seed", 0)
    _known("option which=", which, WHICH)
    _known("method", method, METHODS)
    if not isinstance(tol, numbers.Real) or not 0 < tol < 1:
        raise InputError(
            f"tol must be a number between 0 and 1, the residual relative to the largest eigenvalue; got {tol!r}."
        )
    if by is not None and B is not None:
        raise InputError(
            "by= cuts F into blocks, but B couples them: leave out by=, or restrict both to a layer before the call."
        )
    pencil = metric_of(B, damping, view)
    wish = Wish(k, which, float(tol), vectors, seed, method, budget, pencil)
    if by is not None and not (isinstance(by, str) and by == "layer" and isinstance(F, Fisher)):
        return _from_spectrum(F, by, wish)
    names = None if by is None else [*F.layout.layer_names, WHOLE]
    targets = [F] if names is None else [*(F.restrict(name) for name in names[:-1]), F]
    with progress_bar(budget * len(targets), desc="eigenvalues", enabled=progress) as bar:
        found = [solve_end(target, wish, lambda count: bar.update(count)) for target in targets]
    _warn(found, names, wish, view.dtype)
    return _dataset(F, wish, found, names, by)


def _count(value: Any, name: str, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be an integer >= {least}; got {value!r}.")
    return int(value)


def _known(what: str, name: Any, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(errors.UNKNOWN_NAME.format(what=what, name=name, hint=errors.nearest(str(name), known)))


def _warn(found: list[dict[str, Any]], names: list[str] | None, wish: Wish, dtype: torch.dtype) -> None:
    """One warning for everything that did not converge, and one where float32 hides what was asked for."""
    hidden = max(part["hidden"] for part in found)
    if hidden and dtype == torch.float32:
        warnings.warn(
            f"The smallest eigenvalues above zero are in doubt: the rank may be larger by {hidden}, but nothing below the noise floor "
            f"({max(float(part['noise_floor']) for part in found):.1e}) can be told from zero in float32. Build the operator in float64 (model.double()).",
            NumericalWarning,
            stacklevel=user_level(),
        )
    late = [i for i, part in enumerate(found) if not part["converged"].all() or not part["settled"]]
    if not late:
        return
    where = (
        "" if names is None else f" of {', '.join(repr(names[i]) for i in late[:5])}{', …' if len(late) > 5 else ''}"
    )
    part = found[late[0]]
    why = (
        "Ctrl-C ended the run"
        if any(found[i]["interrupted"] for i in late)
        else f"the budget is {wish.budget} products"
    )
    small = wish.which == "smallest"
    remedy = (
        "The low end needs about √(λ_max/λ_min) products: use fl.spectrum on fewer examples, or kind='mc'."
        if small
        else "Raise max_matvecs or tol, or ask for fewer."
    )
    warnings.warn(
        f"{int(part['converged'].sum())} of {len(part['converged'])} eigenpairs{where} converged to tol={wish.tol:g} ({why}). What is there is returned, "
        f"flagged in 'converged'; the others are Rayleigh quotients with the residual shown. {remedy}",
        ConvergenceWarning,
        stacklevel=user_level(),
    )


def _dataset(F: Any, wish: Wish, found: list[dict[str, Any]], names: list[str] | None, by: Any) -> xr.Dataset:
    lead = () if names is None else ("layer",)
    length = max(len(part["eigenvalue"]) for part in found)
    variables: dict[str, Any] = {}
    for name, (long_name, units) in _WORDS.items():
        if any(name not in part for part in found):
            continue
        values = [part[name] for part in found]
        attrs = {"long_name": long_name, "units": "1" if wish.pencil is not None else units}
        if np.ndim(values[0]) == 1:
            fill = False if values[0].dtype == bool else np.nan
            values = [np.pad(v, (0, length - len(v)), constant_values=fill) for v in values]
            variables[name] = ((*lead, "rank"), values[0] if names is None else np.stack(values), attrs)
        else:
            variables[name] = (lead, values[0] if names is None else np.array(values), attrs)
    coords: dict[str, Any] = {"rank": np.arange(length)}
    if names is not None:
        coords["layer"] = names
    view = as_symmetric(F)
    if wish.vectors:
        needed = len(found) * length * view.n * 8
        if names is not None and needed > getattr(F, "memory", needed):
            raise MemoryBudgetError(
                f"The eigenvectors of {len(found)} blocks take {readable_bytes(needed)}, over the budget of {readable_bytes(F.memory)}. Ask one layer at a time with "
                "F.restrict(name), fewer with k=, or use vectors=False."
            )
        full = np.full((len(found), length, view.n), np.nan)
        starts = [*(layer.start for layer in F.layout.layers), 0] if names is not None else [0]
        for row, part, start in zip(full, found, starts, strict=True):
            x = part["eigenvector"]
            row[: len(x), start : start + x.shape[1]] = x
        attrs = {"long_name": "eigenvector", "units": "1"}
        variables["eigenvector"] = ((*lead, "rank", "param"), full[0] if names is None else full, attrs)
        coords |= label_coords(F, view.n)
    methods = list(dict.fromkeys(part["method"] for part in found))
    return make_dataset(
        variables,
        coords,
        operator=F,
        method="; ".join(methods),
        num_matvecs=sum(part["num_matvecs"] for part in found),
        settings=_settings(wish, by),
        which=wish.which,
        n_params=view.n,
        problem="A x = λ B x" if wish.pencil is not None else None,
    )


def _from_spectrum(F: Any, by: Any, wish: Wish) -> xr.Dataset:
    """The wanted ones of every block's complete spectrum."""
    whole = spectrum(F, by=by, vectors=wish.vectors)
    values, above = whole["eigenvalue"].values, whole["above_noise"].values
    size = np.where(np.isnan(values), np.inf, values)
    if wish.which == "largest":
        key = -size
    elif wish.which == "magnitude":
        key = -np.abs(values)
    else:
        key = np.where(above, size, np.where(np.isinf(size), np.inf, 1e300)) if as_symmetric(F).psd else size
    key = np.where(np.isnan(values), np.inf, key)
    chosen = np.sort(np.argsort(key, axis=1, kind="stable")[:, : wish.k], axis=1)
    lead, floor = whole["eigenvalue"].dims[0], whole["noise_floor"].values[:, None]
    columns = {
        name: np.take_along_axis(whole[name].values, chosen, 1)
        for name in ("eigenvalue", "residual_norm", "above_noise")
    }
    order = np.argsort(
        -np.where(np.isnan(columns["eigenvalue"]), -np.inf, columns["eigenvalue"]), axis=1, kind="stable"
    )
    columns = {name: np.take_along_axis(column, order, 1) for name, column in columns.items()}
    columns["lower"], columns["upper"] = columns["eigenvalue"] - floor, columns["eigenvalue"] + floor
    columns["converged"] = np.isfinite(columns["eigenvalue"])
    variables: dict[str, Any] = {
        name: ((lead, "rank"), columns[name], {"long_name": words, "units": units})
        for name, (words, units) in _WORDS.items()
        if name in columns
    }
    for name in ("noise_floor", "rank_bound", "trace"):
        variables[name] = (lead, whole[name].values, whole[name].attrs)
    shown = columns["above_noise"].sum(1)
    words, units = _WORDS["num_above_noise"]
    variables["num_above_noise"] = (lead, shown, {"long_name": words, "units": units})
    if wish.vectors:
        places = np.take_along_axis(chosen, order, 1)[..., None]
        x = np.take_along_axis(whole["eigenvector"].values, places, 1)
        variables["eigenvector"] = ((lead, "rank", "param"), x, whole["eigenvector"].attrs)
    coords: dict[str, Any] = {
        name: (coord.dims, coord.values) for name, coord in whole.coords.items() if "rank" not in coord.dims
    }
    coords["rank"] = np.arange(chosen.shape[1])
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=whole.attrs["method"],
        num_matvecs=whole.attrs.get("num_matvecs"),
        settings=_settings(wish, json.loads(whole.attrs["settings"])["by"]),
        which=wish.which,
        n_params=whole.attrs["n_params"],
        precision=whole.attrs["precision"],
    )


def _settings(wish: Wish, by: Any) -> dict[str, Any]:
    names = ("k", "tol", "vectors", "seed", "method")
    return {name: getattr(wish, name) for name in names} | {"by": by, "max_matvecs": wish.budget}
