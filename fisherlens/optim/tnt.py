"""TNT: the gradient as a tensor-normal variable, whose covariance is a Kronecker product over the axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.layout import ParameterInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.checks import choice
from fisherlens.optim.groups import Groups
from fisherlens.optim.mean_gradient import WarmStarted
from fisherlens.optim.modes import AxisAverages, along, contraction

DAMPINGS = ("each", "shared")


class TNT(WarmStarted):
    r"""Tensor-normal training (TNT) of Ren and Goldfarb.

    Each tensor of a Linear or convolution layer, with k axes of n_i entries (k = 3 for a convolution: outputs, inputs, kernel), keeps for
    every axis the average H_i of the contractions of mean gradients at sampled labels. With c = (tr H_1 / Π n)^{1/k}

    .. math::
        U_i = \frac{H_i}{c^{k-1} \prod_{j \ne i} n_j}, \qquad
        u = \bar G \times_1 (U_1 + \lambda I)^{-1} \cdots \times_k (U_k + \lambda I)^{-1},

    so that c is the mean eigenvalue of all U_i. A bias, k = 1, has U = H, and u = (H + λI)⁻¹ ḡ.
    Other parameters: ḡ / (1 + λ), announced once.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        Step length and λ, both > 0. λ is on the scale of c, the k-th root of a mean squared entry of ḡ.
    damping_form
        ``"each"``: λ is added to every U_i, as in the source. ``"shared"``: λ^(1/k), so that the damping of their product is λ whatever k; λ is then
        on the scale of ḡ², M times smaller than the Fisher's.
    likelihood
        Name or fisherlens likelihood; draws sampled labels.
    ema
        ρ of every H_i, in [0, 1), divided by 1 - ρ^t unless there was a warm start; 0 averages nothing.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        ``"sampled"``: labels drawn from the model, as in the source. ``"true"``: the mean gradient of the user's loss.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        Steps from one update of H, and of the inverses, to the next. A changed damping takes effect with the next inverses.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of H, ``retries`` (matrices inverted once more, with 10, 100, …, 10⁶ λ, because rounding had cost
        them their definiteness), ``fallbacks`` (matrices for which that failed too: their inverse is I / (10⁶ λ)).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 2106.02925, github.com/renyiryry/tnt_neurips_2021; its periods are 10 and 100 for convolutional networks, 1 and 20 for
    others. lr and λ are our choice: the source tunes both. Call :meth:`warm_start` with the training loader before the first
    step, as the source does. Cost: 2 P Σ n_i operations per step and per update, 2 Σ n_i³ per inversion; 2 Σ n_i² floats.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = TNT(model, lr=0.01)
    >>> opt.warm_start((x, None))
    >>> for _ in range(40):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 4)
    """

    meanings = ("damping_form",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-3,
        damping: float = 0.2,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        damping_form: str = "each",
        reduction: str = "mean",
        refresh: int = 10,
        inverse_refresh: int = 100,
        kl_clip: float | None = None,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.damping_form = choice("damping_form", damping_form, DAMPINGS)
        super().__init__(model, locals())

    def _made(self) -> dict[str, Any]:
        made = {}
        for info in self._tensors():
            for axis, n in enumerate(shape_of(info)):
                like = self._parameters[0].new_zeros(1, n, n)
                made[f"{info.name} {axis}"] = AxisAverages(info.layer, like, like.clone())
        return made

    def _tensors(self) -> list[ParameterInfo]:
        return [info for layer in self.covered for info in layer.parameters]

    def _axes(self, info: ParameterInfo, records: Mapping[str, Any] | None = None) -> list[AxisAverages]:
        records = self._records if records is None else records
        return [records[f"{info.name} {axis}"] for axis in range(len(shape_of(info)))]

    def _contractions(self, info: ParameterInfo, flat: Tensor) -> list[Tensor]:
        x = flat[info.start : info.stop].view(1, *shape_of(info))
        return [contraction(x, axis) for axis in range(len(shape_of(info)))]

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        if self._records is None:
            self._records = self._made()
        tensors = [info for info in self._tensors() if info.layer in active]
        if self._due:
            flat, known = self._statistic(gradient, active, scale)
            fresh = [(info, self._contractions(info, flat)) for info in tensors if info.layer in known]
            self._require_finite_parts((info.layer, H) for info, H in fresh)  # before anything is changed
            for info, contractions in fresh:
                rho = self._options(info.layer)["ema"]
                for record, H in zip(self._axes(info), contractions, strict=True):
                    record.L.lerp_(H, 1 - rho)
                    record.weight = rho * record.weight + (1 - rho)
        ready = [info for info in tensors if self._axes(info)[0].weight]  # others: the rule without statistics
        self._invert([x for x in ready if self._inverse_due or not self._axes(x)[0].inversions], self._records)
        for info in ready:
            u = gradient[info.start : info.stop].view(1, *shape_of(info))
            for axis, record in enumerate(self._axes(info)):
                u = along(u, record.root, axis)
            out[info.start : info.stop] = u.reshape(-1)

    def _invert(self, tensors: list[ParameterInfo], records: Mapping[str, Any]) -> None:
        """Compute the damped inverse of U_i for every axis of these tensors."""
        jobs, due = [], []
        for info in tensors:
            axes, shape, damping = self._axes(info, records), shape_of(info), self._options(info.layer)["damping"]
            n, k = math.prod(shape), len(shape)
            trace = axes[0].L.diagonal(dim1=-2, dim2=-1).double().sum().item() / axes[0].weight
            c = (trace / n) ** (1 / k)
            for axis, record in enumerate(axes):
                share = c ** (k - 1) * n / shape[axis] if c else 1.0  # without any gradient, H is zero
                lam = damping if self.damping_form == "each" else damping ** (1 / k)
                lam = torch.full((1,), lam, dtype=torch.float64, device=record.L.device)
                jobs.append((record.L / (record.weight * share), lam))
                due.append(record)
        for record, inverse in zip(due, self._inverted(jobs), strict=True):
            record.root, record.inversions = inverse, record.inversions + 1

    def _warm(self, gradients: Iterator[Tensor]) -> int:
        records, count = self._made(), 0
        for count, flat in enumerate(gradients, 1):
            for info in self._tensors():
                for record, H in zip(self._axes(info, records), self._contractions(info, flat), strict=True):
                    record.L.lerp_(H, 1 / count)
                    record.weight = 1.0
        self._require_finite_parts((x.layer, [r.L for r in self._axes(x, records)]) for x in self._tensors())
        self._invert(self._tensors(), records)
        self._records = records
        return count


def shape_of(info: ParameterInfo) -> tuple[int, ...]:
    """Axes of a tensor, those of a convolution's kernel as one."""
    return info.shape if len(info.shape) < 3 else (*info.shape[:2], math.prod(info.shape[2:]))
