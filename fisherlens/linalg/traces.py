r"""Trace of a symmetric operator from block products, with its standard error.

The error of a mean of k quadratic forms is usually taken from the spread of the k numbers. Quadratic forms of a matrix with a few
large eigenvalues are as skewed as χ² with few degrees of freedom, and then the spread of ten of them says little: nominal 95 %
intervals hold the truth 85 to 90 % of the time. But the products say more than the numbers: with :math:`y = z \odot R z`,

.. math:: \operatorname{Var}(z^\top R z) = 2 \sum_{a \ne b} R_{ab}^2 = 2 \sum_a \operatorname{Var}(y_a)

for random signs z, and every entry a tells its part. Errors here are of that pooled kind (derived, and checked by simulation in
``tests/benchmarks/coverage.py``), with the degrees of freedom of the pooled variance itself (Satterthwaite 1946).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError
from fisherlens.linalg.probes import (
    MIN_PROBES,
    Estimate,
    Probes,
    Product,
    Unit,
    finite,
    leave_one_out,
    leave_out,
    orthonormal_range,
    pooled_dof,
    sketched,
    split,
    wide,
)

TRACE_METHODS = ("hutch++", "hutchinson", "xtrace", "xnystrace")


def trace(
    product: Product, probes: Probes, num_matvecs: int, method: str, target_sem: float | None = None, limit: int = 0
) -> Estimate:
    """Estimate tr A by one of :data:`TRACE_METHODS`.

    Parameters
    ----------
    product, probes
        The operator, ``(n, K)`` → ``(n, K)``, and where its random vectors come from.
    num_matvecs
        Products to spend.
    method
        ``hutchinson``: mean of zᵀAz over random signs (Hutchinson 1990). ``hutch++``: exact on a sketched range, Hutchinson on the rest
        (Meyer, Musco, Musco and Woodruff 2021). ``xtrace``, ``xnystrace``: see the functions.
    target_sem, limit
        Of the first two: add probes until the standard error is no larger, or ``limit`` products are spent.
    """
    unit = Unit(product)
    if method == "xtrace":
        return unit.undo(xtrace(unit, probes, num_matvecs))
    if method == "xnystrace":
        return unit.undo(xnystrace(unit, probes, num_matvecs))
    return unit.undo(_hutchinson(unit, probes, num_matvecs, method, target_sem, limit))


def _hutchinson(
    product: Unit, probes: Probes, num_matvecs: int, method: str, target_sem: float | None, limit: int
) -> Estimate:
    """Random signs, alone or beside a sketched range; ``target_sem`` is in the units of the operator."""
    sketch, k = split(num_matvecs) if method == "hutch++" else (0, num_matvecs)
    sketch = min(sketch, probes.n)
    known, basis = 0.0, None
    if sketch:
        basis = orthonormal_range(product, probes.gaussian(sketch))
        known = (basis * finite(wide(product(basis.to(probes.dtype))))).sum()
        if sketch == probes.n:
            return Estimate(known, torch.zeros_like(known), math.inf, 2 * sketch)
    rest = Remainder(product, probes, basis)
    rest.add(k)
    while True:
        mean, sem, dof = rest.estimate()
        spent = 2 * sketch + rest.count
        error = sem.item() * product.value
        if target_sem is None or error <= target_sem or spent >= limit:
            return Estimate(known + mean, sem, dof, spent)
        # as many probes as the variance asks for; a tenth more at the least, or the target would stay ahead
        wanted = rest.count * (min(error / target_sem, 1e9) ** 2 - 1) if math.isfinite(error) else MIN_PROBES
        rest.add(min(limit - spent, max(math.ceil(wanted), rest.count // 10, 1), _AT_ONCE))


# Probes that are taken in one block product when more are asked for (our choice).
_AT_ONCE = 256


class Remainder:
    """Mean of the quadratic forms zᵀ R z, R = (I - QQᵀ) A (I - QQᵀ), of random signs; probes can be added.

    Parameters
    ----------
    product, probes
        The operator and where its random vectors come from.
    basis
        Q, ``(n, s)`` with orthonormal columns; None for none.
    """

    def __init__(self, product: Product, probes: Probes, basis: Tensor | None = None):
        self._product, self._probes, self._basis = product, probes, basis
        self._forms: list[Tensor] = []
        self._squares: list[Tensor] = []  # ‖y_j‖², y = z ⊙ R z
        self._dots: list[Tensor] = []  # y_j · Σ_i y_i over the probes of the same call
        self._sums: list[Tensor] = []  # Σ_j y_j of each call
        self.count = 0

    def add(self, k: int) -> None:
        """Take k further probes, one product each."""
        z = self._probes.signs(k)
        y = finite(wide(self._product(self._projected(wide(z)).to(z.dtype))))
        y = wide(z) * self._projected(y)
        total = y.sum(1)
        self._forms.append(y.sum(0))
        self._squares.append(y.square().sum(0))
        self._dots.append(y.T @ total)
        self._sums.append(total)
        self.count += k

    def _projected(self, x: Tensor) -> Tensor:
        return x if self._basis is None else x - self._basis @ (self._basis.T @ x)

    def estimate(self) -> tuple[Tensor, Tensor, float]:
        """Mean of the forms, its standard error and the degrees of freedom of that."""
        forms, squares, k = torch.cat(self._forms), torch.cat(self._squares), self.count
        whole = torch.stack(self._sums).sum(0)
        # within a call y_j · Σ_i y_i is known; the probes of other calls enter by what the call's own meet on average
        parts = zip(self._dots, self._sums, strict=True)
        dots = torch.cat([dot + part @ (whole - part) / len(dot) for dot, part in parts])
        pair = (dots - squares) / max(k - 1, 1)
        sem, dof = pooled(2 * (squares - pair).mean(), 2 * (squares - 2 * pair))
        return forms.mean(), sem, dof


def pooled(variance: Tensor, contributions: Tensor) -> tuple[Tensor, float]:
    """Standard error of a mean over k probes from a pooled variance and the probes' contributions to it ``(k,)``, and its degrees of freedom."""
    k = contributions.shape[0]
    variance = variance.clamp(min=0)
    if k < MIN_PROBES:
        return torch.full_like(variance, math.nan), 1.0
    return (variance / k).sqrt(), pooled_dof(contributions).item()


