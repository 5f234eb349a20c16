"""What an estimate of a spectrum knows: eigenvalues known exactly, and one quadrature rule per probe for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fisherlens import errors
from fisherlens.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

# A standard error of fewer probes than this says nothing (methods: section 2.3).
FEWEST_PROBES = 3


def standard_error(values: np.ndarray) -> np.ndarray:
    """Deviation of the mean over the first axis; NaN for fewer than three probes."""
    if len(values) < FEWEST_PROBES:
        return np.full(values.shape[1:], np.nan)
    return values.std(axis=0, ddof=1) / math.sqrt(len(values))


@dataclass(frozen=True)
class Quadrature:
    r"""A spectrum as known eigenvalues, certain zeros and one rule per probe, so that any function can be integrated.

    .. math:: \operatorname{tr} f(F) \approx \sum_i f(\lambda_i) + z f(0) + \frac{1}{k} \sum_{p=1}^{k} \sum_i w_{pi} f(\theta_{pi})

    Attributes
    ----------
    nodes, weights
        θ and w, ``(probes, nodes)``; unused places have node 0 and weight 0. The weights count eigenvalues: those of a probe sum to
        its squared norm, on average ``n - zeros - len(known)``.
    known
        λ, the eigenvalues known exactly (all of them if there are no probes), ``(known,)``.
    zeros
        z, eigenvalues known to be zero and not among ``known``.
    n
        Number of all eigenvalues, P.
    floor
        Eigenvalues of at most this size cannot be told from zero.
    rank_bound
        No more eigenvalues than this are non-zero.
    rounding
        Relative error that rounding may leave in a value; part of every standard error, so that it is never 0.
    psd
        Whether no eigenvalue is negative.
    lower_nodes, lower_weights
        The Gauss-Radau rule with a node at 0, ``(probes, nodes + 1)``, or None. For log(1 + x/λ) and x/(x + λ) its value is at most that of
        zᵀ f(F) z, and the value of ``nodes`` at least; the gap is the truncation error of the Lanczos run.
    """

    nodes: np.ndarray
    weights: np.ndarray
    known: np.ndarray
    zeros: int
    n: int
    floor: float
    rank_bound: int
    rounding: float
    psd: bool = True
    lower_nodes: np.ndarray | None = None
    lower_weights: np.ndarray | None = None

    @property
    def exact(self) -> bool:
        """Whether every eigenvalue is known."""
        return not len(self.nodes)

    @property
    def sampled(self) -> int:
        """Eigenvalues that the probes stand for."""
        return self.n - self.zeros - len(self.known)

    def integrate(
        self, function: Callable[[np.ndarray], np.ndarray], *, at_zero: float = 0.0, lower: bool = False
    ) -> tuple[float, float]:
        """Estimate tr f(F) for a vectorised f with f(0) = ``at_zero``, and its standard error over probes.

        Where every eigenvalue is known the error is that of rounding; with one or two probes it is NaN. ``lower`` takes the
        Gauss-Radau rule.
        """
        known = float(function(self.known).sum()) + self.zeros * at_zero
        if self.exact:
            return known, self.rounding * abs(known)
        nodes, weights = (self.lower_nodes, self.lower_weights) if lower else (self.nodes, self.weights)
        if nodes is None or weights is None:
            raise InputError(
                "This result has no Gauss-Radau rule: it belongs to method='slq' of a semi-definite operator."
            )
        values = (weights * function(nodes)).sum(1)
        value = known + float(values.mean())
        return value, float(np.hypot(standard_error(values), self.rounding * value))

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Every node's share of all eigenvalues, ``(probes, nodes)``, and the share at zero, ``(probes,)``, or ``(1,)`` without probes.

        Nodes at or below the floor count as zero. Where the rank bound makes more zeros certain than the probes saw, the missing share is
        taken from the smallest nodes, which stand for zero and small eigenvalues together.
        """
        base = (self.zeros + (~self.above(self.known)).sum()) / self.n
        if self.exact:
            return np.zeros((0, 0)), np.array([base])
        # a longer projected probe stands for more of the rest; on average they stand for all of it
        total = self.weights.sum(1).mean()
        if total == 0:  # nothing is left beside the known eigenvalues
            return np.zeros_like(self.weights), np.full(len(self.weights), base + self.sampled / self.n)
        shares = self.weights * (self.sampled / self.n / total)
        real = self.above(self.nodes)
        zero = base + (shares * ~real).sum(1)
        shares = shares * real
        missing = max(0.0, 1 - self.rank_bound / self.n - zero.mean())
        if missing > 0:
            order = np.argsort(np.abs(self.nodes), axis=1)
            sums = np.clip(np.cumsum(np.take_along_axis(shares, order, axis=1), axis=1) - missing, 0, None)
            left = np.diff(sums, axis=1, prepend=0)
            zero = zero + shares.sum(1) - left.sum(1)
            shares = np.empty_like(shares)
            np.put_along_axis(shares, order, left, axis=1)
        return shares, zero

    def above(self, values: np.ndarray) -> np.ndarray:
        """Which values can be told from zero."""
        return (values if self.psd else np.abs(values)) > self.floor


