r"""Extreme eigenvalues of pairs of symmetric matrices, A x = μ M x, with M positive definite.

A Lanczos run is a generator that asks for products (A v) and solves (M⁻¹ r) and is told the answers, so that whoever serves many runs can
answer the questions of all of them with one block product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError

# Up to this order LAPACK's dense solver is both faster and exact.
DENSE_ORDER = 256
# Share of the tolerance that the estimate residual²/gap may take: the gap is an estimate too, and early on too large (our choice).
_QUADRATIC_SHARE = 0.1
# Steps in which the error must be small before it is believed: a start that hardly holds the largest eigenvector settles on another first.
_IN_A_ROW = 3
PRODUCT, SOLVE = "product", "solve"


@dataclass(frozen=True)
class Extreme:
    """The smallest or largest eigenvalue of a pencil.

    Attributes
    ----------
    value
        Ritz value: inside the spectrum, but for rounding.
    error
        Estimated error: the residual, or its square over the gap to the next Ritz value where that is smaller.
    steps
        Lanczos steps, one product and one solve each.
    converged
        Whether the error met the tolerance.
    """

    value: float
    error: float
    steps: int
    converged: bool


Run = Generator[tuple[str, Tensor], Tensor, list[Extreme]]
Question = tuple[int, str, Tensor]


def lanczos_run(start: Tensor, *, tol: float, max_steps: int, ends: Sequence[str] = ("largest",)) -> Run:
    r"""Find extreme μ of A x = μ M x by Lanczos in the inner product of M.

    .. math:: A v_j = \beta_{j-1} M v_{j-1} + \alpha_j M v_j + \beta_j M v_{j+1}, \qquad v_i^\top M v_j = \delta_{ij}

    Parameters
    ----------
    start
        A vector ``(n,)``: the run begins with M⁻¹ of it.
    tol
        Relative; a value is accepted when its residual is below tol · μ, or residual²/gap below a tenth of that, in three steps in a row.
    max_steps
        Steps after which what there is comes back unconverged.
    ends
        ``"largest"``, ``"smallest"``, or both.

    Yields
    ------
    ``("product", v)`` or ``("solve", r)``, vectors ``(n,)``; to be answered with ``.send`` of A v or M⁻¹ r.

    Returns
    -------
    One :class:`Extreme` for each of ``ends``, as the value of the generator.

    Notes
    -----
    Three vectors are kept, and no basis: without re-orthogonalisation Ritz values stay within rounding of the spectrum and only come in
    copies (Paige 1971), which do not move its ends. A residual that vanishes, where the Krylov space is exhausted, ends the run.
    """
    alphas: list[float] = []
    betas: list[float] = []
    r = start
    z = yield SOLVE, r
    previous, beta, good = torch.zeros_like(start), 0.0, 0
    length = _length(r, z)
    found = [Extreme(math.nan, math.nan, 0, False) for _ in ends]
    if not length > 0:
        return found
    for _ in range(max_steps):
        p, v = r / length, z / length
        w = yield PRODUCT, v
        r = w - beta * previous if beta else w.clone()
        alpha = _dot(v, r)
        r.sub_(p, alpha=alpha)
        z = yield SOLVE, r
        length = _length(r, z)
        alphas.append(alpha)
        found = _ritz(alphas, betas, length, tol, ends)
        good = good + 1 if all(one.converged for one in found) else 0
        exhausted = length <= 1e-3 * tol * min(abs(one.value) for one in found)
        if exhausted or good >= _IN_A_ROW:
            return found
        betas.append(length)
        previous, beta = p, length
    return [Extreme(one.value, one.error, one.steps, False) for one in found]


def _dot(a: Tensor, b: Tensor) -> float:
    value = torch.dot(a, b).item()
    if not math.isfinite(value):
        raise NonFiniteError(
            "A product or solve with F or its stand-in holds NaN or infinity, so that no eigenvalue can be found. Look for very large parameters or "
            "inputs, raise the damping, or use float64."
        )
    return value


def _length(r: Tensor, z: Tensor) -> float:
    return math.sqrt(max(_dot(r, z), 0.0))


def _ritz(alphas: list[float], betas: list[float], beta: float, tol: float, ends: Sequence[str]) -> list[Extreme]:
    """Ritz values at the ends of the tridiagonal matrix so far, with their errors."""
    off = np.array(betas)
    theta, y = np.linalg.eigh(np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1))
    found = []
    for end in ends:
        at, beside = (-1, -2) if end == "largest" else (0, 1)
        value, residual = float(theta[at]), float(beta * abs(y[-1, at]))
        gap = abs(value - float(theta[beside])) if len(theta) > 1 else 0.0
        squared = residual**2 / gap if gap > residual else math.inf
        converged = residual <= tol * abs(value) or squared <= _QUADRATIC_SHARE * tol * abs(value)
        found.append(Extreme(value, min(residual, squared), len(theta), bool(converged)))
    return found


def serve(runs: Sequence[Run], answer: Callable[[list[Question]], Sequence[Tensor | None]]) -> list[list[Extreme]]:
    """Advance several runs together until all have ended.

    Parameters
    ----------
    runs
        Generators of :func:`lanczos_run`, not yet started.
    answer
        Takes all open questions, ``(number of the run, "product" or "solve", vector)``, and answers as many of them as it likes, at least
        one: for each a tensor, or None for a question that is to wait.
    """
    found: dict[int, list[Extreme]] = {}
    waiting: list[Question] = [(k, *next(run)) for k, run in enumerate(runs)]
    while waiting:
        left: list[Question] = []
        for question, reply in zip(waiting, answer(waiting), strict=True):
            if reply is None:
                left.append(question)
                continue
            k = question[0]
            try:
                left.append((k, *runs[k].send(reply)))
            except StopIteration as end:
                found[k] = end.value
        waiting = left
    return [found[k] for k in range(len(runs))]


def dense_extremes(a: Tensor, m: Tensor) -> tuple[float, float]:
    """Smallest and largest μ of A x = μ M x for matrices, by LAPACK in float64."""
    import scipy.linalg  # here, because it would double the time of ``import fisherlens``

    values = scipy.linalg.eigh(a.double().cpu().numpy(), m.double().cpu().numpy(), eigvals_only=True)
    return float(values[0]), float(values[-1])