def xtrace(product: Product, probes: Probes, num_matvecs: int) -> Estimate:
    """Hutch++ with every sample in both roles, each left out in turn (Epperly, Tropp and Webber 2024), for any symmetric A.

    The samples of the mean share most of their sketch, so that their spread understates the error: it is indicative.
    """
    k = max(1, min(num_matvecs // 2, probes.n))
    omega = probes.gaussian(k)
    q, r, aq, whole = sketched(product, omega)
    h = q.T @ aq
    if whole or k == probes.n:
        return Estimate(h.trace(), torch.zeros_like(h[0, 0]), math.inf, 2 * k)
    w = q.T @ wide(omega)
    s = leave_out(r)
    c = w - s * (s * w).sum(0)
    # the rest of a Gaussian is uniform in direction: set its length to what it is on average
    length = wide(omega).square().sum(0) - c.square().sum(0)
    rest = (w * r).sum(0) - 2 * (c * r).sum(0) + (c * (h @ c)).sum(0)
    samples = h.trace() - (s * (h @ s)).sum(0) + rest * (probes.n - k + 1) / length
    return leave_one_out(samples, 2 * k)


def xnystrace(product: Product, probes: Probes, num_matvecs: int) -> Estimate:
    """XTrace on the Nyström approximation, one product per sample, for positive semi-definite A (Epperly, Tropp and Webber 2024).

    The spread of the samples is far too small where eigenvalues fall fast: it is indicative.
    """
    k = max(1, min(num_matvecs, probes.n))
    omega = probes.gaussian(k)
    y, om = finite(wide(product(omega))), wide(omega)
    norm = torch.linalg.matrix_norm(y)
    if norm == 0:
        return Estimate(norm, norm, math.inf, k)
    shift = torch.finfo(omega.dtype).eps * norm / probes.n**0.5
    for _ in range(8):
        small = om.T @ (y + shift * om)
        factor, info = torch.linalg.cholesky_ex((small + small.T) / 2)
        if info == 0:
            break
        shift = 10 * shift
    else:
        raise NonFiniteError(
            "XNysTrace met an operator that is not positive semi-definite, even with a shift of 1e7 times the rounding error. "
            "Use method='xtrace' or 'hutch++', which take any symmetric operator."
        )
    identity = torch.eye(k, dtype=factor.dtype, device=factor.device)
    root = torch.linalg.solve_triangular(factor, (y + shift * om).T, upper=False)  # Nyström approximation: rootᵀ root
    column = root.T @ torch.linalg.solve_triangular(factor, identity, upper=False)
    kappa = torch.cholesky_inverse(factor).diagonal()
    # of a probe only the part beyond the span of the others counts: set its length to what it is on average
    alone = torch.cholesky_inverse(torch.linalg.cholesky(om.T @ om)).diagonal()
    samples = root.square().sum() + ((probes.n - k + 1) * alone - column.square().sum(0)) / kappa - shift * probes.n
    return leave_one_out(samples, k)
