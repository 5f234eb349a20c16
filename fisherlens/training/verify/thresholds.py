r"""The largest stable learning rate, found by taking steps and nothing else.

Near δ = 0 a gradient is linear, c(δ) = Hδ, and steps δ ← δ − r P⁻¹c(δ) multiply a mode of P⁻¹H with eigenvalue μ by 1 − r μ: it overshoots,
changes its sign with each step and grows where r > 2/μ. The rate at which the first mode does so is found by bisection; no eigenvalue is
computed here, so that the answer can be held against one. Where H has negative curvature its modes grow at every rate, and
the loss falls along them; that is not what a learning rate decides, so that "diverges" is said of a loss that rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]

_DOUBLINGS = 60
_GONE = 1e-8


def overshooting(
    gradient: Map, precondition: Map, start: Tensor, steps: int, length: float, *, definite: bool
) -> Tensor:
    """The direction that large steps overshoot most, of the given length: the update, fed back ``steps`` times.

    That finds the strongest mode, of either sign. Unless H is known to be semi-definite, the update is then mixed with so much of the
    vector itself that positive modes come first, for twice as many steps.
    """
    delta, strength = _fed_back(gradient, precondition, start, steps, length, 0.0)
    if not definite and strength > 0:
        delta, _ = _fed_back(
            gradient, precondition, delta + 0.1 * length * start / start.norm(), 2 * steps, length, strength
        )
    return delta


def _fed_back(
    gradient: Map, precondition: Map, start: Tensor, steps: int, length: float, shift: float
) -> tuple[Tensor, float]:
    """δ ← P⁻¹c(δ) + shift δ, held at one length; and by how much the last update was longer than δ."""
    delta = start * (length / torch.linalg.vector_norm(start))
    strength = 0.0
    for _ in range(steps):
        update = precondition(gradient(delta)) + shift * delta
        norm = float(torch.linalg.vector_norm(update))
        if not 0 < norm < math.inf:
            break
        strength = norm / length
        delta = update * (length / norm)
    return delta, strength


def grows(rate: float, gradient: Map, precondition: Map, start: Tensor, steps: int) -> bool:
    """Whether ½ δᵀc(δ), the loss above its tangent, rises in one of ``steps`` steps at this rate; NaN has risen."""
    delta, slope = start, gradient(start)
    first = energy = float(delta @ slope)
    for _ in range(steps):
        delta = delta - rate * precondition(slope)
        slope = gradient(delta)
        before, energy = energy, float(delta @ slope)
        if not energy <= before:
            return True
        if energy < _GONE * first:
            return False  # so small that rounding decides, or gone along negative curvature
    return False


def bisect(unstable: Callable[[float], bool], guess: float, precision: float) -> float:
    """The rate above which ``unstable`` is true, to a relative precision.

    The bracket starts at the guess and grows by factors of 1.15, 1.15², … up to 2. Infinity or 0 where 60 of them find no end of it.
    """
    low = high = guess
    rising, factor = not unstable(guess), 1.15
    for _ in range(_DOUBLINGS):
        if rising:
            high *= factor
            if unstable(high):
                break
            low = high
        else:
            low /= factor
            if not unstable(low):
                break
            high = low
        factor = min(factor**2, 2.0)
    else:
        return math.inf if rising else 0.0
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return math.sqrt(low * high)


def largest_stable_rate(
    gradient: Map,
    precondition: Map,
    start: Tensor,
    *,
    length: float,
    warm_up: int,
    steps: int,
    precision: float,
    definite: bool,
) -> float:
    """The rate above which steps overshoot ever more.

    Parameters
    ----------
    gradient
        δ → c(δ), with c(0) = 0.
    precondition
        c → P⁻¹c; the identity for gradient descent.
    start
        Any direction; ``warm_up`` updates turn it towards what overshoots most.
    length
        ‖δ‖ at the start: short enough for c to be linear.
    steps
        By which a rate proves itself.
    precision
        Relative, of the answer.
    definite
        Whether H has no negative eigenvalue.
    """
    delta = overshooting(gradient, precondition, start, warm_up, length, definite=definite)
    update = precondition(gradient(delta))
    if not float(delta @ update) > 0:
        return math.inf  # nothing to overshoot
    guess = 1.9 * length / float(torch.linalg.vector_norm(update))
    return bisect(lambda rate: grows(rate, gradient, precondition, delta, steps), guess, precision)
