"""Projected Kronecker natural gradient: factors on small data-driven bases, with recursive inverses of the order of the basis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.checks import whole
from fisherlens.optim.factors import matrix_of, matrix_shape, write_matrix
from fisherlens.optim.groups import Groups
from fisherlens.optim.layerwise import LayerWise, accumulate
from fisherlens.optim.projection import Pair, Seen, Side, apply_side, power_steps, seen_from, shares
from fisherlens.optim.side_rows import PatchRows, Rows, rows_of
from fisherlens.optim.tap import Call, Pass


class ProjectedKFAC(LayerWise):
    r"""Kronecker-factored natural gradient on bases of r directions, with inverses that are updated and never recomputed.

    A factor C = mean x xᵀ (x: inputs with a 1 for the bias, or output scores; see :class:`KFAC`) is known on an orthonormal basis P,
    (d, r), as PᵀCP, and by one level s = tr(C - PPᵀC) / (d - r) everywhere else. Every T_P steps P ← qr(CP) from the current batch.
    Q = (PᵀCP + γI)⁻¹ follows each update by Woodbury's formula, for k random signs S over the M rows X of a batch,

    .. math::
        V = [P^\top X^\top S^\top / \sqrt{M k},\ \sqrt{\gamma r / 4}\, e_j \text{ for the next 4 } j], \qquad
        Q^{-1} \leftarrow \beta Q^{-1} + (1 - \beta) V V^\top,

    where the columns e_j, in cyclic order, average to γI and so keep the damping from fading. The direction is

    .. math::
        u = \hat G^{-1} \bar G \hat A^{-1}, \qquad
        \hat C^{-1} = \frac{I}{s + \gamma} + P \Big(Q - \frac{I}{s + \gamma}\Big) P^\top,

    with γ_A = π √λ, γ_G = √λ / π, π² = (tr A / d_i) / (tr G / d_o). Parameters without factors: ḡ / (1 + λ), announced once.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    rank, sketches
        r; a factor of smaller order d has r = d and P = I, so that nothing is projected. k, the random signs per row and update.
    lr, damping, ema
        Step length and λ, both > 0, λ shared between the factors as above. β in [0, 1); 0 averages nothing: each update inverts PᵀCP + γI
        of its own batch, without signs.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    likelihood, labels, seed
        ``"sampled"``: labels drawn from the model. ``"true"``: the user's loss. The seed also draws signs and first bases.
    reduction, refresh, inverse_refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; steps from one update of the inverses to the next; T_P, from one change of
        the bases to the next, at a step that updates.
    kl_clip, rescale
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))), None clips nothing, 1e-2 is
        TENGraD's. True gives the direction of each layer the length of its gradient.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree: the algorithm is our reading.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of the inverses, ``retries`` (inverses made anew from the batch: an update had lost its positive pivots),
        ``fallbacks`` (inverses that even so became I / (10⁶ γ)).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    The first update starts from PᵀCP of its batch, P from two power steps on random directions. The inverse is symmetrised after each update; without that
    float32 diverges within a few hundred. Cost per factor: 4 M T d r operations per change of the basis, 2 M T d r per update, d r + r² floats; 4 P (r_A + r_G)
    per step. Convolutions: rows are positions, A a mean over examples, G over both. A step that changes the bases keeps inputs and scores until it is taken.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = ProjectedKFAC(model, lr=0.05, rank=4)
    >>> for _ in range(40):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["retries"]
    (True, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        damping: float = 3e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        rank: int = 32,
        sketches: int = 4,
        ema: float = 0.95,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        reduction: str = "mean",
        refresh: int = 1,
        inverse_refresh: int = 50,
        kl_clip: float | None = 1e-2,
        rescale: bool = False,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.rank, self.sketches, self.rescale = whole("rank", rank), whole("sketches", sketches), rescale
        super().__init__(model, locals())

    def _made(self) -> dict[str, Any]:
        made = {}
        for layer in self.covered:
            B, d_o, d_i = matrix_shape(layer)
            made[f"{layer.name} a"] = Side.zeros(layer.name, self._parameters[0], B, d_i, self.rank)
            made[f"{layer.name} g"] = Side.zeros(layer.name, self._parameters[0], B, d_o, self.rank)
        return made

    def _sides(self, layer: LayerInfo) -> tuple[Side, Side]:
        self._records = self._made() if self._records is None else self._records
        return self._records[f"{layer.name} a"], self._records[f"{layer.name} g"]

    def _absorb(self, one: Pass, examples: int) -> None:
        for layer, calls in self._layers(one):
            accumulate(self._counts, layer, examples)
            sides = self._sides(layer)
            if self._inverse_due or not sides[0].steps:  # the bases come first
                self._held.setdefault(layer.name, []).append(calls)
            else:
                self._look(layer, calls, [side.P for side in sides])

    def _draws(self) -> torch.Generator:
        """Random numbers of this step, the same again after a step that was refused."""
        if self._step_generator is None:
            seed = ((self.seed << 32) + self.diagnostics["steps"]) % 2**63
            self._step_generator = torch.Generator().manual_seed(seed)
        return self._step_generator

    def _drop(self) -> None:
        super()._drop()  # of what is seen from the bases
        self._step_generator: torch.Generator | None = None
        self._held: dict[str, list[list[Call]]] = {}
        self._counts: dict[str, int] = {}

    def _rows(self, layer: LayerInfo, passes: Sequence[Sequence[Call]]) -> Iterator[tuple[Rows | PatchRows, Rows]]:
        for calls in passes:
            yield from rows_of(layer, calls, self._parameters[0].dtype, self._workspace)

    def _look(self, layer: LayerInfo, calls: Sequence[Call], bases: Sequence[Tensor]) -> None:
        """Add one pass to what is seen from the bases."""
        for rows in self._rows(layer, [calls]):
            a, g = (seen_from(P, x, self.sketches, self._draws()) for x, P in zip(rows, bases, strict=True))
            accumulate(self._sums, layer, Pair(a, g))

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        bases = {}
        for layer in layers:
            if passes := self._held.get(layer.name):
                rows = partial(self._rows, layer, passes)
                bases[layer.name] = power_steps(self._sides(layer), rows, self._draws())
                for calls in passes:
                    self._look(layer, calls, bases[layer.name])
        seen = {layer.name: self._sums[layer.name] for layer in layers if layer.name in self._sums}
        means = {name: (pair.a.mean(1 / self._counts[name]), pair.g.mean(scale)) for name, pair in seen.items()}
        self._require_finite_parts((k, [x for s in pair for x in vars(s).values()]) for k, pair in means.items())
        for layer in layers:
            sides = self._sides(layer)
            if layer.name in means:
                self._update(sides, means[layer.name], bases.get(layer.name))
            if sides[0].steps:  # else the rule for parameters without statistics stands
                self._write_direction(layer, sides, matrix_of(layer, gradient), out)

    def _update(self, sides: tuple[Side, Side], seen: tuple[Seen, Seen], bases: Sequence[Tensor] | None) -> None:
        options = self._options(sides[0].layer)
        levels = [side.level for side in sides]
        for side, new in zip(sides, seen, strict=True):
            side.average(new, options["ema"])
        gammas = shares(*sides, options["damping"])
        for k, (side, new, gamma) in enumerate(zip(sides, seen, gammas, strict=True)):
            lost, afresh = side.advance(new, gamma, bases and (bases[k], levels[k]), options["ema"])
            self.diagnostics["retries"] += 0 if afresh else int(lost.sum())
            if lost.any():  # from the batch itself
                side.Q[lost] = self._inverted([(new.gram[lost], gamma[lost].double())])[0]

    def _write_direction(self, layer: LayerInfo, sides: tuple[Side, Side], gradient: Tensor, out: Tensor) -> None:
        u = apply_side(sides[1], apply_side(sides[0], gradient.mT).mT)
        if self.rescale and u.any():
            u = u * (torch.linalg.vector_norm(gradient) / torch.linalg.vector_norm(u))
        write_matrix(layer, u, out)
