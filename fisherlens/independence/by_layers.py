r"""Both ends of M where the blocks are whole layers: all of it happens among the Gram matrices.

With x_l = U_lᵀ c_l on every layer, F and its blocks map such vectors to such vectors, and on what is orthogonal to them M is the identity:

.. math:: F x \to \sum_m k_m c_m, \qquad F_{ll} x_l \to k_l c_l, \qquad x \cdot y \propto \sum_l c_l^\top k_l d_l, \qquad k_l = U_l U_l^\top / W

so that Lanczos runs on coefficients, and no step touches the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.independence.options import run_options
from fisherlens.independence.target import Target
from fisherlens.linalg.dense import damped_cholesky, solve_factored
from fisherlens.linalg.pencil import PRODUCT, Extreme, Question, lanczos_run, serve
from fisherlens.linalg.probes import Probes

# Rounding of F relative to the damping up to which coefficients stay in its dtype (our choice; on LeNet, at 2.9e-3, both ends then err by 3e-6).
_SAFE = 3e-3


def has_room(target: Target) -> bool:
    """Whether the Gram matrices of all layers and their factors fit the budget, and are smaller than F."""
    F = target.F
    return target.exact and not F.solver.dense_side and 2 * len(F.scores.layers) * F.scores.rows**2 * 8 <= F.memory


def layer_extremes(target: Target, damping: float) -> tuple[Extreme, Extreme] | None:
    """Smallest and largest μ of the pair (F + λ, its layer blocks + λ), each to half the relative tolerance; 1 where F is zero.

    None where rounding has made them worthless. Coefficients in the null space of a k_l stand for no vector at all, and products with F put some there. M is the
    identity on them, so that they grow as the polynomials of the run do at μ = 1: without bounds where no μ is near, as for a small damping. The
    quotient of the vector that was found then differs from its Ritz value.
    """
    space = _Coefficients(target, damping)
    options = run_options(target.options, target.F.n_params) | {"dot": space.dot}
    start = Probes(space.k.shape[0] * space.k.shape[1], space.k.dtype, space.k.device, target.options.seed)
    c = start.gaussian(1).view(space.k.shape[:2])
    c /= torch.linalg.vector_norm(c)
    runs = [lanczos_run(space.whole(c), **options), lanczos_run(space.blocks(c), **options)]
    (high,), (inverse,) = found = serve(runs, space)
    if not high.steps:
        return Extreme(1.0, 0.0, 0, True), Extreme(1.0, 0.0, 0, True)
    if not all(space.stands(which, one, target.options.tol / 2) for which, (one,) in enumerate(found)):
        return None
    return Extreme(1 / inverse.value, inverse.error, inverse.steps, inverse.converged), high


class _Coefficients:
    """Products and solves of both matrices on coefficients c, ``(layers, rows)``."""

    def __init__(self, target: Target, damping: float):
        F = target.F
        self.damping = damping
        k = torch.stack([F.scores.layer_gram(layer.name) for layer in F.layout.layers]) / F.total_weight
        self.factors, self.factor = damped_cholesky(k, damping, "The Gram matrix of a layer"), F.solver.factor(damping)
        # Woodbury loses as many digits as F is larger than λ
        top = torch.linalg.matrix_norm(k.sum(0)).item()
        self._last: list[tuple[Tensor, int, Tensor]] = []
        self._asked: list[list[Tensor]] = [[], []]
        self.k = k if top * torch.finfo(k.dtype).eps <= _SAFE * damping else k.double()

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ_l a_lᵀ k_l b_l, the inner product of the vectors over W."""
        if self._known(a) is not None:
            a, b = b, a
        return (a * self._times(b)).sum()

    def _known(self, c: Tensor) -> Tensor | None:
        return next((k for old, version, k in self._last if old is c and version == c._version), None)

    def _times(self, c: Tensor) -> Tensor:
        """k_l c_l on every layer; the last few are kept, as a step needs each of them twice."""
        found = self._known(c)
        if found is None:
            found = torch.bmm(c[:, None], self.k)[:, 0]  # symmetric; from the left twice as fast
            self._last = [*self._last[-3:], (c, c._version, found)]
        return found

    def whole(self, c: Tensor) -> Tensor:
        """F + λ."""
        return self._times(c).sum(0) + self.damping * c

    def blocks(self, c: Tensor) -> Tensor:
        """F_b + λ."""
        return torch.add(self._times(c), c, alpha=self.damping)

    def _solve_blocks(self, d: Tensor) -> Tensor:
        return solve_factored(self.factors, d.double()[:, :, None])[:, :, 0].to(d.dtype)

    def _solve_whole(self, d: Tensor) -> Tensor:
        inner = solve_factored(self.factor, self._times(d).sum(0).double()[:, None])[:, 0]
        return (d - inner.to(d.dtype)) / self.damping

    def __call__(self, questions: list[Question]) -> list[Tensor]:
        """Run 0 is on (F + λ, F_b + λ), run 1 on the two exchanged."""
        act = {
            (0, True): self.whole,
            (0, False): self._solve_blocks,
            (1, True): self.blocks,
            (1, False): self._solve_whole,
        }
        for k, kind, v in questions:
            if kind == PRODUCT:
                self._asked[k].append(v)
        return [act[k, kind == PRODUCT](v) for k, kind, v in questions]

    def stands(self, which: int, found: Extreme, tol: float) -> bool:
        """Whether the vector that a run found has the quotient that it says."""
        if found.weights is None:
            return False
        x = sum(float(weight) * v for weight, v in zip(found.weights, self._asked[which], strict=True))
        a, m = (
            self.dot(x, act(x)).item()
            for act in ((self.whole, self.blocks) if which == 0 else (self.blocks, self.whole))
        )
        return m > 0 and abs(a / m - found.value) <= tol * abs(found.value)
