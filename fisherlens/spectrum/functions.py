"""Functions of a spectrum: effective dimension and log-determinant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens.errors import InputError
from fisherlens.fisher import check_damping
from fisherlens.linalg.precision import own_precision
from fisherlens.spectrum.bootstrap import bootstrap_functions, check_replicates
from fisherlens.spectrum.intervals import check_confidence, check_probing, student_interval
from fisherlens.spectrum.moments import integrate
from fisherlens.spectrum.rules import Quadrature
from fisherlens.spectrum.sources import of_operator, of_result, require_semidefinite

if TYPE_CHECKING:
    import xarray as xr

Function = Callable[[np.ndarray, float], np.ndarray]


@own_precision
def effective_dimension(
    F_or_result: Any,
    damping: float | Sequence[float],
    *,
    num_probes: int = 10,
    num_matvecs: int = 80,
    deflate: int = 10,
    bootstrap: int = 0,
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.DataArray:
    r"""Compute the effective dimension, the number of directions that the data determine better than the damping.

    .. math:: d(\lambda) = \operatorname{tr} F (F + \lambda I)^{-1} = \sum_i \frac{\lambda_i}{\lambda_i + \lambda}

    Parameters
    ----------
    F_or_result
        A Fisher, an approximation, an :class:`Operator` with ``psd=True``, or the Dataset of :func:`spectrum`, of
        :func:`spectral_density` or of ``top_eigenvalues``.
    damping
        One λ > 0 or several, in nat.
    num_probes, num_matvecs, deflate
        Only where the spectrum must be estimated: probes, Lanczos steps of each, and leading eigenpairs that are found first and then
        exact. Defaults as of :func:`spectral_density`; the 10 pairs are our choice.
    bootstrap
        Replicates of a bootstrap over the examples of a Fisher, 0 for none, else at least 20.
    seed
        Of probes and bootstrap.
    confidence
        Of the intervals.

    Returns
    -------
    DataArray ``effective_dimension (damping)``, or a scalar one for a single λ; its attribute ``method`` says how it came about. Where it is
    not exact it has the coordinates ``sem`` (over probes), ``low``, ``high`` and ``truncation``, what the finite rules may be off by:
    where that is larger than ``sem``, more ``num_matvecs`` help, else more ``num_probes``. With ``bootstrap`` also ``data_low`` and
    ``data_high``, an indicative interval for infinitely many examples, and ``data_variance`` and ``label_variance``, see
    :func:`spectral_summary`.

    Raises
    ------
    InputError: a damping that is no number > 0; a Hessian or another operator that may be indefinite; eigenvalues of ``top_eigenvalues``
    without the trace. TypeError: neither an operator nor a result.

    Notes
    -----
    Exact, at the cost of one spectrum, where the Gram matrix or F fits the memory budget, where the approximation knows its own, and for
    other operators of no more parameters than ``num_probes * num_matvecs``. Else by Lanczos quadrature: the Gauss rules are an upper bound
    of every probe's own value, the Gauss-Radau rules a lower one, and ``low`` … ``high`` is a t interval around both. It holds the truth for
    93 to 97 % of 1,000 seeds (``tests/benchmarks/coverage.py``). From a result of ``top_eigenvalues`` and the trace follow strict bounds:
    ``low`` if what is missing sits in as few eigenvalues as possible, ``high`` if it is spread evenly; the value is their middle.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> fl.effective_dimension(F, [1e-3, 1.0]).dims
    ('damping',)
    """
    options = _options(num_probes, num_matvecs, deflate, seed, confidence)
    words = ("effective_dimension", "effective dimension", "1")
    return _function_of_spectrum(F_or_result, damping, words, dimension_of, options, bootstrap, confidence)


@own_precision
def log_determinant(
    F_or_result: Any,
    damping: float | Sequence[float],
    *,
    num_probes: int = 10,
    num_matvecs: int = 80,
    deflate: int = 10,
    bootstrap: int = 0,
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.DataArray:
    r"""Compute log det(I + F/λ) in nat.

    Half of it is what N examples tell beyond a Gaussian prior of precision Nλ, in the Laplace approximation.

    .. math:: \log\det(I + F/\lambda) = \sum_i \log(1 + \lambda_i/\lambda)

    Parameters, errors and cost as :func:`effective_dimension`.
    """
    options = _options(num_probes, num_matvecs, deflate, seed, confidence)
    words = ("log_determinant", "log det(I + F/λ)", "nat")
    return _function_of_spectrum(F_or_result, damping, words, log_of, options, bootstrap, confidence)


def dimension_of(values: np.ndarray, damping: float) -> np.ndarray:
    """x/(x + λ)."""
    return values / (values + damping)


def log_of(values: np.ndarray, damping: float) -> np.ndarray:
    """log(1 + x/λ)."""
    return np.log1p(values / damping)


def _options(num_probes: Any, num_matvecs: Any, deflate: Any, seed: Any, confidence: Any) -> dict[str, int]:
    check_probing(num_probes, num_matvecs, deflate, seed)
    check_confidence(confidence)
    return {"num_probes": num_probes, "num_matvecs": num_matvecs, "deflate": deflate, "seed": seed}


def _function_of_spectrum(
    source: Any,
    damping: Any,
    words: tuple[str, str, str],
    function: Function,
    options: dict[str, int],
    bootstrap: int,
    confidence: float,
) -> xr.DataArray:
    import xarray as xr

    check_replicates(bootstrap)
    grid = [check_damping(lam) for lam in ([damping] if np.ndim(damping) == 0 else damping)]
    if not grid:
        raise InputError(
            "damping is an empty list; expected one number > 0 or several, in the units of the eigenvalues (nat)."
        )
    name, long_name, units = words
    value, errors, method = _evaluate(source, grid, name, function, options, confidence)
    if bootstrap:
        errors |= _over_examples(source, grid, function, bootstrap, options["seed"], confidence)
    dims = () if np.ndim(damping) == 0 else ("damping",)
    coords: dict[str, Any] = {"damping": grid} if dims else {}
    for key, (values, told) in errors.items():
        unit = "nat²" if "variance" in key and units == "nat" else units
        coords[key] = (dims, values if dims else values[0], {"long_name": f"{told} of the {long_name}", "units": unit})
    attrs = {"long_name": long_name, "units": units, "method": method}
    return xr.DataArray(value if dims else value[0], dims=dims, coords=coords, name=name, attrs=attrs)


def _over_examples(
    source: Any, grid: list[float], function: Function, bootstrap: int, seed: int, confidence: float
) -> dict[str, tuple[np.ndarray, str]]:
    """Coordinates that a bootstrap adds."""

    def values(eigenvalues: np.ndarray) -> np.ndarray:
        return np.stack([function(eigenvalues, lam).sum(-1) for lam in grid], axis=-1)

    told = bootstrap_functions(source, {"value": values}, bootstrap, seed, confidence)["value"]
    shown = f"{100 * confidence:g} % bootstrap interval over examples, indicative,"
    return {
        "data_low": (told["low"], f"lower end of the {shown}"),
        "data_high": (told["high"], f"upper end of the {shown}"),
        "data_variance": (told["data"], "variance over examples"),
        "label_variance": (told["labels"], "variance over drawn labels"),
    }


def _evaluate(
    source: Any, grid: list[float], name: str, function: Function, options: dict[str, int], confidence: float
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, str]], str]:
    """Values on the grid of dampings, their errors by coordinate name, and the method in words."""
    require_semidefinite(source)
    leak = 0.0
    if hasattr(source, "data_vars"):
        rules, method, missing = of_result(source)
        if missing is not None:
            return _bounded(rules, missing, grid, function, method)
    else:
        if not hasattr(source, "__matmul__"):
            message = (
                f"Expected a Fisher or the Dataset of fl.spectrum; got {type(source).__name__}. An approximation, fl.Operator(..., psd=True), and "
                "the Datasets of fl.spectral_density and fl.top_eigenvalues serve too."
            )
            raise TypeError(message)
        own = getattr(source, name, None)
        if callable(own):
            values = [float(torch.as_tensor(own(lam), dtype=torch.float64, device="cpu").sum()) for lam in grid]
            return np.array(values), {}, f"exact: by the {type(source).__name__} itself"
        found = of_operator(source, **options)
        rules, method, leak = found.rules, found.words, found.leak
    result = integrate(rules, [lambda x, lam=lam: function(x, lam) for lam in grid])
    if rules.exact:
        return result.value, {}, method
    # deflated pairs are coupled to the rest by their residuals: at most f'(0) Σ r²/θ, and f'(0) is 1/λ for both functions
    slack = leak / np.array(grid) + rules.rounding * abs(result.value)
    low, _ = student_interval(result.lower, result.sem, result.dof, confidence, slack)
    _, high = student_interval(result.value, result.sem, result.dof, confidence, slack)
    shown = f"{100 * confidence:g} % interval"
    errors = {
        "sem": (result.sem, "standard error over probes"),
        "low": (np.maximum(low, 0), f"lower end of the {shown}"),
        "high": (high, f"upper end of the {shown}"),
        "truncation": (result.value - result.lower + slack, "largest possible error of the finite rules"),
    }
    return result.value, errors, method


def _bounded(
    rules: Quadrature, missing: float, grid: list[float], function: Function, method: str
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, str]], str]:
    """Strict bounds from some of the largest eigenvalues and the trace: the functions are concave and 0 at 0."""
    values = np.maximum(rules.known, 0)
    most, count = values.min(initial=np.inf), max(rules.rank_bound - len(values), 1)
    full = int(min(missing // most, count)) if most > 0 else 0
    rest = max(missing - full * most, 0.0) if most > 0 else 0.0
    known = np.array([function(values, lam).sum() for lam in grid])
    fewest = full * np.array([function(np.array(most), lam) for lam in grid]) if full else np.zeros(len(grid))
    low = known + fewest + np.array([function(np.array(rest), lam) for lam in grid])
    high = known + np.array([count * function(np.array(missing / count), lam) for lam in grid])
    high = np.maximum(high, low)
    errors = {"low": (low, "strict lower bound"), "high": (high, "strict upper bound")}
    return (low + high) / 2, errors, f"bounds from {len(values)} eigenvalues and the trace; {method}"
