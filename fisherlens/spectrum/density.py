"""The density of the eigenvalues, estimated from random probes, with its standard error."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens import errors
from fisherlens._progress import progress as progress_bar
from fisherlens.errors import ConvergenceWarning, InputError, NumericalWarning, user_level
from fisherlens.fisher import Fisher
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import partition
from fisherlens.results import make_dataset
from fisherlens.spectrum.complete import WHOLE
from fisherlens.spectrum.curves import Curves, curves_on, grid_for
from fisherlens.spectrum.estimate import EXACT_ORDER, Estimate, Request, estimate
from fisherlens.spectrum.grids import check_grid
from fisherlens.spectrum.operators import as_symmetric
from fisherlens.spectrum.rules import FEWEST_PROBES
from fisherlens.spectrum.side import Side, masked_side, side_for, side_of_block

if TYPE_CHECKING:
    import xarray as xr

    from fisherlens.spectrum.grids import Grid

METHODS = ("slq", "kpm")
# A result with more blocks than this is a table nobody reads; one density is some hundred numbers (our choice).
_MOST_BLOCKS = 2048


@own_precision
def spectral_density(
    F: Any,
    *,
    num_probes: int = 10,
    num_matvecs: int = 80,
    grid: str | np.ndarray = "log",
    method: str = "slq",
    by: Any = None,
    seed: int = 0,
    deflate: Any = "auto",
    width: float | None = None,
    num_points: int = 400,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Estimate the density of the eigenvalues of F by Lanczos quadrature, or from Chebyshev moments.

    .. math:: \rho(\lambda) = \frac{1}{P} \sum_{i=1}^{P} \delta(\lambda - \lambda_i), \qquad z_0 + \int \rho(\lambda)\, d\lambda = 1

    with the share z₀ of zero eigenvalues kept apart (``zero_fraction``) and the rest smoothed by a Gaussian kernel. Where the Gram matrix or
    F itself is small, all eigenvalues are computed instead, and nothing is estimated: see ``deflate``.

    Parameters
    ----------
    F
        A Fisher of any kind, a Hessian, an approximation, or an :class:`Operator`.
    num_probes
        Random sign vectors. Fewer than 3 give no standard error: NaN, with a warning. Default 10, see ``num_matvecs``.
    num_matvecs
        Lanczos steps per probe, at most the order of the matrix; products per probe of the Chebyshev method. Defaults 10 and 80 are
        those of hessian-eigenthings, ``spectral_density.py``.
    grid
        ``"log"``, ``"linear"``, or an increasing array of eigenvalues. A Hessian, which has negative eigenvalues, needs a linear one.
    method
        ``"slq"``, stochastic Lanczos quadrature, whose resolution follows the eigenvalues; or ``"kpm"``, Chebyshev moments with Jackson
        damping, an independent check on a linear scale. It resolves (π/L)(b - a)/2 at best, L = 2 ``num_matvecs`` moments on [a, b];
        on a logarithmic grid it warns.
    by
        None for the whole; ``"layer"`` for every layer's diagonal block and the whole as ``"all"``; or a scheme, :class:`Partition` or dict
        label → indices, for every diagonal block.
    seed
        Seeds generators of its own for the probes; global random state is neither read nor changed.
    deflate
        What is known exactly, so that the probes estimate only the rest. ``"auto"``: where the smaller of F and Gram matrix fits and has
        an order up to 2,500, all its eigenvalues (``method="slq"`` with at least 3 probes; kpm deflates nothing, as the independent check).
        An integer k: the k leading eigenpairs. A Dataset of :func:`spectrum` or ``top_eigenvalues`` with eigenvectors, or complete.
        None: nothing.
    width
        Standard deviation of the kernel, in λ on a linear grid and in decades on a logarithmic one. Default: 1/150 of a linear range,
        1/60 of the decades (our choice). Recorded in the result. The kernel of a node that has not converged to one eigenvalue is widened
        to half the distance of its neighbours, or its residual norm if that is less. kpm has a width of its own.
    num_points
        Points of a grid given by name.
    progress
        Show a bar; None for "if standard error is a terminal".

    Returns
    -------
    Dataset with dim ``grid`` (and ``layer`` or ``block`` in front): ``density``, ``density_sem`` per unit λ; ``cumulative``, the share of
    eigenvalues at or below a point, and ``cumulative_sem``. Without the dim: ``zero_fraction``, ``trace``, ``squared_norm`` (‖F‖²), each with
    its ``_sem``; ``width``, ``noise_floor``, ``exact``. The trapezoidal rule on ``grid`` gives ``1 - zero_fraction - outside_fraction`` to
    rounding; eigenvalues lie outside only of a grid of your own. ``nodes``, ``weights`` (probe, node) are every probe's rule, from which
    :func:`effective_dimension` and :func:`log_determinant` integrate; ``deflated_eigenvalue`` what is known exactly. ``zero_fraction``
    counts eigenvalues at or below ``noise_floor``, and at least those that the rank bound makes zero; ``unresolved_fraction`` is the
    share at nodes whose own error reaches down to zero: more steps, or deflation, would tell them apart.

    Raises
    ------
    InputError: options out of range; a logarithmic grid for negative eigenvalues; ``deflate`` of another operator. NonFiniteError: a
    product holds NaN or infinity. MemoryBudgetError: one probe's Lanczos vectors do not fit.

    Warns
    -----
    NumericalWarning: fewer than 3 probes, or kpm on a logarithmic grid. ConvergenceWarning: Ctrl-C, the result is of the finished steps.

    Notes
    -----
    Cost: ``num_probes * num_matvecs`` products in blocks of ``num_probes``, on the side and in the form where they are cheapest (recorded in
    ``method``): with F, its score rows, or the Gram matrix formed once. On the row side zero eigenvalues beyond the rank are known, and
    functions with f(0) = 0 have the same trace. Moments up to degree 2 ``num_matvecs`` - 1 of each probe are exact; smoothing merges
    close peaks, and small eigenvalues far below λ_max share few nodes: take ``top_eigenvalues`` for the edge and :func:`spectrum`, exact,
    where the Gram matrix fits. Standard errors are over probes and say nothing of the data's sampling. They include
    bounds of rounding, n ε times the value. Source: Ubaru, Chen and Saad (2017); for kpm Weiße et al. (2006).

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> model = torch.nn.Linear(3, 2)
    >>> F = fl.Fisher(model, (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> result = fl.spectral_density(F)
    >>> bool(abs(result["trace"] - F.trace()) <= 5 * result["trace_sem"])
    True
    >>> float(result["density"].integrate("grid") + result["zero_fraction"]) > 0.999
    True
    """
    points = check_grid(grid, width, num_points)
    _check(F, num_probes, num_matvecs, method, seed, deflate)
    num_probes, num_matvecs, seed = int(num_probes), int(num_matvecs), int(seed)
    if points is None and grid == "log" and getattr(F, "kind", None) == "hessian":
        raise InputError(_NEGATIVE.format(found="This is a Hessian, whose eigenvalues may be negative"))
    parts = list(_parts(F, by))
    if num_probes < FEWEST_PROBES:
        warnings.warn(_FEW.format(count=num_probes), NumericalWarning, stacklevel=user_level())
    total = len(parts) * num_probes * num_matvecs
    found: list[Estimate | None] = []
    interrupted = False
    with progress_bar(total, desc="spectral density", enabled=progress) as bar:
        for part in parts:
            request = Request(num_probes, num_matvecs, method, deflate, seed + 7919 * part.number, bar.update)
            try:
                known, pairs = _known(F, part, deflate)
                found.append(estimate(part.side(request), request, known, pairs))
            except KeyboardInterrupt:
                if not found:
                    raise
                interrupted = True
            if interrupted or found[-1].interrupted:
                interrupted = True
                break
    _require_size(found)
    products = sum(one.products for one in found)
    if interrupted:
        warnings.warn(
            f"Interrupted after {products} of up to {total} products; the result is of the finished Lanczos or Chebyshev steps"
            + ("." if len(found) == len(parts) else f" of {len(found)} of {len(parts)} blocks, the others are NaN."),
            ConvergenceWarning,
            stacklevel=user_level(),
        )
    shape = grid_for(found, points, str(grid), width, num_points, _NEGATIVE)
    if shape.scale == "log" and any(one.moments is not None for one in found):
        resolution = max(one.moments.resolution for one in found)
        warnings.warn(_COARSE.format(resolution=resolution), NumericalWarning, stacklevel=user_level())
    curves = [curves_on(one, shape, own=points is not None) for one in found]
    found += [None] * (len(parts) - len(found))
    settings = {
        "num_probes": num_probes,
        "num_matvecs": num_matvecs,
        "method": method,
        "by": by if isinstance(by, str) or by is None else "own",
        "deflate": deflate if isinstance(deflate, str | int) or deflate is None else "Dataset",
        "num_points": num_points,
        "seed": seed,
    }
    return _dataset(F, parts, found, curves, shape, interrupted, products, settings)


