r"""Claim: the quadratic model tells how much one step of each preconditioner gains.

For a direction d = −P⁻¹g the model m(α) = α gᵀd + ½ α² dᵀFd is smallest at α* = −gᵀd/dᵀFd, where it promises the decrease
(gᵀd)²/(2 dᵀFd). The loss on the same data is then taken at θ + α* d. Damping λ enters the directions, not the model: F alone says how the
loss bends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from fisherlens.approximations import KFAC, BlockDiagonal, Diagonal
from fisherlens.errors import FisherLensError
from fisherlens.training.verify.claim import Claim, Curve, Row, equal, order
from fisherlens.training.verify.subject import Subject

TOLERANCE = 0.25  # of each decrease, our choice
SAME_ORDER = 0.7  # rank correlation between preconditioners, our choice
FRACTIONS = np.array([0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])  # of the best step length, for the series behind the rows

_STEPS: dict[str, str] = {
    "gradient": "the gradient",
    "ngd": "exact natural gradient",
    "cw-ngd": "natural gradient on the blocks of CW-NGD",
    "mbf": "natural gradient on the shared blocks of MBF",
    "unit": "unit-wise natural gradient",
    "kfac": "KFAC",
    "diagonal": "the diagonal of F",
}


def one_step(subjects: Sequence[Subject]) -> Claim:
    """Compare the decrease that the quadratic model promises at its best step length with that of the loss, for seven preconditioners.

    A preconditioner that a network does not admit (KFAC of a layer that it does not know) is left out. Cost: seven solves and about 60
    losses per seed.
    """
    promised = np.full((len(subjects), len(_STEPS), len(FRACTIONS)), np.nan)
    happened = np.full_like(promised, np.nan)
    missing: dict[str, str] = {}
    for number, subject in enumerate(subjects):
        here = subject.loss(subject.theta)
        for place, name in enumerate(_STEPS):
            subject.tick(f"seed {subject.seed}, {name}")
            try:
                direction = -step(subject, name)
            except FisherLensError as error:
                missing[name] = str(error).splitlines()[0]
                continue
            slope = float(subject.gradient @ direction)
            bend = float(direction @ subject.product(direction))
            if not (slope < 0 < bend):
                continue  # no decrease is promised
            best = -slope / bend
            length = FRACTIONS * best
            promised[number, place] = -(length * slope + length**2 * bend / 2)
            after = np.array([subject.loss(subject.theta + a * direction) for a in length])
            happened[number, place] = here - np.where(np.isnan(after), np.inf, after)  # a loss that overflows has risen
    at_best = int(np.flatnonzero(FRACTIONS == 1.0)[0])
    rows = [
        _row(name, promised[:, place, at_best], happened[:, place, at_best])
        for place, name in enumerate(_STEPS)
        if name not in missing
    ]
    both = [(promised[i, :, at_best], happened[i, :, at_best]) for i in range(len(subjects))]
    rows.append(_order(both, missing))
    coords = {
        "one_step_preconditioner": ("one_step_preconditioner", list(_STEPS), {"long_name": "preconditioner"}),
        "one_step_fraction": ("one_step_fraction", FRACTIONS, {"long_name": "step over the best one", "units": "1"}),
    }
    dims = ("seed", "one_step_preconditioner", "one_step_fraction")
    curves = {
        "one_step_promised": Curve(
            dims, promised, {"long_name": "decrease that the quadratic model promises", "units": "nat"}, coords
        ),
        "one_step_happened": Curve(dims, happened, {"long_name": "decrease of the loss", "units": "nat"}, coords),
    }
    return Claim(tuple(rows), curves)


def step(subject: Subject, name: str) -> Tensor:
    """P⁻¹g of one preconditioner, always of the Fisher itself, at the subject's damping."""
    F, lam, g = subject.true_fisher, subject.damping, subject.gradient
    solvers: dict[str, Callable[[], Tensor]] = {
        "gradient": lambda: g,
        "ngd": lambda: F.solve(g, lam),
        "cw-ngd": lambda: BlockDiagonal(F, "cw-ngd").solve(g, lam),
        "mbf": lambda: BlockDiagonal(F, "mbf", shared=True).solve(g, lam),
        "unit": lambda: BlockDiagonal(F, "unit").solve(g, lam),
        "kfac": lambda: KFAC(F).solve(g, lam),
        "diagonal": lambda: Diagonal(F).solve(g, lam),
    }
    return solvers[name]()


def _row(name: str, promised: np.ndarray, happened: np.ndarray) -> Row:
    return equal(
        f"one_step/{name}",
        f"One step along {_STEPS[name]}, of the length that the quadratic model finds best, lowers the loss by as much as the model promises.",
        list(zip(promised.tolist(), happened.tolist(), strict=True)),
        TOLERANCE,
        unit="nat",
    )


def _order(both: list[tuple[np.ndarray, np.ndarray]], missing: dict[str, str]) -> Row:
    return order(
        "one_step/order",
        "The preconditioner whose best step promises more gains more: promised and real decreases rank alike.",
        both,
        SAME_ORDER,
        note="; ".join(f"without {name}: {why}" for name, why in missing.items()),
    )
