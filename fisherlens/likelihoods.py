"""Likelihoods p(y | f): what turns a network's outputs into scores and into a Fisher information.

A likelihood is bound to the outputs (and targets) of one batch. The bound object answers, in output space, what every
kind of Fisher needs: the columns of a root S of the output Fisher H = S Sᵀ, the score at sampled labels, the score at
the observed labels, and the weight of each term of the mean.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherlens.errors import UNKNOWN_NAME, InputError, NonFiniteError, nearest


class BoundLikelihood(ABC):
    """A likelihood at the outputs of one batch of N examples, each with T terms of the mean.

    Attributes
    ----------
    outputs : Tensor
        Outputs of the network, shape ``(N, ...)``, detached.
    weight : Tensor
        Weight of each term, float64, shape ``(N, T)``; T = 1 where all elements of an example are one term.
    num_columns : int
        Columns R of the root per example.
    num_uniforms : int
        Uniform numbers per example that one draw of labels consumes.
    """

    outputs: Tensor
    weight: Tensor
    num_columns: int
    num_uniforms: int

    @abstractmethod
    def column(self, r: int) -> Tensor:
        """Column r of √w S for every example, in the shape of the outputs."""

    @abstractmethod
    def sampled_score(self, uniforms: Tensor) -> Tensor:
        """√w times the score at labels drawn by inversion from ``uniforms`` (N, num_uniforms)."""

    @abstractmethod
    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        """The same scores as combinations of the columns: (N, R) with score = Σ_r c_r column_r."""

    @abstractmethod
    def observed_score(self, term: int | None = None) -> Tensor:
        """√w times the score at the observed labels: summed over terms, or of one term."""

    @abstractmethod
    def gradient_coefficients(self) -> Tensor:
        """The loss gradient as a combination of the columns: (N, R) with Σ_r d_r column_r = ``loss_gradient()``."""

    @abstractmethod
    def loss_gradient(self) -> Tensor:
        """Gradient of Σ w · (negative log-likelihood) with respect to the outputs."""

    @property
    def num_terms(self) -> int:
        return self.weight.shape[1]

    def kept_rows(self) -> Tensor:
        """Which of the N × R rows carry weight, shape ``(N, R)``, bool."""
        kept = self.weight > 0
        return kept.repeat_interleave(self.num_columns // self.num_terms, dim=1)


class Likelihood(ABC):
    """Base class: a family p(y | f) whose Fisher in output space has a closed form."""

    name: str = ""
    needs_targets: bool = False

    @abstractmethod
    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check outputs and targets of one batch and bind to them; ``where`` names the batch in errors."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def rank_per_term(self, output_shape: torch.Size) -> int:
        """Largest rank that one term can add to F."""
        return math.prod(output_shape[1:])


def _require_finite(outputs: Tensor, where: str) -> None:
    if not torch.isfinite(outputs).all():
        bad = (~torch.isfinite(outputs)).reshape(outputs.shape[0], -1).any(1).nonzero()[0].item()
        raise NonFiniteError(
            f"The network's output is NaN or infinite in {where}, first at its example {bad}. The usual causes are weights that "
            "diverged or an input that was not scaled; look at the outputs of that example."
        )


def _require_targets(likelihood: Likelihood, targets: object) -> None:
    if not isinstance(targets, Tensor):
        raise InputError(
            f"The observed labels are needed here, but the targets are {type(targets).__name__}. Give data as (inputs, targets) tensors; "
            f"{likelihood.name} targets may be None only for kind='exact' or 'mc' without class weights or ignored labels."
        )


class _BoundCategorical(BoundLikelihood):
    """Softmax over the last axis of logits (N, T, C); see methods: S' = the C - 1 columns that a Householder leaves of S.

    With q = √p the root S = diag(q) - p qᵀ has S q = 0. A Householder that maps q to a basis vector m moves this null
    direction into column m, which is dropped. m is the most likely class, so that no coefficient divides by a tiny q_m.
    """

    def __init__(self, likelihood: Categorical, outputs: Tensor, labels: Tensor | None, weight: Tensor):
        self.outputs = outputs
        self._axis = likelihood.class_axis
        moved = outputs.movedim(self._axis, -1)
        self._moved_shape = moved.shape
        logits = moved.reshape(moved.shape[0], -1, moved.shape[-1])  # (N, T, C)
        self._log_p = functional.log_softmax(logits, dim=-1)
        self._p = self._log_p.exp()
        self._q = (self._log_p / 2).exp()
        self._pivot = self._p.argmax(-1)  # (N, T)
        self._labels = labels  # (N, T), ignored ones already replaced by 0
        self.weight = weight
        self._root_weight = weight.sqrt().to(outputs.dtype)
        self._free = max(logits.shape[-1] - 1, 1)
        self.num_columns = logits.shape[1] * self._free
        self.num_uniforms = logits.shape[1]

    def _shaped(self, scores: Tensor) -> Tensor:
        return scores.reshape(self._moved_shape).movedim(-1, self._axis)

    def _column_classes(self, j: int) -> Tensor:
        return j + (self._pivot <= j).long()

    def column(self, r: int) -> Tensor:
        t, j = divmod(r, self._free)
        out = torch.zeros_like(self._p)
        if self._p.shape[-1] > 1:
            q, p, pivot = self._q[:, t], self._p[:, t], self._pivot[:, t, None]
            cls = self._column_classes(j)[:, t, None]
            q_c, q_m = q.gather(1, cls), q.gather(1, pivot)
            column = -p * (q_c / (1 + q_m))
            column.scatter_add_(1, cls, q_c)
            column.scatter_add_(1, pivot, -q_m * q_c / (1 + q_m))
            out[:, t] = column * self._root_weight[:, t, None]
        return self._shaped(out)

    def _draw(self, uniforms: Tensor) -> Tensor:
        cumulative = self._p.double().cumsum(-1)
        threshold = uniforms.to(cumulative.device, torch.float64)[..., None] * cumulative[..., -1:]
        return (cumulative <= threshold).sum(-1).clamp_(max=self._p.shape[-1] - 1)

    def _score(self, labels: Tensor) -> Tensor:
        # p - e_y; p_y - 1 by expm1, which keeps its digits when p_y is close to 1
        at_label = torch.expm1(self._log_p.gather(-1, labels[..., None]))
        return self._p.scatter(-1, labels[..., None], at_label)

    def _coefficients(self, labels: Tensor) -> Tensor:
        if self._p.shape[-1] == 1:
            return torch.zeros(*labels.shape, 1, dtype=self._p.dtype, device=self._p.device).flatten(1)
        classes = torch.stack([self._column_classes(j) for j in range(self._free)], dim=-1)  # (N, T, C-1)
        q_c = self._q.gather(-1, classes)
        q_m = self._q.gather(-1, self._pivot[..., None])
        q_y = self._q.gather(-1, labels[..., None])
        is_pivot = (labels == self._pivot)[..., None]
        coefficients = torch.where(is_pivot, q_c / q_m, q_c / (1 + q_m))
        return (coefficients - (classes == labels[..., None]) / q_y).flatten(1)

    def sampled_score(self, uniforms: Tensor) -> Tensor:
        return self._shaped(self._score(self._draw(uniforms)) * self._root_weight[..., None])

    def sampled_coefficients(self, uniforms: Tensor) -> Tensor:
        return self._coefficients(self._draw(uniforms))

    def observed_score(self, term: int | None = None) -> Tensor:
        score = self._score(self._labels) * self._root_weight[..., None]
        if term is not None:
            only = torch.zeros_like(score)
            only[:, term] = score[:, term]
            score = only
        return self._shaped(score)

    def gradient_coefficients(self) -> Tensor:
        root_weight = self._root_weight.repeat_interleave(self._free, dim=1)
        return self._coefficients(self._labels) * root_weight

    def loss_gradient(self) -> Tensor:
        return self._shaped(self._score(self._labels) * self.weight.to(self._p.dtype)[..., None])


class Categorical(Likelihood):
    """Softmax over C classes: p(y | f) = softmax(f)_y, the likelihood behind ``CrossEntropyLoss``.

    Every kept position of a structured output is one term of the mean: F = Σ w_t F_t / Σ w_t.

    Parameters
    ----------
    weight
        Weight of each class, shape ``(C,)``, or None. A weight is a repetition count: weight 2 equals the example given twice.
        It is that of the observed label, for every kind, so that F is the GGN of the weighted cross-entropy.
    ignore_index
        Terms with this label are left out.
    class_axis
        Which axis of the outputs holds the classes: 1 for ``(N, C)`` and ``(N, C, d1, …)``, -1 for ``(N, S, C)``. It is never guessed.

    Examples
    --------
    >>> Categorical(weight=[1.0, 2.0, 0.5])
    Categorical(weight=tensor([1.0000, 2.0000, 0.5000], dtype=torch.float64), ignore_index=-100, class_axis=1)
    """

    name = "categorical"

    def __init__(self, weight: Tensor | list[float] | None = None, ignore_index: int = -100, class_axis: int = 1):
        self.weight = None if weight is None else torch.as_tensor(weight, dtype=torch.float64).detach().cpu()
        self.ignore_index = ignore_index
        self.class_axis = class_axis
        if self.weight is not None and (
            self.weight.ndim != 1 or not torch.isfinite(self.weight).all() or (self.weight < 0).any()
        ):
            raise InputError(f"Class weights must be finite numbers >= 0, one per class; got {self.weight.tolist()}.")

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return self.weight is not None

    def rank_per_term(self, output_shape: torch.Size) -> int:
        return output_shape[self.class_axis] - 1

    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check logits and labels of one batch and bind to them."""
        if outputs.ndim < 2 or not -outputs.ndim <= self.class_axis < outputs.ndim or self.class_axis % outputs.ndim == 0:
            raise InputError(
                f"Categorical needs logits of shape (N, C) or (N, C, d1, …) with the classes on axis {self.class_axis}; {where} gave outputs of "
                f"shape {tuple(outputs.shape)}. Use class_axis=-1 for (N, S, C), or Bernoulli for one logit per example."
            )
        _require_finite(outputs, where)
        moved = outputs.detach().movedim(self.class_axis, -1)
        term_shape, num_classes = moved.shape[:-1], moved.shape[-1]
        if self.weight is not None and len(self.weight) != num_classes:
            raise InputError(f"{len(self.weight)} class weights for {num_classes} classes: give one weight per class.")
        if targets is None:
            if self.needs_targets:
                _require_targets(self, targets)
            weight = torch.ones(term_shape, dtype=torch.float64, device=outputs.device)
            return _BoundCategorical(self, outputs.detach(), None, weight.flatten(1) if weight.ndim > 1 else weight[:, None])
        labels, weight = self._check_labels(targets, term_shape, num_classes, where)
        shape = (term_shape[0], -1)
        return _BoundCategorical(self, outputs.detach(), labels.reshape(shape), weight.reshape(shape))

    def _check_labels(self, targets: Tensor, term_shape: torch.Size, num_classes: int, where: str) -> tuple[Tensor, Tensor]:
        _require_targets(self, targets)
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(
                f"Categorical targets must be class indices of an integer dtype; {where} holds {targets.dtype}. For class probabilities or "
                "one-hot rows use targets.argmax(axis); for 0/1 targets of independent outputs use likelihood='bernoulli'."
            )
        if targets.shape != term_shape:
            raise InputError(
                f"Targets of {where} have shape {tuple(targets.shape)}, but outputs with classes on axis {self.class_axis} leave {tuple(term_shape)}: "
                "one label per remaining position. Check the class axis (class_axis=-1 for (N, S, C)) and the length of the targets."
            )
        labels = targets.long()
        kept = labels != self.ignore_index
        wrong = kept & ((labels < 0) | (labels >= num_classes))
        if wrong.any():
            value = labels[wrong][0].item()
            raise InputError(
                f"Label {value} in {where} is outside 0..{num_classes - 1}. The network has {num_classes} outputs; labels count from 0, and "
                f"{self.ignore_index} marks ignored ones."
            )
        labels = labels.masked_fill(~kept, 0)
        weight = kept.double()
        if self.weight is not None:
            weight = weight * self.weight.to(labels.device)[labels]
        return labels, weight


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
        self.pos_weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=torch.float64).detach().cpu()
        if self.pos_weight is not None and not (torch.isfinite(self.pos_weight).all() and (self.pos_weight >= 0).all()):
            raise InputError(f"pos_weight must be finite and >= 0; got {self.pos_weight.tolist()}.")

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return self.pos_weight is not None

    def bind(self, outputs: Tensor, targets: Tensor | None, where: str = "the data") -> BoundLikelihood:
        """Check logits and 0/1 targets of one batch and bind to them."""
        _require_finite(outputs, where)
        outputs = outputs.detach()
        if targets is None and not self.needs_targets:
            return _BoundBernoulli(outputs, None, None)
        _require_targets(self, targets)
        _require_same_shape(self, outputs, targets, where)
        if not torch.isfinite(targets.double()).all() or (targets < 0).any() or (targets > 1).any():
            raise InputError(
                f"Bernoulli targets must lie in [0, 1]; {where} holds values outside. Class indices belong to likelihood='categorical'."
            )
        scale = None
        if self.pos_weight is not None:
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
        _require_finite(outputs, where)
        if self.variance.ndim >= outputs.ndim and self.variance.ndim > 0:
            raise InputError(
                f"variance of shape {tuple(self.variance.shape)} does not broadcast against one example's outputs {tuple(outputs.shape[1:])}: "
                "give a scalar or one value per output."
            )
        if targets is not None:
            _require_targets(self, targets)
            _require_same_shape(self, outputs, targets, where)
            if not torch.isfinite(targets.double()).all():
                raise NonFiniteError(f"Gaussian targets hold NaN or infinity in {where}. Clean the targets or drop those examples.")
        return _BoundGaussian(outputs.detach(), targets, self.variance)