_FEW = (
    "A standard error needs at least 3 probes; with num_probes={count} every _sem is NaN. Raise num_probes: their products run as one block, "
    "so further probes are cheap."
)
_NEGATIVE = (
    "A logarithmic grid has no place for negative eigenvalues. {found}. Use grid='linear', which covers both sides of zero, or an array of "
    "your own."
)
_SIZE = (
    "The eigenvalues are of the order {top:.1e}; their squares, and with them norms, densities and standard errors, leave the range of float64. "
    "Scale the operator, fl.Operator(lambda v: (A @ v) * 1e{factor}, ...), and the answer back."
)
_COARSE = (
    "Chebyshev moments resolve {resolution:.3g} (nat) at best, everywhere alike: on a logarithmic grid, nothing below that has a meaning. Use "
    "grid='linear', more num_matvecs, or method='slq', whose resolution follows the eigenvalues."
)


def _require_size(found: Sequence[Estimate]) -> None:
    """Refuse eigenvalues whose squares are no numbers any more: norms, densities and errors would come out as 0 or infinity."""
    top = max(np.abs(part).max(initial=0.0) for one in found for part in (one.quadrature.nodes, one.quadrature.known))
    if top and not 1e-140 < top < 1e140:
        raise InputError(_SIZE.format(top=top, factor=-round(np.log10(top))))


