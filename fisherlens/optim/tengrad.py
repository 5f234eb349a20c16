"""TENGraD: exact inverses of layer blocks from the rows of one batch, used for many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fisherlens.layout import LayerInfo
from fisherlens.likelihoods import Likelihood
from fisherlens.optim.checks import choice, number
from fisherlens.optim.groups import Groups
from fisherlens.optim.kernels import KernelSolve, RowMethod
from fisherlens.optim.rows import PATHS, TruncatedScores
from fisherlens.optim.rule import add_scaled
from fisherlens.scores.base import LayerScores
from fisherlens.scores.explicit import ExplicitScores

RULES = ("v1", "july-2021", "later")


class TENGraD(RowMethod):
    r"""Time-efficient natural gradient descent (TENGraD): layer blocks, inverted exactly through the kernels of one batch.

    Every ``refresh`` steps, for each layer, with u_n the score of example n (at labels y′ drawn from the model)

    .. math:: K = \tfrac{1}{M} U U^\top \; (= \tfrac{1}{M} (A A^\top) \circ (G G^\top) \text{ for one position}), \qquad
              L L^\top = K + \lambda I;

    every step, with ḡ the mean gradient of the layer and U up to ``refresh`` - 1 steps old

    .. math:: z = U \bar g, \qquad y = L^{-\top} L^{-1} z, \qquad
              P = \tfrac{1}{\lambda} \big( \bar g - \tfrac{1}{M} U^\top y \big) = \big( \tfrac{1}{M} U^\top U + \lambda I \big)^{-1} \bar g,

    and by the rule of the first release (``"v1"``)

    .. math:: P \leftarrow \nu P, \quad \nu = \min\big(1, \sqrt{\kappa / (\eta^2 \langle P, \bar g \rangle)}\big), \qquad
              m \leftarrow \mu m + P, \qquad \theta \leftarrow \theta - \eta (m + w \theta),

    ⟨P, ḡ⟩ and ν over all parameters. All other parameters: P = ḡ, small beside 1/λ, as in the source.

    Parameters
    ----------
    model
        The network itself. Trains all parameters that require grad, of one device and dtype, float32 or float64.
    lr, damping
        η and λ, both > 0. The source tunes η from 3e-3 to 0.1 and λ from 0.1 to 0.3.
    likelihood, labels, seed
        ``"sampled"``: labels drawn from the model, at refresh steps only. ``"true"``: those of the loss.
    momentum, weight_decay, kl_clip
        μ in [0, 1), w and κ.
    rule
        ``"v1"`` (June 2021), as above. ``"july-2021"``: neither clip nor momentum, θ ← θ - η (P + w θ). ``"later"``: no clip,
        m ← μ m + P + w θ, θ ← θ - η m. The arguments of what a rule does without are ignored.
    path
        How K of a convolution is computed. ``"auto"``: the cheaper exact one, from inner products of positions (``"A"``) or from
        explicit rows (``"B"``). ``"paper"``: the source's coarser choice, A if T² (d_i + d_o) < d_i d_o. ``"reduced"``: from sums over
        positions, an approximation: u_n = (1/T) (Σ_t g_t) (Σ_t a_t)ᵀ.
    low_rank
        Share in (0, 1] (the source: 0.9): products with explicit rows take their leading singular triples, as many as have singular
        values that sum up to no more than this share; K stays exact. None takes all.
    bias
        ``"block"``: in the block of its weight, as an input of 1. ``"paper"``: a dense bias has a kernel of its own, G Gᵀ/M, and takes
        ḡ between refresh steps; a convolution's bias always takes ḡ.
    reduction, refresh
        How the loss combines examples, ``"mean"`` or ``"sum"``; steps from one batch of rows to the next.
    param_groups, preset
        Options of single parameters, see :mod:`fisherlens.optim`. ``"paper"``: ``path="paper", bias="paper"``. None: ours, as given.

    Attributes
    ----------
    diagnostics : dict
        Counts: ``steps``, ``refreshes``, ``retries`` (factorisations repeated with 10, 100, …, 10⁶ λ), ``fallbacks`` (layers that move
        along ḡ / (10⁶ λ) until the next refresh, with a NumericalWarning).

    Raises
    ------
    InputError: an option out of range, nothing to train, ``step()`` without a backward pass. NonFiniteError, from ``step()``: NaN or
    infinity in a gradient (named) or in the statistics; parameters and state stay as they were.

    Notes
    -----
    Source: arXiv 2106.03947, github.com/saeedsoori/k-fac. The released reduced path lacks the 1/T, which makes its step
    (1/T²)(F + λ/T²)⁻¹ ḡ; ours is exact where inputs or scores do not vary over positions. λ holds from one refresh to the next. A
    layer that had no gradient at the refresh takes ḡ until the next one. Cost:
    a refresh 2 M² (d_i + d_o) + M³/3 per dense layer and one more backward pass; a step 4 M d_i d_o, two thirds of a gradient, and less
    for convolutions on path B by the number of positions. Kept between steps, and part of the state: M (d_i + d_o) floats or M rows,
    and M².

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(32, 4), torch.arange(32) % 3
    >>> opt = TENGraD(model, lr=0.1, damping=0.1, refresh=10)
    >>> for _ in range(20):
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     opt.step()
    >>> bool(loss < 1.0), opt.diagnostics["refreshes"]
    (True, 2)
    """

    rest_rule = "gradient"
    clips_all = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-2,
        damping: float = 0.2,
        *,
        likelihood: str | Likelihood = "categorical",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        labels: str = "sampled",
        kl_clip: float | None = 1e-2,
        rule: str = "v1",
        path: str = "auto",
        low_rank: float | None = None,
        bias: str = "block",
        reduction: str = "mean",
        refresh: int = 100,
        seed: int = 0,
        param_groups: Groups = None,
        preset: str | None = None,
    ):
        self.rule = choice("rule", rule, RULES)
        self.path = choice("path", path if preset is None else "paper", PATHS)
        self.bias = choice("bias", bias if preset is None else "paper", ("block", "paper"))
        most = math.nextafter(1.0, 2.0)
        self.low_rank = None if low_rank is None else number("low_rank", low_rank, 0.0, most, strict=True)
        self.decoupled = rule != "later"
        super().__init__(model, locals())
        ignored = ({} if rule == "v1" else {"kl_clip": None}) | ({"momentum": 0.0} if rule == "july-2021" else {})
        for group in self.param_groups:
            group |= ignored

    def _pieces(self) -> Sequence[LayerInfo]:
        if self.bias == "block":
            return self.covered
        pieces = []
        for layer in self.covered:
            if layer.weight is not None:
                pieces.append(replace(layer, parameters=(layer.weight,), bias=None))
            if layer.bias is not None and layer.kind == "dense":
                pieces.append(replace(layer, parameters=(layer.bias,), weight=None))
        return pieces

    def _rest(self, gradient: Tensor) -> Tensor:
        return gradient.clone()

    def _precondition(self, gradient: Tensor, active: set[str], scale: float, out: Tensor) -> None:
        if self._tap.listening:
            due = [piece for piece in self._pieces() if piece.name in active]
            self._kept = self._kept | {_key(x): self._kernel_solve([self._scores(x)], scale) for x in due}
        for block in self._kept.values():
            (piece,) = block.layers
            if piece.name in active and (piece.weight is not None or self.bias == "block" or self._tap.listening):
                block.write(block.solve(block.of(gradient)), out, active)
        if self.rule == "later":
            moving = [p if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
            add_scaled(out, torch.cat([p.reshape(-1) for p in moving]), self._values("weight_decay"))

    def _factorised(
        self, scores: Sequence[LayerScores], scale: float, gram: Tensor | None, damping: float
    ) -> KernelSolve:
        if self.low_rank is not None:
            scores = [
                TruncatedScores.of(x, gram, self.low_rank)
                if type(x) is ExplicitScores and x.layer.kind == "conv"
                else x
                for x in scores
            ]
        return super()._factorised(scores, scale, gram, damping)


def _key(piece: LayerInfo) -> str:
    return " ".join(p.name for p in piece.parameters)
