"""From an estimate of a spectrum to curves on a grid, with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fisherlens.errors import InputError
from fisherlens.linalg.chebyshev import delta_moments, mass_below
from fisherlens.spectrum.estimate import Estimate
from fisherlens.spectrum.grids import Grid, make_grid, own_grid
from fisherlens.spectrum.rules import standard_error

# Nodes that hold less than this share of the eigenvalues do not stretch a grid; they are drawn at its end.
_NEGLIGIBLE = 1e-6

Pair = tuple[np.ndarray, np.ndarray]  # a value and its standard error


@dataclass(frozen=True)
class Curves:
    """Each quantity with its standard error over probes."""

    density: Pair
    cumulative: Pair
    zero_fraction: Pair
    trace: tuple[float, float]
    squared_norm: tuple[float, float]
    outside: float
    unresolved: float
    width: float


def grid_for(
    found: list[Estimate], points: np.ndarray | None, scale: str, width: float | None, num_points: int, negative: str
) -> Grid:
    """One grid for all estimates: the user's own points, or the range of all eigenvalues above the noise floors."""
    psd = all(one.quadrature.psd for one in found)
    lows, highs, least = [], [], np.inf
    for one in found:
        rule = one.quadrature
        values, shares = _mean_rule(one)
        least = min(least, (values[shares > _NEGLIGIBLE] + rule.floor).min(initial=np.inf))
        values, shares = values[shares > 0], shares[shares > 0]
        if not len(values):
            continue
        order = np.argsort(values)
        tail = np.cumsum(shares[order]) > (_NEGLIGIBLE * shares.sum() if not rule.exact else 0)
        lows.append(values[order][np.argmax(tail)])
        highs.append(values[order][-1])
    if points is not None:
        return own_grid(points, width, psd)
    if scale == "log" and least < 0:
        raise InputError(negative.format(found=f"The smallest found here is {least:.3g}"))
    chebyshev = [one.moments for one in found if one.moments is not None]
    if chebyshev:
        low, high = min(m.low for m in chebyshev), max(m.high for m in chebyshev)
        if scale == "log":
            resolution = min(m.resolution for m in chebyshev)
            return Grid(np.geomspace(min(resolution, high / 10), high, num_points), scale, 1.0, False)
        return Grid(np.linspace(low, high, num_points), scale, 1.0, False)
    low, high = (min(lows), max(highs)) if lows else (1e-3, 1.0)  # of a zero operator any grid will do
    if scale == "log":
        low = max(low, np.finfo(float).tiny * 1e6)
    return make_grid(scale, low, high, width, num_points, psd)


def _mean_rule(one: Estimate) -> Pair:
    """All nodes of all probes and the known eigenvalues above the floor, with their mean shares."""
    rule = one.quadrature
    known = rule.known[rule.above(rule.known)]
    shares, _ = rule.shares()
    nodes = rule.nodes.reshape(-1)
    if one.moments is not None:  # Gauss-Chebyshev nodes lie everywhere; what they say of the spectrum is in the moments
        nodes, shares = np.zeros(0), np.zeros(0)
    if not rule.psd:
        known = rule.known
    return (
        np.concatenate([nodes, known]),
        np.concatenate([shares.reshape(-1) / max(1, len(shares)), np.full(len(known), 1 / rule.n)]),
    )


def curves_on(one: Estimate, grid: Grid, *, own: bool) -> Curves:
    """Density, cumulative distribution and scalars of one estimate."""
    rule = one.quadrature
    trace = rule.integrate(lambda x: x)
    squared = rule.integrate(np.square)
    if one.moments is not None:
        return _chebyshev_curves(one, grid, trace, squared, own)
    shares, zero = rule.shares()
    known = rule.known[rule.above(rule.known)]
    each = np.full(len(known), 1 / rule.n)
    nodes = rule.nodes
    if not own:
        nodes = np.clip(nodes, grid.points[0], grid.points[-1])
    density = grid.density(known, each)
    below = grid.cumulative(known[None], each[None])[0]
    outside = float((~grid.contains(known) * each).sum())
    if rule.exact:
        below = below + zero[0] * (grid.points >= 0)
        return Curves(
            (density, rule.rounding * density),
            (below, rule.rounding * below),
            (zero[0], rule.rounding * zero[0]),
            trace,
            squared,
            outside,
            0.0,
            grid.width,
        )
    widths = None if one.rules is None else grid.node_widths(nodes, one.rules.residuals)
    densities = density + grid.density(nodes, shares, widths)
    belows = below + grid.cumulative(nodes, shares) + zero[:, None] * (grid.points >= 0)
    outside += float((~grid.contains(nodes) * shares).sum(1).mean())
    unresolved = (
        0.0 if one.rules is None else float((shares * (one.rules.residuals >= np.abs(rule.nodes))).sum(1).mean())
    )
    return Curves(_pair(densities), _pair(belows), _pair(zero), trace, squared, outside, unresolved, grid.width)


def _pair(values: np.ndarray) -> Pair:
    return values.mean(0), standard_error(values)


def _chebyshev_curves(
    one: Estimate, grid: Grid, trace: tuple[float, float], squared: tuple[float, float], own: bool
) -> Curves:
    """The damped density in closed form; certain zeros are taken out of the moments, known eigenvalues enter them exactly."""
    rule, moments = one.quadrature, one.moments
    count = moments.values.shape[1]
    certain = max(rule.zeros, rule.n - rule.rank_bound)
    mean = moments.squared_norms.mean()
    portion = moments.squared_norms / mean if mean > 0 else np.ones(len(moments.values))
    total = moments.values * portion[:, None] * rule.sampled + delta_moments(moments.scaled(rule.known), count)
    total = (total - (certain - rule.zeros) * delta_moments(moments.scaled(np.zeros(1)), count)) / rule.n
    edges = moments.scaled(grid.edges)
    if not own:
        edges[0], edges[-1] = -1.0, 1.0
    mass = np.clip(np.diff(mass_below(total, edges), axis=1), 0, None)  # taking zeros out may leave less than nothing
    share = 1 - certain / rule.n
    if not own:
        scale = mass.sum(1, keepdims=True)
        mass = mass * np.where(scale > 0, share / np.where(scale > 0, scale, 1), 0)
    below = mass_below(total, moments.scaled(grid.points)) + certain / rule.n * (grid.points >= 0)
    zero = np.full(len(mass), certain / rule.n)
    outside = max(0.0, share - float(mass.sum(1).mean())) if own else 0.0
    near = np.array([-1.0, 1.0]) * moments.resolution
    unresolved = float(np.diff(mass_below(total, moments.scaled(near)), axis=1).mean())
    width = moments.resolution
    return Curves(
        _pair(mass / grid.cells), _pair(np.clip(below, 0, 1)), _pair(zero), trace, squared, outside, unresolved, width
    )
