"""Smoothing of a spectrum on a grid: masses of cells, so that the density integrates to what it should on any grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fisherlens import errors
from fisherlens.errors import InputError

# Widths of the default kernel: shares of the range of a linear grid, and of the decades of a logarithmic one (our choice).
_LINEAR_SHARE, _LOG_SHARE = 1 / 150, 1 / 60
# How far, in widths, a grid reaches beyond the outermost eigenvalues.
_REACH = 4.0


@dataclass(frozen=True)
class Grid:
    """Points and a Gaussian kernel, in λ on a linear scale and in log₁₀ λ on a logarithmic one.

    The density at a point is the mean over the cell between the midpoints to its neighbours, whose length is the point's weight in the
    trapezoidal rule: the rule then returns the mass on the grid exactly, whatever the width and the spacing.

    Attributes
    ----------
    points
        Strictly increasing eigenvalues, ``(G,)``.
    scale
        ``"linear"`` or ``"log"``.
    width
        Standard deviation of the kernel, in λ or in decades.
    reflect
        Fold the kernel at 0, where no eigenvalue is negative, so that no mass is lost below.
    """

    points: np.ndarray
    scale: str
    width: float
    reflect: bool

    @property
    def edges(self) -> np.ndarray:
        """Ends of the cells, ``(G + 1,)``."""
        middles = (self.points[1:] + self.points[:-1]) / 2
        return np.concatenate([self.points[:1], middles, self.points[-1:]])

    @property
    def cells(self) -> np.ndarray:
        """Lengths of the cells, the weights of the trapezoidal rule, ``(G,)``."""
        return np.diff(self.edges)

    def contains(self, values: np.ndarray) -> np.ndarray:
        """Which values lie on the grid, but for rounding."""
        slack = 1e-9 * (self.points[-1] - self.points[0])
        low = self.points[0] * (1 - 1e-9) if self.scale == "log" else self.points[0] - slack
        return (values >= low) & (values <= self.points[-1] + slack)

    def density(self, values: np.ndarray, shares: np.ndarray, widths: np.ndarray | None = None) -> np.ndarray:
        """Density per unit λ of eigenvalues ``(..., m)`` with shares of the same shape → ``(..., G)``; values off the grid are left out.

        ``widths`` of the kernels, in the units of ``width``, where they are not all that one.
        """
        inside = self.contains(values)
        at = np.where(inside, values, self.points[-1])
        below = self._below(at, np.full(values.shape, self.width) if widths is None else widths)
        total = below[..., -1:] - below[..., :1]
        kernel = np.diff(below, axis=-1) / np.where(total > 0, total, 1)
        return ((shares * inside)[..., None] * kernel).sum(-2) / self.cells

    def _below(self, values: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Mass of every kernel below every edge, ``(..., m, G + 1)``."""
        edges, center, width = self.edges, values[..., None], widths[..., None]
        if self.scale == "log":
            return _normal((np.log10(edges) - np.log10(center)) / width)
        if not self.reflect:
            return _normal((edges - center) / width)
        edges = np.maximum(edges, 0)
        return _normal((edges - center) / width) - _normal((-edges - center) / width)

    def node_widths(self, nodes: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Kernel widths of quadrature nodes ``(probes, m)``, ascending but for their padding.

        A converged node is an eigenvalue and gets the width of the grid. One that stands for several is spread over half the distance to
        its neighbours, or its residual norm if that is less: narrower kernels would draw the nodes as peaks.
        """
        out = np.full(nodes.shape, self.width)
        for row, (x, residual) in enumerate(zip(nodes, residuals, strict=True)):
            used = np.flatnonzero(np.isfinite(residual) & ((x > 0) | (self.scale != "log")))
            if len(used) < 2:
                continue
            place, error = x[used], residual[used]
            if self.scale == "log":
                place, error = np.log10(place), error / place / np.log(10)
            gaps = np.diff(place)
            spacing = (np.concatenate([gaps[:1], gaps]) + np.concatenate([gaps, gaps[-1:]])) / 4
            out[row, used] = np.maximum(self.width, np.minimum(error, spacing))
        return out

    def cumulative(self, values: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Share of eigenvalues at or below each point, not smoothed: ``(probes, m)`` → ``(probes, G)``."""
        out = np.empty((len(values), len(self.points)))
        for row, (x, share) in enumerate(zip(values, shares, strict=True)):
            order = np.argsort(x)
            sums = np.concatenate([[0.0], np.cumsum(share[order])])
            out[row] = sums[np.searchsorted(x[order], self.points * (1 + 1e-12 * np.sign(self.points)), side="right")]
        return out


def _normal(x: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def check_grid(grid: Any, width: Any, num_points: Any) -> np.ndarray | None:
    """Refuse what cannot be a grid; the array of a user's own, else None."""
    if width is not None and not (
        isinstance(width, int | float) and not isinstance(width, bool) and 0 < width < np.inf
    ):
        raise InputError(
            f"width must be a number > 0, the standard deviation of the kernel in λ (linear grid) or in decades (logarithmic); got {width!r}. "
            "None chooses one from the range."
        )
    if not isinstance(num_points, int) or isinstance(num_points, bool) or num_points < 10:
        raise InputError(f"num_points must be an integer >= 10, the points of the grid; got {num_points!r}.")
    if isinstance(grid, str):
        if grid not in ("linear", "log"):
            hint = errors.nearest(grid, ("linear", "log")) + " An increasing array of eigenvalues serves too."
            raise InputError(errors.UNKNOWN_NAME.format(what="grid", name=grid, hint=hint))
        return None
    try:
        points = np.asarray(grid, dtype=float)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 1 or len(points) < 2 or not np.isfinite(points).all() or (np.diff(points) <= 0).any():
        raise InputError(
            f"grid must be 'linear', 'log' or a strictly increasing one-dimensional array of finite eigenvalues; got {type(grid).__name__} of shape "
            f"{points.shape}. np.linspace and np.geomspace make such arrays."
        )
    return points


def own_grid(points: np.ndarray, width: float | None, psd: bool) -> Grid:
    """A grid of the user's own: logarithmic if its points are positive and closer to a geometric than to an arithmetic series."""
    log = False
    if points[0] > 0 and len(points) > 2:
        steps, ratios = np.diff(points), np.diff(np.log(points))
        log = bool(ratios.std() / ratios.mean() < steps.std() / steps.mean())
    scale = "log" if log else "linear"
    return Grid(points, scale, width or _default_width(points, scale), psd and not log)


def make_grid(scale: str, low: float, high: float, width: float | None, num_points: int, psd: bool) -> Grid:
    """A grid over eigenvalues from low to high with room for the kernel; ``low`` > 0 on a logarithmic scale."""
    if scale == "log":
        decades = max(np.log10(high / low), 1.0)
        width = width or decades * _LOG_SHARE
        reach = _REACH * width
        return Grid(np.geomspace(low / 10**reach, high * 10**reach, num_points), scale, width, False)
    low, high = 0.0 if psd else min(low, 0.0), max(high, 0.0)
    width = width or ((high - low) * _LINEAR_SHARE or 1.0)
    start = 0.0 if psd else low - _REACH * width
    return Grid(np.linspace(start, high + _REACH * width, num_points), scale, width, psd)


def _default_width(points: np.ndarray, scale: str) -> float:
    if scale == "log":
        return max(_LOG_SHARE * np.log10(points[-1] / points[0]), float(np.diff(np.log10(points)).max()))
    return max(_LINEAR_SHARE * (points[-1] - points[0]), float(np.diff(points).max()))