def _require_same_shape(likelihood: Likelihood, outputs: Tensor, targets: Tensor, where: str) -> None:
    if targets.shape != outputs.shape:
        raise InputError(
            f"{type(likelihood).__name__} targets must have the shape of the outputs, {tuple(outputs.shape)}; {where} holds {tuple(targets.shape)}. "
            "Broadcasting is refused because it hides mistakes: use targets.unsqueeze(-1) or outputs.squeeze(-1)."
        )


_BY_NAME = {cls.name: cls for cls in (Categorical, Bernoulli, Gaussian)}
_FOR_LOSS = {
    "CrossEntropyLoss": "categorical",
    "cross_entropy": "categorical",
    "NLLLoss": "categorical",
    "nll_loss": "categorical",
    "BCEWithLogitsLoss": "bernoulli",
    "binary_cross_entropy_with_logits": "bernoulli",
    "BCELoss": "bernoulli",
    "binary_cross_entropy": "bernoulli",
    "MSELoss": "gaussian",
    "mse_loss": "gaussian",
}


def as_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood from its name; a loss is refused with the name of the likelihood to use.

    A loss has no normalisation of its own: the GGN of ``MSELoss`` is 2/C or 2N times a Fisher, so a Fisher is never built from one.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in _BY_NAME:
            raise InputError(UNKNOWN_NAME.format(what="likelihood", name=likelihood, hint=nearest(likelihood, _BY_NAME)))
        return _BY_NAME[likelihood]()
    label = type(likelihood).__name__ if isinstance(likelihood, nn.Module) else getattr(likelihood, "__name__", type(likelihood).__name__)
    advice = f"use likelihood={_FOR_LOSS[label]!r}" if label in _FOR_LOSS else f"use one of {sorted(_BY_NAME)}"
    raise TypeError(
        f"likelihood must be a name or a fisherlens likelihood; got {label}. A loss does not fix the scale of a Fisher: {advice}, "
        "and the outputs stay logits (categorical, bernoulli) or means (gaussian)."
    )
