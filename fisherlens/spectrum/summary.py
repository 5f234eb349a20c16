"""One look at a spectrum: trace, norm, participation ratio, stable rank, log-determinant, effective dimension, each with its error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import partition as make_partition
from fisherlens.results import make_dataset
from fisherlens.spectrum.bootstrap import bootstrap_functions, check_replicates
from fisherlens.spectrum.complete import WHOLE, spectrum
from fisherlens.spectrum.intervals import check_confidence, check_probing
from fisherlens.spectrum.moments import Sampled, sample
from fisherlens.spectrum.operators import as_symmetric
from fisherlens.spectrum.quantities import COLUMN_WORDS, COLUMNS, DAMPED, WORDS, Table, functionals
from fisherlens.spectrum.side import masked_side, side_of_block
from fisherlens.spectrum.sources import known_blocks, of_operator, require_semidefinite

if TYPE_CHECKING:
    import xarray as xr

METHODS = ("auto", "exact", "quadrature")


@own_precision
def spectral_summary(
    F: Any,
    *,
    damping: float | Sequence[float] | None = 1e-3,
    by: Any = None,
    method: str = "auto",
    num_probes: int = 10,
    num_matvecs: int = 80,
    deflate: int = 10,
    bootstrap: int = 0,
    seed: int = 0,
    confidence: float = 0.95,
) -> xr.Dataset:
    r"""Compute what one asks of a spectrum first, exactly where it can be had, else from one set of products with an error for each.

    .. math:: \operatorname{tr} F, \quad \|F\|^2 = \sum_i \lambda_i^2, \quad \frac{(\operatorname{tr} F)^2}{\operatorname{tr} F^2}, \quad
              \frac{\|F\|^2}{\lambda_{\max}^2}, \quad \operatorname{tr} F (F + \lambda I)^{-1}, \quad \log\det(I + F/\lambda)

    Parameters
    ----------
    F
        A Fisher of any kind, a Hessian, an approximation, or an :class:`Operator`.
    damping
        One λ > 0 or several, in nat, for effective dimension and log-determinant; None leaves them out, as must be for a Hessian.
    by
        None for the whole; ``"layer"`` for each layer's diagonal block, with the whole as ``"all"``; or a scheme, :class:`Partition` or dict
        label → indices, for the diagonal block of each of its blocks.
    method
        ``"auto"``: all eigenvalues where the Gram matrix or F fits the memory budget of a Fisher, or where another operator has no more
        than ``num_probes * num_matvecs`` parameters; else probes. ``"exact"`` or ``"quadrature"``: always the one or the other.
    num_probes, num_matvecs
        Of an estimate: random vectors, which share block products, and Lanczos steps of each.
    deflate
        Of an estimate: leading eigenpairs that are found first and then exact; the probes see only the rest.
    bootstrap
        Replicates of a bootstrap over the examples: what another data set of this size might have given. 0 for none.
    seed
        Of probes and bootstrap; global random state is neither read nor changed.
    confidence
        Of all intervals.

    Returns
    -------
    Dataset with ``trace``, ``squared_norm``, ``largest_eigenvalue``, ``participation_ratio``, ``stable_rank`` and, with a damping,
    ``effective_dimension`` and ``log_determinant`` (with a dim ``damping`` if several were asked for, and ``layer`` or ``block`` in front with
    ``by=``). Each has ``_sem``, its error over probes (0 where it is exact), ``_truncation``, what finite rules may be off by, and
    ``_low`` … ``_high``, the t interval with the truncation. ``how (quantity)`` says of each whether it is exact and by what. With ``bootstrap`` each also has ``_data_low`` … ``_data_high`` and ``_variance (source)``, the
    parts of its variance that come from ``probes``, from ``data`` and from ``labels`` drawn for kind mc.

    Raises
    ------
    InputError: options out of range, a damping for an operator that may be indefinite, a bootstrap of what has no examples.
    MemoryBudgetError: ``method="exact"`` or a bootstrap where the matrix does not fit.

    Warns
    -----
    NumericalWarning: fewer than 3 probes, whose errors are NaN.

    Notes
    -----
    Cost: nothing but the spectrum where it is exact; else ``num_probes * num_matvecs`` products and at most half as many for the deflation.
    All quantities come from the same nodes and weights, with one covariance, see ``moments.py``; the ratios take theirs by the delta
    method on a logarithmic scale. The trace of a Fisher is exact always, as a sum over captured scores. ``largest_eigenvalue`` of an
    estimate is a Ritz value, a lower bound, and its ``_high`` lies higher by the residual (NaN with ``deflate=0``). Intervals of trace, norm, effective dimension
    and log-determinant hold the truth for 93 to 97 % of 1,000 seeds; bootstrap intervals are indicative, see :func:`spectrum`.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> found = fl.spectral_summary(F, damping=[1e-3, 1e-1])
    >>> bool(1 <= found["participation_ratio"] <= 3), str(found["how"].sel(quantity="trace").item())
    (True, 'exact: sum over the captured scores')
    """
    request = _Request(method, num_probes, num_matvecs, deflate, seed)
    grid = _check(F, damping, request, bootstrap, confidence)
    parts = list(_parts(F, by, request))
    lead = () if by is None else ("layer" if isinstance(by, str) and by == "layer" else "block",)
    damped = ("damping",) if np.ndim(damping) else ()
    names = [name for name in WORDS if grid or name not in DAMPED]
    tables = [Table(part.found, part.trace, grid, confidence) for part in parts]
    columns: dict[str, tuple[tuple[str, ...], list[Any], dict[str, str]]] = {}

    def put(name: str, dims: tuple[str, ...], value: Any, long_name: str, units: str) -> None:
        columns.setdefault(name, (dims, [], {"long_name": long_name, "units": units}))[1].append(value)

    for part, table in zip(parts, tables, strict=True):
        index = part.index
        told = bootstrap_functions(F, functionals(grid), bootstrap, seed, confidence, index) if bootstrap else {}
        for name in names:
            long_name, units = WORDS[name]
            dims = damped if name in DAMPED else ()
            row = [values if dims else values[0] for values in table.row(name)]
            for suffix, words, value in zip(COLUMNS, COLUMN_WORDS, row, strict=True):
                put(name + suffix, dims, value, words.format(long_name), units)
            if told:
                from_data = {
                    key: values if dims or name not in DAMPED else values[0] for key, values in told[name].items()
                }
                for end, which in (("low", "lower"), ("high", "upper")):
                    words = f"{which} end of the bootstrap interval over examples, indicative: {long_name}"
                    put(f"{name}_data_{end}", dims, from_data[end], words, units)
                variances = np.stack([np.asarray(row[1], dtype=float) ** 2, from_data["data"], from_data["labels"]])
                words = f"variance by where it comes from: {long_name}"
                put(f"{name}_variance", ("source", *dims), variances, words, _SQUARED[units])
        put("how", ("quantity",), [table.how(name) for name in names], "exact or estimated, and by what", "1")
    variables = {
        name: ((*lead, *dims), np.array(values if lead else values[0]), attrs)
        for name, (dims, values, attrs) in columns.items()
    }
    coords: dict[str, Any] = {"quantity": names}
    if lead:
        coords[lead[0]] = [part.label for part in parts]
    if damped:
        coords["damping"] = grid
    if bootstrap:
        coords["source"] = ["probes", "data", "labels"]
    words = list(dict.fromkeys(part.found.words for part in parts))
    return make_dataset(
        variables,
        coords,
        operator=F,
        method="; ".join(words[:3]) + ("; …" if len(words) > 3 else ""),
        num_matvecs=sum(part.found.products for part in parts),
        confidence=confidence,
        probe_seed=seed,
        damping=None if damped or not grid else grid[0],
        settings={**vars(request), "by": by if by is None or isinstance(by, str) else "own", "bootstrap": bootstrap},
    )


_SQUARED = {"1": "1", "nat": "nat²", "nat²": "nat⁴"}


@dataclass(frozen=True)
class _Request:
    method: str
    num_probes: int
    num_matvecs: int
    deflate: int
    seed: int


@dataclass(frozen=True)
class _Part:
    """The whole or a diagonal block: its label, flat indices (None for all), spectrum, and trace where it is known without."""

    label: str
    index: Tensor | None
    found: Sampled
    trace: float | None


def _check(F: Any, damping: Any, request: _Request, bootstrap: Any, confidence: Any) -> list[float]:
    as_symmetric(F)
    if request.method not in METHODS:
        hint = errors.nearest(str(request.method), METHODS)
        raise InputError(errors.UNKNOWN_NAME.format(what="method", name=request.method, hint=hint))
    check_probing(request.num_probes, request.num_matvecs, request.deflate, request.seed)
    check_replicates(bootstrap)
    check_confidence(confidence)
    if damping is None:
        return []
    require_semidefinite(F)
    return [check_damping(lam) for lam in ([damping] if np.ndim(damping) == 0 else damping)]


def _parts(F: Any, by: Any, request: _Request) -> Iterator[_Part]:
    options = vars(request)
    fisher = isinstance(F, Fisher) and F.kind != "hessian"
    if by is None:
        yield _Part(WHOLE, None, of_operator(F, **options), F.trace() if fisher else None)
        return
    if getattr(F, "layout", None) is None:
        raise InputError(
            f"by= cuts named parameters into blocks, but {type(F).__name__} has no layout. Leave by= out, or make one operator per block."
        )
    cut = make_partition(F, by)
    layers = isinstance(by, str) and by == "layer"
    labels = [str(layer) for layer in cut.layers] if layers else list(cut.labels)
    diagonal = F.diagonal().double() if fisher else None
    exact = None
    if request.method != "quadrature":
        try:
            exact = known_blocks(spectrum(F, by=by), as_symmetric(F))
        except MemoryBudgetError:
            if request.method == "exact":
                raise
    seeded = enumerate(zip(labels, cut.blocks, strict=True))
    for number, (label, index) in seeded:
        trace = None if diagonal is None else diagonal[index.to(diagonal.device)].sum().item()
        yield _Part(label, index, exact[number] if exact else _sampled(F, index, request, number + 1), trace)
    if layers:
        whole = exact[-1] if exact else of_operator(F, **options)
        yield _Part(WHOLE, None, whole, F.trace() if fisher else None)


def _sampled(F: Any, index: Tensor, request: _Request, number: int) -> Sampled:
    """A block from probes of its own."""
    products = request.num_probes * request.num_matvecs
    side = (
        side_of_block(F, index, products, width=request.num_probes) if isinstance(F, Fisher) else masked_side(F, index)
    )
    return sample(side, request.num_probes, request.num_matvecs, request.deflate, request.seed + 7919 * number)
