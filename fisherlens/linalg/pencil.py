r"""Extreme eigenvalues of pairs of symmetric matrices, A x = μ M x, with M positive definite.

A run is a generator that asks for products (A v, M v) and solves (M⁻¹ r, or roughly that) and is told the answers, so that whoever serves
many runs can answer the questions of all of them with one block product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import NonFiniteError

# Up to this order LAPACK's dense solver is both faster and exact.
DENSE_ORDER = 256
# Share of the tolerance that the estimate residual²/gap may take: the gap is an estimate too, and early on too large (our choice).
_QUADRATIC_SHARE = 0.1
# Steps in which a residual must be small before it is believed: a start that hardly holds the largest eigenvector settles on another first.
_IN_A_ROW = 3
# Steps before which a small residual alone is not believed either (our choice).
_RESIDUALS_FROM = 20
# Share of the tolerance that they may take: on 616 runs, of five kinds of networks, with damping from 1e-5 to 1e-1 and at least eight steps,
# six errors then were above 0.25 % and two above the 0.5 % that was asked for, up to 0.63 %. A fifth of this share left one of the two.
_SETTLED_SHARE = 0.3
# What is left where increments grow, over their number times the last of them (our choice).
_GROWING = 10
# Entries of vectors that are combined at a time (our choice).
_CACHED = 2**16
PRODUCT, SOLVE, MASS, PRECONDITION = "product", "solve", "mass", "precondition"


@dataclass(frozen=True)
class Extreme:
    """The smallest or largest eigenvalue of a pencil.

    Attributes
    ----------
    value
        Ritz value: inside the spectrum, but for rounding.
    error
        Estimated error, the smallest of three: the residual, its square over the gap to the next Ritz value, and what the last increments
        of the value leave to come.
    steps
        Steps, one product and one solve each.
    converged
        Whether the error met the tolerance.
    weights
        The Ritz vector, as coefficients of the vectors whose product with A was asked for, in that order.
    """

    value: float
    error: float
    steps: int
    converged: bool
    weights: np.ndarray | None = field(default=None, compare=False, repr=False)


Run = Generator[tuple[str, Tensor], Tensor, list[Extreme]]
Question = tuple[int, str, Tensor]
Dot = Callable[[Tensor, Tensor], Tensor]


class Settling:
    r"""What is left to come of a value that approaches its limit from one side, from its last increments.

    .. math:: \mu - \theta_k \lesssim \delta_k \max\Big(\frac{3k}{4}, \frac{q}{1 - q}\Big), \qquad q = \frac{\delta_k}{\delta_{k-1}}

    The second is what is left where increments shrink like a geometric series, the first, with half as much
    again, where they shrink like k⁻³, as they do below a crowded end of the spectrum. Where they grow, ten times as much must not matter.
    """

    def __init__(self) -> None:
        self._values: list[float] = []
        self.left = math.inf

    def rest(self, value: float) -> float:
        """The estimate after one more value; infinite before the third, and where increments do not shrink."""
        self._values.append(value)
        self.left = self._rest() if len(self._values) > 2 else math.inf
        return self.left

    def _rest(self) -> float:
        first, second, third = self._values[-3:]
        before, last = abs(second - first), abs(third - second)
        if last >= before:
            return _GROWING * len(self._values) * last
        ratio = last / before
        return last * max(0.75 * len(self._values), ratio / (1 - ratio))


def lanczos_run(
    start: Tensor,
    *,
    tol: float,
    max_steps: int,
    least_steps: int = 0,
    in_a_row: int = 3,
    ends: Sequence[str] = ("largest",),
    dot: Dot = torch.dot,
) -> Run:
    r"""Find extreme μ of A x = μ M x by Lanczos in the inner product of M.

    .. math:: A v_j = \beta_{j-1} M v_{j-1} + \alpha_j M v_j + \beta_j M v_{j+1}, \qquad v_i^\top M v_j = \delta_{ij}

    Parameters
    ----------
    start
        A vector ``(n,)``: the run begins with M⁻¹ of it.
    tol
        Relative; a value is accepted when what its increments leave to come (:class:`Settling`) is a small part of tol · μ in ``in_a_row`` steps
        in a row; after 20 steps also when its residual is below tol · μ, or residual²/gap below a tenth of that, in three steps in a row.
    max_steps
        Steps after which what there is comes back unconverged.
    least_steps
        Steps before which no value is believed, for problems in which they cost nothing.
    in_a_row
        Steps in which what increments leave to come must be small; each looks back at two more (default from runs on networks of all sizes).
    ends
        ``"largest"``, ``"smallest"``, or both.
    dot
        Of a vector v or M⁻¹ r with a vector r or A v, where tensors are coefficients of these.

    Yields
    ------
    ``("product", v)`` or ``("solve", r)``, vectors ``(n,)``; to be answered with ``.send`` of A v or M⁻¹ r.

    Returns
    -------
    One :class:`Extreme` for each of ``ends``, as the value of the generator.

    Notes
    -----
    Three vectors are kept, and no basis: without re-orthogonalisation Ritz values stay within rounding of the spectrum and only come in
    copies (Paige 1971), which do not move its ends. A residual that vanishes, where the Krylov space is exhausted, ends the run. Where many
    eigenvalues crowd at an end, the value settles long before its vector does, so that residuals alone would ask for far more than the
    accuracy of the value.
    """
    alphas: list[float] = []
    lengths: list[float] = []
    watches = [Settling() for _ in ends]
    r, previous, spare = start, None, None
    z = yield SOLVE, r
    length, good, settled = _length(dot, z, r), 0, 0
    found = [Extreme(math.nan, math.nan, 0, False) for _ in ends]
    if not length > 0:
        return found
    for step in range(max_steps):
        w = yield PRODUCT, z
        alpha = _finite(dot(z, w)) / length**2
        # vectors stay as long as they come; their lengths are divided out here
        terms = [(w, 1 / length), (r, -alpha / length)]
        if previous is not None:
            terms.append((previous, -length / lengths[-1]))
        out = _sum_of(terms, torch.empty_like(w) if spare is None else spare)
        spare = previous if step > 1 else None  # the start is not ours to write to
        r, previous = out, r
        alphas.append(alpha)
        lengths.append(length)
        z = yield SOLVE, r
        length = _length(dot, z, r)
        found = _ritz(alphas, lengths, length, tol, ends, watches)
        good = good + 1 if all(one.converged for one in found) else 0
        still = all(
            watch.left <= _SETTLED_SHARE * tol * abs(one.value) for watch, one in zip(watches, found, strict=True)
        )
        settled = settled + 1 if still else 0
        exhausted = length <= 1e-3 * tol * min(abs(one.value) for one in found)
        believed = settled >= in_a_row or (good >= _IN_A_ROW and step + 1 >= _RESIDUALS_FROM)
        if exhausted or (believed and step + 1 >= least_steps):
            return found
    return [Extreme(one.value, one.error, one.steps, False, one.weights) for one in found]


def _sum_of(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> Tensor:
    """Write a sum of scaled vectors to ``out``, some entries at a time, which then are still in the cache for the next term."""
    for into, *pieces in zip(out.split(_CACHED), *(x.split(_CACHED) for x, _ in terms), strict=True):
        torch.mul(pieces[0], terms[0][1], out=into)
        for piece, (_, scale) in zip(pieces[1:], terms[1:], strict=True):
            into.add_(piece, alpha=scale)
    return out


def _finite(value: Tensor) -> float:
    number = value.item()
    if not math.isfinite(number):
        raise NonFiniteError(
            "A product or solve with F or its stand-in holds NaN or infinity, so that no eigenvalue can be found. Look for very large parameters or "
            "inputs, raise the damping, or use float64."
        )
    return number


def _length(dot: Dot, z: Tensor, r: Tensor) -> float:
    return math.sqrt(max(_finite(dot(z, r)), 0.0))


def _ritz(
    alphas: list[float], lengths: list[float], beta: float, tol: float, ends: Sequence[str], watches: list[Settling]
) -> list[Extreme]:
    """Ritz values at the ends of the tridiagonal matrix so far, with their errors."""
    off = np.array(lengths[1:])
    theta, y = np.linalg.eigh(np.diag(alphas) + np.diag(off, 1) + np.diag(off, -1))
    found = []
    for end, watch in zip(ends, watches, strict=True):
        at, beside = (-1, -2) if end == "largest" else (0, 1)
        value, residual = float(theta[at]), float(beta * abs(y[-1, at]))
        gap = abs(value - float(theta[beside])) if len(theta) > 1 else 0.0
        squared = residual**2 / gap if gap > residual else math.inf
        rest = watch.rest(value)
        converged = min(residual, squared / _QUADRATIC_SHARE, rest / _SETTLED_SHARE) <= tol * abs(value)
        weights = y[:, at] / np.array(lengths)
        found.append(Extreme(value, min(residual, squared, rest), len(theta), bool(converged), weights))
    return found


def preconditioned_run(
    start: Tensor, *, tol: float, max_steps: int, least_steps: int = 0, in_a_row: int = 3, solved: Tensor | None = None
) -> Run:
    r"""Find the largest μ of A x = μ M x where M⁻¹ is known only roughly, from products with A and M.

    Each step takes the best vector of the space of three: the last one, its residual preconditioned, and the direction of the last step
    (LOBPCG, Knyazev 2001, for a single vector).

    Parameters
    ----------
    start
        A vector ``(n,)``: the run begins with the preconditioner of it.
    tol, max_steps, least_steps, in_a_row
        As for :func:`lanczos_run`, without the last of its three errors.
    solved
        M⁻¹ of the start, where it is known: then the run begins with it.

    Yields
    ------
    ``("product", v)``, ``("mass", v)`` or ``("precondition", r)``; to be answered with ``.send`` of A v, M v or T r, where T resembles M⁻¹.

    Returns
    -------
    A list of one :class:`Extreme`, as the value of the generator.
    """
    watch, good, settled = Settling(), 0, 0
    x = (yield PRECONDITION, start) if solved is None else solved
    best = [x.clone(), (yield PRODUCT, x).clone(), (yield MASS, x).clone()]  # a vector with its two images
    moved: list[Tensor] | None = None
    weights, moved_weights = np.ones(1), np.zeros(1)
    found = Extreme(math.nan, math.nan, 0, False)
    if not _finite(torch.dot(best[0], best[2])) > 0:
        return [found]
    for step in range(1, max_steps + 1):
        x, a, m = best
        size = _finite(torch.dot(x, m))
        value = _finite(torch.dot(x, a)) / size
        r = torch.add(a, m, alpha=-value)
        t = yield PRECONDITION, r
        residual, rest = _length(torch.dot, t, r) / math.sqrt(size), watch.rest(value)
        converged = min(residual, rest / _SETTLED_SHARE) <= tol * abs(value)
        found = Extreme(value, min(residual, rest), step, bool(converged), weights)
        good = good + 1 if converged else 0
        settled = settled + 1 if rest <= _SETTLED_SHARE * tol * abs(value) else 0
        believed = settled >= in_a_row or (good >= _IN_A_ROW and step >= _RESIDUALS_FROM)
        if residual <= 1e-3 * tol * abs(value) or (believed and step >= least_steps):
            return [found]
        new = [t, (yield PRODUCT, t), (yield MASS, t)]
        space = [best, new] if moved is None else [best, new, moved]
        c = _best_of(space, torch.finfo(t.dtype).eps)
        weights, moved_weights = np.append(weights, 0.0), np.append(moved_weights, 0.0)
        moved_weights *= c[2]
        moved_weights[-1] += c[1]
        weights = c[0] * weights + moved_weights
        if moved is None:
            moved = [c[1] * one for one in new]
        else:
            for mine, one in zip(moved, new, strict=True):
                mine.mul_(c[2]).add_(one, alpha=c[1])
        for mine, one in zip(best, moved, strict=True):
            mine.mul_(c[0]).add_(one)
    return [Extreme(found.value, found.error, found.steps, False, weights)]


def _best_of(space: list[list[Tensor]], eps: float) -> tuple[float, float, float]:
    """Coefficients of the vector with the largest quotient; the last direction is left out where rounding has made it dependent."""
    k = len(space)
    a, m = np.zeros((k, k)), np.zeros((k, k))
    for i in range(k):
        for j in range(i + 1):
            a[i, j] = a[j, i] = _finite(torch.dot(space[i][0], space[j][1]))
            m[i, j] = m[j, i] = _finite(torch.dot(space[i][0], space[j][2]))
    scale = 1 / np.sqrt(np.maximum(m.diagonal(), np.finfo(float).tiny))
    a, m = a * scale * scale[:, None], m * scale * scale[:, None]
    lowest = np.linalg.eigvalsh(m)[0]
    if lowest < 100 * eps:
        return _best_of(space[:-1], eps) if k > 2 else (1.0, 0.0, 0.0)
    half = np.linalg.inv(np.linalg.cholesky(m))
    c = half.T @ np.linalg.eigh(half @ a @ half.T)[1][:, -1] * scale
    return (float(c[0]), float(c[1]), float(c[2]) if k > 2 else 0.0)


def serve(runs: Sequence[Run], answer: Callable[[list[Question]], Sequence[Tensor | None]]) -> list[list[Extreme]]:
    """Advance several runs together until all have ended.

    Parameters
    ----------
    runs
        Generators of :func:`lanczos_run` or :func:`preconditioned_run`, not yet started.
    answer
        Takes all open questions, ``(number of the run, kind of question, vector)``, and answers as many of them as it likes, at least one:
        for each a tensor, or None for a question that is to wait.
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
