"""One spectrum from random probes: what is known exactly is deflated, and the probes estimate the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.linalg.chebyshev import Moments, chebyshev_moments, rule_of
from fisherlens.linalg.dense import eigenvalues, noise_floor
from fisherlens.linalg.quadrature import BREAKDOWN, Rules, gauss_rules
from fisherlens.spectrum.operators import Operator
from fisherlens.spectrum.rules import FEWEST_PROBES, Quadrature
from fisherlens.spectrum.side import Side

# Matrices up to this order are decomposed completely: about a second on two cores, and exact.
EXACT_ORDER = 2500
# Lanczos steps that find the interval of the Chebyshev polynomials (our choice).
_BOUND_STEPS = 20
# An eigenpair of another operator has a residual of the order of its eigenvalue.
_FOREIGN = 1e-2


@dataclass(frozen=True)
class Request:
    """The options of one estimate."""

    num_probes: int
    num_matvecs: int
    method: str
    deflate: Any
    seed: int
    tick: Callable[[int], object]

    @property
    def prefers_exact(self) -> bool:
        """Whether all eigenvalues of a small matrix may take the place of probes."""
        return isinstance(self.deflate, str) and self.method == "slq" and self.num_probes >= FEWEST_PROBES


@dataclass(frozen=True)
class Estimate:
    """A quadrature with what it came from: ``rules`` of Lanczos runs, or Chebyshev ``moments``, or neither where all is known."""

    quadrature: Quadrature
    words: str
    products: int
    interrupted: bool = False
    rules: Rules | None = None
    moments: Moments | None = None


def estimate(
    side: Side, request: Request, known: np.ndarray | None, pairs: tuple[np.ndarray, Tensor] | None
) -> Estimate:
    """Estimate the spectrum of one side.

    ``known`` are all non-zero eigenvalues where somebody knows them; ``pairs`` are eigenvalues and orthonormal eigenvectors ``(order, d)``
    to deflate.
    """
    if known is not None:
        known = np.sort(known)[::-1][: side.order]
        floor = noise_floor(torch.from_numpy(known.copy()), side.order, side.dtype)
        words = "exact: the eigenvalues of the spectrum that was passed"
        return Estimate(_quadrature(side, known, side.n - len(known), floor), words, 0)
    if request.prefers_exact and side.matrix is not None and side.order <= EXACT_ORDER:
        values = eigenvalues(side.matrix, "The matrix of the operator")
        floor = noise_floor(values, side.order, side.dtype)
        request.tick(request.num_probes * request.num_matvecs)
        words = f"exact: all eigenvalues of {side.words}"
        return Estimate(_quadrature(side, values.cpu().numpy(), side.n - side.order, floor), words, side.spent)
    values, basis, spent = _pairs(side, request, pairs)
    probes = _signs(request, side)
    note = f"; {len(values)} eigenvalues deflated" if len(values) else ""
    if request.method == "kpm":
        return _by_moments(side, request, probes, values, basis, spent, note)
    steps = min(request.num_matvecs, side.order)
    if steps * side.order * side.dtype.itemsize > side.memory:
        raise MemoryBudgetError(
            f"{steps} Lanczos vectors of length {side.order} take {readable_bytes(steps * side.order * side.dtype.itemsize)} for one probe, over the budget of "
            f"{readable_bytes(side.memory)}. Use fewer num_matvecs, method='kpm', which keeps three vectors per probe, or raise memory= of the Fisher."
        )
    rules = gauss_rules(side.product, probes, steps, deflated=basis, max_bytes=side.memory, tick=request.tick)
    top = np.abs(np.concatenate([rules.nodes[np.isfinite(rules.nodes)], values])).max(initial=0.0)
    floor = max(steps, BREAKDOWN) * torch.finfo(side.dtype).eps * top
    quadrature = _quadrature(
        side,
        values,
        side.n - side.order,
        float(floor),
        (rules.nodes, rules.weights, rules.squared_norms),
        (rules.radau_nodes, rules.radau_weights, rules.squared_norms) if side.psd else None,
    )
    words = f"stochastic Lanczos quadrature, {request.num_probes} probes x {steps} steps, {side.words}{note}"
    return Estimate(quadrature, words, rules.products + spent, rules.interrupted, rules)


def _quadrature(
    side: Side, known: np.ndarray, zeros: int, floor: float, rule: Any = None, lower: Any = None
) -> Quadrature:
    def filled(parts: Any) -> tuple[Any, Any]:
        if parts is None:
            return None, None
        nodes, weights, norms = parts
        return np.nan_to_num(nodes), np.nan_to_num(weights) * norms[:, None]

    nodes, weights = filled(rule)
    if nodes is None:
        nodes = weights = np.zeros((0, 0))
    lower_nodes, lower_weights = filled(lower)
    rounding = (BREAKDOWN if len(nodes) else side.order) * torch.finfo(side.dtype).eps
    return Quadrature(
        nodes, weights, known, zeros, side.n, floor, side.rank_bound, rounding, side.psd, lower_nodes, lower_weights
    )


def _signs(request: Request, side: Side) -> Tensor:
    """Rademacher vectors ``(probes, order)`` from a generator of its own, the same on every device."""
    generator = torch.Generator().manual_seed(request.seed)
    bits = torch.randint(0, 2, (request.num_probes, side.order), generator=generator, dtype=torch.int8, device="cpu")
    return (2 * bits - 1).to(device=side.device, dtype=side.dtype)


def _by_moments(
    side: Side, request: Request, probes: Tensor, values: np.ndarray, basis: Tensor | None, spent: int, note: str
) -> Estimate:
    extent = gauss_rules(side.product, probes[:1], _BOUND_STEPS, deflated=basis)
    low, high = min(extent.extent[0], *values, 0.0), max(extent.extent[1], *values, 0.0)
    if side.psd:
        high = 1.01 * high or 1.0
        low = -0.001 * high
    else:
        margin = 0.01 * (high - low) or 1.0
        low, high = low - margin, high + margin
    moments = chebyshev_moments(side.product, probes, request.num_matvecs, low, high, deflated=basis, tick=request.tick)
    nodes, weights = rule_of(moments)
    floor = BREAKDOWN * torch.finfo(side.dtype).eps * max(abs(low), abs(high))
    nodes = np.broadcast_to(nodes, weights.shape)
    quadrature = _quadrature(side, values, side.n - side.order, float(floor), (nodes, weights, moments.squared_norms))
    words = (
        f"kernel polynomial method, {request.num_probes} probes x {moments.values.shape[1]} Chebyshev moments, Jackson damping, "
        f"{side.words}{note}"
    )
    products = moments.products + extent.products + spent
    return Estimate(quadrature, words, products, moments.interrupted, moments=moments)


def _pairs(
    side: Side, request: Request, pairs: tuple[np.ndarray, Tensor] | None
) -> tuple[np.ndarray, Tensor | None, int]:
    """Eigenvalues and eigenvectors to deflate on this side, and the products they took."""
    if isinstance(request.deflate, int) and request.deflate:
        from fisherlens.spectrum.top import top_eigenvalues

        count = min(request.deflate, side.order)
        view = Operator(side.product, side.order, side.dtype, side.device, block=True, psd=side.psd)
        found = top_eigenvalues(view, count, vectors=True, seed=request.seed)
        good = found["converged"].values.astype(bool) & np.isfinite(found["eigenvector"].values).all(1)
        values = found["eigenvalue"].values[good]
        basis = torch.as_tensor(found["eigenvector"].values[good].T, dtype=side.dtype, device=side.device)
        return (*_orthonormal(values, basis), int(found.attrs.get("num_matvecs", 0)))
    if pairs is None:
        return np.zeros(0), None, 0
    values, vectors = pairs
    basis = side.to_side(vectors.to(device=side.device, dtype=side.dtype))
    norms = torch.linalg.vector_norm(basis, dim=0)
    if not (norms > 0).all():
        raise InputError(
            "An eigenvector handed to deflate= lies in the null space of F, so it is none of its eigenvalue. The Dataset is probably of another "
            "operator: compute it from this one."
        )
    values, basis = _orthonormal(values, basis / norms)
    if basis is not None:
        residual = torch.linalg.vector_norm(side.product(basis) - basis * _like(values, basis), dim=0).max().item()
        if not residual <= _FOREIGN * np.abs(values).max():
            raise InputError(
                f"deflate= holds eigenpairs with ‖F v - λ v‖ up to {residual:.3g}, for eigenvalues up to {np.abs(values).max():.3g}. They are probably of another "
                "operator, or far from converged: compute them from this one, or pass deflate=k."
            )
    return values, basis, len(values)


def _orthonormal(values: np.ndarray, basis: Tensor) -> tuple[np.ndarray, Tensor | None]:
    if not len(values):
        return np.zeros(0), None
    return np.asarray(values, dtype=float), torch.linalg.qr(basis)[0]


def _like(values: np.ndarray, basis: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=basis.dtype, device=basis.device)
