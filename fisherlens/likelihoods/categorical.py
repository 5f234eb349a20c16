"""Softmax over classes, with class weights, ignored labels and structured outputs."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.nn import functional

from fisherlens.errors import InputError
from fisherlens.likelihoods.base import (
    BoundLikelihood,
    Likelihood,
    as_setting,
    require_finite,
    require_targets,
    softmax_divergence,
)


class _BoundCategorical(BoundLikelihood):
    """Softmax over the last axis of logits (N, T, C); see methods: S' = the C - 1 columns that a Householder leaves of S.

    With q = √p the root S = diag(q) - p qᵀ has S q = 0. A Householder that maps q to a basis vector m moves this null
    direction into column m, which is dropped. m is the most likely class, so that no coefficient divides by a tiny q_m.
    """

    def __init__(self, likelihood: Categorical, outputs: Tensor, labels: Tensor | None, weight: Tensor):
        num_terms, self._free = weight.shape[1], max(outputs.shape[likelihood.class_axis] - 1, 1)
        super().__init__(outputs, num_columns=num_terms * self._free, num_uniforms=num_terms, weight=weight)
        self._axis = likelihood.class_axis
        moved = outputs.movedim(self._axis, -1)
        self._moved_shape = moved.shape
        logits = moved.reshape(moved.shape[0], -1, moved.shape[-1])  # (N, T, C)
        self._log_p = functional.log_softmax(logits, dim=-1)
        self._p = self._log_p.exp()
        self._q = (self._log_p / 2).exp()
        self._pivot = self._p.argmax(-1)  # (N, T)
        self._labels = labels  # (N, T), ignored ones already replaced by 0
        self._root_weight = weight.sqrt().to(outputs.dtype)

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

    def curvature(self, changes: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.curvature`; (diag(p) - p pᵀ) v in O(C), from differences to the most likely class, which lose no digits."""
        moved = changes.movedim(self._axis % self.outputs.ndim + 1, -1)
        v = moved.reshape(len(changes), *self._p.shape)
        v = v - v.gather(-1, self._pivot[..., None].expand(*v.shape[:-1], 1))
        found = self._p * (v - (self._p * v).sum(-1, keepdim=True)) * self.weight.to(v.dtype)[..., None]
        return found.view(moved.shape).movedim(-1, self._axis % self.outputs.ndim + 1)

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

    def divergence(self, moved: Tensor) -> Tensor:
        """See :meth:`BoundLikelihood.divergence`."""
        other = moved.detach().movedim(self._axis, -1).reshape(self._log_p.shape)
        logits = self.outputs.movedim(self._axis, -1).reshape(self._log_p.shape)
        return self.weight * softmax_divergence(logits.double(), other.double())

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
        self.weight = None if weight is None else as_setting(weight, "Class weights")
        for name, value in (("ignore_index", ignore_index), ("class_axis", class_axis)):
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"{name} of Categorical must be an integer; got {value!r}.")
        self.ignore_index, self.class_axis = int(ignore_index), int(class_axis)
        if self.weight is not None and (
            self.weight.ndim != 1 or not torch.isfinite(self.weight).all() or (self.weight < 0).any()
        ):
            raise InputError(f"Class weights must be finite numbers >= 0, one per class; got {self.weight.tolist()}.")

    @property
    def needs_targets(self) -> bool:  # type: ignore[override]
        return self.weight is not None or self.ignore_index != -100

    def rank_per_term(self, output_shape: torch.Size) -> int:
        return output_shape[self.class_axis] - 1

    def bind(
        self, outputs: Tensor, targets: Tensor | None, where: str = "the data", at: slice | None = None
    ) -> BoundLikelihood:
        """Check logits and labels of one batch and bind to them."""
        if (
            outputs.ndim < 2
            or not -outputs.ndim <= self.class_axis < outputs.ndim
            or self.class_axis % outputs.ndim == 0
        ):
            raise InputError(
                f"Categorical needs logits of shape (N, C) or (N, C, d1, …) with the classes on axis {self.class_axis}; {where} gave outputs of "
                f"shape {tuple(outputs.shape)}. Use class_axis=-1 for (N, S, C), or Bernoulli for one logit per example."
            )
        require_finite(outputs, where)
        moved = outputs.detach().movedim(self.class_axis, -1)
        term_shape, num_classes = moved.shape[:-1], moved.shape[-1]
        if self.weight is not None and len(self.weight) != num_classes:
            raise InputError(f"{len(self.weight)} class weights for {num_classes} classes: give one weight per class.")
        if targets is None:
            if self.needs_targets:
                require_targets(self, targets)
            weight = torch.ones(term_shape, dtype=torch.float64, device=outputs.device)
            return _BoundCategorical(
                self, outputs.detach(), None, weight.flatten(1) if weight.ndim > 1 else weight[:, None]
            )
        labels, weight = self._check_labels(targets, term_shape, num_classes, where)
        shape = (term_shape[0], -1)
        return _BoundCategorical(self, outputs.detach(), labels.reshape(shape), weight.reshape(shape))

    def _check_labels(
        self, targets: Tensor, term_shape: torch.Size, num_classes: int, where: str
    ) -> tuple[Tensor, Tensor]:
        require_targets(self, targets)
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
