"""The exponent with which a cost grows."""

from __future__ import annotations

import math

import numpy as np


def fit(sizes: list[float], seconds: list[float]) -> tuple[float, float, int]:
    """Slope of log seconds against log size on the upper half of the range, its standard error, and the points used."""
    x, y = np.log(sizes), np.log(seconds)
    upper = x >= (x[0] + x[-1]) / 2 - 1e-9
    if upper.sum() < 3:
        upper = np.arange(len(x)) >= len(x) - 3
    x, y = x[upper], y[upper]
    centred = x - x.mean()
    slope = (centred @ y) / (centred @ centred)
    rest = y - y.mean() - slope * centred
    error = math.sqrt(rest @ rest / max(1, len(x) - 2) / (centred @ centred))
    return float(slope), error, len(x)
