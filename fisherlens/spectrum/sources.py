"""The spectrum behind an operator or a result, exact where it can be, else sampled: what functions of a spectrum integrate over."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import InputError, NumericalWarning, user_level
from fisherlens.fisher import Fisher
from fisherlens.linalg.probes import MIN_PROBES
from fisherlens.spectrum.complete import spectrum
from fisherlens.spectrum.moments import Sampled, known_spectrum, sample
from fisherlens.spectrum.operators import Symmetric, as_symmetric
from fisherlens.spectrum.rules import Quadrature, quadrature_of
from fisherlens.spectrum.side import side_for

# A spectrum of this order is computed whatever the budget says, as by fl.spectrum.
_ALWAYS = 2000
INDEFINITE = (
    "Functions of a spectrum such as the effective dimension and the log-determinant are of a positive semi-definite F, but this is "
    "{what}, whose eigenvalues may be negative. {remedy}"
)


def require_semidefinite(source: Any) -> None:
    """Refuse a Hessian, a result of one, or an operator that was not declared free of negative eigenvalues."""
    attrs = getattr(source, "attrs", {})
    kind = source.kind if isinstance(source, Fisher) else attrs.get("kind") if hasattr(attrs, "get") else None
    if kind == "hessian":
        remedy = "Use kind='exact', 'mc' or 'empirical', or fl.spectrum(H) for the eigenvalues themselves."
        raise InputError(INDEFINITE.format(what="a Hessian", remedy=remedy))
    if not getattr(source, "psd", True):
        remedy = "If no eigenvalue of it is negative, say so: fl.Operator(..., psd=True)."
        raise InputError(INDEFINITE.format(what="an operator", remedy=remedy))


def fits(F: Fisher) -> bool:
    """Whether the smaller of dense and Gram matrix can be decomposed within the budget, as :func:`spectrum` judges it."""
    order = F.n_params if F.kind == "hessian" else min(F.n_params, F.n_rows)
    return order <= _ALWAYS or 3 * order**2 * 8 <= F.memory


def of_operator(
    operator: Any, num_probes: int, num_matvecs: int, deflate: int, seed: int, *, method: str = "auto"
) -> Sampled:
    """Every eigenvalue where that is cheap or, for a Fisher, where it fits the budget; else a quadrature from probes."""
    view = as_symmetric(operator)
    budget = num_probes * num_matvecs
    if isinstance(operator, Fisher) and operator.kind != "hessian":
        exact = fits(operator)
    else:  # a block-diagonal one is decomposed by blocks; else the matrix costs no more products than the probes would
        exact = isinstance(operator, BlockDiagonal) or view.n <= budget
    if method == "exact" or (exact and method == "auto"):
        return known_blocks(spectrum(operator), view)[0]
    if num_probes < MIN_PROBES:
        warnings.warn(
            f"num_probes={num_probes} is too few for a standard error, which is NaN; it needs at least {MIN_PROBES}.",
            NumericalWarning,
            stacklevel=user_level(),
        )
    return sample(side_for(operator, budget, width=num_probes), num_probes, num_matvecs, deflate, seed)


def known_blocks(found: Any, view: Symmetric) -> list[Sampled]:
    """The blocks of a complete spectrum, or the whole as the only one."""
    spent = int(found.attrs.get("num_matvecs", 0))
    out = []
    for number, row in enumerate(np.atleast_2d(found["eigenvalue"].values)):
        values = torch.from_numpy(row[np.isfinite(row)].copy())
        floor, bound = (float(np.atleast_1d(found[name].values)[number]) for name in ("noise_floor", "rank_bound"))
        rounding = len(values) * torch.finfo(view.dtype).eps
        rules = known_spectrum(values, view.n, floor, int(bound), rounding, view.psd)
        top = float(values.abs().max()) if len(values) else 0.0
        out.append(Sampled(rules, found.attrs["method"], 0 if number else spent, 0.0, (top, 0.0)))
    return out


def of_result(result: Any) -> tuple[Quadrature, str, float | None]:
    """The quadrature of a result, how it came about, and the trace of what it does not hold: None where it holds everything.

    A result of :func:`top_eigenvalues` holds some eigenvalues; with the trace of F, what is missing is known in sum.
    """
    method = str(result.attrs.get("method", "a result"))
    if "deflated_eigenvalue" in result:
        return quadrature_of(result), method, None
    if "eigenvalue" not in result or "rank" not in result["eigenvalue"].dims:
        raise TypeError(
            "Expected a Fisher or the Dataset of fl.spectrum, fl.top_eigenvalues or fl.spectral_density; got a Dataset with "
            f"{', '.join(map(str, result.data_vars)) or 'nothing'}."
        )
    for dim in ("layer", "block"):
        if dim in result["eigenvalue"].dims:
            raise InputError(
                f"The result has one spectrum per {dim}; choose one, such as result.sel({dim}={result[dim].values[-1].item()!r})."
            )
    values = result["eigenvalue"].dropna("rank").values.astype(float)
    dtype = torch.float32 if result.attrs.get("dtype") == "float32" else torch.float64
    n = int(result.attrs.get("n_params", len(values)))
    bound = int(result["rank_bound"]) if "rank_bound" in result else n
    floor = float(result["noise_floor"]) if "noise_floor" in result else 0.0
    rules = known_spectrum(torch.from_numpy(values.copy()), n, floor, bound, len(values) * torch.finfo(dtype).eps, True)
    if "converged" not in result or len(values) >= bound:
        return rules, method, None
    return rules, method, _missing(result, values)


def _missing(result: Any, values: np.ndarray) -> float:
    if result.attrs.get("which", "largest") not in ("largest", "magnitude") or "problem" in result.attrs:
        told = result.attrs.get("problem", f"which={result.attrs.get('which')!r}")
        raise InputError(
            f"The result holds eigenvalues of {told}; functions of the whole spectrum need the largest of F, or the operator itself."
        )
    if "trace" not in result or not np.isfinite(result["trace"].item()):
        raise InputError(
            f"The result holds {len(values)} eigenvalues and not the trace, so nothing is known of the others. Pass the operator itself, or a result of "
            "fl.spectral_density."
        )
    if not result["converged"].values[: len(values)].all():
        raise InputError(
            "Some eigenvalues of the result have not converged, so that bounds from them would not hold. Raise the budget of fl.top_eigenvalues, or pass "
            "the operator itself."
        )
    return max(float(result["trace"]) - float(values.sum()), 0.0)
