r"""How unevenly a stand-in preconditions: the ends of the spectrum of M = (F̂ + λ)^-½ (F + λ) (F̂ + λ)^-½.

μ_max is the largest eigenvalue of the pair (F + λ, F̂ + λ) and 1/μ_min that of the pair (F̂ + λ, F + λ): each as the largest, where
Lanczos converges fast. All stand-ins advance together, and a step of all of them is one pass over the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.independence.options import MAX_STEPS
from fisherlens.independence.standin import StandIn
from fisherlens.independence.target import Target
from fisherlens.linalg.pencil import (
    DENSE_ORDER,
    PRODUCT,
    SOLVE,
    Extreme,
    Question,
    Run,
    dense_extremes,
    lanczos_run,
    serve,
)
from fisherlens.linalg.probes import Probes

# Vectors of a run and of the answers to it that exist at the same time.
_VECTORS = 12
# Products with F̂ that prepare the start of the search for μ_min, which lies where F̂ is large and F small (our choice).
_PREPARED = 1


@dataclass(frozen=True)
class Ratios:
    """μ_min and μ_max, NaN where Lanczos did not converge, and then what is to be told of it."""

    low: float
    high: float
    troubles: tuple[str, ...] = ()


def extreme_ratios(target: Target, stand_ins: Sequence[StandIn], damping: float) -> list[Ratios]:
    """Ends of the spectrum of M for every stand-in, dense up to an order of 256, else to half the relative tolerance each."""
    if not stand_ins:
        return []
    F = target.F
    if F.n_params <= DENSE_ORDER:
        eye = torch.eye(F.n_params, dtype=F.dtype, device=F.device)
        a = target.dense + damping * eye.double()
        pairs = [dense_extremes(a, stand_in.product(eye, damping)) for stand_in in stand_ins]
        return [Ratios(*pair) for pair in pairs]
    together = max(1, int(F.memory // (2 * _VECTORS * F.n_params * F.dtype.itemsize)))
    found: list[Ratios] = []
    for first in range(0, len(stand_ins), together):
        group = stand_ins[first : first + together]
        found += _by_lanczos(target, group, damping)
    return found


def _by_lanczos(target: Target, stand_ins: Sequence[StandIn], damping: float) -> list[Ratios]:
    options = {"tol": target.options.tol / 2, "max_steps": MAX_STEPS}
    forward, backward = _starts(target, stand_ins, damping)
    if target.exact:
        runs: list[Run] = [lanczos_run(start, **options) for start in (*forward, *backward)]
    else:  # no solves with F: both ends from products with it
        runs = [lanczos_run(start, ends=("smallest", "largest"), **options) for start in forward]
    found = serve(runs, _Answers(target, stand_ins, damping))
    out = []
    for k, stand_in in enumerate(stand_ins):
        if target.exact:
            (high,), (inverse,) = found[k], found[k + len(stand_ins)]
            low = Extreme(1 / inverse.value, inverse.error, inverse.steps, inverse.converged)
        else:
            low, high = found[k]
        told = [
            _trouble(end, what, target, stand_in)
            for end, what in ((low, "μ_min"), (high, "μ_max"))
            if not end.converged
        ]
        out.append(Ratios(*(end.value if end.converged else math.nan for end in (low, high)), tuple(told)))
    return out


def _trouble(end: Extreme, what: str, target: Target, stand_in: StandIn) -> str:
    return (
        f"{what} of {stand_in.name!r} on {target.name!r} did not converge to {target.options.tol:g} in {end.steps} Lanczos steps (so far {end.value:.3g}); it is "
        "NaN, and so is the condition number. A larger damping makes the problem easier, a larger tol= asks for less."
    )


def _starts(target: Target, stand_ins: Sequence[StandIn], damping: float) -> tuple[list[Tensor], list[Tensor]]:
    """Start vectors for μ_max, in the row space of F, and for μ_min, where F̂ is large; a random part makes both complete."""
    F = target.F
    probes = Probes(F.n_params, F.dtype, F.device, target.options.seed)
    random = _unit(probes.gaussian(1)[:, 0])
    if F.plan.streamed or F.plan.linearised:
        spread = F._product(random[:, None])[:, 0]
    else:
        rows = Probes(F.scores.rows, F.dtype, F.device, target.options.seed + 1).gaussian(1)
        spread = F.scores.rmatmat(rows)[:, 0]
    forward = _unit(spread) + random
    backward = []
    for stand_in in stand_ins if target.exact else ():
        v = random
        for _ in range(_PREPARED):
            v = _unit(stand_in.product(v[:, None], damping)[:, 0])
        backward.append(v + random)
    return [forward] * len(stand_ins), backward


def _unit(v: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(v)
    return v / norm if norm > 0 else v


class _Answers:
    """Answers the questions of all runs: those to stand-ins first, and when only such to F are left, these in one pass."""

    def __init__(self, target: Target, stand_ins: Sequence[StandIn], damping: float):
        self.target, self.stand_ins, self.damping = target, stand_ins, damping

    def __call__(self, questions: list[Question]) -> list[Tensor | None]:
        count = len(self.stand_ins)
        # the second half of the runs has the roles of F and the stand-in exchanged
        to_stand_in = [(kind == SOLVE) == (k < count) for k, kind, _ in questions]
        if any(to_stand_in):
            return [
                self._ask(k % count, kind, v) if own else None
                for (k, kind, v), own in zip(questions, to_stand_in, strict=True)
            ]
        products = [v for _, kind, v in questions if kind == PRODUCT]
        solves = [v for _, kind, v in questions if kind == SOLVE]
        images, solutions = self.target.products_and_solves(self._block(products), self._block(solves), self.damping)
        answers = {PRODUCT: iter(images.T), SOLVE: iter(solutions.T)}
        return [next(answers[kind]) for _, kind, _ in questions]

    def _ask(self, which: int, kind: str, v: Tensor) -> Tensor:
        stand_in = self.stand_ins[which]
        act = stand_in.solve if kind == SOLVE else stand_in.product
        return act(v[:, None], self.damping)[:, 0]

    def _block(self, vectors: list[Tensor]) -> Tensor:
        """Vectors as columns, each contiguous."""
        if not vectors:
            F = self.target.F
            return torch.empty(0, F.n_params, dtype=F.dtype, device=F.device).T
        return torch.stack(vectors).T
