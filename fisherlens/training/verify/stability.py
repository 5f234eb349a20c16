r"""Claim: full-batch steps diverge above the rate 2/μ_max that the analysis gives, and not below.

==============  =========================  =============================================
steps           update                     largest stable rate on ½ δᵀFδ
==============  =========================  =============================================
sgd             g                          2/λ_max
ngd             (F + λ)⁻¹ g                2 (λ_max + λ)/λ_max
block-layer     (F_b + λ)⁻¹ g              2/μ_max, μ_max of (F_b + λ)⁻¹ F
block-unit      the same, unit by unit
==============  =========================  =============================================

What is measured is found by bisection on the rate, with steps alone (``thresholds``): on the quadratic model ½ δᵀFδ, where the claim is exact,
and on the loss near θ, of which the linear part is taken off, L(θ + δ) − gᵀδ, so that θ is stationary whether training has converged or
not. There the Hessian governs, and F stands in for it: F = H at a minimum that fits well, and for a model linear in its parameters. Elsewhere F may miss by much
where it is small and divided by: (F + λ)⁻¹ makes of a curvature that F does not have the largest of all. The Hessian's own predictions, 2/μ_max of
(F + λ)⁻¹ H and so on, are rows beside these, and so is plain training: the rate above which the loss rises above where it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import MemoryBudgetError
from fisherlens.fisher import Fisher
from fisherlens.spectrum import top_eigenvalues
from fisherlens.training.verify.claim import Claim, Row, equal
from fisherlens.training.verify.subject import Subject
from fisherlens.training.verify.thresholds import Map, bisect, largest_stable_rate

BLOCKS = ("layer", "unit")
EXACT = 0.02  # of the quadratic model: what some dozen steps can tell apart in a cluster at the top of the spectrum
NEAR = 0.1  # of the loss by F, and by H: our choices
BY_HESSIAN = 0.02
TRAINING = 0.25
_ENERGY = 1e-8  # nat, of the start on the loss: far above rounding, far below what bends it
_WARM_UP = 20

_STEPS = {
    "sgd": "gradient descent",
    "ngd": "damped natural gradient",
    "block-layer": "block-wise natural gradient, a block per layer,",
    "block-unit": "block-wise natural gradient, a block per unit,",
}


def stability(subjects: Sequence[Subject]) -> Claim:
    """Compare 2/μ_max with the rate above which full-batch steps grow, on the quadratic model and on the loss.

    Cost: per seed about 1,000 products and solves with F, 500 gradients and 200 Hessian products at ``gd_steps = 24``.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for subject in subjects:
        for name, pair in _pairs(subject):
            found.setdefault(name, []).append(pair)
    return Claim(tuple(_row(name, pairs, subjects[0]) for name, pairs in found.items()))


def _pairs(subject: Subject) -> list[tuple[str, tuple[float, float]]]:
    """(predicted, measured) of every row for one seed."""
    F, theta, g = subject.true_fisher, subject.theta, subject.gradient
    start = torch.randn(len(theta), generator=subject.generator(11), dtype=torch.float64, device="cpu").to(theta)

    def near(delta: Tensor) -> Tensor:
        return subject.gradient_at(theta + delta) - g

    blocks = _blocks(F)
    rates, inverse = predictions(subject, blocks), preconditioners(subject, blocks)
    rows: list[tuple[str, tuple[float, float]]] = []
    measured: dict[str, float] = {}
    for name in rates:
        subject.tick(f"seed {subject.seed}, {name}")
        on_model = largest_stable_rate(
            lambda v: F @ v,
            inverse[name],
            start,
            length=1.0,
            warm_up=4 * _WARM_UP,
            steps=subject.budget.gd_steps,
            precision=2e-3,
            definite=True,
        )
        on_loss = largest_stable_rate(
            near,
            inverse[name],
            start,
            length=_length(subject),
            warm_up=_WARM_UP,
            steps=subject.budget.gd_steps // 4,
            precision=4e-3,
            definite=False,
        )
        rows += [(f"{name}-quadratic", (rates[name], on_model)), (name, (rates[name], on_loss))]
        measured[name] = on_loss
    subject.tick(f"seed {subject.seed}, Hessian")
    rows += [(f"{name}-hessian", (rate, measured[name])) for name, rate in _by_hessian(subject, blocks).items()]
    subject.tick(f"seed {subject.seed}, training")
    return [*rows, ("sgd-training", (rates["sgd"], training_rate(subject, rates["sgd"])))]


def predictions(subject: Subject, blocks: dict[str, BlockDiagonal]) -> dict[str, float]:
    """Largest stable rates by the operator that predicts."""
    lam, operator = subject.damping, subject.fisher
    top = float(top_eigenvalues(operator, 1, progress=False)["eigenvalue"][0])
    rates = {"sgd": _twice_over(top), "ngd": _twice_over(top / (top + lam))}
    for name, part in blocks.items():
        found = top_eigenvalues(operator, 1, B=_in_dtype_of(operator, part, lam), progress=False)
        rates[name] = _twice_over(float(found["eigenvalue"][0]))
    return rates


