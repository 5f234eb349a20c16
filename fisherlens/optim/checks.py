"""Checks of single arguments, with one wording for all methods."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fisherlens.errors import UNKNOWN_NAME, InputError, nearest
from fisherlens.optim import texts


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, strict: bool = False) -> float:
    """Check a finite number with ``low <= value < high``, ``low < value`` where ``strict``."""
    hint = texts.HINTS.get(name, "")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}.{hint}")
    if not math.isfinite(value) or value < low or (strict and value == low) or value >= high:
        bounds = f"{'>' if strict else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise InputError(f"{name} must be a finite number {bounds}; got {value!r}.{hint}")
    return float(value)


def whole(name: str, value: Any, low: int = 1) -> int:
    """Check an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__} {value!r}.")
    number(name, value, low)
    return int(value)


def choice(name: str, value: Any, known: tuple[str, ...]) -> str:
    """Check one of a few words."""
    if value not in known:
        raise InputError(UNKNOWN_NAME.format(what=name, name=value, hint=nearest(str(value), known)))
    return value


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinity: where their sum is finite, that says all; else it may only have overflowed."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
