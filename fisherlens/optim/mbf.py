"""MBF: many modest blocks per layer, of the outer products of the mean gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.likelihoods import Likelihood
from fisherlens.optim.averages import EntryAverages
from fisherlens.optim.checks import choice
from fisherlens.optim.groups import Groups
from fisherlens.optim.mean_gradient import WarmStarted
from fisherlens.optim.miniblocks import VARIANTS, Blocks, products, write_direction

SCALAR_EMA, SQUARE_EMA, FLOOR = 0.9, 0.999, 1e-8  # of the rule for norm layers and biases of convolutions


class MBF(WarmStarted):
    r"""Mini-block Fisher (MBF) of Bahamou, Goldfarb and Ren: small blocks of the outer product of the mean gradient.

    Each kernel of a convolution has a block of its own; a dense layer with mean gradient Ḡ = [∂W, ∂b], ``(O, I+1)``, has one matrix S that
    is the average over its units (variant A) or its inputs (variant B). With m_0 = F_0 = 0

    .. math::
        F_b &\leftarrow \rho F_b + (1 - \rho) \bar g_b \bar g_b^\top, \qquad S_A = \bar G^\top \bar G / O, \quad
        S_B = \bar G \bar G^\top / (I + 1), \\
        m &\leftarrow \mu m + \bar g, \qquad \theta_b \leftarrow \theta_b - \eta (F_b + \lambda I)^{-1} m_b,

    without bias correction; F = 0 gives SGD with momentum at the rate η/λ. Norm layers and biases of convolutions:
    a ← 0.9 a + 0.1 ḡ, v ← 0.999 v + 0.001 a², u = a / (1e-8 + √(v / (1 - 0.999^t))). All other parameters: m / (1 + λ), announced once.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0; λ is on the scale of an outer product of mean gradients, M times smaller than the Fisher's.
    likelihood
        Name or fisherlens likelihood; draws the labels of the warm start, and sampled labels.
    variant
        Of dense layers: ``"A"``: S_A, (I+1) x (I+1), m S⁻¹. ``"B"``: S_B, O x O, S⁻¹ m. ``"released_view"``: with V = Ḡ reshaped to
        (I+1, O), VᵀV / (I+1), V S⁻¹ reshaped back; the reshape is no transpose, so that its rows mix units. For reproduction only.
    ema
        ρ, in [0, 1); 0 averages nothing.
    momentum, weight_decay
        μ in [0, 1), of the gradients; decoupled decay, θ is first multiplied by 1 - lr * weight_decay.
    labels, seed
        Whose mean gradient F is made of: ``"true"``: that of the user's loss, as released. ``"sampled"``: at labels drawn from the model.
    reduction
        How the loss combines examples, ``"mean"`` or ``"sum"`` (the steps are the same).
    refresh, inverse_refresh
        T1 and T2: steps from one update of F to the next, and from one inversion to the next; until step T2 it is inverted at each
        update. A changed damping takes effect at the next one.
    kl_clip
        κ: the direction of Linear and convolution layers is multiplied by ν = min(1, √(κ / (lr² ⟨u, ḡ⟩))). None clips nothing.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. None or ``"paper"``, which agree.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes`` of F, ``retries`` (blocks inverted once more, with 10, 100, …, 10⁶ λ, because rounding had cost
        them their definiteness), ``fallbacks`` (blocks for which that failed too: their inverse is I / (10⁶ λ), with a NumericalWarning).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 2202.04124, github.com/achrafba96/mbf; that S averages the blocks of units or inputs is our reading. The defaults are
    those of its VGG16 on CIFAR-100 (there with decay 10); its autoencoder has lr 1e-5, λ 3e-4 and periods 2 and 25. Call
    :meth:`warm_start` with the training loader before the first step, as the source does. Cost: 2 P k floats for kernels of k entries and
    2 O² for variant B; a step takes 2 P k and 2 (I+1) O² operations.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = MBF(model, lr=1e-3, damping=1e-2)
    >>> opt.warm_start([(x[:16], None), (x[16:], None)])
    >>> for _ in range(40):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 4)
    """

    scalar_kinds = ("norm",)
    momentum_of_directions = False
    meanings = ("variant",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-5,
        damping: float = 3e-3,
        *,
        likelihood: str | Likelihood = "categorical",
        variant: str = "B",
        ema: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "true",
        reduction: str = "mean",
        refresh: int = 10,
        inverse_refresh: int = 100,
        kl_clip: float | None = None,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.variant = choice("variant", variant, VARIANTS)
        super().__init__(model, locals())

    def _made(self) -> dict[str, Any]:
        """Blocks of weights, and single entries of biases of convolutions and of norm layers."""
        like = self._parameters[0]
        made: dict[str, Any] = {}
        for layer in self.covered:
            if layer.kind == "dense" or layer.weight is not None:
                made[layer.name] = Blocks.zeros(layer, self.variant, like)
            if layer.kind == "conv" and layer.bias is not None:
                made[layer.bias.name] = EntryAverages.of(layer.name, layer.bias, like)
        norms = [layer for layer in self.layout.layers if layer.kind == "norm"]
        return made | {layer.name: EntryAverages.of(layer.name, layer, like) for layer in norms}

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        step, records = self.diagnostics["steps"], self._made() if self._records is None else self._records
        self._records = records
        blocks = [x for x in self.covered if x.name in active and isinstance(records.get(x.name), Blocks)]
        if self._due:
            flat, known = self._statistic(gradient, active, scale)
            fresh = {layer.name: products(layer, flat, self.variant) for layer in blocks if layer.name in known}
            self._require_finite_parts((name, (S,)) for name, S in fresh.items())  # before anything is changed
            for name, S in fresh.items():
                records[name].F.lerp_(S, 1 - self._options(name)["ema"])
        if step % self.inverse_refresh == 0 or (step <= self.inverse_refresh and self._due):
            self._invert([records[layer.name] for layer in blocks])
        m = gradient
        if self._any("momentum"):
            m = gradient.clone()
            self._add_momentum(m, active)
            if len(blocks) < len(self.layout.layers):
                out.copy_(self._rest(m))  # the rule of what is not covered
        for layer in blocks:
            damping = self._options(layer.name)["damping"]
            write_direction(layer, records[layer.name], m, self.variant, damping, out)
        for entries in records.values():
            if isinstance(entries, EntryAverages) and entries.layer in active:
                entries.m.lerp_(gradient[entries.at], 1 - SCALAR_EMA)
                entries.h.lerp_(entries.m.square(), 1 - SQUARE_EMA)
                entries.steps += 1
                out[entries.at] = entries.m / (FLOOR + (entries.h / (1 - SQUARE_EMA**entries.steps)).sqrt())

    def _invert(self, blocks: list[Blocks]) -> None:
        jobs = []
        for x in blocks:
            damping = self._options(x.layer)["damping"]
            jobs.append((x.F, torch.full((len(x.F),), damping, dtype=torch.float64, device=x.F.device)))
        for one, inverse in zip(blocks, self._inverted(jobs), strict=True):
            one.inverse, one.inversions = inverse, one.inversions + 1

    def _warm(self, gradients: Iterator[Tensor]) -> int:
        records, count = self._made(), 0
        layers = [layer for layer in self.covered if isinstance(records.get(layer.name), Blocks)]
        for count, flat in enumerate(gradients, 1):
            for layer in layers:
                records[layer.name].F.lerp_(products(layer, flat, self.variant), 1 / count)
        self._require_finite_parts((layer.name, (records[layer.name].F,)) for layer in layers)
        self._invert([records[layer.name] for layer in layers])
        self._records = records
        return count
