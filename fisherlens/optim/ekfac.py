"""EKFAC: second moments of the scores along the eigenvectors of the Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.averages import Averages
from fisherlens.optim.checks import choice
from fisherlens.optim.factors import (
    factor_basis,
    factor_sums,
    matrix_of,
    matrix_shape,
    normal,
    rotated_squares,
    summed_scores,
    write_matrix,
)
from fisherlens.optim.groups import Groups
from fisherlens.optim.layerwise import LayerWise, accumulate
from fisherlens.optim.tap import Call, Pass

MOMENTS = ("examples", "mean")


@dataclass(eq=False)
class EigenMoments(Averages):
    """Orthogonal bases of B blocks, and the average second moments along them."""

    layer: str
    left: Tensor  # Q_G, (B, d_o, d_o)
    right: Tensor  # Q_A, (B, d_i, d_i)
    s: Tensor  # (B, d_o, d_i)
    steps: int = 0
    weight: float = 0.0  # updates of s since the bases changed


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
        ``ema=0.75`` in the release; it starts from the eigenvalues d_G d_Aᵀ of the factors at each change of the bases: the release has T times those of
        means over positions, and A here is a sum over them.
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
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree.

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

    meanings = ("moments",)

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
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.moments = choice("moments", moments, MOMENTS)
        super().__init__(model, locals())

    def _new(self, layer: LayerInfo, like: Tensor) -> EigenMoments:
        B, d_o, d_i = matrix_shape(layer)
        return EigenMoments(layer.name, *(like.new_zeros(s) for s in ((B, d_o, d_o), (B, d_i, d_i), (B, d_o, d_i))))

    def _absorb(self, one: Pass, examples: int) -> None:
        for layer, calls in self._layers(one):
            record = self._record_of(layer)
            if self._inverse_due or not record.steps:  # the bases come first
                found = factor_sums(layer, calls, self._parameters[0].dtype, self._workspace, "expand")
                accumulate(self._sums, layer, found)
                self._held.setdefault(layer.name, []).append(calls)
            else:
                self._look(layer, calls, record.left, record.right)

    def _look(self, layer: LayerInfo, calls: Sequence[Call], left: Tensor, right: Tensor) -> None:
        """Add one pass: Σ_n (Q_Gᵀ U_n Q_A)², or Σ_n U_n."""
        if self.moments == "mean":
            found = summed_scores(layer, calls, left.dtype, self._workspace)
        else:
            found = rotated_squares(layer, calls, left, right, self._workspace)
        accumulate(self._squares, layer, found)

    def _drop(self) -> None:
        super()._drop()
        self._held: dict[str, list[list[Call]]] = {}
        self._squares: dict[str, Tensor] = {}

    def _bases(self, layer: LayerInfo, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Q_G, Q_A and d_G d_Aᵀ of this batch."""
        sums = self._sums[layer.name]
        A, G = sums.A / sums.examples, sums.G * scale
        self._require_finite_parts([(layer.name, (A, G))])
        (d_a, right), (d_g, left) = factor_basis(A, "A", layer.name), factor_basis(G, "G", layer.name)
        return left, right, d_g.clamp(min=0)[:, :, None] * d_a.clamp(min=0)[:, None, :]

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        bases = {layer.name: self._bases(layer, scale) for layer in layers if layer.name in self._sums}
        fresh: dict[str, Tensor] = {}
        for layer in layers:
            record = self._record_of(layer)
            left, right = bases.get(layer.name, (record.left, record.right))[:2]
            for calls in self._held.get(layer.name, ()):
                self._look(layer, calls, left, right)
            if layer.name in self._squares:
                found = self._squares[layer.name]
                found = (left.mT @ found @ right).square() if self.moments == "mean" else found
                fresh[layer.name] = scale * found
        self._require_finite_parts((name, (s,)) for name, s in fresh.items())  # nothing is changed before this
        for layer in layers:
            record, options = self._record_of(layer), self._options(layer.name)
            if layer.name in bases:
                record.left, record.right, start = bases[layer.name]
                record.s = start if self.moments == "mean" else torch.zeros_like(start)
                record.steps, record.weight = 0, 0.0
            if layer.name in fresh:
                record.update(options["ema"], s=fresh[layer.name])
            if record.steps:  # else the rule for parameters without statistics stands
                s = record.s if self.moments == "mean" else record.corrected("s")
                along = normal(record.left.mT @ matrix_of(layer, gradient)) @ record.right
                u = normal(record.left @ normal(along / (s + options["damping"]))) @ record.right.mT
                write_matrix(layer, u, out)
