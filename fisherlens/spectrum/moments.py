r"""Traces of functions of an operator from one set of Lanczos runs, with one covariance for all of them.

A probe x, uniform on the sphere of radius √n, gives the forms :math:`q_f = x^\top f(A)\, x` of every f from the same nodes and weights,
and, as :math:`f g` is a function too, their covariance (derived; exact, for every spectrum):

.. math:: \operatorname{Cov}(q_f, q_g) = 2\, \mathbb{E}\!\left[x^\top f(A) g(A)\, x - q_f q_g / n\right]

So each single probe estimates the error of its own numbers, and k probes give that of their mean with far more certainty than the spread
of k skewed numbers does. For random signs the formula is an upper bound, equal where the diagonal of f(A) is even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.linalg.lanczos import Selection, block_lanczos
from fisherlens.linalg.probes import MIN_PROBES, Probes, pooled_dof, wide
from fisherlens.linalg.quadrature import BREAKDOWN, gauss_rules
from fisherlens.spectrum.rules import Quadrature
from fisherlens.spectrum.side import Side

Function = Callable[[np.ndarray], np.ndarray]

# Sets the probes apart from other normal numbers of the same seed: the start of Lanczos, whose eigenvectors of a repeated eigenvalue are parts of
# it, or a user's data and weights. torch takes the lower 32 bits of a seed, and these differ.
_APART = 0x9E3779B9
# Residual, relative to the largest eigenvalue, up to which a Ritz pair counts as an eigenpair; its effect is bounded and reported.
_CONVERGED = 1e-6


@dataclass(frozen=True)
class Functions:
    """Traces of F functions: estimates, what the finite rules may be off by, and the covariance over probes.

    Attributes
    ----------
    value, lower
        By the Gauss rules and, for concave functions, by the Gauss-Radau rules, which bound each form from below; ``(F,)``.
    covariance
        Of ``value`` over probes, ``(F, F)``; zero where everything is known, NaN for fewer than 3 probes.
    dof
        Degrees of freedom of each variance, ``(F,)``.
    """

    value: np.ndarray
    lower: np.ndarray
    covariance: np.ndarray
    dof: np.ndarray

    @property
    def sem(self) -> np.ndarray:
        """Standard errors, ``(F,)``."""
        return np.sqrt(np.maximum(self.covariance.diagonal(), 0))


def integrate(rules: Quadrature, functions: Sequence[Function]) -> Functions:
    """Traces of several functions with f(0) = 0 from one quadrature."""

    def evaluated(nodes: np.ndarray) -> np.ndarray:
        nodes = np.maximum(nodes, 0) if rules.psd else nodes  # rounding of a zero eigenvalue
        return np.stack([function(nodes) for function in functions])

    count = len(functions)
    known = evaluated(rules.known).sum(1)
    if rules.exact:
        return Functions(known, known, np.zeros((count, count)), np.full(count, np.inf))
    values, weights = evaluated(rules.nodes), rules.weights
    probes = len(weights)
    forms = (values * weights).sum(2)  # (F, k)
    lower = forms
    if rules.lower_nodes is not None and rules.lower_weights is not None:
        lower = (evaluated(rules.lower_nodes) * rules.lower_weights).sum(2)
    length = np.maximum(weights.sum(1), np.finfo(float).tiny)
    single = 2 * (np.einsum("fkm,gkm,km->fgk", values, values, weights) - forms[:, None] * forms / length)
    covariance = single.mean(2) / probes
    variance = np.maximum(np.einsum("ffk->fk", single), 0)
    if probes < MIN_PROBES:
        covariance, dof = np.full_like(covariance, np.nan), np.ones(count)
    else:
        dof = pooled_dof(torch.from_numpy(variance.T)).numpy()
    return Functions(known + forms.mean(1), known + lower.mean(1), covariance, dof)


def known_spectrum(values: Tensor, n: int, floor: float, rank_bound: int, rounding: float, psd: bool) -> Quadrature:
    """A quadrature in which nothing is estimated: some eigenvalues, and zeros up to n."""
    none = np.zeros((0, 0))
    known = values.detach().cpu().double().numpy()
    return Quadrature(none, none, known, n - len(known), n, floor, rank_bound, rounding, psd)


@dataclass(frozen=True)
class Sampled:
    r"""A quadrature and where it came from.

    Attributes
    ----------
    rules, words, products
        The quadrature, how it came about, and the products it took.
    leak
        Σ r²/\|θ\| over the deflated pairs with residuals r: how far their coupling to the rest may move a function, in units of its slope at 0.
    largest
        Size of the largest eigenvalue, from below, and its residual: NaN where none was computed, 0 where every eigenvalue is known.
    """

    rules: Quadrature
    words: str
    products: int
    leak: float
    largest: tuple[float, float]


def sample(side: Side, num_probes: int, num_matvecs: int, deflate: int, seed: int) -> Sampled:
    """Deflate the leading eigenpairs, then run Lanczos from probes on the sphere of what is left.

    Parameters
    ----------
    side
        The operator in its cheapest form.
    num_probes, num_matvecs
        Probes, and Lanczos steps of each.
    deflate
        Leading eigenpairs to find first, at most a quarter of the order; those that converge are treated exactly.
    seed
        Of the probes and of the start of the eigensolver.
    """
    values, basis, products, leak, top = _leading(side, min(deflate, side.order // 4), num_probes * num_matvecs, seed)
    left = side.order - len(values)
    x = wide(Probes(side.order, side.dtype, side.device, int(seed) ^ _APART).gaussian(num_probes))
    for _ in range(2 if len(values) else 0):
        x = x - wide(basis) @ (wide(basis).T @ x)
    x = x * (left**0.5 / torch.linalg.vector_norm(x, dim=0))
    found = gauss_rules(
        side.product,
        x.T.to(side.dtype).contiguous(),
        num_matvecs,
        deflated=basis if len(values) else None,
        max_bytes=side.memory,
    )
    scale = np.abs(np.concatenate([found.nodes[np.isfinite(found.nodes)], values])).max(initial=0.0)
    floor = float(max(num_matvecs, BREAKDOWN) * torch.finfo(side.dtype).eps * scale)
    norms = found.squared_norms[:, None]
    lower = (np.nan_to_num(found.radau_nodes), np.nan_to_num(found.radau_weights) * norms) if side.psd else (None, None)
    rules = Quadrature(
        np.nan_to_num(found.nodes),
        np.nan_to_num(found.weights) * norms,
        values,
        side.n - side.order,
        side.n,
        floor,
        side.rank_bound,
        side.order * torch.finfo(side.dtype).eps,
        side.psd,
        *lower,
    )
    note = f", {len(values)} leading eigenvalues deflated" if len(values) else ""
    words = f"Lanczos quadrature, {num_probes} probes x {num_matvecs} steps{note}, {side.words}"
    largest = (max(scale, top[0]), top[1] if top[0] >= (1 - _CONVERGED) * scale else math.nan)
    return Sampled(rules, words, found.products + products, leak, largest)


def _leading(side: Side, k: int, budget: int, seed: int) -> tuple[np.ndarray, Tensor, int, float, tuple[float, float]]:
    """Converged leading pairs, the products they took, Σ r²/|θ| of their residuals r, and the largest with its residual, converged or not."""
    if k < 1:
        return np.zeros(0), torch.zeros(side.order, 0, device=side.device), side.spent, 0.0, (0.0, math.nan)
    found = block_lanczos(
        side.product,
        side.order,
        k,
        dtype=side.dtype,
        device=side.device,
        selection=Selection("largest" if side.psd else "magnitude"),
        tol=1e-2 * _CONVERGED,
        max_products=max(k, budget // 2),
        seed=seed,
    )
    theta = wide(found.values).to(side.device)
    basis, images = wide(found.vectors.T), wide(found.images.T)
    residual = torch.linalg.vector_norm(images - basis * theta, dim=0)
    first = theta.abs().argmax()
    top = (theta[first].abs().item(), residual[first].item())
    good = (residual <= _CONVERGED * top[0]) & (theta.abs() > BREAKDOWN * torch.finfo(side.dtype).eps * top[0])
    basis, theta, residual = basis[:, good], theta[good], residual[good]
    if len(theta):
        basis = torch.linalg.qr(basis)[0].to(side.dtype)
    leak = (residual.square() / theta.abs()).sum().item()
    return theta.cpu().numpy(), basis, found.products + side.spent, leak, top