def _check(F: Any, num_probes: Any, num_matvecs: Any, method: Any, seed: Any, deflate: Any) -> None:
    as_symmetric(F)
    for name, value, least in (("num_probes", num_probes, 1), ("num_matvecs", num_matvecs, 1), ("seed", seed, 0)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be an integer >= {least}; got {value!r}.")
    if method not in METHODS:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="method", name=method, hint=errors.nearest(str(method), METHODS))
        )
    count = isinstance(deflate, int) and not isinstance(deflate, bool) and deflate >= 0
    if not (
        deflate is None or count or (isinstance(deflate, str) and deflate == "auto") or hasattr(deflate, "data_vars")
    ):
        raise InputError(
            f"deflate must be 'auto', None, a number >= 0 of leading eigenpairs, or the Dataset of fl.spectrum or fl.top_eigenvalues; got {deflate!r}."
        )


@dataclass(frozen=True)
class _Part:
    """One diagonal block: its label, the flat indices it holds (None for all), and its layer where it is one."""

    number: int
    label: str
    operator: Any
    index: torch.Tensor | None = None
    layer: str | None = None

    @property
    def size(self) -> int:
        return self.operator.shape[0] if self.index is None else len(self.index)

    def side(self, request: Request) -> Side:
        """The form in which the products of a request are cheapest."""
        count, F = request.num_probes * request.num_matvecs, self.operator
        options: dict[str, Any] = {"width": request.num_probes}
        if isinstance(F, Fisher) and F.kind != "hessian":
            rows = F.n_rows
            options["prefer_matrix"] = request.prefers_exact and min(self.size, rows) <= EXACT_ORDER
        if self.layer is not None or self.index is None:
            return side_for(F.restrict(self.layer) if self.layer else F, count, **options)
        if isinstance(F, Fisher):
            return side_of_block(F, self.index.to(F.device), count, **options)
        return masked_side(F, self.index)


def _parts(F: Any, by: Any) -> Iterator[_Part]:
    if by is None:
        yield _Part(0, WHOLE, F)
        return
    if not hasattr(F, "layout"):
        raise InputError(
            f"by={by!r} needs an operator that knows its parameters, a Fisher or an approximation; got {type(F).__name__}. Use by=None."
        )
    blocks = partition(F, by)
    if blocks.num_blocks > _MOST_BLOCKS:
        raise InputError(
            f"Partition {blocks.scheme!r} has {blocks.num_blocks} blocks; the limit is {_MOST_BLOCKS} densities. Look at one layer with F.restrict(name), or "
            "choose a coarser partition."
        )
    layers = isinstance(by, str) and by == "layer"
    for number, (label, index, layer) in enumerate(zip(blocks.labels, blocks.blocks, blocks.layers, strict=True)):
        whole_layer = layer if layers and isinstance(F, Fisher) else None
        yield _Part(number + 1, layer if layers else label, F, index, whole_layer)
    if layers:
        yield _Part(0, WHOLE, F)


