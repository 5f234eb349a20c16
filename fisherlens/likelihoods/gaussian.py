"""Normally distributed outputs, with a variance that is given or that the network predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods.base import (
    BoundLikelihood,
    Likelihood,
    as_setting,
    broadcasts,
    require_finite,
    require_finite_targets,
    require_same_shape,
    require_targets,
)
from fisherlens.likelihoods.elementwise import BoundElementwise


def _standard_normal(uniforms: Tensor, like: Tensor) -> Tensor:
    """Inverse of the normal distribution function, on the CPU in float64, then moved."""
    return torch.special.ndtri(uniforms.clamp(1e-300, 1 - 2**-53)).to(like.device, like.dtype)


class _BoundGaussian(BoundElementwise):
    """Labels are standardised, z = (y - f)/√v: the score is -z/√v."""

    def __init__(self, outputs: Tensor, targets: Tensor | None, variance: Tensor):
        root = 1 / variance.sqrt().to(outputs.device, outputs.dtype).expand_as(outputs)
        super().__init__(outputs, root, None if targets is None else (targets.to(outputs.dtype) - outputs) * root)

    def draw(self, uniforms: Tensor) -> Tensor:
        return _standard_normal(uniforms, self._root)

    def score(self, labels: Tensor) -> Tensor:
        return -labels * self._root

    def coefficients(self, labels: Tensor) -> Tensor:
        return -labels

    def divergence(self, moved: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.divergence`."""
        change = (self._flat(moved) - self._flat(self.outputs)).double()
        return self._summed((change * self._root.double()).square() / 2)


class Gaussian(Likelihood):
    """y ~ N(f, v I) with a fixed variance, the likelihood behind ``MSELoss``.

    All elements of an example are summed; the mean is over examples. With unit variance and C elements per example the GGN of
    ``MSELoss("mean")`` is (2/C) F and that of ``MSELoss("sum")`` is 2 N F.

    Parameters
    ----------
    variance
        A positive scalar; a tensor with fewer axes than the outputs, which broadcasts against one example's outputs (one value per
        output: shape ``(C,)``); or a tensor with as many axes as the outputs, whose first axis counts the examples of the whole data
        set in data order (``(N, 1)`` or ``(N, C)``). The number of axes decides, never a size.

    Examples
    --------
    >>> Gaussian(variance=[0.5, 2.0])
    Gaussian(variance=tensor([0.5000, 2.0000], dtype=torch.float64))
    """

    name = "gaussian"

    def __init__(self, variance: Tensor | float = 1.0):
        self.variance = as_setting(variance, "variance")
        wrong = ~(torch.isfinite(self.variance) & (self.variance > 0))
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            place = f" at {first}" if first else ""
            raise InputError(
                f"variance must be finite and > 0; got {self.variance[first].item()}{place}. It is a variance, not a log-variance: where the "
                "network predicts its logarithm use HeteroscedasticGaussian."
            )

    def check_data(self, output_shape: torch.Size, n_data: int) -> None:
        """Refuse a variance per example that counts other than ``n_data`` examples."""
        if self.variance.ndim == len(output_shape) + 1 and self.variance.shape[0] != n_data:
            raise InputError(
                f"variance of shape {tuple(self.variance.shape)} gives {self.variance.shape[0]} examples a variance, but the data hold {n_data}. With as "
                f"many axes as the outputs, the first counts the examples of the whole data set; for one value per output leave it out: {tuple(output_shape)}."
            )

    def variance_at(self, outputs: Tensor, where: str = "the data", at: slice | None = None) -> Tensor:
        """The variance of examples ``at`` of the data set, on the CPU in float64; broadcasts against their outputs."""
        shape, own = tuple(self.variance.shape), tuple(outputs.shape[1:])
        per_example = len(shape) == outputs.ndim
        if len(shape) > outputs.ndim or not broadcasts(shape[1:] if per_example else shape, own):
            raise InputError(
                f"variance must be a scalar, broadcast against one example's outputs of shape {own}, or have a first axis for the examples, "
                f"(N, …) with {outputs.ndim} axes; got shape {shape} for {where}. For one value per example give variance of shape "
                f"({', '.join(['N', *['1'] * len(own)])}), for one per output {own}."
            )
        if not per_example:
            return self.variance
        if at is None:
            raise InputError(
                f"A variance per example, of shape {shape}, belongs to one data set in its order, but which of its examples {where} holds is not known "
                "here. Use fl.Fisher with that data set, or a variance without an axis for the examples."
            )
        if at.stop > shape[0] or at.stop - at.start != len(outputs):
            raise InputError(
                f"variance of shape {shape} gives {shape[0]} examples a variance, but {where} holds {len(outputs)} outputs for examples "
                f"{at.start}..{at.stop - 1}, counted from 0. Its first axis must count the examples of the whole data set, in data order."
            )
        return self.variance[at]

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check predictions and targets of one batch and bind to them; a variance per example needs ``at``."""
        require_finite(outputs, where)
        variance = self.variance_at(outputs, where, at)
        if targets is not None:
            require_targets(self, targets)
            require_same_shape(self, outputs, targets, where)
            require_finite_targets(self, targets, where)
        return _BoundGaussian(outputs.detach(), targets, variance)


class _BoundHeteroscedastic(BoundElementwise):
    """Outputs moved so that the axis of (μ, log v) is first within an example; labels are z = (y - μ)/√v."""

    def __init__(self, outputs: Tensor, targets: Tensor | None, axis: int, where: str):
        mean, log_variance = outputs.chunk(2, axis)
        precision = (-log_variance / 2).exp()  # 1/√v
        z = None if targets is None else (targets.to(outputs.dtype) - mean) * precision
        worst = precision if z is None else z.square() * precision
        if not torch.isfinite(worst).all():
            bad = (~torch.isfinite(worst)).flatten(1).any(1).nonzero()[0].item()
            raise NonFiniteError(
                f"1/v = exp(-log v) or the squared error over v overflows in {where}, first at its example {bad}, where the smallest log-variance is "
                f"{log_variance[bad].min().item():.4g}. Check that the second half of axis {axis} holds log v, bound it from below, or use float64."
            )
        root = torch.cat([precision, torch.full_like(precision, math.sqrt(0.5))], dim=axis)
        self._mean_shape = mean.shape
        self._precision, self._axis = precision, axis
        super().__init__(outputs, root, z, num_uniforms=mean[0].numel())

    def draw(self, uniforms: Tensor) -> Tensor:
        return _standard_normal(uniforms, self._root)

    def score(self, labels: Tensor) -> Tensor:
        z = labels.reshape(self._mean_shape)
        return torch.cat([-z * self._precision, (1 - z.square()) / 2], dim=self._axis).flatten(1)

    def coefficients(self, labels: Tensor) -> Tensor:
        z = labels.reshape(self._mean_shape)
        return torch.cat([-z, (1 - z.square()) * math.sqrt(0.5)], dim=self._axis).flatten(1)

    def divergence(self, moved: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.divergence`."""
        (mean, h), (other, g) = (f.double().chunk(2, self._axis) for f in (self.outputs, moved.detach()))
        s = g - h
        each = (torch.expm1(-s) + s + (other - mean).square() * (-g).exp()) / 2
        return each.flatten(1).sum(1, keepdim=True)


