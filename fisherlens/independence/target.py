"""What a stand-in is judged against: the Fisher of the network or of a layer, exact where its smaller side fits, else estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fisherlens.errors import MemoryBudgetError, readable_bytes
from fisherlens.fisher import DIRECT_LIMIT, Fisher
from fisherlens.independence.leads import Leads
from fisherlens.independence.options import DEFLATE, Options
from fisherlens.linalg.dense import solve_factored
from fisherlens.spectrum.functions import log_of
from fisherlens.spectrum.moments import Functions, Sampled, integrate, sample
from fisherlens.spectrum.side import side_for

# A matrix up to this order is always within reach, whatever the budget says (as fl.spectrum does).
_ALWAYS = 2000


@dataclass(frozen=True)
class Value:
    """A number with its standard error, 0 where it is exact."""

    value: float
    sem: float = 0.0


@dataclass(frozen=True)
class Step:
    """The exact natural gradient at one damping: p = (F + λ)⁻¹ g with g · p, and log det(I + F/λ)."""

    damping: float
    vector: Tensor
    decrease: float
    log_determinant: Value


class Jacobi:
    """The diagonal of F as a preconditioner."""

    def __init__(self, diagonal: Tensor):
        self._diagonal = diagonal

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """(diag F + λ)⁻¹ v."""
        return v / (self._diagonal + damping)[:, None]


class Target:
    """A Fisher with what every judgement compares with.

    Parameters
    ----------
    F
        The operator, or its restriction to a layer.
    name
        The layer, or ``"all"``.
    options
        How to find what is too expensive.
    diagonal
        F_ii, float64 ``(P,)``.

    Attributes
    ----------
    exact
        Whether the smaller of F and its Gram matrix is factored; else solves are iterative and determinants estimated.
    leads
        What layers found, as a start for the whole network.
    common, solved
        With its λ, the vector that μ_max begins with for all stand-ins; and (F̂ + λ)⁻¹ of it, by stand-in and λ, where it came along with another solve.
    """

    def __init__(self, F: Fisher, name: str, options: Options, diagonal: Tensor):
        self.F, self.name, self.options, self.diagonal = F, name, options, diagonal
        self.exact = options.method != "estimate" and self._factors()
        self.gradient = F.gradient()
        self._step: Step | None = None
        self.leads = Leads(F.memory / 8)
        self.common: tuple[float, Tensor] | None = None
        self.solved: dict[tuple[str, float], Tensor] = {}

    def _factors(self) -> bool:
        F = self.F
        order, item = F.solver.order, F.dtype.itemsize
        # one Gram matrix per layer is kept, and the factor with its workspace is float64
        needed = order**2 * (24 + len(F.scores.layers) * item)
        if F.solver.direct and (order <= _ALWAYS or needed <= F.memory):
            return True
        if self.options.method == "exact":
            raise MemoryBudgetError(
                f"method='exact' needs a Cholesky factor of order {order} for {self.name!r}, {readable_bytes(needed)} with the Gram matrices; the limits are "
                f"order {DIRECT_LIMIT} and the budget of {readable_bytes(F.memory)}. Use method='auto', which estimates with error bars, fewer examples, "
                "kind='mc', or raise memory= of the Fisher."
            )
        return False

    @property
    def words(self) -> str:
        """How determinant and norm were found, for ``method`` in results."""
        if self.exact:
            return "exact through the Gram matrix"
        return self._sampled.words if "_sampled" in self.__dict__ else "conjugate gradients"

    @cached_property
    def _sampled(self) -> Sampled:
        o = self.options
        side = side_for(self.F, o.num_probes * o.num_matvecs, width=o.num_probes)
        return sample(side, o.num_probes, o.num_matvecs, DEFLATE, o.seed)

    @cached_property
    def squared_norm(self) -> Value:
        """‖F‖², exact wherever the matrix on the smaller side has room, also where its factor has none."""
        order = self.F.solver.order
        room = order <= _ALWAYS or order**2 * self.F.dtype.itemsize * (2 + len(self.F.scores.layers)) <= self.F.memory
        if self.exact or (room and self.options.method != "estimate"):
            return Value(self.F.frobenius_norm() ** 2)
        found = self._integrated(lambda x: x * x)
        return Value(float(found.value[0]), float(found.sem[0]))

    def _integrated(self, function: object) -> Functions:
        return integrate(self._sampled.rules, [function])

    def _log_determinant(self, damping: float) -> Value:
        if self.exact:
            return Value(self.F.solver.log_determinant(damping))
        found = self._integrated(lambda x: log_of(x, damping))
        value, lower, sem = float(found.value[0]), float(found.lower[0]), float(found.sem[0])
        # Gauss and Gauss-Radau rules lie on the two sides of every probe's own value; deflated pairs leak by their residuals
        slack = self._sampled.leak / damping + self._sampled.rules.rounding * abs(value)
        return Value((value + lower) / 2, math.hypot(sem, (value - lower) / 2 + slack))

    def step(self, damping: float) -> Step:
        """The exact step at this damping; the last one is kept."""
        if self._step is None or self._step.damping != damping:
            if self.exact:
                p = self.F.natural_gradient(damping)
            else:
                p = self.F.solve(self.gradient, damping, preconditioner=Jacobi(self.diagonal.to(self.F.dtype)))
            decrease = (self.gradient.double() @ p.double()).item()
            self._step = Step(damping, p, decrease, self._log_determinant(damping))
        return self._step

    def curvature(self, vectors: Tensor, damping: float) -> np.ndarray:
        """vᵀ (F + λ) v of the columns of ``(P, K)``, float64 ``(K,)``."""
        images = self.F.scores.matmat(vectors).double().square().sum(0) / self.F.total_weight
        lengths = torch.linalg.vector_norm(vectors.T, dim=1, dtype=torch.float64)
        return (images + damping * lengths.square()).cpu().numpy()

    @cached_property
    def dense(self) -> Tensor:
        """The matrix in float64, for small ones."""
        return self.F.dense().double()

    def products_and_solves(self, both: Tensor, k: int, damping: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """(F + λ) V and (F + λ)⁻¹ R for ``[V, R]``, ``(P, K + L)`` with each vector contiguous, in one pass over the scores.

        Also U V, ``(rows, K)``, where that was on the way.
        """
        F, v, r = self.F, both[:, :k], both[:, k:]
        if F.solver.dense_side or F.plan.streamed or F.plan.linearised:
            images = (F._product(v) + damping * v) if k else v
            return images, (F.solver.solve(r, damping) if r.shape[1] else r), None
        z = F.scores.matmat(both)
        along = z[:, :k].clone()
        z.div_(F.total_weight)
        if r.shape[1]:
            z[:, k:] = solve_factored(F.solver.factor(damping), z[:, k:].double()).div_(-damping).to(z.dtype)
        y = F.scores.rmatmat(z)
        return y[:, :k].add_(v, alpha=damping), y[:, k:].add_(r, alpha=1 / damping), along