def _known(F: Any, part: _Part, deflate: Any) -> tuple[np.ndarray | None, Any]:
    """From a Dataset: all non-zero eigenvalues of a block, or some of them with their eigenvectors ``(n, d)``."""
    if not hasattr(deflate, "data_vars"):
        return None, None
    if "eigenvalue" not in deflate:
        raise InputError(
            "deflate= takes a result of fl.spectrum or fl.top_eigenvalues, with the variable 'eigenvalue'; this Dataset has "
            f"{', '.join(map(str, deflate.data_vars)) or 'none'}."
        )
    if deflate.attrs.get("n_params", F.shape[0]) != F.shape[0]:
        raise InputError(
            f"deflate= is of an operator of {deflate.attrs['n_params']} parameters; this one has {F.shape[0]}. Compute it from this operator."
        )
    chosen = deflate
    if "layer" in deflate["eigenvalue"].dims:
        if part.label not in deflate["layer"].values:
            raise InputError(f"deflate= has no layer {part.label!r}. Compute it with the same by= as here.")
        chosen = deflate.sel(layer=part.label)
    elif part.index is not None:
        raise InputError("deflate= is of the whole, but by= asks for blocks. Use deflate='auto', a number, or None.")
    values = chosen["eigenvalue"].values.astype(float)
    kept = np.isfinite(values)
    bound = min(part.size, _rank_bound(F, part))
    if kept.sum() >= bound:
        _require_same_trace(F, part, values[kept])
        return values[kept], None
    if "eigenvector" not in chosen:
        raise InputError(
            f"deflate= holds {kept.sum()} of up to {bound} eigenvalues and no eigenvectors, so they cannot be split off. Compute it with vectors=True."
        )
    vectors = chosen["eigenvector"].transpose("rank", "param").values
    if part.index is not None and vectors.shape[1] != part.size:
        vectors = vectors[:, part.index.numpy()]
    if vectors.shape[1] != part.size:
        raise InputError(f"deflate= has eigenvectors of length {vectors.shape[1]}; expected {part.size}.")
    kept &= np.isfinite(vectors).all(1)
    if "above_noise" in chosen:
        kept &= chosen["above_noise"].values.astype(bool)
    if "converged" in chosen:
        kept &= chosen["converged"].values.astype(bool)
    return None, (values[kept], torch.from_numpy(np.ascontiguousarray(vectors[kept].T)))


def _rank_bound(F: Any, part: _Part) -> int:
    return as_symmetric(F.restrict(part.layer) if part.layer else F).rank_bound


def _require_same_trace(F: Any, part: _Part, values: np.ndarray) -> None:
    if not isinstance(F, Fisher) or F.kind == "hessian":
        return
    trace = (F.restrict(part.layer) if part.layer else F).trace()
    if abs(values.sum() - trace) > 1e-3 * abs(trace):
        raise InputError(
            f"deflate= is a complete spectrum with the sum {values.sum():.6g}, but the trace of this operator is {trace:.6g}. It is of another operator: "
            "compute it from this one."
        )


