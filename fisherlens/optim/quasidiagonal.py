"""Quasi-diagonal natural gradient: the diagonal, and in each unit the row of the bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import NonFiniteError
from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim import texts
from fisherlens.optim.checks import all_finite
from fisherlens.optim.groups import Groups
from fisherlens.optim.kernels import RowMethod
from fisherlens.optim.units import (
    by_unit,
    chunks,
    has_plain_units,
    unit_count,
    unit_rows,
    unit_size,
    write_units,
)


class QuasiDiagonal(RowMethod):
    r"""Quasi-diagonal natural gradient: per unit, the diagonal of F and the products of weights with the bias, index 0.

    The metric that these define has F_ij = F_0i F_0j / F_00 for other pairs of a unit. Its damped inverse, with r_i = F_0i / F_00 and over
    the weights i of the unit, is

    .. math::
        D_i = F_{ii} - r_i F_{0i} + \lambda, \qquad
        s = \frac{\bar g_0 + \lambda \sum_i r_i \bar g_i / D_i}{F_{00} + \lambda (1 + \sum_i r_i F_{0i} / D_i)}, \qquad
        d_i = (\bar g_i - F_{0i} s) / D_i, \qquad d_0 = s - \sum_i r_i d_i, \qquad
        \theta \leftarrow \theta - \eta \nu d ,

    which for λ = 0 is d_i = (g_i - g_0 F_0i/F_00)/(F_ii - F_0i²/F_00), d_0 = g_0/F_00 - Σ_i d_i F_0i/F_00. A layer without bias or
    without weight has the diagonal alone. F: ρ F + (1 - ρ) of the batch's, divided by 1 - ρ^t. All other parameters: d = ḡ / (1 + λ).

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0, λ in the units of F.
    ema
        ρ in [0, 1); 0 averages nothing.
    likelihood, labels, seed
        ``"sampled"``: labels drawn from the model, an unbiased estimate of the Fisher. ``"true"``: those of the loss.
    momentum, weight_decay
        μ in [0, 1), of the directions; decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    kl_clip
        κ: ν = min(1, √(κ / (lr² ⟨d, ḡ⟩))) over the covered layers. None clips nothing.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; steps from one update of the statistics to the next.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree: there is no one source.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes``, ``retries`` and ``fallbacks`` (always 0: nothing is factorised).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: Ollivier, Riemannian metrics for neural networks I (arXiv 1303.0818); λ is added to the completed metric, and the defaults
    are our choice. Cost per step: the diagonal, one matrix product the size of a weight gradient in dense layers, and one more for the
    bias row; rows of convolutions 16 MiB at a time. State: 2 P floats.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = QuasiDiagonal(model, lr=0.1, damping=0.1)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.05), opt.diagnostics["steps"]
    (True, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        damping: float = 1e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.95,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        kl_clip: float | None = None,
        reduction: str = "mean",
        refresh: int = 1,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self._averages: dict[
            str, dict[str, Any]
        ] = {}  # layer -> diagonal and bias row (d_o, s each), divisor 1 - rho^t
        super().__init__(model, locals())

    def _has_statistics(self) -> bool:
        return bool(self._averages)

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        if self._tap.listening:
            fresh = {layer.name: self._moments(layer).mul_(scale) for layer in layers}
            for name, found in fresh.items():
                if not all_finite(found):
                    raise NonFiniteError(texts.BAD_STATISTICS.format(layer=name))
            for name, found in fresh.items():
                own = self._averages.setdefault(name, {"F": torch.zeros_like(found), "weight": 0.0})
                ema = self._options(name)["ema"]
                own["F"].lerp_(found, 1 - ema)
                own["weight"] = ema * own["weight"] + 1 - ema  # 1 - rho^t
        for layer in layers:
            if layer.name in self._averages:
                own, damping = self._averages[layer.name], self._options(layer.name)["damping"]
                diagonal, row = own["F"] / own["weight"]
                both = layer.weight is not None and layer.bias is not None
                d = _solve_units(diagonal, row if both else None, by_unit(layer, gradient), damping)
                write_units(layer, d, out)

    def _moments(self, layer: LayerInfo) -> Tensor:
        """Σ_n u_ni² and Σ_n u_ni u_n0 of every unit over the rows as they arrived, ``(2, d_o, s)``, the bias last."""
        like = self._parameters[0]
        out = like.new_zeros(2, unit_count(layer), unit_size(layer))
        for scores in chunks(layer, self._passes, like):
            if has_plain_units(scores):
                a, squares = scores.unit_inputs()[:, 0], scores.g[:, 0, 0].square()
                out[0] += squares.T @ a.square()
                out[1] += squares.T @ a
                continue
            for at, rows in unit_rows(scores):  # (k, n, s)
                out[0, at] += rows.square().sum(1)
                out[1, at] += torch.bmm(rows.mT, rows[:, :, -1:])[:, :, 0]
        return out

    def _state(self) -> dict[str, Any]:
        return {"kept": {}, "averages": {name: dict(own) for name, own in self._averages.items()}}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for own in state["averages"].values():
            self._require_entries(own, ("F", "weight"), "an average")
        self._averages = dict(state["averages"])


def _solve_units(diagonal: Tensor, row: Tensor | None, g: Tensor, damping: float) -> Tensor:
    """(F̂ + λI)⁻¹ g of every unit, all ``(d_o, s)``; the bias is the last column of ``row``. No small differences, however small λ."""
    if row is None:
        return g / (diagonal + damping)
    v, corner = (
        row[:, :-1],
        row[:, -1:],
    )  # F_0i and F_00; a bias without information has none in common with weights either
    r = v / torch.where(corner > 0, corner, 1)
    D = (diagonal[:, :-1] - r * v).clamp(min=0) + damping  # the clamp takes rounding away
    s = g[:, -1:] + damping * (r * g[:, :-1] / D).sum(1, keepdim=True)
    s = s / (corner + damping * (1 + (r * v / D).sum(1, keepdim=True)))  # p_0 + Σ_i r_i p_i
    p = (g[:, :-1] - v * s) / D
    return torch.cat([p, s - (r * p).sum(1, keepdim=True)], dim=1)
