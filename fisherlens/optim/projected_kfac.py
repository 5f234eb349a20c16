"""Projected Kronecker natural gradient: factors on small data-driven bases, with recursive inverses of the order of the basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.base import choice
from fisherlens.optim.factors import LayerWise, matrix_of, matrix_shape, whole, write_matrix
from fisherlens.optim.projection import (
    Seen,
    Side,
    apply_side,
    change_basis,
    damping_columns,
    orthonormal,
    random_basis,
    recursive_inverse,
    rows_of,
    seen_from,
    shares,
)
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
    lr, damping
        Step length and λ, both > 0; λ is shared between the factors, as above.
    likelihood
        Name or fisherlens likelihood; draws sampled labels. With true labels the loss says all.
    rank
        r; a factor of smaller order d has r = d and P = I, so that nothing is projected.
    sketches
        k, the random signs per row and update.
    ema
        β, in [0, 1). 0 averages nothing: each update inverts PᵀCP + γI of its own batch, without signs.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        ``"sampled"``: labels drawn from the model. ``"true"``: the user's loss. The seed also draws signs and first bases.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        Steps from one update of the inverses to the next; T_P, from one change of the bases to the next, at a step that updates.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing; 1e-2 is TENGraD's.
    rescale
        True gives the direction of each layer the length of its gradient.
    preset
        None or ``"paper"``, which agree: no text of this method is at hand, the algorithm is our reading.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of the inverses, ``retries`` (inverses made anew from the batch, because an update had lost its
        positive pivots), ``fallbacks`` (inverses that even so became I / (10⁶ γ)).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    The first update starts from PᵀCP of its batch, P from two power steps on random directions. The inverse is symmetrised after each
    update; without that float32 diverges within a few hundred updates. Cost per factor: 4 M T d r operations per change of the basis,
    2 M T d r per update, d r + r² floats; 4 P (r_A + r_G) per step. Convolutions: rows are positions, A a mean over examples, G over both.
    A step that changes the bases keeps the batch's inputs and scores until it is taken.

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
        preset: str | None = None,
    ):
        if preset is not None:
            choice("preset", preset, ("paper",))
        self.rank, self.sketches, self.rescale = whole("rank", rank), whole("sketches", sketches), rescale
        self.inverse_refresh = inverse_refresh
        self._drop()
        options = {"lr": lr, "damping": damping, "ema": ema, "momentum": momentum}
        options |= {"weight_decay": weight_decay, "kl_clip": kl_clip}
        shared = {"likelihood": likelihood, "labels": labels, "reduction": reduction, "refresh": refresh, "seed": seed}
        super().__init__(model, options, **shared)

    def _made(self) -> dict[str, Any]:
        made = {}
        for layer in self.covered:
            groups, d_o, d_i = matrix_shape(layer)
            for side, d in (("a", d_i), ("g", d_o)):
                r = min(self.rank, d)
                shapes = (groups, d, r), (groups, r, r), (groups,), (groups,), (groups,)
                zeros = (self._parameters[0].new_zeros(shape) for shape in shapes)
                made[f"{layer.name} {side}"] = Side(layer.name, *zeros)
        return made

    def _sides(self, layer: LayerInfo) -> tuple[Side, Side]:
        if self._records is None:
            self._records = self._made()
        return self._records[f"{layer.name} a"], self._records[f"{layer.name} g"]

    def _absorb(self, one: Pass, examples: int) -> None:
        for layer, calls in self._layers(one):
            self._counts[layer.name] = self._counts.get(layer.name, 0) + examples
            sides = self._sides(layer)
            if self._inverse_due or not sides[0].steps:  # the bases come first
                self._held.setdefault(layer.name, []).append(calls)
            else:
                self._look(layer, calls, [side.P for side in sides])

    def _draws(self) -> torch.Generator:
        """Random numbers of this step, the same again after a step that was refused."""
        if self._step_generator is None:
            self._step_generator = torch.Generator().manual_seed(
                ((self.seed << 32) + self.diagnostics["steps"]) % 2**63
            )
        return self._step_generator

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"seed": self.seed}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        self.seed = state["seed"]

    def _drop(self) -> None:
        self._step_generator: torch.Generator | None = None
        self._held: dict[str, list[list[Call]]] = {}
        self._seen_from: dict[str, tuple[Seen, Seen]] = {}
        self._counts: dict[str, int] = {}

    def _look(self, layer: LayerInfo, calls: Sequence[Call], bases: Sequence[Tensor]) -> None:
        """Add one pass to what is seen from the bases."""
        for rows in rows_of(layer, calls, self._parameters[0].dtype, self._workspace):
            found = tuple(seen_from(P, x, self.sketches, self._draws()) for x, P in zip(rows, bases, strict=True))
            old = self._seen_from.get(layer.name)
            self._seen_from[layer.name] = found if old is None else (old[0] + found[0], old[1] + found[1])

    def _bases(self, layer: LayerInfo) -> list[Tensor]:
        """P ← qr(C P) from the current batch; the first time from random directions, twice."""
        sides = self._sides(layer)
        P = [random_basis(side.P, self._draws()) if not side.steps else side.P for side in sides]
        for _ in range(1 if sides[0].steps else 2):
            if all(one.shape[1] == one.shape[2] for one in P):
                break
            powers = [torch.zeros_like(one) for one in P]
            for calls in self._held[layer.name]:
                for rows in rows_of(layer, calls, self._parameters[0].dtype, self._workspace):
                    for power, one, x in zip(powers, P, rows, strict=True):
                        power += x @ (x.mT @ one)
            self._require_finite_parts([(layer.name, powers)])
            P = [orthonormal(power, one) for power, one in zip(powers, P, strict=True)]
        return P

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        options = self.param_groups[0]
        layers = [layer for layer in self.covered if layer.name in active]
        bases = {}
        for layer in layers:
            if layer.name in self._held:
                bases[layer.name] = self._bases(layer)
                for calls in self._held[layer.name]:
                    self._look(layer, calls, bases[layer.name])
        means = {}
        for layer in layers:
            if layer.name in self._seen_from:
                factors = 1 / self._counts[layer.name], scale
                pairs = zip(self._seen_from[layer.name], factors, strict=True)
                means[layer.name] = tuple(one.mean(factor) for one, factor in pairs)
        self._require_finite_parts((k, [x for s in pair for x in vars(s).values()]) for k, pair in means.items())
        for layer in layers:
            sides = self._sides(layer)
            if layer.name in means:
                self._update(sides, means[layer.name], bases.get(layer.name), options["ema"], options["damping"])
            if sides[0].steps:  # else the rule for parameters without statistics stands
                self._write_direction(layer, sides, matrix_of(layer, gradient), out)

    def _update(
        self, sides: tuple[Side, Side], seen: tuple[Seen, Seen], bases: Sequence[Tensor] | None, beta: float, damping: float
    ) -> None:  # fmt: skip
        levels = [side.level for side in sides]
        for side, new in zip(sides, seen, strict=True):
            side.average(new, beta)
        for k, gamma in enumerate(shares(*sides, damping)):
            side, new, fresh = sides[k], seen[k], not sides[k].steps or beta == 0
            if bases is not None:
                if not fresh:
                    change_basis(side, bases[k], levels[k])
                side.P = bases[k]
            side.gamma = gamma
            stands = torch.zeros(len(gamma), dtype=torch.bool, device=gamma.device)
            if not fresh:
                columns = torch.cat([new.sketch, damping_columns(side.Q, gamma, side.steps)], dim=2)
                side.Q, stands = recursive_inverse(side.Q, columns, beta)
                self.diagnostics["retries"] += int((~stands).sum())
            if not stands.all():  # from the batch itself
                side.Q[~stands] = self._inverted([(new.gram[~stands], gamma[~stands].double())])[0]
            side.steps += 1

    def _write_direction(self, layer: LayerInfo, sides: tuple[Side, Side], gradient: Tensor, out: Tensor) -> None:
        right = apply_side(sides[0], gradient.mT).mT
        u = apply_side(sides[1], right)
        if self.rescale:
            length = torch.linalg.vector_norm(u)
            u = u * (torch.linalg.vector_norm(gradient) / length) if length > 0 else u
        write_matrix(layer, u, out)
