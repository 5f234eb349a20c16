"""Bernoulli and Gaussian: every output element is independent, so the output Fisher is diagonal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods.base import (
    BoundLikelihood,
    Likelihood,
    require_finite,
    require_per_output,
    require_same_shape,
    require_targets,
)


class _BoundElementwise(BoundLikelihood):
    """All elements of an example are independent and summed; H is diagonal, so each element is one column."""

    def __init__(self, outputs: Tensor, root: Tensor, scale: Tensor | None):
        self.outputs = outputs
        self._shape = outputs.shape
        self._root = root.reshape(outputs.shape[0], -1)  # (N, R): √H_ee, element weights included
        self._scale = None if scale is None else scale.reshape(self._root.shape)  # √ of an element's weight
        self.weight = torch.ones(outputs.shape[0], 1, dtype=torch.float64, device=outputs.device)
        self.num_columns = self.num_uniforms = self._root.shape[1]

    def column(self, r: int) -> Tensor:
        out = torch.zeros_like(self._root)
        out[:, r] = self._root[:, r]
        return out.reshape(self._shape)

    def _scaled(self, scores: Tensor) -> Tensor:
        return (scores if self._scale is None else scores * self._scale).reshape(self._shape)


class _BoundBernoulli(_BoundElementwise):
    def __init__(self, outputs: Tensor, targets: Tensor | None, scale: Tensor | None):
        # √(p(1-p)) without forming 1-p, safe at saturation
        root = ((functional.logsigmoid(outputs) + functional.logsigmoid(-outputs)) / 2).exp()
        super().__init__(outputs, root if scale is None else root * scale, scale)
        self._logits = outputs.reshape(self._root.shape)
        self._targets = None if targets is None else targets.reshape(self._root.shape).to(outputs.dtype)

    def _draw(self, uniforms: Tensor) -> Tensor:
        return (uniforms.to(self._logits.device) < self._logits.double().sigmoid()).to(self._logits.dtype)

    def _score(self, labels: Tensor) -> Tensor:
        return (1 - labels) * self._logits.sigmoid() - labels * (-self._logits).sigmoid()

    def _coefficients(self, labels: Tensor) -> Tensor:
        return (1 - labels) * (self._logits / 2).exp() - labels * (-self._logits / 2).exp()

    def sampled_score(self, uniforms: Tensor) -> Tensor:
        return self._scaled(self._score(self._draw(uniforms)))

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        return self._coefficients(self._draw(uniforms))

    def observed_score(self, term: int | None = None) -> Tensor:
        return self._scaled(self._score(self._targets))

    def gradient_coefficients(self) -> Tensor:
        coefficients = self._coefficients(self._targets)
        return coefficients if self._scale is None else coefficients * self._scale

    def loss_gradient(self) -> Tensor:
        score = self._score(self._targets)
        return (score if self._scale is None else score * self._scale.square()).reshape(self._shape)


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
        self.pos_weight = (
            None if pos_weight is None else torch.as_tensor(pos_weight, dtype=torch.float64).detach().cpu()
        )
        if self.pos_weight is not None and not (torch.isfinite(self.pos_weight).all() and (self.pos_weight >= 0).all()):
            raise InputError(f"pos_weight must be finite and >= 0; got {self.pos_weight.tolist()}.")

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return self.pos_weight is not None

    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check logits and 0/1 targets of one batch and bind to them."""
        require_finite(outputs, where)
        outputs = outputs.detach()
        if targets is None and not self.needs_targets:
            return _BoundBernoulli(outputs, None, None)
        require_targets(self, targets)
        require_same_shape(self, outputs, targets, where)
        if not torch.isfinite(targets.double()).all():
            raise NonFiniteError(
                f"Bernoulli targets hold NaN or infinity in {where}. Clean the targets or drop those examples."
            )
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


class _BoundGaussian(_BoundElementwise):
    def __init__(self, outputs: Tensor, targets: Tensor | None, variance: Tensor):
        std = variance.sqrt().to(outputs.device, outputs.dtype).expand_as(outputs)
        super().__init__(outputs, 1 / std, None)
        self._residual = None if targets is None else outputs - targets.to(outputs.dtype)

    def _standard(self, uniforms: Tensor) -> Tensor:
        return -torch.special.ndtri(uniforms.clamp(1e-300, 1 - 2**-53)).to(self._root.device, self._root.dtype)

    def sampled_score(self, uniforms: Tensor) -> Tensor:
        return (self._standard(uniforms) * self._root).reshape(self._shape)

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        return self._standard(uniforms)

    def observed_score(self, term: int | None = None) -> Tensor:
        return self._residual * self._root.square().reshape(self._shape)

    def gradient_coefficients(self) -> Tensor:
        return self._residual.reshape(self._root.shape) * self._root

    def loss_gradient(self) -> Tensor:
        return self.observed_score()


class Gaussian(Likelihood):
    """y ~ N(f, v I) with a fixed variance, the likelihood behind ``MSELoss``.

    All elements of an example are summed; the mean is over examples. With unit variance and C elements per example the GGN of
    ``MSELoss("mean")`` is (2/C) F and that of ``MSELoss("sum")`` is 2 N F.

    Parameters
    ----------
    variance
        A positive scalar, or a tensor that broadcasts against one example's outputs.
    """

    name = "gaussian"

    def __init__(self, variance: Tensor | float = 1.0):
        self.variance = torch.as_tensor(variance, dtype=torch.float64).detach().cpu()
        if not (torch.isfinite(self.variance).all() and (self.variance > 0).all()):
            raise InputError(f"variance must be finite and > 0; got {self.variance.tolist()}.")

    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check predictions and targets of one batch and bind to them."""
        require_finite(outputs, where)
        require_per_output("variance", self.variance, outputs)
        if targets is not None:
            require_targets(self, targets)
            require_same_shape(self, outputs, targets, where)
            if not torch.isfinite(targets.double()).all():
                raise NonFiniteError(
                    f"Gaussian targets hold NaN or infinity in {where}. Clean the targets or drop those examples."
                )
        return _BoundGaussian(outputs.detach(), targets, self.variance)
