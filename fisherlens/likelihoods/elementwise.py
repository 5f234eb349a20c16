"""Likelihoods whose outputs are independent given f, so that the output Fisher is diagonal; the base for one's own."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.likelihoods.base import (
    BoundLikelihood,
    Likelihood,
    require_finite,
    require_finite_targets,
    require_same_shape,
    require_targets,
)


class BoundElementwise(BoundLikelihood):
    """All elements of an example are independent and summed; H is diagonal, so each element is one column.

    Labels may have any form that ``draw`` gives and ``score`` takes, as long as the observed ones have it too.

    Parameters
    ----------
    outputs
        Outputs of the network, ``(N, ...)``.
    root
        √H_ee of each element, ``scale`` included, in the shape of the outputs.
    labels
        Observed labels, ``(N, ...)``, or None.
    scale
        Root of an element's own weight, broadcast to the outputs, or None for 1.
    num_uniforms
        Uniform numbers per example and draw; None for one per element.
    """

    def __init__(
        self,
        outputs: Tensor,
        root: Tensor,
        labels: Tensor | None,
        scale: Tensor | None = None,
        num_uniforms: int | None = None,
    ):
        self._shape = outputs.shape
        self._root = root.reshape(outputs.shape[0], -1)  # (N, R)
        self._labels = None if labels is None else labels.reshape(outputs.shape[0], -1)
        self._scale = None if scale is None else scale.expand_as(outputs).reshape(self._root.shape)
        columns = self._root.shape[1]
        super().__init__(outputs, num_columns=columns, num_uniforms=columns if num_uniforms is None else num_uniforms)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Labels drawn by inversion from uniform numbers ``(N, num_uniforms)``."""
        raise NotImplementedError

    def score(self, labels: Tensor) -> Tensor:
        """The score at these labels without weights, ``(N, R)``."""
        raise NotImplementedError

    def coefficients(self, labels: Tensor) -> Tensor:
        """The score at these labels over its root, ``(N, R)``; 0 where both vanish, NaN where only the root does."""
        score = self._scaled(self.score(labels))
        ratio = score / self._root.where(self._root > 0, 1)
        return ratio.where((self._root > 0) | (score == 0), torch.nan)

    def _scaled(self, scores: Tensor) -> Tensor:
        return scores if self._scale is None else scores * self._scale

    def _flat(self, values: Tensor) -> Tensor:
        """Values of the shape of the outputs as ``(N, elements)``."""
        return values.detach().reshape(self._shape[0], -1)

    def _summed(self, each: Tensor) -> Tensor:
        """One term per example from its elements, ``(N, elements)`` → ``(N, 1)``, each with its own weight."""
        each = each.double() if self._scale is None else each.double() * self._scale.double().square()
        return each.sum(1, keepdim=True)

    def _observed(self) -> Tensor:
        if self._labels is None:
            raise InputError(
                "The observed labels are needed here, but the targets are None. Give data as (inputs, targets)."
            )
        return self._labels

    def column(self, r: int) -> Tensor:
        out = torch.zeros_like(self._root)
        out[:, r] = self._root[:, r]
        return out.reshape(self._shape)

    def curvature(self, changes: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.curvature`."""
        return changes * self._root.square().reshape(self._shape)

    def sampled_score(self, uniforms: Tensor) -> Tensor:
        return self._scaled(self.score(self.draw(uniforms))).reshape(self._shape)

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        return self.coefficients(self.draw(uniforms))

    def observed_score(self, term: int | None = None) -> Tensor:
        return self._scaled(self.score(self._observed())).reshape(self._shape)

    def gradient_coefficients(self) -> Tensor:
        return self._scaled(self.coefficients(self._observed()))

    def observed_coefficients(self) -> Tensor | None:
        return super().observed_coefficients() if self._scale is None else None

    def loss_gradient(self) -> Tensor:
        return self._scaled(self._scaled(self.score(self._observed()))).reshape(self._shape)


class ElementwiseLikelihood(Likelihood):
    """Base class for a family of your own in which every output element has a label of its own, p(y | f) = Π_e p(y_e | f_e).

    Three methods make a likelihood. All elements of an example are summed and the mean is over examples, as for
    ``Bernoulli`` and ``Gaussian``. Targets have the shape of the outputs.

    Examples
    --------
    Exponential waiting times with log-rate f: p(y | f) = exp(f - y exp(f)), whose Fisher is 1 for every f.

    >>> class Exponential(ElementwiseLikelihood):
    ...     def fisher_root(self, outputs):
    ...         return torch.ones_like(outputs)
    ...     def score(self, outputs, targets):
    ...         return targets * outputs.exp() - 1
    ...     def sample(self, outputs, uniforms):
    ...         return -torch.log1p(-uniforms) * (-outputs).exp()
    >>> bound = Exponential().bind(torch.zeros(2, 1), torch.ones(2, 1))
    >>> bound.observed_score().tolist(), Exponential().name
    ([[0.0], [0.0]], 'exponential')
    """

    name = ""

    @abstractmethod
    def fisher_root(self, outputs: Tensor) -> Tensor:
        """√H_ee of each element, in the shape of the outputs ``(N, ...)``: the standard deviation of the score.

        Write it so that it neither overflows nor loses digits: exp(f/2), say, rather than the root of exp(f).
        """

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-∂/∂f log p(y | f) at labels of the shape and dtype of the outputs."""

    @abstractmethod
    def sample(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Labels y ~ p(y | f) from uniform numbers, one per element, by the inverse of the cumulative distribution.

        Both arguments have the shape of the outputs, and are float64 on the CPU whatever the network is, so that the labels do not
        depend on the device; ``uniforms`` lie strictly between 0 and 1. numpy and scipy may be used.
        """

    def divergence(self, outputs: Tensor, moved: Tensor) -> Tensor:
        """KL(p(y | f) ‖ p(y | f')) of each element in nat, both outputs and the answer of one shape; only what draws divergences asks for it."""
        raise InputError(errors.NO_DIVERGENCE.format(name=type(self).__name__))

    def check_targets(self, targets: Tensor, where: str) -> None:
        """Raise InputError for labels that cannot be, counts below 0, say; ``where`` names the batch."""

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check outputs and targets of one batch and bind to them."""
        require_finite(outputs, where)
        outputs = outputs.detach()
        if targets is not None:
            require_targets(self, targets)
            require_same_shape(self, outputs, targets, where)
            require_finite_targets(self, targets, where)
            self.check_targets(targets, where)
            targets = targets.to(outputs.dtype)
        root = self._checked("fisher_root", self.fisher_root(outputs), outputs)
        if (root < 0).any():
            raise InputError(
                f"{type(self).__name__}.fisher_root must be >= 0, the standard deviation of the score; it gave {root.min().item():.3g} in {where}."
            )
        return _BoundOwn(self, outputs, root, targets)

    def _checked(self, method: str, values: object, outputs: Tensor) -> Tensor:
        """What a subclass's method gave, on the device and in the dtype of the outputs."""
        name = f"{type(self).__name__}.{method}"
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must return a tensor; it returned {type(values).__name__}.")
        if values.shape != outputs.shape:
            raise InputError(
                f"{name} must return one value per output element, shape {tuple(outputs.shape)}; it returned {tuple(values.shape)}."
            )
        values = values.detach().to(outputs.device, outputs.dtype)
        if not torch.isfinite(values).all():
            at = tuple((~torch.isfinite(values)).nonzero()[0].tolist())
            raise NonFiniteError(
                f"{name} gave NaN or infinity, first at {at} of its batch, where the output is {outputs[at].item():.6g}. Write it so that it holds for "
                "large outputs, scale the outputs, or use a float64 model."
            )
        return values


class _BoundOwn(BoundElementwise):
    """A user's elementwise likelihood at the outputs of one batch."""

    def __init__(self, likelihood: ElementwiseLikelihood, outputs: Tensor, root: Tensor, targets: Tensor | None):
        super().__init__(outputs, root, targets)
        self._likelihood = likelihood

    def draw(self, uniforms: Tensor) -> Tensor:
        inside = uniforms.clamp(2.0**-54, 1 - 2.0**-53).reshape(self._shape)
        labels = self._likelihood.sample(self.outputs.double().cpu(), inside)
        return self._likelihood._checked("sample", labels, self.outputs).reshape(self._root.shape)

    def score(self, labels: Tensor) -> Tensor:
        score = self._likelihood.score(self.outputs, labels.reshape(self._shape))
        return self._likelihood._checked("score", score, self.outputs).reshape(self._root.shape)

    def divergence(self, moved: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.divergence`."""
        each = self._likelihood.divergence(self.outputs, moved.detach())
        return self._summed(self._flat(self._likelihood._checked("divergence", each, self.outputs)))

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        found = super().sampled_coefficients(uniforms)
        if not torch.isfinite(found).all():
            raise InputError(
                f"{type(self._likelihood).__name__}.fisher_root is 0 where the score at a sampled label is not, so the two do not belong to one "
                "distribution: fisher_root squared must be the mean of score squared over sampled labels."
            )
        return found