def quadrature_of(result: xr.Dataset) -> Quadrature:
    """Read the rules off a result of :func:`spectral_density`, to integrate further functions with their standard errors.

    Parameters
    ----------
    result
        The Dataset; of one with a dim ``layer`` or ``block``, one entry: ``result.sel(layer="all")``.

    Raises
    ------
    TypeError: not a Dataset. InputError: of another analysis, or several densities.

    Examples
    --------
    >>> import numpy as np, torch, fisherlens as fl
    >>> d = torch.linspace(0, 1, 50, dtype=torch.float64)
    >>> A = fl.Operator(lambda v: d * v, 50, torch.float64, psd=True)
    >>> value, sem = quadrature_of(fl.spectral_density(A, num_matvecs=20)).integrate(np.log1p)
    >>> bool(abs(value - np.log1p(d.numpy()).sum()) <= 5 * sem + 1e-12)
    True
    """
    if not hasattr(result, "data_vars"):
        raise TypeError(f"Expected the Dataset of fl.spectral_density; got {type(result).__name__}.")
    if "deflated_eigenvalue" not in result:
        hint = errors.nearest("deflated_eigenvalue", [str(name) for name in result.data_vars])
        raise InputError(
            f"Expected a result of fl.spectral_density, which keeps its quadrature rules; this Dataset has no 'deflated_eigenvalue'. {hint}"
        )
    several = [dim for dim in ("layer", "block") if dim in result["deflated_eigenvalue"].dims]
    if several:
        first = result[several[0]].values[-1].item()
        raise InputError(
            f"The result holds one density per {several[0]}; choose one, such as result.sel({several[0]}={first!r})."
        )

    def array(name: str) -> np.ndarray:
        return result[name].values.astype(float)

    def rule(nodes: str, weights: str) -> tuple[np.ndarray, np.ndarray]:
        rows = np.isfinite(array("probe_norm"))
        norms = array("probe_norm")[rows, None] ** 2
        return np.nan_to_num(array(nodes)[rows]), np.nan_to_num(array(weights)[rows]) * norms

    known = array("deflated_eigenvalue")
    known = known[np.isfinite(known)]
    n, sampled = int(result["size"]), int(result["num_sampled"])
    facts: dict[str, Any] = {
        "known": known,
        "zeros": n - sampled - len(known),
        "n": n,
        "floor": float(result["noise_floor"]),
        "rank_bound": int(result["rank_bound"]),
        "rounding": float(result["rounding"]),
        "psd": bool(result["psd"]),
    }
    if not sampled or "node" not in result.dims:
        return Quadrature(np.zeros((0, 0)), np.zeros((0, 0)), **facts)
    nodes, weights = rule("nodes", "weights")
    if "radau_nodes" in result:
        facts["lower_nodes"], facts["lower_weights"] = rule("radau_nodes", "radau_weights")
    return Quadrature(nodes, weights, **facts)
