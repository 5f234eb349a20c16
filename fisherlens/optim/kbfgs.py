"""K-BFGS: the two Kronecker factors of KFAC inverted by BFGS updates, one of them from what the step itself did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.errors import InputError
from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim import texts
from fisherlens.optim.base import choice
from fisherlens.optim.factors import LayerWise, matrix_of, matrix_shape, positions, whole, write_matrix
from fisherlens.optim.replay import Replay, Run
from fisherlens.optim.secant import Secants, Sums, bfgs, random_states, set_random_states
from fisherlens.optim.tap import Pass


class KBFGS(LayerWise):
    r"""Kronecker-factored BFGS (K-BFGS, and with a memory K-BFGS(L)) of Goldfarb, Ren and Bahamou.

    The direction of a layer is u = H_G Ḡ H_A, with Ḡ = [∂W, ∂b] and a the inputs, with a 1 for the bias, over examples n and positions t:

    .. math::
        A \leftarrow \rho A + (1 - \rho) \tfrac1M \sum_{nt} a_{nt} a_{nt}^\top, \qquad
        s = H_A \bar a, \quad y = (A + \sqrt\lambda I) s

    is the pair of H_A, which starts as (A + √λ I)⁻¹ of the first batch. H_G starts as I; its pair is the change of the layer's mean
    pre-activation (s) and of the mean score there (y) between the old and the stepped weights on the same batch, both averaged with ρ, and
    damped after Powell: first sᵀy ≥ 0.2 yᵀH_G y, then sᵀy ≥ √λ sᵀs. Both follow

    .. math:: H \leftarrow (I - s y^\top / s^\top y)\, H\, (I - y s^\top / s^\top y) + s s^\top / s^\top y .

    Parameters without factors: ḡ / (1 + λ), announced once.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        Step length and λ, both > 0.
    ema
        ρ of A, s and y, in [0, 1); 0 averages nothing.
    memory
        None keeps H_G as a matrix; a number keeps that many pairs in its place (100 in the source), for wide layers.
    momentum, weight_decay
        Of the directions, in [0, 1); decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh
        Steps from one update of both inverses to the next; steps between them evaluate the closure once.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing.
    likelihood
        Whose mean negative log-likelihood the loss is, for steps without a closure: categorical, Bernoulli or Gaussian without weights.
    labels, seed
        ``"true"`` alone: the pairs are changes of the user's loss, and nothing is drawn.
    preset
        None or ``"paper"``, which agree.

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

    inverse_refresh = 1

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
        preset: str | None = None,
    ):
        if preset is not None:
            choice("preset", preset, ("paper",))
        self.memory = None if memory is None else whole("memory", memory)
        self._sums: dict[str, Sums] = {}
        self._numbers: list[int] = []  # of the passes since the last step
        self._replay: Any = None
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        options = {"lr": lr, "damping": damping, "ema": ema, "momentum": momentum}
        options |= {"weight_decay": weight_decay, "kl_clip": kl_clip}
        if labels == "sampled":
            raise InputError(texts.LOSS_LABELS.format(name=type(self).__name__))
        shared = {"likelihood": likelihood, "labels": labels, "reduction": reduction, "refresh": refresh, "seed": seed}
        super().__init__(model, options, **shared)
        self._replay = Replay(model, self._tap, self.likelihood)
        self.diagnostics["skipped"] = 0

    def _made(self) -> dict[str, Any]:
        made = {}
        for layer in self.covered:
            groups, d_o, d_i = matrix_shape(layer)
            new = self._parameters[0].new_zeros
            square = torch.eye(d_o).to(new(1)).expand(groups, d_o, d_o).clone() if self.memory is None else new(0)
            pairs = [new(self.memory or 0, groups, d_o, 1) for _ in range(2)]
            averages = [new(groups, d_o, 1) for _ in range(2)]
            made[layer.name] = Secants(
                layer.name, new(groups, d_i, d_i), new(groups, d_i, d_i), square, *averages, *pairs
            )
        return made

    def _absorb(self, one: Pass, examples: int) -> None:
        self._numbers.append(next(iter(one.calls.values()))[0].number)
        for layer, calls in self._layers(one):
            for a, g in positions(layer, calls, self._parameters[0].dtype, self._workspace):
                found = Sums.of(a, g)
                self._sums[layer.name] = self._sums[layer.name] + found if layer.name in self._sums else found

    def _drop(self) -> None:
        self._sums, self._numbers = {}, []
        if self._replay is not None:
            self._replay.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters by one step, and learn from what it did.

        Parameters
        ----------
        closure
            Clears the gradients, computes the loss of one batch, calls ``backward`` and returns the loss. Called before the step and,
            where the statistics are due, once more after it, on the same batch. The loss of the first call is returned. Without one,
            the model's forward passes since the last step are made once more.
        """
        due, device = self._due, self._parameters[0].device
        before, runs = random_states(device), self._kept_runs() if closure is None and due else []
        loss = super().step(closure)
        if due:
            after = random_states(device)
            self._tap.listening = True
            try:
                if closure is None:
                    self._replay.again(runs, mean=self.reduction == "mean")
                else:
                    set_random_states(before, device)
                    with torch.enable_grad():
                        closure()
                self._tap.flush()
                self._learn()
            finally:
                set_random_states(after, device)
                self._clear()
                self._schedule()
        return loss

    def _kept_runs(self) -> list[Run]:
        """The forward passes of the coming step, all of which must be there to be made again."""
        self._tap.flush()
        runs = [self._replay.runs.get(number) for number in self._numbers]
        if any(run is None for run in runs):
            raise InputError(texts.NO_CLOSURE.format(name=self.name))
        if not all(self._replay.unmodified(run) for run in runs):
            raise InputError(texts.WRITTEN_OVER.format(layer="(the model)"))
        return runs

    def _means(self, layer: LayerInfo, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean input ā (B, d_i, 1), mean pre-activation W ā + b and the mean score there, both (B, d_o, 1)."""
        found = self._sums[layer.name]
        a = found.a / found.count
        scale = 1.0 if self.reduction == "mean" else 1 / self._examples
        return a, matrix_of(layer, theta) @ a, scale * found.g

    def _theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        options = self.param_groups[0]
        layers = [layer for layer in self.covered if layer.name in active]
        self._before = {}
        fresh = [layer for layer in layers if layer.name in self._sums]
        A = {layer.name: self._sums[layer.name].A / self._sums[layer.name].examples for layer in fresh}
        theta = self._theta()
        means = {layer.name: self._means(layer, theta) for layer in fresh}
        self._require_finite_parts((name, (A[name], *means[name])) for name in A)  # before anything is changed
        for layer in fresh:
            record = self._record_of(layer)
            a, h, score = means[layer.name]
            self._before[layer.name] = h, score
            self._renew(record, A[layer.name], a, options)
        for layer in layers:
            record = self._record_of(layer)
            if record.steps:  # else the rule for parameters without statistics stands
                write_matrix(layer, record.apply(matrix_of(layer, gradient) @ record.H_a), out)

    def _renew(self, record: Secants, A: Tensor, a: Tensor, options: Mapping[str, Any]) -> None:
        """Average A, and update H_A by the pair of the mean input."""
        epsilon = math.sqrt(options["damping"])
        if not record.steps:
            record.A = A
            damping = torch.full((len(A),), epsilon, dtype=torch.float64, device=A.device)
            record.H_a = self._inverted([(A, damping)])[0]
        else:
            record.A = options["ema"] * record.A + (1 - options["ema"]) * A
            s = record.H_a @ a
            record.H_a, used = bfgs(record.H_a, s, record.A @ s + epsilon * s)
            self.diagnostics["skipped"] += int((~used).sum())
        record.steps += 1

    def _learn(self) -> None:
        """Update H_G by what the step did to the mean pre-activations and their scores."""
        options = self.param_groups[0]
        rho, epsilon = options["ema"], math.sqrt(options["damping"])
        theta = self._theta()
        for layer in self.covered:
            if layer.name not in self._sums or layer.name not in self._before:
                continue
            record, (h, score) = self._record_of(layer), self._before[layer.name]
            _, h_new, score_new = self._means(layer, theta)
            change = h_new - h, score_new - score
            if all(torch.isfinite(x).all() for x in change):
                self.diagnostics["skipped"] += record.learn(*change, rho, epsilon)
            else:
                self.diagnostics["skipped"] += 1
