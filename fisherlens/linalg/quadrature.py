"""Gauss rules of a symmetric operator from Lanczos runs that advance as one block: stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError
from fisherlens.linalg.probes import Product, Unit

# A new direction shorter than this many rounding errors of the operator is none (methods: breakdown is relative to the norm).
BREAKDOWN = 100.0


@dataclass(frozen=True)
class Rules:
    """One Gauss rule per probe z: ``zᵀ f(A) z ≈ squared_norms[p] Σ_i weights[p, i] f(nodes[p, i])``, float64.

    Attributes
    ----------
    nodes, weights
        ``(probes, steps)``, nodes ascending; shorter rules are padded with NaN. The weights of a probe sum to 1.
    radau_nodes, radau_weights
        ``(probes, steps + 1)``: the Gauss-Radau rule with a node at 0, whose value is a bound of zᵀ f(A) z from the other side for the
        functions that :mod:`fisherlens.spectrum` integrates, where A is positive semi-definite.
    squared_norms
        ‖z‖² of each probe after projection, ``(probes,)``.
    steps
        Finished Lanczos steps, ``(probes,)``.
    exact
        Whether the Krylov space was exhausted: then the rule holds for every f, ``(probes,)``.
    residuals
        Residual norm of every node as an eigenvalue, ``(probes, steps)``: one lies within it.
    extent
        Lowest and highest Ritz value of all probes, widened by their residual norms: an interval that holds all eigenvalues in
        practice (a start vector orthogonal to an eigenvector does not see it).
    products
        Products with the operator, one per vector.
    interrupted
        Whether Ctrl-C ended the run early.
    """

    nodes: np.ndarray
    weights: np.ndarray
    radau_nodes: np.ndarray
    radau_weights: np.ndarray
    squared_norms: np.ndarray
    steps: np.ndarray
    exact: np.ndarray
    residuals: np.ndarray
    extent: tuple[float, float]
    products: int
    interrupted: bool


@dataclass
class _Probe:
    """The recurrence of one probe: orthonormal basis ``(steps, n)`` and the tridiagonal matrix it projects to."""

    squared_norm: float
    basis: Tensor | None
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    scale: float = 0.0
    exact: bool = False


def gauss_rules(
    product: Product,
    probes: Tensor,
    num_steps: int,
    *,
    deflated: Tensor | None = None,
    max_bytes: float = 2**62,
    tick: Callable[[int], object] = lambda _: None,
) -> Rules:
    r"""Run Lanczos from every probe and turn each tridiagonal matrix into a Gauss rule.

    All probes share one block product per step, but each has its own recurrence, with full re-orthogonalisation in two passes. The
    projected problem is float64. A probe whose next direction vanishes, relative to ‖A v‖, stops there: its rule is exact.

    Parameters
    ----------
    product
        ``(n, K)`` → ``(n, K)``.
    probes
        Start vectors, ``(probes, n)``.
    num_steps
        Lanczos steps per probe; a rule of m steps is exact for polynomials up to degree 2m - 1.
    deflated
        Orthonormal columns ``(n, d)`` that span an invariant subspace; probes and basis are kept orthogonal to it.
    max_bytes
        Of the bases; probes run in as many groups as that takes.
    tick
        Called after each step with the number of products it took.

    Raises
    ------
    NonFiniteError: a product holds NaN or infinity. KeyboardInterrupt: only if no step was finished.

    Notes
    -----
    Cost: ``probes * num_steps`` products and 4 num_steps² n floating-point operations per probe. Source: Golub and Meurant, "Matrices,
    Moments and Quadrature" (2010); Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017).
    """
    product = Unit(product)
    count, n = probes.shape
    num_steps = min(num_steps, n)
    room = max(1, int(max_bytes // max(1, num_steps * n * probes.itemsize)))
    finished: list[_Probe] = []
    products, interrupted = 0, False
    for start in range(0, count, room):
        group = [_begin(z, num_steps, deflated) for z in probes[start : start + room]]
        finished += group
        for step in range(num_steps):
            active = [probe for probe in group if not probe.exact]
            if not active:
                break
            try:
                _advance(product, active, step, num_steps, deflated)
            except KeyboardInterrupt:
                interrupted = True
                break
            products += len(active)
            tick(len(active))
        for probe in group:
            probe.basis = None  # the next group needs the memory
        if interrupted:
            break
    finished = [probe for probe in finished if probe.alphas]
    if not finished:
        raise KeyboardInterrupt
    return _rules(finished, products, interrupted, product.value)


def _begin(z: Tensor, num_steps: int, deflated: Tensor | None) -> _Probe:
    norm = torch.linalg.vector_norm(z, dtype=torch.float64).item()
    full = norm
    if deflated is not None:
        for _ in range(2):
            z = z - deflated @ (deflated.T @ z)
        norm = torch.linalg.vector_norm(z, dtype=torch.float64).item()
    if norm <= BREAKDOWN * torch.finfo(z.dtype).eps * full:  # nothing is left of this probe
        return _Probe(0.0, None, alphas=[0.0], exact=True)
    basis = torch.empty(num_steps, len(z), dtype=z.dtype, device=z.device)
    basis[0] = z / norm
    return _Probe(norm**2, basis)


def _advance(product: Product, active: list[_Probe], step: int, num_steps: int, deflated: Tensor | None) -> None:
    """One Lanczos step of every active probe."""
    block = torch.stack([probe.basis[step] for probe in active])
    found = product(block.T)
    w = found.T.contiguous()
    alphas = (block.double() * w.double()).sum(1).tolist()
    norms = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).tolist()
    if not np.isfinite(norms).all():
        raise NonFiniteError(
            f"A product in Lanczos step {step + 1} holds NaN or infinity. The operator probably overflowed: look for very large parameters or "
            "inputs, or use a float64 model."
        )
    for _ in range(2):  # one pass leaves multiples of the rounding error, which grow into copies of eigenvalues
        if deflated is not None:
            w -= (w @ deflated) @ deflated.T
        for row, probe in zip(w, active, strict=True):
            done = probe.basis[: step + 1]
            row.addmv_(done.T, done @ row, alpha=-1)
    betas = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).tolist()
    eps = torch.finfo(w.dtype).eps
    for row, probe, alpha, beta, norm in zip(w, active, alphas, betas, norms, strict=True):
        probe.scale = max(probe.scale, norm)
        probe.exact = beta <= BREAKDOWN * eps * probe.scale
        if step + 1 < num_steps and not probe.exact:
            torch.div(row, beta, out=probe.basis[step + 1])
        probe.alphas.append(alpha)
        probe.betas.append(0.0 if probe.exact else beta)
        probe.exact = probe.exact or step + 1 == len(row)


def _rules(finished: list[_Probe], products: int, interrupted: bool, unit: float) -> Rules:
    width = max(len(probe.alphas) for probe in finished)
    nodes, weights, residuals = np.full((3, len(finished), width), np.nan)
    radau_nodes, radau_weights = np.full((2, len(finished), width + 1), np.nan)
    low, high = np.inf, -np.inf
    for row, probe in enumerate(finished):
        m = len(probe.alphas)
        tridiagonal = np.diag(probe.alphas) + np.diag(probe.betas[: m - 1], 1) + np.diag(probe.betas[: m - 1], -1)
        theta, vectors = np.linalg.eigh(tridiagonal)
        nodes[row, :m], weights[row, :m] = theta, vectors[0] ** 2
        # T gains a row so that 0 is an eigenvalue: T δ = β² e_m gives its last diagonal entry
        beta = probe.betas[m - 1] if len(probe.betas) >= m else 0.0
        share = beta * vectors[-1]
        residuals[row, :m] = np.abs(share)
        low, high = min(low, theta[0] - abs(share[0])), max(high, theta[-1] + abs(share[-1]))
        if beta > 0 and (theta > 0).all():
            larger = np.zeros((m + 1, m + 1))
            larger[:m, :m] = tridiagonal
            larger[m - 1, m] = larger[m, m - 1] = beta
            larger[m, m] = (share**2 / theta).sum()
            theta, vectors = np.linalg.eigh(larger)
            theta[0] = 0.0
            radau_nodes[row, : m + 1], radau_weights[row, : m + 1] = theta, vectors[0] ** 2
        else:  # exhausted, or 0 is a node already: both rules are one
            radau_nodes[row, :m], radau_weights[row, :m] = nodes[row, :m], weights[row, :m]
    return Rules(
        nodes * unit,
        weights,
        radau_nodes * unit,
        radau_weights,
        np.array([probe.squared_norm for probe in finished]),
        np.array([len(probe.alphas) for probe in finished]),
        np.array([probe.exact for probe in finished]),
        residuals * unit,
        (float(low) * unit, float(high) * unit),
        products,
        interrupted,
    )
