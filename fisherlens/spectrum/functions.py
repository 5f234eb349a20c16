"""Functions of a spectrum: effective dimension and log-determinant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens.errors import InputError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.spectrum.complete import spectrum

if TYPE_CHECKING:
    import xarray as xr


def _known_values(F_or_result: Any) -> tuple[np.ndarray, Any]:
    """Eigenvalues of an operator or of a spectrum, noise clipped to zero, and the Dataset they came from if any."""
    kind = F_or_result.kind if isinstance(F_or_result, Fisher) else getattr(F_or_result, "attrs", {}).get("kind")
    if kind == "hessian":
        raise InputError(
            "Functions of a spectrum such as the effective dimension and the log-determinant are of a positive semi-definite F, but this is a "
            "Hessian, whose eigenvalues may be negative. Use kind='exact', 'mc' or 'empirical', or fl.spectrum(H) for the eigenvalues themselves."
        )
    if isinstance(F_or_result, Fisher):
        return spectrum(F_or_result)["eigenvalue"].clip(min=0).values, None
    if hasattr(F_or_result, "data_vars") and "eigenvalue" in F_or_result:
        if "layer" in F_or_result["eigenvalue"].dims:
            raise InputError("The result has one spectrum per layer; choose one, such as result.sel(layer='all').")
        return F_or_result["eigenvalue"].dropna("rank").clip(min=0).values, F_or_result
    raise TypeError(f"Expected a Fisher or the Dataset of fl.spectrum; got {type(F_or_result).__name__}.")


def effective_dimension(F_or_result: Any, damping: float | Sequence[float]) -> xr.DataArray:
    r"""Compute the effective dimension, the number of directions that the data determine better than the damping.

    .. math:: d(\lambda) = \operatorname{tr} F (F + \lambda I)^{-1} = \sum_i \frac{\lambda_i}{\lambda_i + \lambda}

    Parameters
    ----------
    F_or_result
        A Fisher, or the Dataset of :func:`spectrum`.
    damping
        One λ > 0 or several, in nat.

    Returns
    -------
    DataArray ``effective_dimension (damping)``, or a scalar one for a single λ. Exact; cost: one spectrum.
    """
    return _function_of_spectrum(
        F_or_result, damping, "effective_dimension", lambda x, lam: (x / (x + lam)).sum(), "effective dimension", "1"
    )


def log_determinant(F_or_result: Any, damping: float | Sequence[float]) -> xr.DataArray:
    r"""Compute log det(I + F/λ) in nat.

    Half of it is what N examples tell beyond a Gaussian prior of precision Nλ, in the Laplace approximation.

    .. math:: \log\det(I + F/\lambda) = \sum_i \log(1 + \lambda_i/\lambda)

    Parameters and cost as :func:`effective_dimension`.
    """
    return _function_of_spectrum(
        F_or_result, damping, "log_determinant", lambda x, lam: np.log1p(x / lam).sum(), "log det(I + F/λ)", "nat"
    )


def _function_of_spectrum(
    source: Any, damping: Any, name: str, function: Any, long_name: str, units: str
) -> xr.DataArray:
    import xarray as xr

    values, _ = _known_values(source)
    attrs = {"long_name": long_name, "units": units}
    if np.ndim(damping) == 0:
        return xr.DataArray(function(values, check_damping(damping)), name=name, attrs=attrs)
    grid = [check_damping(lam) for lam in damping]
    found = [function(values, lam) for lam in grid]
    return xr.DataArray(found, dims="damping", coords={"damping": grid}, name=name, attrs=attrs)
