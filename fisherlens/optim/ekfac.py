"""EKFAC: second moments of the scores along the eigenvectors of the Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.dense import eigenpairs
from fisherlens.linalg.memory import Workspace
from fisherlens.optim.averages import Averages
from fisherlens.optim.base import choice
from fisherlens.optim.factors import (
    FactorSums,
    LayerWise,
    factor_sums,
    matrix_of,
    matrix_shape,
    positions,
    summed_scores,
    write_matrix,
)
from fisherlens.optim.moments import ROWS_BYTES
from fisherlens.optim.tap import Call, Pass

MOMENTS = ("examples", "mean")


@dataclass(eq=False)
class EigenMoments(Averages):
    """Orthogonal bases of B blocks, and the average second moments along them."""

    layer: str
    left: Tensor  # Q_G, (B, d_o, d_o)
    right: Tensor  # Q_A, (B, d_i, d_i)
    s: Tensor  # (B, d_o, d_i)
    steps: int = 0  # updates of s since the bases changed


class EKFAC(LayerWise):
    r"""Eigenvalue-corrected KFAC (EKFAC) of George, Laurent and co-workers.

    The eigenvectors Q_A, Q_G of the Kronecker factors of one batch (see :class:`KFAC`) are kept for a while; along them the second moments
    of the gradients U_n = Σ_t g_nt a_ntᵀ are exact, so that the trace of the layer's block is kept, and Ḡ is the mean gradient:

    .. math::
        s = \frac1M \sum_n (Q_G^\top U_n Q_A)^2, \qquad
        u = Q_G \frac{Q_G^\top \bar G Q_A}{s + \lambda} Q_A^\top .

    Of all matrices with these eigenvectors, s makes the one closest to the block. Parameters without statistics: ḡ / (1 + λ).

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        Step length and λ, both > 0.
    likelihood
        Name or fisherlens likelihood; draws sampled labels. With true labels the loss says all.
    moments
        ``"examples"``: s as above. ``"mean"``: M (Q_Gᵀ Ḡ Q_A)² of the mean gradient, which only makes sense averaged, with
        ``ema=0.75`` in the release; it starts from the eigenvalues d_G d_Aᵀ of the factors at each change of the bases.
    ema
        Of s, in [0, 1); 0, as released, takes s of the current batch. The average starts anew when the bases change.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        ``"true"``: the user's loss, as released. ``"sampled"``: labels drawn from the model, so that s belongs to the Fisher.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        Steps from one update of s to the next, and from one change of the bases to the next, at a step that updates s.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing; 1e-2 is TENGraD's.
    preset
        None or ``"paper"``, which agree.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of s; nothing can fail to factorise, so ``retries`` and ``fallbacks`` stay 0.

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 1806.03884, github.com/Thrandis/EKFAC-pytorch. The periods, lr and λ are our choice. Cost beside KFAC's: 2 M T P
    operations per update of s, P floats. A step that changes the bases keeps the batch's inputs and scores until it is taken.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = EKFAC(model, lr=0.05)
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
        lr: float = 1e-2,
        damping: float = 3e-2,
        *,
        likelihood: str | Likelihood = "categorical",
        moments: str = "examples",
        ema: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "true",
        reduction: str = "mean",
        refresh: int = 1,
        inverse_refresh: int = 50,
        kl_clip: float | None = 1e-2,
        seed: int = 0,
        preset: str | None = None,
    ):
        if preset is not None:
            choice("preset", preset, ("paper",))
        self.moments, self.inverse_refresh = choice("moments", moments, MOMENTS), inverse_refresh
        self._drop()
        options = {"lr": lr, "damping": damping, "ema": ema, "momentum": momentum}
        options |= {"weight_decay": weight_decay, "kl_clip": kl_clip}
        shared = {"likelihood": likelihood, "labels": labels, "reduction": reduction, "refresh": refresh, "seed": seed}
        super().__init__(model, options, **shared)

    def _made(self) -> dict[str, Any]:
        return {layer.name: self._new(layer, self._parameters[0]) for layer in self.covered}

    def _new(self, layer: LayerInfo, like: Tensor) -> EigenMoments:
        groups, d_o, d_i = matrix_shape(layer)
        shapes = (groups, d_o, d_o), (groups, d_i, d_i), (groups, d_o, d_i)
        return EigenMoments(layer.name, *(like.new_zeros(shape) for shape in shapes))

    def _absorb(self, one: Pass, examples: int) -> None:
        dtype = self._parameters[0].dtype
        for layer, calls in self._layers(one):
            record = self._record_of(layer)
            if self._inverse_due or not record.steps:  # the bases come first
                found = factor_sums(layer, calls, dtype, self._workspace, "expand")
                self._sums[layer.name] = self._sums[layer.name] + found if layer.name in self._sums else found
                self._held.setdefault(layer.name, []).append(calls)
            else:
                self._add(layer, calls, record.left, record.right)

    def _add(self, layer: LayerInfo, calls: Sequence[Call], left: Tensor, right: Tensor) -> None:
        """Add one pass: Σ_n (Q_Gᵀ U_n Q_A)², or Σ_n U_n."""
        if self.moments == "mean":
            found = summed_scores(layer, calls, left.dtype, self._workspace)
        else:
            found = rotated_squares(layer, calls, left, right, self._workspace)
        self._squares[layer.name] = self._squares[layer.name] + found if layer.name in self._squares else found

    def _drop(self) -> None:
        self._sums: dict[str, FactorSums] = {}
        self._held: dict[str, list[list[Call]]] = {}
        self._squares: dict[str, Tensor] = {}

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        options = self.param_groups[0]
        rho, like = options["ema"], self._parameters[0]
        layers = [layer for layer in self.covered if layer.name in active]
        factors = {name: (s.A / s.examples, s.G * scale) for name, s in self._sums.items() if name in active}
        self._require_finite_parts(factors.items())
        bases: dict[str, tuple[Tensor, ...]] = {}
        for layer in layers:
            if layer.name in factors:
                d_a, right = eigenpairs(factors[layer.name][0], f"Factor A of layer {layer.name!r}")
                d_g, left = eigenpairs(factors[layer.name][1], f"Factor G of layer {layer.name!r}")
                start = d_g.clamp(min=0)[:, :, None] * d_a.clamp(min=0)[:, None, :]
                bases[layer.name] = tuple(x.to(like.dtype) for x in (left, right, start))
                for calls in self._held[layer.name]:
                    self._add(layer, calls, *bases[layer.name][:2])
        fresh: dict[str, Tensor] = {}
        for layer in layers:
            if layer.name in self._squares:
                found, record = self._squares[layer.name], self._record_of(layer)
                if self.moments == "mean":
                    left, right = bases.get(layer.name, (record.left, record.right))[:2]
                    found = (left.mT @ found @ right).square()
                fresh[layer.name] = scale * found
        self._require_finite_parts((name, (s,)) for name, s in fresh.items())  # nothing is changed before this
        for layer in layers:
            record = self._record_of(layer)
            if layer.name in bases:
                record.left, record.right, start = bases[layer.name]
                record.s = start if self.moments == "mean" else torch.zeros_like(start)
                record.steps = 0
            if layer.name in fresh:
                record.s = rho * record.s + (1 - rho) * fresh[layer.name]
                record.steps += 1
            if record.steps:  # else the rule for parameters without statistics stands
                s = record.s if self.moments == "mean" else record.s / (1 - rho**record.steps)
                along = record.left.mT @ matrix_of(layer, gradient) @ record.right
                write_matrix(layer, record.left @ (along / (s + options["damping"])) @ record.right.mT, out)


def rotated_squares(
    layer: LayerInfo, calls: Sequence[Call], left: Tensor, right: Tensor, workspace: Workspace
) -> Tensor:
    """Σ_n (Q_Gᵀ U_n Q_A)², entry by entry, ``(B, d_o, d_i)``; the U_n of layers with positions under a memory budget."""
    total = left.new_zeros(len(left), left.shape[1], right.shape[1])
    for a, g in positions(layer, calls, left.dtype, workspace):
        n, t = a.shape[2:]
        a, g = right.mT @ a.flatten(2), left.mT @ g.flatten(2)
        if t == 1:
            total += g.square() @ a.square().mT
            continue
        a, g = (x.unflatten(2, (n, t)).transpose(1, 2) for x in (a, g))  # (B, n, d, T)
        step = max(1, ROWS_BYTES // (total.numel() * total.itemsize))
        for first in range(0, n, step):
            some = slice(first, first + step)
            total += (g[:, some] @ a[:, some].mT).square().sum(1)
    return total
