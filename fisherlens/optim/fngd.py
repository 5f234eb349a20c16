"""FNGD: the weights that natural gradient gives to examples, found in the first epoch and shared afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim import texts
from fisherlens.optim.checks import choice, whole
from fisherlens.optim.groups import Groups
from fisherlens.optim.kernels import RowMethod
from fisherlens.optim.weighted import transformed, weigh_gradient

COEFFICIENTS = ("position", "layer")


@dataclass(eq=False)
class Coefficients:
    """c̄ of one layer by position in the batch, and the number of steps that each of them has seen; both ``(n,)``."""

    mean: Tensor
    steps: Tensor

    def add(self, c: Tensor) -> None:
        """c̄ ← (t c̄ + c)/(t + 1) for the positions of this batch."""
        missing = len(c) - len(self.mean)
        if missing > 0:
            self.mean, self.steps = (torch.cat([x, x.new_zeros(missing)]) for x in (self.mean, self.steps))
        n = len(c)
        self.mean[:n] += (c - self.mean[:n]) / (self.steps[:n] + 1)
        self.steps[:n] += 1

    def at(self, start: int, n: int, *, constant: bool) -> Tensor:
        """Coefficients of ``n`` positions from ``start`` on; one that was never seen takes the mean of the others."""
        out = self.mean.mean().expand(n)
        if not constant and start < len(self.mean):
            known = self.mean[start : start + n]
            out = torch.cat([known, out[len(known) :]]) if len(known) < n else known
        return out


class FNGD(RowMethod):
    r"""Fast natural gradient descent (FNGD): a weighted sum of the gradients of examples, at the cost of SGD.

    In the first epoch (``epoch_steps`` steps), for each layer, with u_n the score of example n at position n of the batch,

    .. math::
        K = \tfrac{1}{M} U U^\top, \qquad c = (K + \lambda I)^{-1} \mathbf{1}, \qquad
        \bar c \leftarrow (t \bar c + c)/(t + 1), \qquad d = \tfrac{1}{M} \sum_n \bar c_n u_n ;

    with c in place of c̄, d is (F + λI)⁻¹ ḡ, and the first step is. Afterwards c̄ stays, and the backward pass itself multiplies the
    output scores by c̄ in the gradients of weight and bias; the signal to earlier layers stays. All other parameters: d = ḡ / (1 + λ).

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0; c̄ lies in (0, 1/λ] on average.
    epoch_steps
        Steps in the first epoch: ``len(loader)``. The default is our choice, for lack of a loader; :meth:`end_epoch` ends it earlier.
    coefficients
        ``"position"``: a coefficient for each position in the batch. ``"layer"``: their mean (an ablation: under
        shuffling c̄ tends to it).
    likelihood, labels
        For the form of all methods: coefficients exist for the labels of the loss only, ``"true"``.
    momentum, weight_decay
        μ in [0, 1), of the directions; decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; in the first epoch, steps between new c.
    param_groups, preset, seed
        Options of single parameters, see :mod:`fisherlens.optim`. Not used: nothing is drawn, and ``"paper"`` agrees as far as its text is known.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of c̄, ``retries`` (factorisations repeated with 10, 100, …, 10⁶ λ), ``fallbacks`` (layers whose
        c is 10⁻⁶/λ in that step, with a NumericalWarning).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; nothing has changed.

    Notes
    -----
    Source: arXiv 2403.03473; its damping strategy is not available to us. Where c̄ is in use, the ``.grad`` of Linear and convolution
    layers is the *weighted* gradient, also as ``torch.autograd.grad`` of the live parameters shows it; there is therefore no ``kl_clip``,
    and clipping of gradients by norm clips the step in all epochs. Positions count on over several backward passes before a step, each
    after its own forward pass. Positions of a batch beyond those of the first epoch take mean(c̄). A sequence has one coefficient. Cost: in the first
    epoch 2 M² (d_i + d_o) + M³/3 per dense layer and one more weight gradient; afterwards M d_o multiplications per layer.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = FNGD(model, lr=0.02, damping=0.1, epoch_steps=5)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        damping: float = 0.1,
        *,
        epoch_steps: int = 100,
        coefficients: str = "position",
        likelihood: str | Likelihood = "categorical",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "true",
        reduction: str = "mean",
        refresh: int = 1,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        if labels == "sampled":
            raise InputError(texts.TRUE_LABELS.format(name=type(self).__name__))
        self.epoch_steps = whole("epoch_steps", epoch_steps)
        self.coefficients = choice("coefficients", coefficients, COEFFICIENTS)
        self._coefficients: dict[str, Coefficients] = {}
        super().__init__(model, locals())
        self._tap.weigh = weakref.WeakMethod(self._weigh)

    @property
    def coefficients_of(self) -> dict[str, Tensor]:
        """c̄ of each layer, a copy."""
        return {name: one.mean.clone() for name, one in self._coefficients.items()}

    def end_epoch(self) -> None:
        """End the first epoch now: from the next step on, c̄ stays as it is."""
        self.epoch_steps = min(self.epoch_steps, self.diagnostics["steps"])
        self._schedule()

    def _has_statistics(self) -> bool:
        return True  # outside the first epoch there is nothing to wait for

    def _schedule(self) -> None:
        super()._schedule()
        if self.diagnostics["steps"] >= self.epoch_steps:
            self._due = self._tap.listening = False

    def _weigh(self, layer: LayerInfo, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        """Let the gradients of a layer's parameters be weighted by its coefficients, once these are not under way."""
        known = self._coefficients.get(layer.name)
        if self._tap.listening or known is None or transformed(output):
            return None
        c = known.at(self._examples, len(output), constant=self.coefficients == "layer")
        return weigh_gradient(module, x, output, c)

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        if not self._tap.listening:
            for layer in layers:
                if layer.name in self._coefficients:  # it has been done in the backward pass
                    at = slice(layer.start, layer.stop)
                    out[at] = gradient[at]
            return
        share = self._share()
        blocks = {layer.name: self._kernel_solve([self._scores(layer)], scale) for layer in layers}
        for name, block in blocks.items():  # nothing can be refused any more
            n, like = block.rows.rows, self._parameters[0]
            ones = torch.ones(
                n, dtype=torch.float64 if block.factor is None else block.factor.dtype, device=like.device
            )
            c = ones / block.damping if block.factor is None else block.weights(ones)
            known = self._coefficients.setdefault(name, Coefficients(like.new_zeros(0), like.new_zeros(0)))
            known.add(c.to(like.dtype))
            used = known.at(0, n, constant=self.coefficients == "layer")
            d, explained = block.spread(torch.stack([used, torch.ones_like(used)], dim=1) * share).unbind(1)
            block.write(self._as_given(block, block.of(gradient), d, explained), out, active)

    def _state(self) -> dict[str, Any]:
        kept = {name: {"mean": one.mean, "steps": one.steps} for name, one in self._coefficients.items()}
        return {"kept": {}, "coefficients": kept, "epoch_steps": self.epoch_steps}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for entry in state["coefficients"].values():
            self._require_entries(entry, ("mean", "steps"), "a layer's coefficients")
        self._coefficients = {name: Coefficients(**entry) for name, entry in state["coefficients"].items()}
        self.epoch_steps = state["epoch_steps"]