class HeteroscedasticGaussian(Likelihood):
    r"""y ~ N(μ, v) where the network predicts both: outputs f = (μ, log v), the likelihood behind ``GaussianNLLLoss``.

    .. math:: -\log p(y | f) = \frac{1}{2} [ h + (y - \mu)^2 e^{-h} + \log 2\pi ], \quad h = \log v, \qquad H = \mathrm{diag}(e^{-h}, \frac{1}{2})

    H is the Fisher, the *expected* Hessian; the Hessian at observed labels (and so the usual GGN) is another matrix, and not positive
    semi-definite. All elements of an example are summed; the mean is over examples.

    Parameters
    ----------
    axis
        Which axis of the outputs holds μ and log v: its first half are the means, its second half the log-variances. Targets have the
        shape of the means: ``(N, 1)`` for outputs ``(N, 2)``, ``(N, C)`` for ``(N, 2C)``, ``(N, 1, H, W)`` for ``(N, 2, H, W)``.

    Examples
    --------
    >>> bound = HeteroscedasticGaussian().bind(torch.zeros(3, 2), torch.ones(3, 1))
    >>> bound.observed_score()[0].tolist()
    [-1.0, 0.0]
    """

    name = "heteroscedastic_gaussian"

    def __init__(self, axis: int = 1):
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(f"axis must be an integer, the axis of the outputs that holds (μ, log v); got {axis!r}.")
        self.axis = axis

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check outputs (μ, log v) and targets of one batch and bind to them."""
        axis, shape = self.axis, tuple(outputs.shape)
        if not -len(shape) <= axis < len(shape) or axis % len(shape) == 0 or shape[axis] < 2 or shape[axis] % 2:
            raise InputError(
                f"HeteroscedasticGaussian needs outputs (N, …) with means and log-variances as the two halves of axis {axis}; {where} gave outputs of "
                f"shape {shape}. Let the last layer have two outputs per target, or name the axis: HeteroscedasticGaussian(axis=...)."
            )
        require_finite(outputs, where)
        axis %= len(shape)
        if targets is not None:
            require_targets(self, targets)
            wanted = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
            if tuple(targets.shape) != wanted:
                raise InputError(
                    f"HeteroscedasticGaussian targets must have the shape of the means, {wanted}, for outputs of shape {shape}; {where} holds "
                    f"{tuple(targets.shape)}. Broadcasting is refused because it hides mistakes: use targets.unsqueeze({axis}) where that axis is missing."
                )
            require_finite_targets(self, targets, where)
        return _BoundHeteroscedastic(outputs.detach(), targets, axis, where)