def _dataset(
    F: Any,
    parts: list[_Part],
    found: list[Estimate | None],
    curves: list[Curves],
    grid: Grid,
    interrupted: bool,
    products: int,
    settings: dict[str, Any],
) -> xr.Dataset:
    several = len(parts) > 1 or parts[0].index is not None
    dim = "layer" if settings["by"] == "layer" else "block"
    lead = (dim,) if several else ()

    def stacked(values: list[Any]) -> np.ndarray:
        """One entry per part, padded with NaN at the ends; parts that were not reached are NaN altogether."""
        arrays = [np.asarray(value, dtype=float) for value in values]
        shape = tuple(np.max([a.shape for a in arrays], axis=0)) if arrays[0].ndim else ()
        out = np.full((len(parts), *shape), np.nan)
        for row, a in enumerate(arrays):
            out[(row, *(slice(0, size) for size in a.shape))] = a
        return out if several else out[0]

    variables: dict[str, Any] = {}

    def put(name: str, dims: tuple[str, ...], values: list[Any], long_name: str, units: str = "1") -> None:
        variables[name] = ((*lead, *dims), stacked(values), {"long_name": long_name, "units": units})

    names = {
        "density": (("grid",), "density of eigenvalues", "1/nat"),
        "cumulative": (("grid",), "share of eigenvalues up to here", "1"),
        "zero_fraction": ((), "share of eigenvalues that are zero", "1"),
        "trace": ((), "trace", "nat"),
        "squared_norm": ((), "squared Frobenius norm", "nat²"),
    }
    for name, (dims, words, units) in names.items():
        put(name, dims, [getattr(one, name)[0] for one in curves], words, units)
        put(f"{name}_sem", dims, [getattr(one, name)[1] for one in curves], f"standard error of the {words}", units)
    done = [one for one in found if one is not None]
    put("outside_fraction", (), [one.outside for one in curves], "share of eigenvalues off the grid")
    unresolved = "share of eigenvalues that these probes cannot tell from zero, though they are not counted there"
    put("unresolved_fraction", (), [one.unresolved for one in curves], unresolved)
    put(
        "noise_floor",
        (),
        [one.quadrature.floor for one in done],
        "size below which an eigenvalue counts as zero",
        "nat",
    )
    put("rounding", (), [one.quadrature.rounding for one in done], "relative rounding error of exact values")
    put("deflated_eigenvalue", ("deflated",), [one.quadrature.known for one in done], "eigenvalue known exactly", "nat")
    width = [one.width for one in curves]
    put("width", (), width, "standard deviation of the kernel", "decades" if grid.scale == "log" else "nat")
    for name, counts in {
        "size": [part.size for part in parts],
        "num_sampled": [0 if one is None else one.quadrature.sampled for one in found],
        "rank_bound": [0 if one is None else one.quadrature.rank_bound for one in found],
    }.items():
        words = {"size": "number of eigenvalues", "num_sampled": "eigenvalues that the probes stand for"}
        values = np.array(counts) if several else counts[0]
        variables[name] = (lead, values, {"long_name": words.get(name, "upper bound of the rank"), "units": "1"})
    for name, flags, words in (
        (
            "exact",
            [one is not None and one.quadrature.exact for one in found],
            "every eigenvalue is known, nothing estimated",
        ),
        ("psd", [one is None or one.quadrature.psd for one in found], "no eigenvalue is negative"),
    ):
        variables[name] = (lead, np.array(flags) if several else flags[0], {"long_name": words, "units": "1"})
    variables["interrupted"] = ((), interrupted, {"long_name": "ended early by Ctrl-C", "units": "1"})
    _put_rules(put, done)
    coords: dict[str, Any] = {"grid": ("grid", grid.points, {"long_name": "eigenvalue", "units": "nat"})}
    if several:
        coords[dim] = [part.label for part in parts]
    words = list(dict.fromkeys(one.words for one in done))
    return make_dataset(
        variables,
        coords,
        operator=F,
        method="; ".join(words[:4]) + ("; …" if len(words) > 4 else ""),
        num_matvecs=products,
        settings=settings,
        grid_scale=grid.scale,
        probe_seed=settings["seed"],
    )


def _put_rules(put: Any, done: list[Estimate]) -> None:
    """Nodes and weights of the probes, empty rules for blocks that are known exactly."""
    if all(one.quadrature.exact for one in done):
        return
    nodes, weights, norms, steps = [], [], [], []
    for one in done:
        rule = one.quadrature
        root = np.sqrt(np.maximum(rule.weights.sum(1), 0))
        scale = np.where(root > 0, root, 1)[:, None] ** 2
        used = np.ones(rule.nodes.shape, bool) if one.rules is None else np.isfinite(one.rules.nodes)
        nodes.append(np.where(used, rule.nodes, np.nan))
        weights.append(np.where(used, rule.weights / scale, np.nan))
        norms.append(root)
        steps.append(used.sum(1))
    put("nodes", ("probe", "node"), nodes, "node of a probe's quadrature rule", "nat")
    put("weights", ("probe", "node"), weights, "weight of the node, of a probe of unit length")
    put("probe_norm", ("probe",), norms, "length of the probe")
    put("steps", ("probe",), steps, "nodes of the probe")
    if all(one.rules is not None and one.quadrature.psd for one in done if not one.quadrature.exact):
        empty = np.zeros((0, 0))
        rules = [one.rules for one in done]
        put(
            "radau_nodes",
            ("probe", "radau"),
            [empty if r is None else r.radau_nodes for r in rules],
            "Radau node",
            "nat",
        )
        put(
            "radau_weights",
            ("probe", "radau"),
            [empty if r is None else r.radau_weights for r in rules],
            "Radau weight",
        )
