"""The quantities of a spectral summary: their values, errors and intervals from one quadrature."""

from __future__ import annotations

from typing import Any

import numpy as np

from fisherlens.spectrum.bootstrap import Functional
from fisherlens.spectrum.functions import dimension_of, log_of
from fisherlens.spectrum.intervals import student_interval
from fisherlens.spectrum.moments import Functions, Sampled, integrate

WORDS = {
    "trace": ("trace", "nat"),
    "squared_norm": ("squared Frobenius norm", "nat²"),
    "largest_eigenvalue": ("largest eigenvalue by size", "nat"),
    "participation_ratio": ("participation ratio (tr F)²/tr F²", "1"),
    "stable_rank": ("stable rank ‖F‖²/λ_max²", "1"),
    "effective_dimension": ("effective dimension tr F(F + λ)⁻¹", "1"),
    "log_determinant": ("log det(I + F/λ)", "nat"),
}
DAMPED = ("effective_dimension", "log_determinant")
COLUMNS = ("", "_sem", "_low", "_high", "_truncation")
COLUMN_WORDS = (
    "{}",
    "standard error over probes: {}",
    "lower end of the interval: {}",
    "upper end of the interval: {}",
    "largest possible error of the finite rules: {}",
)


def functionals(grid: list[float]) -> dict[str, Functional]:
    """All quantities as functions of eigenvalues ``(B, L)``, for the bootstrap."""

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return above / np.where(below > 0, below, 1)

    def square(values: np.ndarray) -> np.ndarray:
        return (values**2).sum(-1)

    def damped(function: Any) -> Functional:
        return lambda values: np.stack([function(values, lam).sum(-1) for lam in grid], axis=-1)

    return {
        "trace": lambda values: values.sum(-1),
        "squared_norm": square,
        "largest_eigenvalue": lambda values: values[..., 0],
        "participation_ratio": lambda values: ratio(values.sum(-1) ** 2, square(values)),
        "stable_rank": lambda values: ratio(square(values), values[..., 0] ** 2),
        "effective_dimension": damped(dimension_of),
        "log_determinant": damped(log_of),
    }


class Table:
    """Values, errors and intervals of all quantities of one operator or block.

    Parameters
    ----------
    found
        Its spectrum, exact or sampled.
    trace
        Its trace, where that is known without the spectrum.
    grid, confidence
        Dampings; level of the intervals.
    """

    def __init__(self, found: Sampled, trace: float | None, grid: list[float], confidence: float):
        self._found, self._trace, self._grid, self._confidence = found, trace, grid, confidence
        self._rules = found.rules
        functions = [lambda x: x, lambda x: x * x]
        for function in (dimension_of, log_of):
            functions += [lambda x, f=function, lam=lam: f(x, lam) for lam in grid]
        self._all: Functions = integrate(self._rules, functions)

    def how(self, name: str) -> str:
        """Whether a quantity is exact, and by what."""
        if name == "trace" and self._trace is not None:
            return "exact: sum over the captured scores"
        if self._rules.exact:
            return self._found.words
        return f"{'Ritz value, a lower bound' if name == 'largest_eigenvalue' else 'estimated'}: {self._found.words}"

    def row(self, name: str) -> tuple[np.ndarray, ...]:
        """Value, standard error, both ends of the interval and truncation, each of one entry per damping, or one."""
        if name == "trace":
            return self._plain(slice(0, 1)) if self._trace is None else self._certain(self._trace)
        if name == "squared_norm":
            return self._plain(slice(1, 2))
        if name == "largest_eigenvalue":
            value, residual = (np.array([x]) for x in self._found.largest)
            return value, residual * 0, value, value + residual, residual
        if name in DAMPED:
            start = 2 + len(self._grid) * DAMPED.index(name)
            return self._plain(slice(start, start + len(self._grid)))
        return self._ratio(name)

    def _certain(self, value: float) -> tuple[np.ndarray, ...]:
        one = np.array([value])
        return one, np.zeros(1), one, one, np.zeros(1)

    def _plain(self, at: slice) -> tuple[np.ndarray, ...]:
        value, sem, dof = self._all.value[at], self._all.sem[at], self._all.dof[at]
        if self._rules.exact:
            return value, sem, value, value, np.zeros_like(value)
        lower, slack = value, self._rules.rounding * np.abs(value)
        if at.start >= 2:  # of trace and norm the rules are exact, polynomials of low degree
            lower, slack = self._all.lower[at], slack + self._found.leak / np.array(self._grid)
        low, _ = student_interval(lower, sem, dof, self._confidence, slack)
        _, high = student_interval(value, sem, dof, self._confidence, slack)
        return value, sem, np.maximum(low, 0) if self._rules.psd else low, high, value - lower + slack

    def _ratio(self, name: str) -> tuple[np.ndarray, ...]:
        """Participation ratio and stable rank: errors on a logarithmic scale, as they are ratios of positive numbers."""
        (t, s), c, dof = self._all.value[:2], self._all.covariance[:2, :2], self._all.dof[:2]
        top, residual = self._found.largest
        if not (s > 0 and top > 0):
            return self._certain(0.0)
        gradient, shift = np.array([0, -1 / s]), 0.0
        if name == "stable_rank":
            value, shift = s / top**2, 2 * np.log1p(residual / top)  # the largest eigenvalue may lie higher
        elif self._trace is not None:
            value = self._trace**2 / s
        else:
            value, gradient = t**2 / s, np.array([2 / t if t else 0.0, -1 / s])
        if self._rules.exact:
            return self._certain(value)
        relative = np.sqrt(gradient @ c @ gradient)
        worst = dof[1] if gradient[0] == 0 else dof.min()
        low, high = student_interval(0.0, relative, worst, self._confidence, self._rules.rounding)
        ends = value * np.exp(low - np.nan_to_num(shift)), value * np.exp(high)
        return tuple(np.array([x]) for x in (value, value * relative, *ends, value * shift))
