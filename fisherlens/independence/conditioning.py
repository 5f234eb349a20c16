r"""How unevenly a stand-in preconditions: the ends of the spectrum of M = (F̂ + λ)^-½ (F + λ) (F̂ + λ)^-½.

μ_max is the largest eigenvalue of the pair (F + λ, F̂ + λ) and 1/μ_min that of the pair (F̂ + λ, F + λ): each as the largest, where
Lanczos converges fast. All stand-ins advance together, and a step of all of them is one pass over the scores. Where a solve with F̂ + λ
is dear, μ_max comes from products with it and rough solves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.independence.by_layers import has_room, layer_extremes
from fisherlens.independence.leads import Trail, unit
from fisherlens.independence.options import run_options
from fisherlens.independence.standin import StandIn
from fisherlens.independence.starts import RANDOM_PREPARED, common_start, is_layer, low_start
from fisherlens.independence.target import Target
from fisherlens.linalg.pencil import (
    DENSE_ORDER,
    MASS,
    PRECONDITION,
    PRODUCT,
    SOLVE,
    Extreme,
    Question,
    Run,
    dense_extremes,
    lanczos_run,
    preconditioned_run,
    serve,
)
from fisherlens.linalg.probes import Probes

# Vectors of a run and of the answers to it that exist at the same time.
_VECTORS = 12
# Products that prepare a start: with F̂ for μ_min, which lies where F̂ is large and F small, so that a few large blocks among very many are
# not found late; with the Gram matrix of F for μ_max, where F is large (our choice).
_PREPARED_LOW, _PREPARED_HIGH = 4, 1
# Share of a random vector in a start that is held to be good; it makes the start complete (our choice).
_RANDOM = 0.1


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
    found: dict[int, Ratios] = {}
    rest: list[int] = []
    for k, stand_in in enumerate(stand_ins):
        pair = layer_extremes(target, damping) if stand_in.by_layers and has_room(target) else None
        if pair is None:
            rest.append(k)
        else:
            found[k] = _told(*pair, target, stand_in)
    for first in range(0, len(rest), together):
        some = rest[first : first + together]
        found |= zip(some, _by_lanczos(target, [stand_ins[k] for k in some], damping), strict=True)
    return [found[k] for k in range(len(stand_ins))]


def _by_lanczos(target: Target, stand_ins: Sequence[StandIn], damping: float) -> list[Ratios]:
    size = target.F.n_params
    forward, backward = _starts(target, stand_ins, damping)
    if target.exact:
        runs: list[Run] = []
        for stand_in, start in zip(stand_ins, forward, strict=True):
            own = run_options(target.options, size, prepared=start.prepared)
            if stand_in.preconditions:
                solved = target.solved.pop((stand_in.name, damping), None)
                runs.append(preconditioned_run(start.vector, solved=solved, **own))
            else:
                runs.append(lanczos_run(start.vector, **own))
        for start in backward:
            runs.append(lanczos_run(start.vector, **run_options(target.options, size, prepared=start.prepared)))
    else:  # no solves with F: both ends from products with it
        options = run_options(target.options, size)
        runs = [lanczos_run(start.vector, ends=("smallest", "largest"), **options) for start in forward]
    answers = _Answers(target, stand_ins, damping)
    found = serve(runs, answers)
    out = []
    for k, stand_in in enumerate(stand_ins):
        if target.exact:
            (high,), (inverse,) = found[k], found[k + len(stand_ins)]
            low = Extreme(1 / inverse.value, inverse.error, inverse.steps, inverse.converged)
            answers.lead(k, high, inverse)
        else:
            low, high = found[k]
        out.append(_told(low, high, target, stand_in))
    return out


def _told(low: Extreme, high: Extreme, target: Target, stand_in: StandIn) -> Ratios:
    told = [
        _trouble(end, what, target, stand_in) for end, what in ((low, "μ_min"), (high, "μ_max")) if not end.converged
    ]
    return Ratios(*(end.value if end.converged else math.nan for end in (low, high)), tuple(told))


def _trouble(end: Extreme, what: str, target: Target, stand_in: StandIn) -> str:
    return (
        f"{what} of {stand_in.name!r} on {target.name!r} did not converge to {target.options.tol:g} in {end.steps} Lanczos steps (so far {end.value:.3g}); it is "
        "NaN, and so is the condition number. A larger damping makes the problem easier, a larger tol= asks for less."
    )


@dataclass(frozen=True)
class _Start:
    """A vector, and whether it lies near the end that is looked for."""

    vector: Tensor
    prepared: bool = False

    def complete(self, random: Tensor) -> _Start:
        """With a random part."""
        share = RANDOM_PREPARED if self.prepared else _RANDOM
        return _Start(torch.add(self.vector, random, alpha=share), self.prepared)


def _starts(target: Target, stand_ins: Sequence[StandIn], damping: float) -> tuple[list[_Start], list[_Start]]:
    """Start vectors for μ_max, in the row space of F, and for μ_min, where F̂ is large; a random part makes both complete."""
    F = target.F
    probes = Probes(F.n_params, F.dtype, F.device, target.options.seed)
    random = unit(probes.gaussian(1)[:, 0])
    kept = not (F.plan.streamed or F.plan.linearised)
    if not kept:
        forward = [_Start(unit(F._product(random[:, None])[:, 0]) + _RANDOM * random)] * len(stand_ins)
    else:
        forward = _spread(target, stand_ins, damping, random)
    backward = []
    for stand_in in stand_ins if target.exact else ():
        found = _near_lowest(target, stand_in, damping) if kept else None
        prepared = found is not None
        if found is None:
            found = random
            for _ in range(_PREPARED_LOW):
                found = unit(stand_in.product(found[:, None], damping)[:, 0])
        backward.append(_Start(found, prepared).complete(random))
    return forward, backward


def _near_lowest(target: Target, stand_in: StandIn, damping: float) -> Tensor | None:
    """What (F + λ)⁻¹ takes to a vector near that of μ_min: in a layer from its largest blocks, in the network from what the layers found."""
    found = low_start(target, stand_in, damping)
    if found is not None or is_layer(target):
        return found
    known = target.leads.low((stand_in.name, damping), target.F)
    return None if known is None else unit(stand_in.product(known[:, None], damping)[:, 0])


def _spread(target: Target, stand_ins: Sequence[StandIn], damping: float, random: Tensor) -> list[_Start]:
    """Uᵀy for each stand-in: y is the sum of what the layers before have found, or what a few columns of a layer tell."""
    common = common_start(target, damping)
    if common is not None:
        return [_Start(common, True)] * len(stand_ins)
    known = [None if is_layer(target) else target.leads.high((stand_in.name, damping)) for stand_in in stand_ins]
    different = {k: lead for k, lead in enumerate(known) if lead is not None}
    rest = [_largest_of_gram(target)] if len(different) < len(stand_ins) else []
    spread = target.F.scores.rmatmat(torch.stack([*rest, *different.values()]).T).T
    own = {k: _Start(unit(x), True).complete(random) for k, x in zip(different, spread[len(rest) :], strict=True)}
    return [own[k] if k in own else _Start(unit(spread[0])).complete(random) for k in range(len(stand_ins))]


def _largest_of_gram(target: Target) -> Tensor:
    """A random y where the Gram matrix is large, ``(rows,)``."""
    F = target.F
    y = unit(Probes(F.scores.rows, F.dtype, F.device, target.options.seed + 1).gaussian(1)[:, 0])
    if target.exact and not F.solver.dense_side:
        for _ in range(_PREPARED_HIGH):
            y = unit(sum(F.scores.layer_gram(layer.name) @ y for layer in F.layout.layers))
    return y


class _Answers:
    """Answers the questions of all runs: those to stand-ins first, and when only such to F are left, these in one pass."""

    def __init__(self, target: Target, stand_ins: Sequence[StandIn], damping: float):
        self.target, self.stand_ins, self.damping = target, stand_ins, damping
        small = target.F.scores.rows < target.F.n_params
        self._along = Trail(len(stand_ins), target.F.memory / 8) if is_layer(target) and small else None
        # of blocks the whole knows where they are large
        others = any(type(stand_in.matrix) is not BlockDiagonal for stand_in in stand_ins)
        self._asked = Trail(len(stand_ins), target.F.memory / 8) if is_layer(target) and others else None

    def __call__(self, questions: list[Question]) -> list[Tensor | None]:
        count = len(self.stand_ins)
        # the second half of the runs has the roles of F and the stand-in exchanged
        to_stand_in = [(kind != PRODUCT) == (k < count) for k, kind, _ in questions]
        if any(to_stand_in):
            return [
                self._ask(k % count, kind, v) if own else None
                for (k, kind, v), own in zip(questions, to_stand_in, strict=True)
            ]
        products = [v for _, kind, v in questions if kind == PRODUCT]
        solves = [v for _, kind, v in questions if kind == SOLVE]
        F = self.target.F
        room = F.scores.workspace.empty((len(questions), F.n_params), F.dtype, F.device)
        both = torch.stack([*products, *solves], out=room).T  # each vector contiguous
        images, solutions, along = self.target.products_and_solves(both, len(products), self.damping)
        if along is not None and self._along is not None:
            asked = (k for k, kind, _ in questions if kind == PRODUCT)
            for k, z in zip(asked, along.T, strict=True):
                self._along.add(k, z)
        answers = {PRODUCT: iter(images.T), SOLVE: iter(solutions.T)}
        return [next(answers[kind]) for _, kind, _ in questions]

    def _ask(self, which: int, kind: str, v: Tensor) -> Tensor:
        stand_in = self.stand_ins[which]
        if kind == PRODUCT and self._asked is not None:
            self._asked.add(which, v)
        act = {
            SOLVE: stand_in.solve,
            PRODUCT: stand_in.product,
            MASS: stand_in.product,
            PRECONDITION: stand_in.precondition,
        }[kind]
        return act(v[:, None], self.damping)[:, 0]

    def lead(self, which: int, high: Extreme, inverse: Extreme) -> None:
        """Note the vectors that a layer found, for the whole network."""
        target, key = self.target, (self.stand_ins[which].name, self.damping)
        if self._along is not None and high.weights is not None:
            y = self._along.vector(which, high.weights)
            if y is not None:
                target.leads.note_high(key, high.value, y)
        if self._asked is not None and inverse.weights is not None:
            x = self._asked.vector(which, inverse.weights)
            if x is not None:
                target.leads.note_low(key, target.name, inverse.value, x)
