"""Trace and diagonal of any symmetric operator from a few products, with their errors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from fisherlens import errors
from fisherlens.errors import ConvergenceWarning, InputError, NumericalWarning, user_level
from fisherlens.linalg.diagonals import DIAGONAL_METHODS, diagonal
from fisherlens.linalg.precision import own_precision
from fisherlens.linalg.probes import MIN_PROBES, Probes, split
from fisherlens.linalg.traces import TRACE_METHODS, trace
from fisherlens.results import make_dataset
from fisherlens.spectrum.intervals import check_confidence, check_count, student_interval
from fisherlens.spectrum.operators import as_symmetric

if TYPE_CHECKING:
    import xarray as xr

_PRODUCTS = "the products with the operator that may be spent"
_INDICATIVE = {
    "xtrace": "indicative: leave-one-out samples are correlated",
    "xnystrace": "indicative: leave-one-out samples are correlated, strongly where eigenvalues fall fast",
    "xdiag": "indicative: leave-one-out samples are correlated",
}


@own_precision
def estimate_trace(
    A: Any,
    *,
    method: str = "hutch++",
    num_matvecs: int = 60,
    target_sem: float | None = None,
    max_matvecs: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Estimate the trace of a symmetric operator from products with random vectors, with its standard error.

    .. math:: \operatorname{tr} A = \operatorname{tr} Q^\top A Q + \mathbb{E}\, z^\top (I - QQ^\top) A (I - QQ^\top) z,
              \qquad \mathbb{E}\, z z^\top = I

    Of a Fisher the trace is known exactly, ``F.trace()``, for less than one product. This function is for what has no other way to it: a
    Hessian of many parameters, an approximation, a plain callable.

    Parameters
    ----------
    A
        A Fisher or Hessian, an approximation, or ``fl.Operator(matvec, n)``.
    method
        ``"hutch++"`` (default): exact on the range Q of a random sketch, random signs for the rest. ``"hutchinson"``: random signs
        alone, Q empty; better where the spectrum is flat or A nearly diagonal. ``"xtrace"``: a sketch whose vectors take both roles,
        each in turn; for spectra that fall fast. ``"xnystrace"``: the same with one product per vector, for semi-definite A.
    num_matvecs
        Products. Hutch++ takes a third each for the sketch, its image and the probes, but never fewer than 3 probes. Default 60: 2 % or
        better where the k-th eigenvalue falls like 1/k (our measurement).
    target_sem
        Of Hutchinson and Hutch++: add probes after ``num_matvecs`` until the standard error is no larger, in the units of the trace.
    max_matvecs
        Where a target is set: products after which to stop with a ConvergenceWarning.
    seed
        Of an own generator; global random state is neither read nor changed.
    confidence
        Of the interval ``trace_low`` … ``trace_high``.

    Returns
    -------
    Dataset with the scalars ``trace``, ``trace_sem``, ``trace_low``, ``trace_high`` in the units of A, and the attributes ``num_matvecs``,
    ``degrees_of_freedom`` and ``interval``: ``"Student t"``, or ``"indicative: ..."`` for the X methods, whose samples are correlated.

    Raises
    ------
    InputError: unknown method, counts out of range, XNysTrace of an operator that may be indefinite. NonFiniteError: a product holds NaN.

    Warns
    -----
    NumericalWarning: fewer than 3 probes give no standard error (NaN). ConvergenceWarning: ``max_matvecs`` spent before the target.

    Notes
    -----
    Unbiased. The standard error pools what every entry of the products says of the variance, so that the t interval of Hutchinson and
    Hutch++ holds the truth in 93 to 97 % of 1,000 seeds from 4 probes on, whatever the spectrum; the usual spread of the quadratic forms
    gives 85 to 92 % with ten probes and a few dominating eigenvalues. Intervals of XTrace hold it in 81 to 95 % and those of XNysTrace in
    41 to 95 %. Figures: ``tests/benchmarks/coverage.py`` and the page "Choosing an estimator". Where the rank is at most the size of the
    sketch the answer is exact, and its error rounding. A Fisher is multiplied on its row side where that is the shorter.
    Sources: Hutchinson 1990; Meyer, Musco, Musco and Woodruff 2021; Epperly, Tropp and Webber 2024.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> d = 0.9 ** torch.arange(200, dtype=torch.float64)
    >>> A = fl.Operator(lambda v: d[:, None] * v, 200, block=True, psd=True)
    >>> found = fl.estimate_trace(A, num_matvecs=60)
    >>> bool(abs(found.trace - d.sum().item()) <= 5 * found.trace_sem), float(found.trace_sem / found.trace) < 0.05
    (True, True)
    """
    view = as_symmetric(A)
    _check(method, TRACE_METHODS, num_matvecs, seed, confidence)
    if method == "xnystrace" and not view.psd:
        raise InputError(
            "method='xnystrace' needs a positive semi-definite operator, but this one may have negative eigenvalues. Use 'hutch++' or 'xtrace'; "
            "if no eigenvalue is negative, say so: fl.Operator(..., psd=True)."
        )
    if target_sem is not None:
        if method in _INDICATIVE:
            raise InputError(
                f"target_sem= needs an honest standard error, but that of method={method!r} is indicative. Use 'hutch++' or 'hutchinson'."
            )
        if not isinstance(target_sem, int | float) or isinstance(target_sem, bool) or not target_sem > 0:
            raise InputError(f"target_sem must be a number > 0, in the units of the trace; got {target_sem!r}.")
        check_count("max_matvecs", max_matvecs, num_matvecs, "no fewer than num_matvecs")
    rows = view.rows is not None and view.row_product is not None
    n, product = (view.rows, view.row_product) if rows else (view.n, view.product)
    found = trace(product, Probes(n, view.dtype, view.device, seed), num_matvecs, method, target_sem, max_matvecs)
    value, sem = found.value.item(), found.sem.item()
    if target_sem is not None and not sem <= target_sem:
        warnings.warn(
            f"The standard error is {sem:.2e} after {found.num_matvecs} products, above the target {target_sem:.2e}. The estimate so far is returned; "
            "raise max_matvecs, or the sketch with num_matvecs.",
            ConvergenceWarning,
            stacklevel=user_level(),
        )
    _warn_few(sem, method, num_matvecs)
    low, high = student_interval(value, sem, found.dof, confidence, _rounding(view.dtype, n) * abs(value))
    units = {"units": "nat"}
    return make_dataset(
        {
            "trace": ((), value, {"long_name": "trace", **units}),
            "trace_sem": ((), sem, {"long_name": "standard error of the trace", **units}),
            "trace_low": (
                (),
                low,
                {"long_name": f"lower end of the {100 * confidence:g} % interval of the trace", **units},
            ),
            "trace_high": (
                (),
                high,
                {"long_name": f"upper end of the {100 * confidence:g} % interval of the trace", **units},
            ),
        },
        {},
        operator=A,
        method=_words(method, found.num_matvecs, num_matvecs, "the score rows" if rows else "the operator"),
        num_matvecs=found.num_matvecs,
        degrees_of_freedom=min(found.dof, 1e9),
        interval=_INDICATIVE.get(method, "Student t"),
        confidence=confidence,
        settings={"method": method, "num_matvecs": num_matvecs, "target_sem": target_sem, "seed": seed},
        **_seed(A, seed),
    )


