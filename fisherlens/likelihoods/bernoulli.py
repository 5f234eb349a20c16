"""Independent 0/1 outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fisherlens.errors import InputError
from fisherlens.likelihoods.base import (
    BoundLikelihood,
    Likelihood,
    as_setting,
    require_finite,
    require_finite_targets,
    require_per_output,
    require_same_shape,
    require_targets,
    softmax_divergence,
)
from fisherlens.likelihoods.elementwise import BoundElementwise


class _BoundBernoulli(BoundElementwise):
    def __init__(self, outputs: Tensor, targets: Tensor | None, scale: Tensor | None):
        # √(p(1-p)) without forming 1-p, safe at saturation
        root = ((functional.logsigmoid(outputs) + functional.logsigmoid(-outputs)) / 2).exp()
        labels = None if targets is None else targets.to(outputs.dtype)
        super().__init__(outputs, root if scale is None else root * scale, labels, scale)
        self._logits = outputs.reshape(self._root.shape)

    def draw(self, uniforms: Tensor) -> Tensor:
        return (uniforms.to(self._logits.device) < self._logits.double().sigmoid()).to(self._logits.dtype)

    def score(self, labels: Tensor) -> Tensor:
        return (1 - labels) * self._logits.sigmoid() - labels * (-self._logits).sigmoid()

    def coefficients(self, labels: Tensor) -> Tensor:
        return (1 - labels) * (self._logits / 2).exp() - labels * (-self._logits / 2).exp()

    def loss_gradient(self) -> Tensor:
        y, ones = self._observed(), self._ones()
        return ((1 - y) * self._logits.sigmoid() - ones * (-self._logits).sigmoid()).reshape(self._shape)

    def gradient_coefficients(self) -> Tensor:
        y, ones = self._observed(), self._ones()
        found = (1 - y) * (self._logits / 2).exp() - ones * (-self._logits / 2).exp()
        return found if self._scale is None else torch.where(self._scale > 0, found / self._scale, 0)

    def divergence(self, moved: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.divergence`; an element's own weight multiplies its part."""
        pairs = [torch.stack([f, torch.zeros_like(f)], dim=-1) for f in (self._logits, self._flat(moved))]
        each = softmax_divergence(*(pair.double() for pair in pairs))
        return self._summed(each)

    def _ones(self) -> Tensor:
        """pos_weight · y, the weight of the outcome 1: what is left of the element's weight 1 + (pos_weight - 1) y."""
        y = self._observed()
        return y if self._scale is None else (self._scale.square() - (1 - y)).clamp(min=0)


class Bernoulli(Likelihood):
    """Independent 0/1 outputs with logits f, the likelihood behind ``BCEWithLogitsLoss``.

    All elements of an example are summed; the mean is over examples. With C elements, ``BCEWithLogitsLoss("mean")`` has GGN F/C.

    Parameters
    ----------
    pos_weight
        Multiplies the contribution of elements whose observed target is 1, a scalar or one number per output; None for 1.
    """

    name = "bernoulli"

    def __init__(self, pos_weight: Tensor | float | None = None):
        self.pos_weight = None if pos_weight is None else as_setting(pos_weight, "pos_weight")
        if self.pos_weight is not None and not (torch.isfinite(self.pos_weight).all() and (self.pos_weight >= 0).all()):
            raise InputError(f"pos_weight must be finite and >= 0; got {self.pos_weight.tolist()}.")

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return self.pos_weight is not None

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check logits and 0/1 targets of one batch and bind to them."""
        require_finite(outputs, where)
        outputs = outputs.detach()
        if targets is None and not self.needs_targets:
            return _BoundBernoulli(outputs, None, None)
        require_targets(self, targets)
        require_same_shape(self, outputs, targets, where)
        require_finite_targets(self, targets, where)
        if (targets < 0).any() or (targets > 1).any():
            raise InputError(
                f"Bernoulli targets must lie in [0, 1]; {where} holds values outside. Class indices belong to likelihood='categorical'."
            )
        scale = None
        if self.pos_weight is not None:
            require_per_output("pos_weight", self.pos_weight, outputs)
            extra = self.pos_weight.to(outputs.device) - 1
            scale = (1 + extra * targets.double()).sqrt().to(outputs.dtype).expand_as(outputs)
        return _BoundBernoulli(outputs, targets, scale)
