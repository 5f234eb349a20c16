"""K-BFGS: the two Kronecker factors of KFAC inverted by BFGS updates, one of them from what the step itself did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.linalg.precision import without_autocast
from fisherlens.optim import texts
from fisherlens.optim.checks import whole
from fisherlens.optim.factors import matrix_of, matrix_shape, positions, write_matrix
from fisherlens.optim.groups import Groups
from fisherlens.optim.layerwise import LayerWise, accumulate
from fisherlens.optim.replay import Replay
from fisherlens.optim.scaling import overflowed
from fisherlens.optim.secant import Secants, Sums, random_states, set_random_states
from fisherlens.optim.tap import Pass


class KBFGS(LayerWise):
    r"""Kronecker-factored BFGS (K-BFGS, and with a memory K-BFGS(L)) of Goldfarb, Ren and Bahamou.

    The direction of a layer is u = H_G Ḡ H_A, with Ḡ = [∂W, ∂b] and a the inputs, with a 1 for the bias, over examples n and positions t:

    .. math::
        A \leftarrow \rho A + (1 - \rho) \tfrac1M \sum_{nt} a_{nt} a_{nt}^\top, \qquad
        s = H_A \bar a, \quad y = (A + \sqrt\lambda I) s

    is the pair of H_A, which starts as (A + √λ I)⁻¹ of the first batch. H_G starts as I; its pair is the change of the layer's mean
    pre-activation (s) and of the mean score there (y) between the old and the stepped weights on the same batch, both averaged with ρ, and
    damped after Powell: first sᵀy ≥ 0.2 yᵀH_G y, then sᵀy ≥ √λ sᵀs. Parameters without factors: ḡ / (1 + λ). Both inverses follow

    .. math:: H \leftarrow (I - s y^\top / s^\top y)\, H\, (I - y s^\top / s^\top y) + s s^\top / s^\top y .

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping, ema
        Step length and λ, both > 0; ρ of A, s and y, in [0, 1), where 0 averages nothing.
    memory
        None keeps H_G as a matrix; a number keeps that many pairs in its place (100 in the source), for wide layers.
    momentum, weight_decay, kl_clip
        As of :class:`KFAC`. None clips nothing.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; steps from one update of both inverses to the next, with one pass each between.
    likelihood, labels, seed
        Of which the loss is the mean, for steps without a closure: categorical, Bernoulli or Gaussian, unweighted. ``"true"`` alone; nothing is drawn.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes``, ``skipped`` (pairs that were not finite or not positive, and so not used), ``retries`` and
        ``fallbacks`` (first inverses of A that needed more damping).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a closure where it needs one. NonFiniteError, from ``step``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 2006.08877, github.com/renyiryry/kbfgs_neurips2020_public, true labels. lr and λ are our choice. For convolutions means
    are over examples and positions, as those of KFAC's factors. Each update takes a second forward and backward pass on the same batch, with
    the random numbers of the first (dropout is as it was); statistics of BatchNorm are updated twice. ``step(closure)`` calls the closure
    twice, whose second gradients stay in ``.grad``. ``step()`` makes the model's own passes again: the gradient at the new outputs is the
    old one plus the change of the likelihood's, in which the labels drop out. Cost beside that: 2 M T d_i² operations, 2 d_i² + d_o² floats.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = KBFGS(model, lr=0.1)
    >>> for _ in range(40):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["skipped"]
    (True, 0)
    """

    _replay: Replay | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 1e-1,
        *,
        likelihood: str | Likelihood = "categorical",
        ema: float = 0.9,
        memory: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        labels: str = "true",
        reduction: str = "mean",
        refresh: int = 1,
        kl_clip: float | None = None,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.memory = None if memory is None else whole("memory", memory)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # mean pre-activations and scores at the old weights
        if labels == "sampled":
            raise InputError(texts.LOSS_LABELS.format(name=type(self).__name__))
        super().__init__(model, locals())
        self._replay = Replay(model, self._tap, self.likelihood)
        self.diagnostics["skipped"] = 0

    def _new(self, layer: LayerInfo, like: Tensor) -> Secants:
        return Secants.start(layer.name, like, *matrix_shape(layer), self.memory)

    def _absorb(self, one: Pass, examples: int) -> None:
        self._numbers.append(next(iter(one.calls.values()))[0].number)
        for layer, calls in self._layers(one):
            for a, g in positions(layer, calls, self._parameters[0].dtype, self._workspace):
                accumulate(self._sums, layer, Sums.of(a, g))

    def _drop(self) -> None:
        super()._drop()
        self._numbers: list[int] = []  # of the passes since the last step
        if self._replay is not None:
            self._replay.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters by one step, and learn from what it did.

        Parameters
        ----------
        closure
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss; called twice, the first loss is returned. Without one,
            the model's forward passes since the last step are made once more.
        """
        due, device, steps = self._due, self._parameters[0].device, self.diagnostics["steps"]
        before, runs = random_states(device), []
        if closure is None and due and not overflowed(self):
            self._tap.flush()
            runs = self._replay.kept(self._numbers, self.name)
        loss = super().step(closure)
        if due and self.diagnostics["steps"] > steps:
            after = random_states(device)
            self._tap.listening = True
            try:
                if closure is None:
                    self._replay.again(runs, mean=self.reduction == "mean", scale=self._loss_scale)
                else:
                    set_random_states(before, device)
                    with torch.enable_grad():
                        closure()
                self._tap.flush()
                with without_autocast():
                    self._learn()
            finally:
                set_random_states(after, device)
                self._clear()
                self._schedule()
        return loss

    def _means(self, layers: Iterable[LayerInfo]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Mean inputs, pre-activations and scores of the layers that were seen, at the weights of now."""
        theta = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        scale = (1.0 if self.reduction == "mean" else 1 / self._examples) / self._carried
        seen = [layer for layer in layers if layer.name in self._sums]
        return {layer.name: self._sums[layer.name].means(matrix_of(layer, theta), scale) for layer in seen}

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        layers = [layer for layer in self.covered if layer.name in active]
        means = self._means(layers)
        A = {name: self._sums[name].A / self._sums[name].examples for name in means}
        self._require_finite_parts((name, (A[name], *means[name])) for name in A)  # before anything is changed
        self._before = {name: (h, score) for name, (_, h, score) in means.items()}
        for layer in layers:
            record, options = self._record_of(layer), self._options(layer.name)
            if layer.name in A:
                pair = A[layer.name], means[layer.name][0]
                lost = record.renew(*pair, options["ema"], math.sqrt(options["damping"]), self._inverted)
                self.diagnostics["skipped"] += lost
            if record.steps:  # else the rule for parameters without statistics stands
                write_matrix(layer, record.apply(matrix_of(layer, gradient) @ record.H_a), out)

    def _learn(self) -> None:
        """Update H_G by what the step did to the mean pre-activations and their scores."""
        means = self._means(layer for layer in self.covered if layer.name in self._before)
        for name, (_, h, score) in means.items():
            record, options = self._records[name], self._options(name)
            change = h - self._before[name][0], score - self._before[name][1]
            self.diagnostics["skipped"] += record.learn(*change, options["ema"], math.sqrt(options["damping"]))
