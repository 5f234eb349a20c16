"""Unit-wise natural gradient: one Fisher block per output unit, its bias inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.groups import Groups
from fisherlens.optim.kernels import RowMethod
from fisherlens.optim.rows import batch_scores, owned, packed, unpacked
from fisherlens.optim.units import (
    by_unit,
    chunks,
    solve_by_kernels,
    unit_count,
    unit_rows,
    unit_size,
    write_units,
)
from fisherlens.scores.base import LayerScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ExplicitScores


class UnitWise(RowMethod):
    r"""Unit-wise natural gradient: the weights into one output unit (or channel) and its bias are a block.

    With X_o the rows of unit o, one per example (u_n restricted to the block; g_no [a_n, 1] for one position), and ḡ_o the mean
    gradient

    .. math::
        F_o \leftarrow \rho F_o + (1 - \rho) \tfrac{1}{M} X_o^\top X_o, \qquad
        d_o = \Big( \frac{F_o}{1 - \rho^t} + \lambda I \Big)^{-1} \bar g_o, \qquad \theta \leftarrow \theta - \eta \nu d.

    Without averaging (ρ = 0) a block with more parameters than the batch has examples is inverted through its M x M kernel
    X_o X_oᵀ/M. All other parameters: d = ḡ / (1 + λ).

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0, λ in the units of F.
    ema
        ρ in [0, 1); 0 averages nothing. With an average, each unit keeps its (d_i + 1)² matrix.
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
        Counts: ``steps``, ``refreshes``, ``retries`` (blocks factorised once more, with 10, 100, …, 10⁶ λ), ``fallbacks`` (blocks for
        which that failed too: ḡ_o / (10⁶ λ), with a NumericalWarning).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    The blocks are those of the unit-wise natural gradient (Kurita 1993; Ollivier 2015, arXiv 1303.0818); defaults are our choice.
    Cost per dense layer and refresh: 2 M d_o d_i² operations for F_o and d_o d_i³/3 for the factors, or 2 d_o M² d_i and d_o M³/3.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = UnitWise(model, lr=0.1, damping=0.1)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["steps"]
    (True, 20)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        damping: float = 1e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        kl_clip: float | None = 1e-2,
        reduction: str = "mean",
        refresh: int = 1,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self._averages: dict[str, dict[str, Any]] = {}  # layer -> F (d_o, s, s) and its weight 1 - rho^t
        self._rows: dict[str, tuple[LayerScores, float]] = {}  # layer -> scores and scale, where kernels are smaller
        super().__init__(model, locals())

    def _has_statistics(self) -> bool:
        return bool(self._rows or self._averages)

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        if self._tap.listening:
            fresh = {layer.name: self._statistics(layer, scale) for layer in layers}
            for name, found in fresh.items():  # nothing can be refused any more
                self._take_in(name, found, scale)
        for layer in layers:
            g, damping = by_unit(layer, gradient), self._options(layer.name)["damping"]
            if layer.name in self._rows:
                write_units(layer, self._by_kernels(*self._rows[layer.name], g, damping), out)
            elif layer.name in self._averages:
                own = self._averages[layer.name]
                write_units(layer, self._solve(own["F"] / own["weight"], damping, g), out)

    def _statistics(self, layer: LayerInfo, scale: float) -> LayerScores | Tensor:
        """Scores, where kernels are smaller than blocks; else (1/M) Σ_n of the outer products, ``(d_o, s, s)``."""
        like, units, size = self._parameters[0], unit_count(layer), unit_size(layer)
        if self._options(layer.name)["ema"] == 0 and self._examples < size:
            scores = batch_scores(layer, self._passes, like, "B")
            if type(scores) in (DenseScores, ExplicitScores):
                largest = scores.largest()
                bound = largest * largest * scores.n * size * max(scale, 1.0)
                if not bound < torch.finfo(like.dtype).max:  # also where it is NaN
                    self._require_finite_kernel(scores.trace().to(like.dtype).view(1, 1), scale, layer.name)
                return scores if self.refresh == 1 else owned(scores)
        F = like.new_zeros(units, size, size)
        for scores in chunks(layer, self._passes, like):
            for at, rows in unit_rows(scores):
                F[at] += rows.mT @ rows
        F *= scale
        self._require_finite_kernel(F.diagonal(dim1=1, dim2=2), 1.0, layer.name)
        return F

    def _take_in(self, name: str, found: LayerScores | Tensor, scale: float) -> None:
        if isinstance(found, LayerScores):
            self._rows[name] = found, scale
            self._averages.pop(name, None)
            return
        self._rows.pop(name, None)
        own = self._averages.setdefault(name, {"F": torch.zeros_like(found), "weight": 0.0})
        ema = self._options(name)["ema"]
        own["F"].lerp_(found, 1 - ema)  # F <- rho F + (1 - rho) X^T X / M
        own["weight"] = ema * own["weight"] + 1 - ema  # 1 - rho^t

    def _by_kernels(self, scores: LayerScores, scale: float, g: Tensor, damping: float) -> Tensor:
        found, retries, failed = solve_by_kernels(scores, scale, g, damping)
        self._count(retries, failed, scores.n, damping)
        return found

    def _state(self) -> dict[str, Any]:
        kept = self._rows if self.refresh > 1 else {}
        rows = {name: {"scores": packed(scores), "scale": scale} for name, (scores, scale) in kept.items()}
        return {"kept": {}, "averages": {name: dict(own) for name, own in self._averages.items()}, "rows": rows}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for own in state["averages"].values():
            self._require_entries(own, ("F", "weight"), "an average")
        layers, like = {layer.name: layer for layer in self.covered}, self._parameters[0]
        self._averages = dict(state["averages"])
        self._rows = {
            name: (unpacked(one["scores"], layers[name], None, like), one["scale"])
            for name, one in state["rows"].items()
        }

    def _drop(self) -> None:
        super()._drop()
        if self.refresh == 1:
            self._rows = {}