@own_precision
def estimate_diagonal(
    A: Any, *, method: str = "hutch++", num_matvecs: int = 60, seed: int = 0, confidence: float = 0.95
) -> xr.Dataset:
    r"""Estimate the diagonal of a symmetric operator from products with random vectors, with standard errors.

    .. math:: A_{aa} \approx \frac{\sum_j z_{aj} (A z_j)_a}{\sum_j z_{aj}^2}, \qquad z \sim N(0, I)

    Of a Fisher the diagonal is known exactly, ``F.diagonal()``. This function is for a Hessian of many parameters or a plain callable.

    Parameters
    ----------
    A
        A Fisher or Hessian, an approximation, or ``fl.Operator(matvec, n)``.
    method
        ``"hutch++"`` (default): exact for what a random sketch of a third of the products catches, the formula above for the rest.
        ``"hutchinson"``: the formula alone; better for flat spectra. ``"xdiag"``: leave-one-out with random signs.
    num_matvecs
        Products, shared as in :func:`estimate_trace`.
    seed
        Of an own generator.
    confidence
        Of every single entry's interval.

    Returns
    -------
    Dataset with ``diagonal``, ``diagonal_sem``, ``diagonal_low``, ``diagonal_high`` ``(param)``, and the attributes of
    :func:`estimate_trace`.

    Raises
    ------
    InputError: unknown method or counts out of range. NonFiniteError: a product holds NaN or infinity.

    Warns
    -----
    NumericalWarning: fewer than 3 probes give no standard error (NaN).

    Notes
    -----
    Unbiased. With Gaussian probes each entry is the slope of a regression with Gaussian errors, so that Student's t with (probes - 1)
    degrees of freedom holds exactly for Hutchinson and Hutch++, for any operator and any number of probes. An interval covers one entry:
    of many entries, 5 % lie outside. Intervals of XDiag are indicative and hold 83 to 95 % (``tests/benchmarks/coverage.py``). An
    entry's relative error is √(‖A_a‖²/A_aa² - 1)/√probes, so that small entries beside large couplings need the sketch.
    Sources: Bekas, Kokiopoulou and Saad 2007; Baston and Nakatsukasa 2022 (sketch); Epperly, Tropp and Webber 2024 (XDiag).

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> d = torch.linspace(1, 2, 50, dtype=torch.float64)
    >>> A = fl.Operator(lambda v: d * v + 0.01 * v.sum(), 50)  # diagonal d + 0.01
    >>> found = fl.estimate_diagonal(A, method="hutchinson", num_matvecs=30)
    >>> bool((abs(found.diagonal.values - (d + 0.01).numpy()) < 0.1).all())
    True
    """
    view = as_symmetric(A)
    _check(method, DIAGONAL_METHODS, num_matvecs, seed, confidence)
    found = diagonal(view.product, Probes(view.n, view.dtype, view.device, seed), num_matvecs, method)
    value, sem = found.value.cpu().numpy(), found.sem.cpu().numpy()
    _warn_few(float(sem[0]), method, num_matvecs)
    slack = _rounding(view.dtype, view.n) * abs(value).max()
    low, high = student_interval(value, sem, found.dof, confidence, slack)
    words = {"diagonal": "diagonal", "diagonal_sem": "standard error of the diagonal"}
    words |= {
        f"diagonal_{end}": f"{end} end of each entry's {100 * confidence:g} % interval" for end in ("low", "high")
    }
    values = {"diagonal": value, "diagonal_sem": sem, "diagonal_low": low, "diagonal_high": high}
    return make_dataset(
        {name: ("param", values[name], {"long_name": words[name], "units": "nat"}) for name in values},
        parameter_coords(A, view.n),
        operator=A,
        method=_words(method, found.num_matvecs, num_matvecs, "the operator"),
        num_matvecs=found.num_matvecs,
        degrees_of_freedom=min(found.dof, 1e9),
        interval=_INDICATIVE.get(method, "Student t"),
        confidence=confidence,
        settings={"method": method, "num_matvecs": num_matvecs, "seed": seed},
        **_seed(A, seed),
    )