def preconditioners(subject: Subject, blocks: dict[str, BlockDiagonal]) -> dict[str, Map]:
    """Maps c → P⁻¹ c of every kind of steps, always of the Fisher itself."""
    F, lam = subject.true_fisher, subject.damping
    found: dict[str, Map] = {"sgd": lambda c: c, "ngd": lambda c: F.solve(c, lam)}
    return found | {name: _solver(part, lam) for name, part in blocks.items()}


def _blocks(F: Fisher) -> dict[str, BlockDiagonal]:
    """The block-diagonal parts of F, but for those over the memory budget."""
    found = {}
    for scheme in BLOCKS:
        with suppress(MemoryBudgetError):
            found[f"block-{scheme}"] = BlockDiagonal(F, scheme)
    return found


def _solver(blocks: BlockDiagonal, lam: float) -> Map:
    return lambda c: blocks.solve(c, lam)


class _Damped:
    """F_b + λ on vectors of the dtype that another operator has."""

    def __init__(self, blocks: BlockDiagonal, lam: float, dtype: torch.dtype):
        self._blocks, self._lam, self.dtype = blocks, lam, dtype
        self.shape, self.device = blocks.shape, blocks.device

    def __matmul__(self, v: Tensor) -> Tensor:
        wide = v.to(self._blocks.dtype)
        return ((self._blocks @ wide) + self._lam * wide).to(self.dtype)

    def solve(self, v: Tensor) -> Tensor:
        """(F_b + λ)⁻¹ v."""
        return self._blocks.solve(v.to(self._blocks.dtype), self._lam).to(self.dtype)


def _in_dtype_of(operator: object, blocks: BlockDiagonal, lam: float) -> object:
    dtype = getattr(operator, "dtype", blocks.dtype)
    return (blocks, lam) if dtype == blocks.dtype else _Damped(blocks, lam, dtype)


def _twice_over(value: float) -> float:
    return 2 / value if value > 0 else math.inf


def _length(subject: Subject) -> float:
    """Length of a step along the top direction that costs 1e-8 nat."""
    return math.sqrt(2 * _ENERGY / max(subject.largest_eigenvalue, 1e-30))


def _by_hessian(subject: Subject, blocks: dict[str, BlockDiagonal]) -> dict[str, float]:
    """Largest stable rates near θ by the operator that governs there, preconditioned as the steps are."""
    H = Fisher(subject.model, subject.data, likelihood=subject.likelihood, kind="hessian", progress=False)
    lam = subject.damping
    metrics: dict[str, Any] = {"sgd": None, "ngd": (subject.true_fisher, lam)}
    metrics |= {name: (part, lam) for name, part in blocks.items()}
    found = {name: top_eigenvalues(H, 1, B=B, tol=1e-4, progress=False) for name, B in metrics.items()}
    return {name: _twice_over(float(one["eigenvalue"][0])) for name, one in found.items()}


def training_rate(subject: Subject, guess: float) -> float:
    """The rate above which the loss, in plain full-batch gradient descent from θ, rises above where it starts."""
    return bisect(_rises(subject), guess if 0 < guess < math.inf else 1.0, 0.03)


def _rises(subject: Subject) -> Callable[[float], bool]:
    start, first = subject.theta, subject.loss(subject.theta)

    def rises(rate: float) -> bool:
        theta = start - rate * subject.gradient
        for _ in range(subject.budget.gd_steps):
            loss, slope = subject.loss_and_gradient(theta)
            if not loss <= first + 1e-10 * abs(first):  # rounding aside; NaN has risen
                return True
            theta = theta - rate * slope
        return False

    return rises


def _row(name: str, pairs: list[tuple[float, float]], subject: Subject) -> Row:
    steps, _, case = name.rpartition("-") if name not in _STEPS else (name, "", "")
    if case == "quadratic":
        statement = f"On the quadratic model ½ δᵀFδ, {_STEPS[steps]} diverges above the rate 2/μ_max, and not below."
        tolerance = EXACT
    elif case == "hessian":
        statement = f"Near θ, {_STEPS[steps]} on the loss diverges above 2/μ_max of the Hessian, preconditioned alike, which governs it there."
        tolerance = BY_HESSIAN
    elif case == "training":
        statement = "In training from θ, the loss rises above its start for learning rates above 2/λ_max of F."
        tolerance = TRAINING
    else:
        statement = f"Near θ, {_STEPS[name]} on the loss diverges above 2/μ_max as F gives it."
        tolerance = NEAR
    note = (
        ""
        if steps == "sgd"
        else "damping λ: "
        + (f"{subject.given_damping:g} nat" if subject.given_damping is not None else "a hundredth of λ_max")
    )
    return equal(f"stability/{name}", statement, pairs, tolerance, unit="1", note=note)
