"""Confidence intervals of estimates, and the checks that all estimators share."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from fisherlens.errors import InputError


def check_count(name: str, value: Any, least: int, meaning: str) -> int:
    """Refuse what is not an integer of at least ``least``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be an integer >= {least}, {meaning}; got {value!r}.")
    return int(value)


def check_probing(num_probes: Any, num_matvecs: Any, deflate: Any, seed: Any) -> None:
    """Refuse options of Lanczos quadrature that are out of range."""
    check_count("num_probes", num_probes, 1, "the random probes of an estimate")
    check_count("num_matvecs", num_matvecs, 2, "the Lanczos steps of each probe")
    check_count("deflate", deflate, 0, "the leading eigenpairs that are found first")
    check_count("seed", seed, 0, "of the probes")


def check_confidence(value: Any) -> float:
    """Refuse what is no confidence level."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise InputError(
            f"confidence must be a number between 0 and 1, the share of intervals that shall hold the truth; got {value!r}. 0.95 is the custom."
        )
    return float(value)


def student_interval(
    value: Any, sem: Any, dof: Any, confidence: float, slack: Any = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of value ± t · sem, t the quantile of Student's distribution, each moved out by ``slack`` (rounding, truncation).

    NaN where ``sem`` is NaN; the value itself, but for the slack, where it is 0.
    """
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    value, sem = np.asarray(value, dtype=float), np.asarray(sem, dtype=float)
    quantile = stdtrit(np.maximum(np.asarray(dof, dtype=float), 1e-3), (1 + confidence) / 2)
    half = np.where(sem > 0, quantile * sem, sem) + slack
    return value - half, value + half