def parameter_coords(A: Any, n: int) -> dict[str, Any]:
    """Position, name and layer of every parameter, as far as the operator knows them."""
    layout = getattr(A, "layout", None)
    coords: dict[str, Any] = {"param": range(n)}
    if layout is not None:
        coords["param_name"] = ("param", layout.parameter_labels())
        coords["param_layer"] = ("param", layout.parameter_layers())
    return coords


def _check(method: Any, known: tuple[str, ...], num_matvecs: Any, seed: Any, confidence: Any) -> None:
    if method not in known:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="method", name=method, hint=errors.nearest(str(method), known))
        )
    check_count("num_matvecs", num_matvecs, 2 if method.startswith("x") else 1, _PRODUCTS)
    check_count("seed", seed, 0, "of the probes")
    check_confidence(confidence)


def _warn_few(sem: float, method: str, num_matvecs: int) -> None:
    if sem != sem:
        warnings.warn(
            f"{num_matvecs} products of method={method!r} are fewer than {MIN_PROBES} independent probes, too few for a standard error, which is NaN. "
            "Raise num_matvecs.",
            NumericalWarning,
            stacklevel=user_level(),
        )


def _words(method: str, spent: int, num_matvecs: int, side: str) -> str:
    names = {
        "hutch++": "Hutch++",
        "hutchinson": "Hutchinson",
        "xtrace": "XTrace",
        "xnystrace": "XNysTrace",
        "xdiag": "XDiag",
    }
    detail = f"{spent} products"
    if method == "hutch++":
        sketch = split(num_matvecs)[0]
        spans = 2 * sketch > spent  # the sketch was cut to the order
        detail = (
            "the sketch spans the whole space"
            if spans
            else f"a sketch of {sketch} vectors and {spent - 2 * sketch} probes"
        )
    return f"{names[method]} on {side}: {detail}"


def _rounding(dtype: torch.dtype, n: int) -> float:
    """Relative rounding error of a sum of n products (our choice: √n ε, as errors of random sign add)."""
    return n**0.5 * torch.finfo(dtype).eps


def _seed(A: Any, seed: int) -> dict[str, Any]:
    """The seed as an attribute, unless the operator's own, of its label draws, stands there."""
    return {} if getattr(A, "seed", None) is not None else {"seed": seed}
